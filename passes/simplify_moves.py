"""Afterwards a graph in eval mode has one operation where the model's Python had several, about sizes and channels.

x.size(0) -> x.view(., -1)                                       ->      torch.flatten(x, 1)
x.view(N, 2, C / 2, H, W) -> transpose(1, 2) -> view             ->      F.channel_shuffle(x, 2)
x.chunk(2, 1) -> [0], [1]                                        ->      x[:, :c], x[:, c:]
F.dropout(x, training=self.training)                             ->      x
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx

from dspfx.graph.traced import TracedModule, TrainingFlag

RESHAPES = ("view", "reshape", torch.reshape)
SPLITS = ("chunk", "split", torch.chunk, torch.split)
TRAINING: dict[Any, int] = {F.dropout: 2, F.dropout2d: 2, torchvision.ops.stochastic_depth: 3}  # where the flag stands
# What may go when nobody reads it any more; anything else could change a tensor in place.
PURE = {
    *RESHAPES, *SPLITS, "size", "contiguous", "transpose", torch.transpose, getattr, operator.getitem,
    operator.floordiv, operator.mul,
}  # fmt: skip


def simplify_moves(part: TracedModule) -> TracedModule:
    """Rewrites in place; every node has its value, and new ones get theirs."""
    for node in list(part.graph.nodes):
        for find in (_flattened, _shuffled, _chunked, _dropped):
            found = find(part, node)
            if found is None:
                continue
            function, args = found
            new = args[0]
            if function is not None:
                with part.graph.inserting_before(node):
                    new = part.graph.call_function(function, args)
                new.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(new)
            part.graph.erase_node(node)
            break
    for node in reversed(list(part.graph.nodes)):
        is_flag = node.op == "call_module" and isinstance(part.get_submodule(str(node.target)), TrainingFlag)
        if not node.users and (is_flag or (node.op in ("call_function", "call_method") and node.target in PURE)):
            part.graph.erase_node(node)
    part.recompile()
    return part


Found = tuple[Callable[..., Any] | None, tuple[Any, ...]] | None  # the operation instead, and what it is called with


def _flattened(part: TracedModule, node: Any) -> Found:
    if node.target not in RESHAPES or len(node.args) != 3 or not isinstance(node.args[0], fx.Node):
        return None
    source, batch, rest = node.args
    before, after = _value(source), _value(node)
    if before is None or after is None or before.dim() != 4 or not isinstance(rest, int):
        return None
    is_flat = tuple(after.shape) == (before.shape[0], before[0].numel())
    keeps_batch = _is_first_size(batch, source) or (batch == -1 and rest > 0)
    return (torch.flatten, (source, 1)) if is_flat and keeps_batch else None


def _shuffled(part: TracedModule, node: Any) -> Found:
    after, inner = _value(node), node.args[0] if node.args else None
    if node.target not in RESHAPES or after is None or after.dim() != 4:
        return None
    if isinstance(inner, fx.Node) and inner.target == "contiguous":
        inner = inner.args[0]
    is_turn = isinstance(inner, fx.Node) and inner.target in ("transpose", torch.transpose) and inner.args[1:] == (1, 2)
    outer = inner.args[0] if is_turn and isinstance(inner, fx.Node) else None
    if not isinstance(outer, fx.Node) or outer.target not in RESHAPES or not isinstance(outer.args[0], fx.Node):
        return None
    before, split = _value(outer.args[0]), _value(outer)
    if before is None or split is None or split.dim() != 5 or before.shape != after.shape:
        return None
    is_by_channel = split.shape[3:] == before.shape[2:] and split.shape[0] == before.shape[0]
    return (F.channel_shuffle, (outer.args[0], int(split.shape[1]))) if is_by_channel else None


def _chunked(part: TracedModule, node: Any) -> Found:
    if (
        node.target is not operator.getitem
        or not isinstance(node.args[0], fx.Node)
        or not isinstance(node.args[1], int)
    ):
        return None
    split, index = node.args
    if split.target not in SPLITS or not isinstance(split.args[0], fx.Node):
        return None
    axis = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    before, values = _value(split.args[0]), split.meta.get("val")
    if axis not in (1, -3) or before is None or before.dim() != 4 or not isinstance(values, (tuple, list)):
        return None
    ends = [sum(int(v.shape[1]) for v in values[:i]) for i in range(len(values) + 1)]
    bounds = slice(ends[index % len(values)], ends[index % len(values) + 1])
    return operator.getitem, (split.args[0], (slice(None), bounds))


def _dropped(part: TracedModule, node: Any) -> Found:
    """What does nothing in eval mode; a literal True would do it there, too."""
    place = TRAINING.get(node.target) if node.op == "call_function" else None
    if place is None or not isinstance(node.args[0], fx.Node):
        return None
    flag = node.args[place] if len(node.args) > place else node.kwargs.get("training", True)
    if isinstance(flag, fx.Node) and flag.op == "call_module":
        module = part.get_submodule(str(flag.target))
        flag = not (isinstance(module, TrainingFlag) and not module.inverted)
    return (None, (node.args[0],)) if flag is False else None


def _value(node: fx.Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _is_first_size(batch: Any, source: fx.Node) -> bool:
    """True for x.size(0) and x.shape[0]."""
    if not isinstance(batch, fx.Node):
        return False
    if batch.target == "size":
        return batch.args == (source, 0)
    shape = batch.args[0] if batch.target is operator.getitem and batch.args[1:] == (0,) else None
    if not isinstance(shape, fx.Node):
        return False
    return (shape.target is getattr and shape.args == (source, "shape")) or (
        shape.target == "size" and shape.args == (source,)
    )
