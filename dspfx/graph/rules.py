"""What dspfx knows about operations: a table. An op is a movement, elementwise, channelwise, a layer, or unknown.

Unknown operations pin the channels they touch (graph/channels.py), so a missing rule costs savings, never exactness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dspfx.graph.aliases import is_read_later, overwrites
from dspfx.graph.builder import Builder
from dspfx.graph.channels import Step, module_of, tensors_in
from dspfx.graph.elementwise import binary, elementwise, prelu, same_value
from dspfx.graph.layer_rules import apply_layer, only_zero, unknown
from dspfx.graph.layers import arguments, has_hooks, layer_of, stored
from dspfx.graph.moves import is_move, run_move
from dspfx.graph.ops import (
    BINARY,
    IDENTITIES,
    IDENTITY_MODULES,
    POINTWISE,
    POINTWISE_MODULES,
    POOL_MODULES,
    POOLS,
    REDUCTIONS,
    RULES,
)
from dspfx.graph.wires import compress, distinct, spread, thin

NAN = float("nan")


def apply_rule(b: Builder, node: fx.Node) -> Any:
    """The wires of the node's output; steps, ties and pins go to the builder."""
    if node.op == "placeholder":
        return b.constant(node, "it is an input of the model")
    args = fx.map_arg(node.args, lambda n: b.graph.values[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: b.graph.values[n])
    if node.op == "output":
        for wires in tensors_in(list(args)):
            b.pin(distinct(wires, b.count), node, "it is an output of the model")
        return None
    tensor = stored(b.part, node)
    is_vector = tensor is not None and sum(size > 1 for size in tensor.shape) == 1
    if tensor is not None and is_vector and tensor.is_floating_point():  # one number a channel, should it be used so
        axis = max(range(tensor.dim()), key=lambda i: tensor.shape[i])
        return spread(b.param(node, axis, str(node.target)), tensor.shape, axis)
    value = node.meta.get("val")
    if not tensors_in([args, kwargs]) or (value is not None and not tensors_in(value)):
        return b.constant(node, "it is a constant of the model")  # sizes, parameters, tensors made from nothing
    known = _known(b, node, args, kwargs)
    if known is None:
        b.taint(tensors_in([args, kwargs]))
        what = f"no rule knows what {describe(b.part, node)} does to channels"
        return b.opaque(node, [args, kwargs], what, remedy(b.part, node))
    if overwrites(b.part, node) and is_read_later(b.part, node):
        b.taint(tensors_in([args, known]))
        reason = "a tensor is changed in place and read again later"
        return b.opaque(node, [args, kwargs, known], reason, "Write that line without changing its input in place.")
    return known


def remedy(part: nn.Module, node: fx.Node) -> str:
    """The two lines that would free an operation's channels, where its user knows what it does."""
    if node.op == "call_module":
        kind = type(module_of(part, node))
        owner, name = kind.__module__, kind.__qualname__
    elif node.op == "call_method":
        return (
            f"If every element or channel is treated alone: import dspfx; "
            f'dspfx.register_rule("{node.target}", "elementwise")  # or "channelwise", "movement"'
        )
    else:
        owner, name = getattr(node.target, "__module__", None) or "torch", getattr(node.target, "__name__", "")
    return (
        f"If every element or channel is treated alone: from {owner} import {name}; "
        f'dspfx.register_rule({name}, "elementwise")  # or "channelwise", "movement"'
    )


def describe(gm: nn.Module, node: fx.Node) -> str:
    """The operation in words a user recognises."""
    if node.op == "call_module":
        return f"{type(module_of(gm, node)).__name__} ({node.target})"
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f".{name}()" if node.op == "call_method" else f"{name}()"


def _known(b: Builder, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The rule's result, or None where there is no rule or the operation falls outside what its rule covers."""
    if node.kwargs.get("out") is not None:
        return None
    target: Any = node.target
    rule = RULES.get(type(module_of(b.part, node)) if node.op == "call_module" else target)
    if rule is not None and rule != "movement":
        return _registered(b, node, rule, args, kwargs)
    if node.op == "call_module" and has_hooks(module_of(b.part, node)):
        return None
    layer = layer_of(b.part, node, b.prefix)
    if layer is not None:
        given = arguments(node, ("input",))["input"]
        wires = b.graph.values[given] if isinstance(given, fx.Node) else None
        return apply_layer(b, node, layer, wires) if isinstance(wires, Tensor) else None
    if is_move(b.part, node):
        return _moved(b, node)
    if node.op == "call_module":
        return _known_module(b, node, module_of(b.part, node), args)
    if target in IDENTITIES:
        return args[0]
    if target in BINARY:
        return binary(b, node, args, kwargs)
    if target in POINTWISE and isinstance(args[0], Tensor) and len(tensors_in([args, kwargs])) == 1:
        return b.map(node, elementwise(node, args, kwargs), args[0])
    if target in POOLS and isinstance(args[0], Tensor):
        return _channelwise(b, node, args[0], only_zero if _pads(node) else same_value)
    if target in REDUCTIONS:
        return _reduction(b, node, args, kwargs)
    if target is F.pad and isinstance(args[0], Tensor):
        return _channelwise(b, node, args[0], only_zero if _pads_zeros(node) else unknown)
    if target is F.prelu:
        weight: Any = arguments(node, ("input", "weight"))["weight"]
        return prelu(b, node, args[0], str(weight.target)) if stored(b.part, weight) is not None else None
    return None


def _known_module(b: Builder, node: fx.Node, module: nn.Module, args: Any) -> Any:
    if len(args) != 1 or not isinstance(args[0], Tensor):
        return None
    wires = args[0]
    if type(module) in IDENTITY_MODULES:
        return wires
    if type(module) in POINTWISE_MODULES:
        return b.map(node, lambda v: module(v.clone()), wires)
    if type(module) is nn.PReLU:
        return prelu(b, node, wires, f"{node.target}.weight")
    if type(module) in POOL_MODULES:
        return _channelwise(b, node, wires, only_zero)
    return None


def _registered(b: Builder, node: fx.Node, rule: str, args: Any, kwargs: Any) -> Any:
    """What a user said about an operation; nothing is known of what it makes of constants."""
    tensors = tensors_in([args, kwargs])
    value = node.meta.get("val")
    if not tensors or not isinstance(value, Tensor):
        return None
    if rule == "channelwise":
        return _channelwise(b, node, tensors[0], unknown) if len(tensors) == 1 else None
    if any(t.shape != value.shape for t in tensors):
        return None
    return b.map(node, lambda *columns: torch.full_like(columns[0], NAN), *tensors)


def _channelwise(b: Builder, node: fx.Node, wires: Tensor, function: Callable[[Tensor], Tensor]) -> Any:
    """An operation that treats every channel alone and alike (pooling, resizing, spatial padding)."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or wires.dim() < 3 or value.dim() != wires.dim():
        return None
    if value.shape[1] != wires.shape[1]:
        return None
    vector = b.merged(node, wires, 1)
    out = b.fresh(len(vector))
    b.tie(out, vector)
    b.graph.steps.append(Step("map", node, out, (vector,), function=function))
    return spread(out, value.shape, 1)


def _reduction(b: Builder, node: fx.Node, args: Any, kwargs: Any) -> Any:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    wires = args[0]
    if dims is None or not isinstance(wires, Tensor):
        return None
    dims = {d % wires.dim() for d in ([dims] if isinstance(dims, int) else dims)}
    small = thin(wires)
    left = [axis for axis in range(1, wires.dim()) if axis not in dims]
    if not left:
        return None
    axis = next((a for a in left if small.shape[a] > 1), left[0])
    vector = b.merged(node, wires, axis)
    out = b.fresh(len(vector))
    b.tie(out, vector)
    exact = getattr(node.target, "__name__", node.target) != "sum"
    b.graph.steps.append(Step("map", node, out, (vector,), function=same_value if exact else only_zero))
    value = node.meta["val"]
    return spread(out, value.shape, axis if value.dim() == wires.dim() else axis - sum(d < axis for d in dims))


def _moved(b: Builder, node: fx.Node) -> Any:
    try:
        moved = run_move(b.part, node, b.graph.values.__getitem__)
        if isinstance(moved, Tensor):
            return b.zeros(compress(moved))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return tuple(compress(v) for v in moved) if isinstance(moved, (tuple, list)) else moved


def _pads(node: fx.Node) -> bool:
    return "adaptive" not in getattr(node.target, "__name__", "") and node.target is not F.interpolate


def _pads_zeros(node: fx.Node) -> bool:
    """Of F.pad: what it puts around a channel of zeros is zero, too."""
    given = arguments(node, ("input", "pad", "mode", "value"))
    return given.get("mode", "constant") != "constant" or given.get("value") in (None, 0)
