"""Would the graph still mean the same with some channels gone? Found out by running its data movement on wires."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dspfx.graph.channels import ChannelGraph, Pin, tensors_in
from dspfx.graph.moves import Call, channel_pads, is_move, run_move
from dspfx.graph.select import select_channels
from dspfx.graph.tracer import expect
from dspfx.graph.wires import along, delete, distinct

LITERAL = "a size written into the model fixes the number of channels here"
RAGGED = "the channels that would go do not form a block of this tensor"
COUNTED = "the model computes with the number of channels"
_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


@dataclass
class Outcome:
    """What a removal does to the graph's literal sizes.

    Attributes:
        broken: nodes that would no longer mean the same, with the reason.
        repairs: node -> the (target, args, kwargs) that mean the same on the shrunken tensors.
        values: node -> its wires without the removed ones; its size, where it is one.
        skipped: movements that break and that nobody reads any more, since a later one is repaired.
    """

    broken: list[tuple[fx.Node, str]]
    repairs: dict[fx.Node, Call]
    values: dict[fx.Node, Any]
    skipped: set[fx.Node]


def simulate(gm: nn.Module, channels: ChannelGraph, graph: fx.Graph, removed: Tensor) -> Outcome:
    """Runs every movement on tensors without the `removed` wires (bool [wires]), sizes re-evaluated.

    A movement is right exactly where its result is the original result without the removed elements. One that is not
    gets its literal sizes rewritten, or, at the end of a chain of movements that permutes channels (a channel
    shuffle), becomes a selection of channels; what lies inside of such a chain may break, since nobody reads it then.
    """
    env: dict[fx.Node, Any] = {}
    skipped: set[fx.Node] = set()
    outcome = Outcome([], {}, env, skipped)
    for node in graph.nodes:
        if node.op == "output":
            continue
        full = channels.values[node]
        env[node], ragged = _delete_all(full, removed)
        if not tensors_in(full):
            env[node] = _shape_value(node, env)
            if node.target is expect and env[node.args[0]] != node.args[1]:
                outcome.repairs[node] = expect, (node.args[0], env[node.args[0]], node.args[2]), {}
        elif is_move(gm, node):
            follows = not ragged and not any(n in skipped for n in node.all_input_nodes)
            if follows and all(_is_unchanged(env[n], channels.values[n]) for n in (node, *node.all_input_nodes)):
                continue
            if follows and _agrees(gm, channels, node, None, env, env[node]):
                continue
            repair = _repair(channels, node, removed, env[node]) if follows else None
            if repair is not None and not _agrees(gm, channels, node, repair, env, env[node]):
                repair = None
            repair = repair or (None if ragged else select_channels(gm, channels, node, removed, skipped))
            if repair is not None:
                outcome.repairs[node] = repair
            elif node.users and all(is_move(gm, user) for user in node.users):
                skipped.add(node)
            else:
                reason = RAGGED if ragged else LITERAL
                outcome.broken += [(one, reason) for one in (node, *_skipped_before(node, skipped))]
        elif ragged:
            outcome.broken.append((node, RAGGED))
            env[node] = full
        elif any(env[n] != channels.values[n] for n in node.all_input_nodes if not tensors_in(channels.values[n])):
            outcome.broken.append((node, COUNTED))
    return outcome


def _is_unchanged(left: Any, whole: Any) -> bool:
    """True where nothing was removed, which leaves the very tensors."""
    if isinstance(whole, (tuple, list)) and type(whole) is not torch.Size:
        return len(left) == len(whole) and all(_is_unchanged(a, b) for a, b in zip(left, whole, strict=True))
    return left is whole or (not tensors_in(whole) and left == whole)


def _skipped_before(node: fx.Node, skipped: set[fx.Node]) -> list[fx.Node]:
    """The movements before `node` that broke, and of which it should have been the end."""
    found = dict.fromkeys(n for n in node.all_input_nodes if n in skipped)
    pending = list(found)
    while pending:
        more = [n for n in pending.pop().all_input_nodes if n in skipped and n not in found]
        found.update(dict.fromkeys(more))
        pending += more
    return list(found)


def keep_widths(channels: ChannelGraph, removable: Tensor, multiple: int = 1) -> Tensor:
    """`removable` less what keeps every layer, and what every operation computes from (the parts of a split), at least
    one channel wide; and a layer, if it can be, a multiple of `multiple`."""
    removed = removable.clone()
    for step in channels.steps:
        if step.layer is None and step.kind != "map":
            continue
        for wires in (step.out, step.ins[0]) if step.layer else (step.out,):
            gone = removed[wires]
            left = int((~gone).sum())
            lacking = (max(1, -(-left // multiple) * multiple) if step.layer else 1) - left
            if lacking > 0 and bool(gone.any()):
                roots = channels.root[wires[gone]].unique()[:lacking]
                removed[torch.isin(channels.root, roots)] = False
    return removed


def pin_what_breaks(gm: nn.Module, channels: ChannelGraph, graph: fx.Graph) -> None:
    """Tries out removals and pins, with the reason, the channels that a literal size holds in place."""
    generator = torch.Generator().manual_seed(0)
    for share in (0.3, 0.6):
        chosen = (torch.rand(channels.num_wires, generator=generator) < share)[channels.root]
        while True:
            removed = keep_widths(channels, chosen & ~channels.pinned())
            broken = simulate(gm, channels, graph, removed).broken
            if not broken:
                break
            pin_broken(channels, broken, removed)


def pin_broken(channels: ChannelGraph, broken: list[tuple[fx.Node, str]], removed: Tensor) -> None:
    """Pins what broke; where that holds none of the `removed` channels, all of them, so that trying again ends."""
    pin_nodes(channels, broken)
    if not bool((removed & channels.pinned()).any()):
        node, reason = broken[0]
        channels.pin(removed.nonzero().flatten(), Pin.at(node, reason))


def pin_nodes(channels: ChannelGraph, broken: list[tuple[fx.Node, str]]) -> None:
    """Pins every channel that the broken nodes move or whose number they read; at least one class a node."""
    for node, reason in broken:
        for wires in tensors_in([channels.values[n] for n in (node, *_tensor_sources(channels, node))]):
            channels.pin(distinct(wires, channels.num_wires), Pin.at(node, reason))


def _tensor_sources(channels: ChannelGraph, node: fx.Node) -> list[fx.Node]:
    """The nearest tensors a node depends on, through the sizes it reads."""
    found: list[fx.Node] = []
    for source in node.all_input_nodes:
        is_tensor = bool(tensors_in(channels.values[source]))
        found += [source] if is_tensor else _tensor_sources(channels, source)
    return found


def _agrees(
    gm: nn.Module, channels: ChannelGraph, node: fx.Node, call: Call | None, env: dict[fx.Node, Any], wanted: Any
) -> bool:
    try:
        found = run_move(gm, node, env.__getitem__, call)
    except _ERRORS:
        return False
    return _same(found, wanted, channels.zero)


def _same(found: Any, wanted: Any, zero: Tensor) -> bool:
    if isinstance(found, Tensor) and isinstance(wanted, Tensor):
        if found.shape != wanted.shape:
            return False
        return bool(((found == wanted) | ((found < 0) & zero[wanted])).all())
    if isinstance(found, (tuple, list)) and isinstance(wanted, (tuple, list)):
        return len(found) == len(wanted) and all(_same(x, y, zero) for x, y in zip(found, wanted, strict=True))
    return False


def _repair(channels: ChannelGraph, node: fx.Node, removed: Tensor, wanted: Any) -> Call | None:
    """The node with literal channel counts rewritten for what is left; None where it has none that can follow."""
    whole = channels.values[node]
    source = channels.values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(source, Tensor) or source.dim() < 2:
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target is F.pad and isinstance(whole, Tensor):
        pads = list(channel_pads(node) or ())
        vector = along(whole, 1)
        if vector is None or not pads:
            return None
        first = 2 * (whole.dim() - 2)
        left, right = pads[first], pads[first + 1]
        pads[first] = int((~removed[vector[:left]]).sum())
        pads[first + 1] = int((~removed[vector[len(vector) - right :]]).sum())
        return F.pad, (node.args[0], pads), {}
    if name in ("view", "reshape", "expand") and isinstance(whole, Tensor) and isinstance(wanted, Tensor):
        sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
        if len(sizes) != whole.dim():
            return None
        new = [w if s == f else s for s, f, w in zip(sizes, whole.shape, wanted.shape, strict=True)]
        return node.target, (node.args[0], *new), {}
    if name in ("chunk", "split") and isinstance(whole, tuple):
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        vectors = [along(part, dim) for part in whole] if isinstance(dim, int) else [None]
        if any(v is None for v in vectors):
            return None
        return torch.split, (node.args[0], [int((~removed[v]).sum()) for v in vectors if v is not None]), {"dim": dim}
    if node.target is operator.getitem:
        return _repair_slice(node, source, removed)
    return None


def _repair_slice(node: fx.Node, source: Tensor, removed: Tensor) -> Call | None:
    """x[:, a:b] with the bounds of what is left."""
    index = node.args[1]
    axis = next((a for a in (1, source.dim() - 1) if along(source, a) is not None), None)
    if axis is None or not isinstance(index, tuple):
        return None
    place = axis - source.dim() + len(index) if Ellipsis in index else axis
    bounds = index[place] if 0 <= place < len(index) else None
    if not isinstance(bounds, slice):
        return None
    if any(isinstance(v, fx.Node) for v in (bounds.start, bounds.stop, bounds.step)) or bounds.step not in (None, 1):
        return None
    left = ~removed[along(source, axis)]
    start, stop, _ = bounds.indices(len(left))
    new = slice(int(left[:start].sum()), int(left[:stop].sum()))
    return operator.getitem, (node.args[0], (*index[:place], new, *index[place + 1 :])), {}


def _delete_all(value: Any, removed: Tensor) -> tuple[Any, bool]:
    """(value without the removed wires, whether that was impossible somewhere)."""
    if isinstance(value, Tensor):
        left = delete(value, removed)
        return (value, True) if left is None else (left, False)
    if type(value) in (tuple, list):
        parts = [_delete_all(v, removed) for v in value]
        return type(value)(p for p, _ in parts), any(r for _, r in parts)
    if isinstance(value, dict):
        pairs = {k: _delete_all(v, removed) for k, v in value.items()}
        return {k: p for k, (p, _) in pairs.items()}, any(r for _, r in pairs.values())
    return value, False


def _shape_value(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """A size, re-evaluated on the shrunken tensors; the traced value where the node is no shape arithmetic."""
    traced = node.meta.get("val")
    if node.op not in ("call_function", "call_method"):
        return traced
    args: Any = fx.map_arg(node.args, lambda n: env[n])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: env[n])
    try:
        if node.op == "call_method" and node.target in ("size", "numel", "dim"):
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.target is getattr:
            return args[0].shape if args[1] == "shape" else traced
        if getattr(node.target, "__module__", "") in ("_operator", "math", "builtins"):
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except _ERRORS:
        pass
    return traced
