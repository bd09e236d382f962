"""One safetensors file: tensors, each once, and JSON texts in the header's metadata; written whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dspfx.config import Inputs
from dspfx.errors import StorageError
from dspfx.storage.values import decode_value, encode_value, expect, look_up

FORMAT = 2  # 1: networks traced whole; 2: also those with traced parts
_INPUTS_REMEDY = "Use example inputs made of tensors, numbers, strings, and lists, tuples or dicts of them."


@dataclass(frozen=True)
class File:
    path: Path
    kind: str
    tensors: dict[str, Tensor]
    texts: dict[str, str]

    def read(self, key: str) -> Any:
        """The JSON under a key of the metadata."""
        return json.loads(look_up(self.texts, key, "in its metadata"))


def shared_out(file: File) -> dict[str, Tensor]:
    shared = expect(file.read("shared"), dict, "its table of shared tensors")
    return file.tensors | {
        name: look_up(file.tensors, first, "a tensor of this file") for name, first in shared.items()
    }


def encode_inputs(inputs: Inputs) -> Any:
    return encode_value([list(inputs.args), dict(inputs.kwargs)], "The example input", _INPUTS_REMEDY)


def decode_inputs(data: Any) -> Inputs:
    args, kwargs = expect(decode_value(data, {}), list, "its example inputs", 2)
    return Inputs(*args, **kwargs)


def plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def is_channels_last(value: Tensor) -> bool:
    if value.dim() != 4:
        return False
    # By strides: a tensor of one pixel is contiguous in both formats, and convolutions still tell them apart.
    like = [
        torch.empty(value.shape, device="meta", memory_format=f) for f in (torch.channels_last, torch.contiguous_format)
    ]
    return value.stride() == like[0].stride() != like[1].stride()


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        save_file(tensors, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be written ({error}); give a file in a folder that can be.") from error
    finally:
        part.unlink(missing_ok=True)


def read(path: Path) -> File:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copied: a mapped file could change underneath, and kernels sum in another order on unaligned memory.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist; give a file that dspfx.save wrote.") from error
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path} is no safetensors file, or a part of one ({error}); give a file that dspfx.save wrote, or copy it "
            f"again."
        ) from error
    version = metadata.get("dspfx", "")
    if metadata.get("format") == "dspfx.compressed":
        raise StorageError(
            f"{path} is a compressed state_dict; read it into an instance of its class, by dspfx.read_compressed(path, "
            "model)."
        )
    if not version.isdecimal():
        raise StorageError(f"{path} is a safetensors file without a network of dspfx; dspfx.save writes those.")
    if int(version) > FORMAT:
        raise StorageError(
            f"{path} was written in format {version} by a newer dspfx, this one reads up to format {FORMAT}; upgrade "
            f"dspfx: pip install --upgrade dspfx."
        )
    kind = metadata.get("kind", "")
    if kind not in ("gated", "lowered"):
        raise StorageError(f"{path} is damaged: it holds a {kind!r}, which is neither gated nor lowered.")
    return File(path, kind, tensors, metadata)


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch raises nearly every built-in exception on content that makes no sense
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(f"{path} is damaged, or was not written by dspfx.save: {lines[0].rstrip('.')}.") from error
