"""Balanced structures: groups of equal size that drop equal numbers of channels, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from dspfx.errors import ConfigError, ModelError

BLOCK = 8  # CPU runtimes and tensor cores work on channels in runs of 8 (or 16)
_GAIN = 1e-12  # of the largest logit: less is rounding


def block_size(count: int) -> int:
    """BLOCK, halved until `count` holds two of it, at least 1."""
    size = BLOCK
    while size > 1 and count < 2 * size:
        size //= 2
    return size


def unit_block(unit: Tensor) -> int:
    """How many of the channels go in one step; `unit` [C] (0, 1, ...) numbers channels that go together.

    Units of one size, such as the positions of a flattened channel, are counted as one channel each.
    """
    sizes = torch.bincount(unit)
    size = int(sizes[0]) if len(sizes) and bool((sizes == sizes[0]).all()) else 1
    return block_size(len(unit) // size) * size


def block_drops(
    energy: Tensor, eligible: Tensor, unit: Tensor, block: int, fixed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(score, step) [G, N]: in step 0, 1, ... every row loses its weakest entries, down to a multiple of `block`.

    All entries of a step score the same: the share of the energy of all rows that is gone after it. Rows that are
    longer than others (they differ once a network was pruned) lose the difference first. Each row's best `block`
    entries score 1 and stay.

    Args:
        energy: [G, N], none negative.
        eligible: bool [G, N]; the others are gone already, score -inf and have no step (-1).
        unit: int64 [N], 0, 1, ...; entries of one unit stand next to each other in each row's order.
        block: what each row's length is a multiple of after every step.
        fixed: bool [N], entries that stay, score 1 and count as each row's strongest.
    """
    usable = torch.where(eligible, energy, torch.zeros_like(energy))
    if not bool(usable.sum() > 0):
        usable = eligible.to(energy.dtype)
    count = int(unit.max()) + 1 if len(unit) else 0
    strength = usable.new_zeros(len(usable), count).index_add_(1, unit, usable)[:, unit]
    stays = torch.zeros_like(unit, dtype=torch.bool) if fixed is None else fixed
    strength = strength.masked_fill(stays, torch.inf).masked_fill(~eligible, -1)
    order = unit.argsort(stable=True)
    order = order[strength[:, order].argsort(dim=1, descending=True, stable=True)]
    run = torch.empty_like(order).scatter_(1, order, torch.arange(len(unit)).expand_as(order)) // block
    goes = eligible & (run > 0) & ~stays
    runs = int(run[goes].max()) if bool(goes.any()) else 0
    step = torch.where(goes, runs - run, -1)
    lost = usable.new_zeros(runs).index_add_(0, step[goes], usable[goes])
    share = (lost.cumsum(0) / usable.sum()).clamp(max=1 - torch.finfo(usable.dtype).eps)  # kept energy may round away
    scores = torch.ones_like(usable).masked_fill(~eligible, -torch.inf)
    scores[goes] = share[step[goes]]
    return scores, step


def balanced_groups(logits: Tensor) -> Tensor:
    """int64 [O]: the assignment to groups of equal size (to one filter) with the largest sum of logits [G, O]. Exact.

    Filters take their best group with room, those that would lose most by another first; then filters are passed on
    around cycles of groups while that gains. A best assignment is one without such a cycle (min-cost flow).

    Raises:
        ConfigError: there is no group.
        ModelError: a logit is not finite.
    """
    groups, filters = logits.shape
    if groups < 1:
        raise ConfigError("balanced_groups got no group; give logits [G, O] with G of at least 1.")
    if not bool(logits.isfinite().all()):
        raise ModelError("balanced_groups got logits that are NaN or infinite; restore a sound checkpoint.")
    value = logits.detach().cpu().double()
    group = _greedy(value)
    least = float(value.abs().max()) * _GAIN if filters else 0.0
    while True:
        gain, filter_of = _moves(value, group, filters // groups)
        cycle = _gainful_cycle(gain, least)
        if not cycle:
            return group.to(logits.device)
        for source, target in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
            if groups not in (source, target):
                group[filter_of[source, target]] = target


def _greedy(value: Tensor) -> Tensor:
    """A balanced assignment: filters that have most to lose choose first."""
    groups, filters = value.shape
    best = value.topk(min(2, groups), dim=0).values
    preferred = value.argsort(dim=0, descending=True, stable=True).T.tolist()
    size, longer = divmod(filters, groups)
    sizes, group = [0] * groups, torch.empty(filters, dtype=torch.int64)
    for o in (best[0] - best[-1]).argsort(descending=True, stable=True).tolist():
        g = next(g for g in preferred[o] if sizes[g] < size or (sizes[g] == size and longer > 0))
        longer -= int(sizes[g] == size)
        sizes[g] += 1
        group[o] = g
    return group


def _moves(value: Tensor, group: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(gain [G + 1, G + 1], filter [G, G]) of the best move from group to group.

    Node G is no group: through it a longer group (of `size` + 1 filters) becomes a shorter one and the reverse.
    """
    groups = len(value)
    gain = torch.full((groups + 1, groups + 1), -torch.inf, dtype=torch.float64)
    filter_of = torch.full((groups, groups), -1)
    sizes = torch.bincount(group, minlength=groups)
    for g in range(groups):
        members = (group == g).nonzero().flatten()
        if len(members):
            most, index = (value[:, members] - value[g, members]).max(dim=1)
            gain[g, :groups], filter_of[g] = most, members[index]
    gain[:groups, groups][sizes == size] = 0.0  # takes a filter and passes none on
    gain[groups, :groups][sizes > size] = 0.0  # passes one on and takes none
    gain.fill_diagonal_(-torch.inf)
    return gain, filter_of


def _gainful_cycle(gain: Tensor, least: float) -> list[int]:
    """Nodes of a cycle whose gains add up to more than `least` (a node once), or nothing. Bellman-Ford."""
    nodes = len(gain)
    reached, before = torch.zeros(nodes, dtype=torch.float64), torch.full((nodes,), -1)
    for _ in range(nodes):
        best, source = (reached[:, None] + gain).max(dim=0)
        better = best > reached + least
        if not bool(better.any()):
            return []
        reached, before = torch.where(better, best, reached), torch.where(better, source, before)
    node = int(better.nonzero()[0])
    for _ in range(nodes):  # whatever improved in the last round leads back into a cycle
        node = int(before[node])
    cycle = [node]
    while (node := int(before[cycle[-1]])) != cycle[0]:
        cycle.append(node)
    return cycle[::-1]
