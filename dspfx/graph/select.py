"""A chain of movements that only permutes or drops channels, as one selection of channels of an earlier tensor.

cat -> view -> transpose -> reshape      becomes      cat -> index_select
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from dspfx.graph.channels import ChannelGraph, tensors_in
from dspfx.graph.moves import Call, is_index, is_move, run_move
from dspfx.graph.wires import along


def select_channels(
    gm: nn.Module, channels: ChannelGraph, node: fx.Node, removed: Tensor, broken: set[fx.Node]
) -> Call | None:
    """(target, args, kwargs) that make the node's remaining channels from those of an unbroken tensor before it.

    An index_select's indices are a Tensor among the arguments; consecutive ones become a narrow.
    """
    whole = channels.values[node]
    if not isinstance(whole, Tensor) or whole.dim() < 2:
        return None
    chain = [node]
    while (source := _only_tensor(gm, channels, chain[-1])) is not None:
        before = channels.values[source]
        if source not in broken and isinstance(before, Tensor) and before.dim() == whole.dim():
            found = _selection(gm, channels, source, chain, removed)
            if found is not None:
                return found
        if not is_move(gm, source):
            return None
        chain.append(source)
    return None


def _only_tensor(gm: nn.Module, channels: ChannelGraph, node: fx.Node) -> fx.Node | None:
    sources = [n for n in node.all_input_nodes if tensors_in(channels.values[n]) and not is_index(gm, n)]
    return sources[0] if len(sources) == 1 else None


def _selection(
    gm: nn.Module, channels: ChannelGraph, source: fx.Node, chain: list[fx.Node], removed: Tensor
) -> Call | None:
    before, after = channels.values[source], channels.values[chain[0]]
    for axis in (1, before.dim() - 1):
        old, new = along(before, axis), along(after, axis)
        same = all(a == b for i, (a, b) in enumerate(zip(before.shape, after.shape, strict=True)) if i != axis)
        if old is None or new is None or not same:
            continue
        key = (source, chain[0], axis)
        if key not in channels.selections:
            channels.selections[key] = _replay(gm, source, chain, before.shape, axis)
        index = channels.selections[key]
        if index is None:
            continue
        left = ~removed[old]
        place = torch.where(left, left.cumsum(0) - 1, -1)[index[~removed[new]]]
        if len(place) == 0 or bool((place < 0).any()):
            return None
        if bool((place.diff() == 1).all()):
            return torch.narrow, (source, axis, int(place[0]), len(place)), {}
        return torch.index_select, (source, axis, place), {}
    return None


def _replay(gm: nn.Module, source: fx.Node, chain: list[fx.Node], shape: torch.Size, axis: int) -> Tensor | None:
    """The source channel of each channel at the chain's end; None where positions are moved as well.

    The chain runs on a tensor in which every element has a number of its own.
    """
    numbers = torch.arange(shape.numel()).reshape(shape)
    env: dict[fx.Node, Any] = {source: numbers}
    try:
        for node in reversed(chain):
            env[node] = run_move(gm, node, lambda n: env.get(n, n.meta.get("val")))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    moved = env[chain[0]]
    first = moved.movedim(axis, 0).flatten(1)[:, 0]
    if bool((first < 0).any()):  # padding
        return None
    index: Tensor = first // shape[axis + 1 :].numel() % shape[axis]
    return index if torch.equal(numbers.index_select(axis, index), moved) else None
