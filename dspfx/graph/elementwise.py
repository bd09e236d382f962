"""The rules of elementwise operations: one operand, two of which either may be a number or a stored tensor, PReLU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dspfx.graph.builder import Builder
from dspfx.graph.layers import attribute, stored
from dspfx.graph.ops import FROM_ZERO
from dspfx.graph.wires import along, distinct, spread

NAN = float("nan")


def binary(b: Builder, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Elementwise on two operands: what is added to or multiplied with a channel shares that channel's fate."""
    if len(args) != 2:
        return None
    function = _zero_aware(node)
    scalars: list[Any] = [_scalar(b, n) if isinstance(n, fx.Node) else n for n in node.args]
    wires = [a for a, s in zip(args, scalars, strict=True) if isinstance(a, Tensor) and s is None]
    if len(wires) == 1:
        first, second = scalars
        number = second if first is None else first
        if not isinstance(number, (int, float)):
            return None  # a value that nothing is known of
        constant = torch.tensor(float(number), dtype=torch.float64)
        if first is None:
            return b.map(node, lambda v: function(v, constant.expand_as(v), **node.kwargs), wires[0])
        return b.map(node, lambda v: function(constant.expand_as(v), v, **node.kwargs), wires[0])
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or len(wires) != 2:
        return None
    wires = [_as_channels(b, n, w, o) for n, w, o in zip(node.args, wires, wires[::-1], strict=True)]
    full = [w.expand(value.shape) for w in wires]
    tied = [not _broadcast_over_channels(w, others, value.dim()) for w, others in zip(wires, full[::-1], strict=True)]
    for operand, stays in zip(wires, tied, strict=True):
        if not stays:
            b.pin(distinct(operand, b.count), node, "it is broadcast over other channels")
    return b.map(node, lambda v, w: function(v, w, **node.kwargs), *full, tied=tied)


def _as_channels(b: Builder, source: Any, wires: Tensor, other: Tensor) -> Tensor:
    """A stored tensor of several axes (a position embedding) has the channels where the other operand has them."""
    tensor = stored(b.part, source)
    if tensor is None or sum(size > 1 for size in tensor.shape) < 2:
        return wires
    for place in (1, other.dim() - 1):
        axis = place - other.dim() + tensor.dim()
        vector = along(other, place) if other.dim() > 1 else None
        if vector is not None and len(vector.unique()) > 1 and axis >= 0 and tensor.shape[axis] == len(vector):
            return spread(b.param(source, axis, str(source.target)), tensor.shape, axis)
    return wires


def _broadcast_over_channels(operand: Tensor, other: Tensor, rank: int) -> bool:
    """True where `operand` has one element along an axis on which `other` has several different channels."""
    shape = (1,) * (rank - operand.dim()) + tuple(operand.shape)
    for axis, size in enumerate(shape):
        if size == 1 and other.shape[axis] > 1 and bool((other != other.narrow(axis, 0, 1)).any()):
            return True
    return False


def _scalar(b: Builder, node: fx.Node) -> float | None:
    """The value of a one-element parameter or constant: it does not depend on the input."""
    if node.op == "get_attr":
        value = stored(b.part, node)
        if isinstance(value, Tensor) and value.numel() == 1:
            return NAN
    value = node.meta.get("val")
    return float(value) if isinstance(value, (int, float)) else None


def prelu(b: Builder, node: fx.Node, wires: Tensor, path: str) -> Tensor | None:
    """Negative values times a slope, one for all or one a channel."""
    slopes = attribute(b.part, path).detach()
    if slopes.numel() == 1:
        slope = slopes.double().cpu().reshape(())
        return b.map(node, lambda v: torch.where(v < 0, v * slope, v), wires)
    if wires.dim() < 2 or wires.shape[1] != slopes.numel():
        return None
    vector, param = b.merged(node, wires, 1), b.param(node, 0, path)
    full = [spread(w, wires.shape, 1) for w in (vector, param)]
    return b.map(node, lambda v, w: torch.where(v < 0, v * w, v), *full)


def elementwise(node: fx.Node, args: Any, kwargs: Any) -> Callable[[Tensor], Tensor]:
    target: Any = node.target
    rest = args[1:]
    if node.op == "call_method":
        if target in ("float", "double", "half", "bfloat16", "to", "type_as", "type"):
            return same_value
        return lambda v: getattr(v.clone(), target)(*rest, **kwargs)
    return lambda v: target(v.clone(), *rest, **kwargs)


def _zero_aware(node: fx.Node) -> Callable[..., Tensor]:
    target: Any = node.target
    name = target if isinstance(target, str) else target.__name__

    def function(x: Tensor, y: Tensor, **kwargs: Any) -> Tensor:
        result = getattr(x.clone(), target)(y, **kwargs) if isinstance(target, str) else target(x.clone(), y, **kwargs)
        if name in FROM_ZERO:  # zero times an unknown is zero
            zero = (x == 0) | (y == 0) if "mul" in name else x == 0
            result = torch.where(zero, torch.zeros_like(result), result)
        return result

    return function


def same_value(v: Tensor) -> Tensor:
    return v
