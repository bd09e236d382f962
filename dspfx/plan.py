"""What all plans have: they are JSON and come back from it, checked."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Self

from dspfx.errors import ConfigError, StorageError


class Plan:
    """Mixin of the plan dataclasses: `plan == type(plan).from_json(plan.to_json())`."""

    def to_json(self) -> str:
        """The plan as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `to_json`'s text; raises StorageError where it does not describe this kind of plan."""
        try:
            return _build(cls, json.loads(text))
        except (TypeError, ValueError, KeyError, AttributeError, ConfigError) as error:
            reason = str(error).removesuffix(".")
            raise StorageError(f"This is not the JSON of a {cls.__name__}: {reason}.") from error


def _build(kind: Any, value: Any) -> Any:
    """JSON value -> the annotated type: dataclasses and tuples, recursively; unknown or missing fields are errors."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return tuple(_build(args[0], item) for item in value)
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"expected one of {', '.join(map(repr, args))}, found {value!r}")
        return value
    if origin is types.UnionType:
        return None if value is None else _build(args[0], value)
    if kind is float and isinstance(value, int):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"expected {kind.__name__}, found {value!r}")
    return value
