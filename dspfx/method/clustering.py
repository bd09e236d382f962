"""Which filters belong together, read off the weights: balanced clustering by channel energies, without training."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from dspfx.errors import ConfigError, ModelError

_FIRST_ROUNDS = 2  # of every start; the best one goes on
_ROUNDS = 16
_MANY, _FEW = 10, 2  # random starts: many for small layers, where they cost nothing and the search is easily stuck
_SMALL = 2**13  # energies
_GAIN = 1e-4  # a round that adds less ends the search


def cluster_filters(energy: Tensor, groups: int) -> Tensor:
    """Groups of nearly equal size whose filters put their energy into the same input channels.

    Alternates between picking each group's best half of the channels and reassigning the filters to the groups that
    keep most of them, from a few fixed starts; the grouping that keeps most energy wins. Deterministic.

    Args:
        energy: [O, C], the squared norm of each kernel (`grouping.kernel_energy`).
        groups: G; sizes differ by at most one filter.

    Returns:
        int64 [O], the group of each filter, in 0 .. G-1.

    Raises:
        ConfigError: groups is below 1.
        ModelError: an energy is not finite.
    """
    if groups < 1:
        raise ConfigError(f"cluster_filters got groups={groups}; give at least 1.")
    if not torch.isfinite(energy).all():
        bad = int((~torch.isfinite(energy)).any(dim=1).nonzero()[0])
        raise ModelError(f"cluster_filters got a non-finite energy in filter {bad}; the weights hold NaN or infinity.")
    device = energy.device
    if groups == 1:
        return torch.zeros(len(energy), dtype=torch.int64, device=device)
    energy = energy.detach().to("cpu", torch.promote_types(energy.dtype, torch.float32))  # thousands of tiny steps
    tried = [_improve(energy, start, groups, _FIRST_ROUNDS) for start in _starts(energy, groups)]
    return _improve(energy, max(tried, key=lambda result: result[0])[1], groups, _ROUNDS)[1].to(device)


def kept_energy(energy: Tensor, group: Tensor, groups: int) -> float:
    """The share of all energy [O, C] that is left when each group keeps its best half of the channels."""
    total = float(energy.sum())
    return float(_best_half(energy, group, groups)[0]) / total if total > 0 else 1.0


def _best_half(energy: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(energy kept, mask [G, C] of the better half of each group's channels)."""
    member = torch.zeros(groups, len(energy), dtype=energy.dtype).scatter_(0, group[None], 1.0)
    values, channels = (member @ energy).topk((energy.shape[1] + 1) // 2, dim=1)
    mask = torch.zeros(groups, energy.shape[1], dtype=energy.dtype)
    return values.sum(), mask.scatter_(1, channels, 1.0)


def _improve(energy: Tensor, group: Tensor, groups: int, rounds: int) -> tuple[float, Tensor]:
    """Alternates until the energy kept hardly grows; (energy kept, grouping)."""
    best, mask = _best_half(energy, group, groups)
    for _ in range(rounds):
        candidate = _reassign(energy @ mask.mT, group, groups)
        kept, mask = _best_half(energy, candidate, groups)
        grows = bool(kept > best * (1 + _GAIN))
        if kept > best:
            best, group = kept, candidate
        if not grows:
            break
    return float(best), group


def _reassign(score: Tensor, group: Tensor, groups: int) -> Tensor:
    """Moves filters where `score [O, G]` is higher, group sizes kept: every pair of groups is split anew, exactly."""
    of, filters = score.mT.contiguous().numpy(), group.numpy().copy()  # many tiny steps, which torch takes slowly
    sizes = np.bincount(filters, minlength=groups)
    for first, second in combinations(range(groups), 2):
        members = np.flatnonzero((filters == first) | (filters == second))
        order = np.argsort((of[second] - of[first])[members], kind="stable")
        filters[members[order[: sizes[first]]]] = first
        filters[members[order[sizes[first] :]]] = second
    return torch.from_numpy(filters)


def _starts(energy: Tensor, groups: int) -> list[Tensor]:
    """Balanced first groupings: around filters that overlap least, and a few fixed shuffles."""
    filters = len(energy)
    balanced = torch.arange(filters) * groups // filters
    generator = torch.Generator().manual_seed(0)
    starts = _MANY if energy.numel() <= _SMALL else _FEW
    shuffles = [torch.randperm(filters, generator=generator) for _ in range(starts)]
    direction = energy / energy.norm(dim=1, keepdim=True).clamp(min=torch.finfo(energy.dtype).tiny)
    overlap = torch.zeros(filters, dtype=energy.dtype)
    seeds = []
    chosen = int(energy.sum(dim=1).argmax())
    for _ in range(min(groups, filters)):
        seeds.append(chosen)
        overlap = torch.maximum(overlap, direction @ direction[chosen])
        overlap[chosen] = torch.inf
        chosen = int(overlap.argmin())
    score = direction @ direction[seeds].mT
    score = torch.nn.functional.pad(score, (0, groups - len(seeds)))
    return [_reassign(score, balanced, groups), *(balanced[shuffle.argsort()] for shuffle in shuffles)]
