"""How much each structure matters: energies of filters and group channels, and the order in which they go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dspfx.errors import ConfigError
from dspfx.method.grouping import kernel_energy

Importance = Callable[[Tensor], Tensor]


def resolve(importance: str | Importance) -> Importance:
    """The energy function of a name, or the user's own: weight [O, C, *kernel] -> energy [O, C], >= 0.

    "l2" is the squared Frobenius norm of each kernel, the paper's.
    """
    if callable(importance):
        return importance
    if importance == "l2":
        return kernel_energy
    raise ConfigError(f"importance is {importance!r}; give 'l2' or a function from a weight [O, C, *kernel] to [O, C].")


def group_energy(energy: Tensor, group: Tensor, groups: int) -> Tensor:
    """e[g, c] [G, C]: the energy [O, C] summed over each group's filters (METHOD, pruning); group -1 is left out."""
    alive = group >= 0
    total = energy.new_zeros(groups, energy.shape[1])
    return total.index_add_(0, group[alive], energy[alive])


def cumulative_share(energy: Tensor, eligible: Tensor) -> Tensor:
    """The beta below which each entry survives, along the last dimension [..., C].

    Entries are sorted by energy; the score of one is the cumulative share up to and including it, so that "drop
    while the cumulative share stays below beta" is "drop what scores below beta". The largest scores 1 and always
    survives beta <= 1. Ineligible entries (bool [..., C]) score -inf. All-zero rows are shared out evenly.
    """
    usable = torch.where(eligible, energy, torch.zeros_like(energy))
    usable = torch.where(usable.sum(-1, keepdim=True) > 0, usable, eligible.to(energy.dtype))
    ordered, order = torch.where(eligible, usable, torch.full_like(energy, -1)).sort(dim=-1, stable=True)
    share = ordered.clamp(min=0).cumsum(-1) / ordered.clamp(min=0).sum(-1, keepdim=True).clamp(min=1e-300)
    share[..., -1] = 1.0
    scores = torch.empty_like(share).scatter_(-1, order, share)
    return torch.where(eligible, scores, torch.full_like(scores, float("-inf")))


def unit_share(energy: Tensor, eligible: Tensor, unit: Tensor) -> Tensor:
    """`cumulative_share` of whole units: entries [..., C] of one `unit` (int64 [C], 0, 1, ...) go together.

    A unit's energy is its entries' sum, its score is that of each of its eligible entries.
    """
    count = int(unit.max()) + 1 if len(unit) else 0
    if count == len(unit):
        return cumulative_share(energy, eligible)
    shape = (*energy.shape[:-1], count)
    total = energy.new_zeros(shape).index_add_(-1, unit, torch.where(eligible, energy, torch.zeros_like(energy)))
    usable = energy.new_zeros(shape).index_add_(-1, unit, eligible.to(energy.dtype)) > 0
    scores = cumulative_share(total, usable)[..., unit]
    return torch.where(eligible, scores, torch.full_like(scores, float("-inf")))
