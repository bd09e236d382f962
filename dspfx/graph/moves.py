"""Operations that only move data: run as they are, on tensors of wires."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dspfx.graph.layers import attribute, stored
from dspfx.graph.ops import RULES

Call = tuple[Any, Any, Any]  # what a node calls: target, args, kwargs
ZERO = -1  # stands for an element that padding made; it becomes a wire of its own whose value is zero

FUNCTIONS = {
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.cat),
    *(torch.concat, torch.stack, torch.chunk, torch.split, torch.unbind, torch.narrow, torch.select, torch.roll),
    *(torch.flip, torch.movedim, torch.swapaxes, torch.pixel_shuffle, torch.pixel_unshuffle, torch.channel_shuffle),
    *(torch.index_select, torch.clone, torch.broadcast_to, torch.unflatten, torch.tile, operator.getitem),
    *(F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle),
}
METHODS = {
    *("view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "unbind"),
    *("narrow", "select", "roll", "flip", "movedim", "swapaxes", "contiguous", "clone", "detach", "expand"),
    *("expand_as", "repeat", "view_as", "reshape_as", "unflatten", "index_select", "t"),
}
MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)


def is_move(gm: nn.Module, node: fx.Node) -> bool:
    """True for an operation whose output elements are input elements (or zeros that it pads the channels with)."""
    target = type(gm.get_submodule(str(node.target))) if node.op == "call_module" else node.target
    if RULES.get(target) == "movement":
        return True
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))) in MODULES
    if node.op == "call_method":
        return node.target in METHODS and (str(node.target).endswith("_as") or not _reads_tensors(gm, node))
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    if node.target is F.pad:
        return channel_pads(node) is not None
    if node.target is operator.getitem and isinstance(node.meta.get("val"), (int, float, bool, torch.Size)):
        return False
    return node.target in FUNCTIONS and not _reads_tensors(gm, node)


def run_move(gm: nn.Module, node: fx.Node, read: Callable[[fx.Node], Any], call: Call | None = None) -> Any:
    """The operation on what `read` gives for its inputs; raises what torch raises where sizes do not fit.

    With `call`, that instead of what the node calls.
    """

    def value(source: fx.Node) -> Any:
        return attribute(gm, str(source.target)).cpu() if is_index(gm, source) else read(source)

    target = (call or (node.target,))[0]
    args: Any = fx.map_arg(call[1] if call else node.args, value)
    kwargs: Any = fx.map_arg(call[2] if call else node.kwargs, value)
    if target is F.pad:
        return F.pad(args[0], _argument(args, kwargs, 1, "pad"), value=ZERO)
    if callable(target):
        return target(*args, **kwargs)
    if node.op == "call_module":
        return gm.get_submodule(target)(*args, **kwargs)
    name = {"view": "reshape", "view_as": "reshape_as"}.get(target, target)
    return getattr(args[0], name)(*args[1:], **kwargs)


def _reads_tensors(gm: nn.Module, node: fx.Node) -> bool:
    """True where a computed tensor steers the movement (an index, a mask): its wires are not its values."""
    found: list[fx.Node] = []
    fx.map_arg((node.args[1:], node.kwargs), found.append)
    return any(isinstance(n.meta.get("val"), Tensor) and not is_index(gm, n) for n in found)


def is_index(gm: nn.Module, node: fx.Node) -> bool:
    """True for a stored tensor of integers, which may say where a movement takes its elements from."""
    value = stored(gm, node)
    return value is not None and value.dtype in (torch.int64, torch.int32)


def channel_pads(node: fx.Node) -> list[int] | None:
    """The pad list of an F.pad that pads dimension 1 with zeros and nothing else, else None."""
    pads = _argument(node.args, node.kwargs, 1, "pad")
    mode = _argument(node.args, node.kwargs, 2, "mode", "constant")
    fill = _argument(node.args, node.kwargs, 3, "value", 0)
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or mode != "constant" or fill not in (None, 0):
        return None
    if not isinstance(pads, (list, tuple)) or not all(isinstance(p, int) for p in pads):
        return None
    first = 2 * (value.dim() - 2)  # pads run from the last dimension: this is where dimension 1 stands
    others = [p for i, p in enumerate(pads) if i not in (first, first + 1)]
    return list(pads) if len(pads) >= first + 2 and not any(others) else None


def _argument(args: Any, kwargs: Any, index: int, name: str, default: Any = None) -> Any:
    return kwargs.get(name, args[index] if len(args) > index else default)
