"""How much each structure matters: energies of filters and group channels, and the order in which they go."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dspfx.errors import ConfigError
from dspfx.method.grouping import kernel_energy

Importance = Callable[[Tensor], Tensor]
NAMES = ("auto", "fisher", "l2")


class Fisher:
    """Energies that learning found: how much the loss changes without a group channel, in absolute terms.

    The empirical Fisher information of a structure S is E[<W_S, g_S>^2], which a learner gathers from the gradients
    that pass by, kernel by kernel (`GatedLayer.gate_fisher`, `.gate_filter_fisher`).
    """

    def pairs(self, channels: Tensor, filters: Tensor, group: Tensor) -> Tensor:
        """Energies [O, C] of kernels, from those of group channels [G, C] and of filters [O], of filters in `group`."""
        rows = channels[group.clamp(min=0)] * (group >= 0)[:, None]
        return rows * (filters / rows.sum(1).clamp(min=1e-300))[:, None]


def resolve(importance: str | Importance, is_weighed: bool = False) -> Importance | Fisher:
    """What a name stands for, or the user's own function: weight [O, C, *kernel] -> energy [O, C], >= 0.

    "l2" is the squared Frobenius norm of each kernel, the paper's; "fisher" is what learning found, and "auto" is that
    where there is some, for all of the network's gates (`is_weighed`), and "l2" elsewhere.
    """
    if callable(importance):
        return importance
    if importance not in NAMES:
        raise ConfigError(
            f"importance is {importance!r}; give one of {', '.join(map(repr, NAMES))}, or a function from a weight "
            "[O, C, *kernel] to [O, C]."
        )
    if importance == "fisher" and not is_weighed:
        raise ConfigError(
            "importance='fisher' is gathered by a GroupLearner while it trains every gated layer, and this network has "
            "layers without; train it so, or give importance='l2'."
        )
    return kernel_energy if importance == "l2" or not is_weighed else Fisher()


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
