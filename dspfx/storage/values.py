"""Values of a stored network as JSON and back, and the checks that what a file holds is what it should be."""

from __future__ import annotations

import keyword
import math
import re
from typing import Any

import torch
from torch import Tensor, fx

from dspfx.errors import StorageError

_IDENTIFIER = re.compile(r"(?!__)[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_DTYPES = {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_FORMATS = {
    str(f).removeprefix("torch."): f
    for f in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
}


def encode_value(value: Any, place: str, remedy: str) -> Any:
    """An argument or example input as JSON; StorageError that names `place` where its type has no encoding."""
    if value is None or isinstance(value, (bool, str)) or (type(value) is int and abs(value) < 2**63):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list):
        return [encode_value(v, place, remedy) for v in value]
    if type(value) in (tuple, torch.Size):
        return {"tuple": [encode_value(v, place, remedy) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: encode_value(v, place, remedy) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [encode_value(v, place, remedy) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, Tensor) and value.is_meta:
        return {"tensor": [list(value.shape), str(value.dtype).removeprefix("torch.")]}
    for tag, kind in (("dtype", torch.dtype), ("memory_format", torch.memory_format), ("device", torch.device)):
        if isinstance(value, kind):
            return {tag: str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": None}
    raise StorageError(f"{place} holds {value!r} of type {type(value).__name__}, which has no stored form. {remedy}")


def decode_value(value: Any, nodes: dict[str, fx.Node]) -> Any:
    """Undoes `encode_value`; a node is looked up in `nodes`."""
    if value is None or isinstance(value, (bool, str, float)) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    if isinstance(value, list):
        return [decode_value(v, nodes) for v in value]
    if not isinstance(value, dict) or len(value) != 1:
        raise StorageError(f"{short(value)} is no stored value")
    [(tag, body)] = value.items()
    if tag == "node":
        return look_up(nodes, body, "an earlier node")
    if tag == "tuple" and isinstance(body, list):
        return tuple(decode_value(v, nodes) for v in body)
    if tag == "dict" and isinstance(body, dict):
        return {k: decode_value(v, nodes) for k, v in body.items()}
    if tag == "slice" and isinstance(body, list) and len(body) == 3:
        return slice(*(decode_value(v, nodes) for v in body))
    if tag == "tensor" and isinstance(body, list) and len(body) == 2:
        return torch.empty(body[0], dtype=look_up(_DTYPES, body[1], "a dtype"), device="meta")
    if tag == "float" and body in ("inf", "-inf", "nan"):
        return float(body)
    if tag == "dtype":
        return look_up(_DTYPES, body, "a dtype")
    if tag == "memory_format":
        return look_up(_FORMATS, body, "a memory format")
    if tag == "device" and isinstance(body, str):
        return torch.device(body)
    if tag == "ellipsis":
        return Ellipsis
    raise StorageError(f"{short(value)} is no stored value")


def look_up(table: dict[str, Any], key: Any, what: str) -> Any:
    """`table[key]`; StorageError where a file names anything else."""
    if not isinstance(key, str) or key not in table:
        raise StorageError(f"{short(key)} is not {what}")
    return table[key]


def expect(value: Any, kind: type, what: str, length: int | None = None) -> Any:
    """`value`, if it is of that kind and length."""
    if not isinstance(value, kind) or (length is not None and len(value) != length):  # type: ignore[arg-type]
        raise StorageError(f"{what} is {short(value)}")
    return value


def check_identifier(name: Any, what: str) -> None:
    """StorageError unless torch.fx can write `name` into Python source as one harmless name."""
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name):
        raise StorageError(f"{short(name)} is no name of a {what}")


def short(value: Any) -> str:
    """`repr(value)`, cut to what fits a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
