"""What dspfx knows about operations: a table. An op is a movement, elementwise, channelwise, a layer, or unknown.

Unknown operations pin the channels they touch (graph/channels.py), so a missing rule costs savings, never exactness.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dspfx.graph.channels import Builder, Step, module_of, tensors_in
from dspfx.graph.moves import is_move, run_move
from dspfx.graph.ops import (
    BINARY,
    FROM_ZERO,
    IDENTITIES,
    IDENTITY_MODULES,
    POINTWISE,
    POINTWISE_MODULES,
    POOL_MODULES,
    POOLS,
    REDUCTIONS,
)
from dspfx.graph.wires import along, compress, spread

NAN = float("nan")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def apply_rule(b: Builder, node: fx.Node) -> Any:
    """The wires of the node's output; steps, ties and pins go to the builder."""
    if node.op == "placeholder":
        return b.constant(node, "it is an input of the model")
    args = fx.map_arg(node.args, lambda n: b.graph.values[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: b.graph.values[n])
    if node.op == "output":
        for wires in tensors_in(list(args)):
            b.pins.append((wires.unique(), node, "it is an output of the model"))
        return None
    value = node.meta.get("val")
    if not tensors_in([args, kwargs]) or (value is not None and not tensors_in(value)):
        return b.constant(node, "it is a constant of the model")  # sizes, parameters, tensors made from nothing
    known = _known(b, node, args, kwargs)
    if known is None:
        b.taint(tensors_in([args, kwargs]))
        return b.opaque(node, [args, kwargs], f"no rule knows what {describe(b.gm, node)} does to channels")
    if _overwrites(b, node) and _read_later(b, node):
        b.taint(tensors_in([args, known]))
        return b.opaque(node, [args, kwargs, known], "a tensor is changed in place and read again later")
    return known


def describe(gm: nn.Module, node: fx.Node) -> str:
    """The operation in words a user recognises."""
    if node.op == "call_module":
        return f"{type(module_of(gm, node)).__name__} ({node.target})"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f".{name}()" if node.op == "call_method" else f"{name}()"


def _known(b: Builder, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The rule's result, or None where there is no rule or the operation falls outside what its rule covers."""
    if node.op == "call_module":
        return _known_module(b, node, module_of(b.gm, node), args)
    target: Any = node.target
    if is_move(b.gm, node):
        return _moved(b, node, args, kwargs)
    if target in IDENTITIES:
        return args[0]
    if target in BINARY:
        return _binary(b, node, args, kwargs)
    if target in POINTWISE and isinstance(args[0], Tensor) and len(tensors_in([args, kwargs])) == 1:
        return b.map(node, _elementwise(node, args, kwargs), args[0])
    if target in POOLS and isinstance(args[0], Tensor):
        return _channelwise(b, node, args[0], 1, _only_zero if _pads(node) else _same_value)
    if target in REDUCTIONS:
        return _reduction(b, node, args, kwargs)
    if target is F.pad and isinstance(args[0], Tensor):
        return _channelwise(b, node, args[0], 1, _only_zero)
    return None


def _known_module(b: Builder, node: fx.Node, module: nn.Module, args: Any) -> Any:
    if len(args) != 1 or not isinstance(args[0], Tensor) or has_hooks(module):
        return None
    wires = args[0]
    if is_plain(module, _CONVS):
        return _conv(b, node, module, wires, axis=1)
    if is_plain(module, (nn.Linear,)):
        return _conv(b, node, module, wires, axis=-1)
    if type(module) in _NORMS:
        return _norm(b, node, wires)
    if type(module) in IDENTITY_MODULES:
        return wires
    if type(module) in POINTWISE_MODULES:
        return b.map(node, lambda v: module(v.clone()), wires)
    if type(module) is nn.PReLU and module.num_parameters == 1:
        return b.map(node, lambda v: torch.where(v < 0, v * module.weight.detach().double(), v), wires)
    if type(module) in POOL_MODULES:
        return _channelwise(b, node, wires, 1, _only_zero)
    if is_move(b.gm, node):
        return _moved(b, node, args, {})
    return None


def is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """True for a layer that computes what its torch class computes: no override, hook or parametrization."""
    base = next((k for k in kinds if isinstance(module, k)), None)
    if base is None or hasattr(module, "parametrizations"):
        return False
    overrides = any(
        getattr(type(module), name) is not getattr(base, name)
        for name in ("forward", "_conv_forward")
        if hasattr(base, name)
    )
    return not (overrides or has_hooks(module))


def has_hooks(module: nn.Module) -> bool:
    """True where calling the module may do more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _conv(b: Builder, node: fx.Node, module: Any, wires: Tensor, axis: int) -> Tensor | None:
    if axis == 1 and wires.dim() != module.weight.dim():
        return None  # an unbatched input
    vector = along(wires, axis)
    if vector is None:
        return None
    out = b.fresh(module.weight.shape[0])
    groups = getattr(module, "groups", 1)
    name = str(node.target)
    if groups == 1:
        b.step(Step("conv", node, out, (vector,), name))
    elif groups == module.in_channels:
        aligned = vector.repeat_interleave(len(out) // groups)
        b.tie(out, aligned)
        b.step(Step("depthwise", node, out, (aligned,), name))
    else:
        reason = f"{name} is a grouped convolution (groups={groups}), which is kept as it is"
        b.pins += [(out, node, reason), (vector, node, reason)]
    return spread(out, node.meta["val"].shape, axis % node.meta["val"].dim())


def _norm(b: Builder, node: fx.Node, wires: Tensor) -> Tensor | None:
    vector = along(wires, 1) if wires.dim() > 1 else None
    if vector is None:
        return None
    out = b.fresh(len(vector))
    b.tie(out, vector)
    b.step(Step("norm", node, out, (vector,), str(node.target)))
    return spread(out, wires.shape, 1)


def _channelwise(b: Builder, node: fx.Node, wires: Tensor, axis: int, function: Callable[[Tensor], Tensor]) -> Any:
    """An operation that treats every channel alone and alike (pooling, resizing, spatial padding)."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or wires.dim() < 3 or value.dim() != wires.dim():
        return None
    vector = along(wires, axis)
    if vector is None or value.shape[axis] != len(vector):
        return None
    out = b.fresh(len(vector))
    b.tie(out, vector)
    b.graph.steps.append(Step("map", node, out, (vector,), function=function))
    return spread(out, value.shape, axis)


def _reduction(b: Builder, node: fx.Node, args: Any, kwargs: Any) -> Any:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    wires = args[0]
    if dims is None or not isinstance(wires, Tensor):
        return None
    dims = {d % wires.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    for axis in [a for a in range(1, wires.dim()) if a not in dims]:
        vector = along(wires, axis)
        if vector is not None:
            out = b.fresh(len(vector))
            b.tie(out, vector)
            exact = getattr(node.target, "__name__", node.target) != "sum"
            b.graph.steps.append(Step("map", node, out, (vector,), function=_same_value if exact else _only_zero))
            keepdim = node.meta["val"].dim() == wires.dim()
            place = axis if keepdim else axis - sum(d < axis for d in dims)
            return spread(out, node.meta["val"].shape, place)
    return None


def _binary(b: Builder, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Elementwise on two operands: what is added to or multiplied with a channel shares that channel's fate."""
    if len(args) != 2:
        return None
    function = _zero_aware(node)
    scalars: list[Any] = [_scalar(b, n) if isinstance(n, fx.Node) else n for n in node.args]
    wires = [a for a, s in zip(args, scalars, strict=True) if isinstance(a, Tensor) and s is None]
    if len(wires) == 1:
        first, second = scalars
        constant = torch.tensor(float(second if first is None else first), dtype=torch.float64)
        if first is None:
            return b.map(node, lambda v: function(v, constant.expand_as(v), **node.kwargs), wires[0])
        return b.map(node, lambda v: function(constant.expand_as(v), v, **node.kwargs), wires[0])
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not wires:
        return None
    full = [w.expand(value.shape) for w in wires]
    tied = [not _broadcast_over_channels(w, others, value.dim()) for w, others in zip(wires, full[::-1], strict=True)]
    for operand, stays in zip(wires, tied, strict=True):
        if not stays:
            b.pins.append((operand.unique(), node, "it is broadcast over other channels"))
    return b.map(node, lambda v, w: function(v, w, **node.kwargs), *full, tied=tied)


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
        value = operator.attrgetter(str(node.target))(b.gm)
        if isinstance(value, Tensor) and value.numel() == 1:
            return NAN
    value = node.meta.get("val")
    return float(value) if isinstance(value, (int, float)) else None


def _moved(b: Builder, node: fx.Node, args: Any, kwargs: Any) -> Any:
    try:
        moved = run_move(b.gm, node, args, kwargs)
        if isinstance(moved, Tensor):
            return b.zeros(compress(moved))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return tuple(compress(v) for v in moved) if isinstance(moved, (tuple, list)) else moved


def _elementwise(node: fx.Node, args: Any, kwargs: Any) -> Callable[[Tensor], Tensor]:
    target: Any = node.target
    rest = args[1:]
    if node.op == "call_method":
        if target in ("float", "double", "half", "bfloat16", "to", "type_as", "type"):
            return _same_value
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


def _same_value(v: Tensor) -> Tensor:
    return v


def _only_zero(v: Tensor) -> Tensor:
    return torch.where(v == 0, v, torch.full_like(v, NAN))


def _pads(node: fx.Node) -> bool:
    return "adaptive" not in getattr(node.target, "__name__", "") and node.target is not F.interpolate


def _overwrites(b: Builder, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(module_of(b.gm, node), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or name in ("iadd", "isub", "imul") or node.kwargs.get("inplace") is True


def _read_later(b: Builder, node: fx.Node) -> bool:
    """True where the overwritten tensor, or one it may be a view of, has a reader after this node."""
    source = node.args[0]
    position = {other: i for i, other in enumerate(node.graph.nodes)}
    while isinstance(source, fx.Node):
        if any(position[user] > position[node] for user in source.users):
            return True
        source = source.args[0] if is_move(b.gm, source) and source.args else None
    return False
