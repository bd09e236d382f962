"""What the structures of one gated layer are, what each scores, and the order in which those of all layers go.

A structure is a group channel (a slab W[filters of g, c]) or a whole filter. Of a balanced network they go in steps:
a step takes a block of channels, or of filters, from every group of a layer at once, and is never cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspfx.errors import ModelError
from dspfx.graph.channels import ChannelGraph
from dspfx.method.balance import balanced_groups, block_drops, block_size, unit_block
from dspfx.method.clustering import cluster_filters
from dspfx.method.importance import Fisher, group_energy, unit_share
from dspfx.modules import GatedLayer

Energy = Callable[[Tensor], Tensor] | Fisher
PROTECTED = 0.1  # of the channels that a group may read, and of a layer's filters


@dataclass(eq=False)
class ScoredLayer:
    """One gated convolution: energies [O, C], group [O] (-1 dead), scores of group channels [G, C] and filters [O].

    A score is the share of energy that is gone once the structure is or, of Fisher information, grows with the loss for
    the work saved; -inf was gone before, 1 stays. `steps` are the steps of channels [G, C] and of filters [O] (-1 goes
    in none), of a balanced layer.
    """

    name: str
    energies: Tensor
    group: Tensor
    channel_scores: Tensor
    filter_scores: Tensor
    steps: tuple[Tensor, Tensor] | None = None


def score_layer(
    name: str,
    module: GatedLayer,
    energy: Energy,
    units: list[Tensor],
    free: Tensor | None,
    is_balanced: bool,
    cost: float = 1.0,
) -> ScoredLayer:
    """The layer's structures; `units` number what goes together, of filters and of channels, `free` are the filters
    that are scored one by one (bool [O]), `cost` is that of a (filter, channel) pair."""
    weight = module.by_filter(module.weight.detach()).cpu()
    weight = weight.unflatten(2, module.weight.shape[2:]) if module.weight.dim() > 3 else weight
    group = _known_groups(module, is_balanced)
    if isinstance(energy, Fisher):
        assert group is not None  # what was weighed had groups, learned or a single one
        pairs = energy.pairs(module.gate_fisher.cpu().double(), module.gate_filter_fisher.cpu().double(), group)
    else:
        pairs = energy(weight)
    if pairs.shape != weight.shape[:2]:
        raise ModelError(
            f"the importance function gave shape {tuple(pairs.shape)} for {name}; it must give one energy a (filter, "
            f"input channel) pair, {tuple(weight.shape[:2])}."
        )
    if not _is_finite(pairs) or not _is_finite(weight):
        raise ModelError(
            f"{name} holds weights or energies that are not finite (NaN or infinity); restore a sound one."
        )
    pairs = pairs * module.gate_mask().cpu()
    if group is None:
        group = cluster_filters(pairs, module.gate_groups)  # in the energies' own precision, for speed
    pairs = pairs.double()
    filled = torch.zeros(module.gate_groups, dtype=torch.bool)
    filled[group[group >= 0]] = True
    eligible = module.gate_keep.cpu() & filled[:, None]
    if is_balanced:
        return _in_steps(name, pairs, group, eligible, units, free)
    total = group_energy(pairs, group, module.gate_groups)
    channel_scores = unit_share(total, eligible, units[1])
    filter_scores = _stay(group)
    if free is not None:
        scores = unit_share(pairs.sum(1), group >= 0, units[0])
        filter_scores = torch.where(free | (group < 0), scores, filter_scores)
    if isinstance(energy, Fisher):
        sizes = torch.bincount(group[group >= 0], minlength=module.gate_groups).clamp(min=1)[:, None]
        channel_scores = _by_price(channel_scores, total / (sizes * cost), units[1])
        filter_scores = _by_price(filter_scores, pairs.sum(1) / (module.channels * cost), units[0])
    return ScoredLayer(name, pairs, group, channel_scores, filter_scores)


def _known_groups(module: GatedLayer, is_balanced: bool) -> Tensor | None:
    """The group of each filter [O], pruned or learned; None where neither has happened yet."""
    if module.is_pruned:
        return module.gate_group.cpu()
    if module.is_learned or module.is_weighed:  # one group has nothing to learn, and is known
        logits = module.gate_logits.cpu()
        return balanced_groups(logits) if is_balanced else logits.argmax(0)
    return None


def _by_price(scores: Tensor, price: Tensor, unit: Tensor) -> Tensor:
    """Scores [..., n] in the order of what is lost for the work that is saved, the same scale in every layer.

    What is gone (-inf) or stays (1) does so. Entries of a unit have its mean price. The dearest PROTECTED of a group,
    or of the filters, go only once all others have gone everywhere: a loss that was measured one structure at a time
    says nothing of a layer of which hardly any is left.
    """
    count = int(unit.max()) + 1 if len(unit) else 0
    alive = (scores > float("-inf")).to(price.dtype)
    sums, entries = (x.new_zeros(*x.shape[:-1], count).index_add_(-1, unit, x) for x in (price * alive, alive))
    mean = (sums / entries.clamp(min=1))[..., unit]
    number = max(1, math.ceil(PROTECTED * mean.shape[-1]))
    least = torch.where(alive > 0, mean, -1.0).topk(number, -1).values[..., -1:] if mean.shape[-1] else mean
    priced = (mean / (1 + mean) + (mean >= least)) / 2
    return torch.where((scores > float("-inf")) & (scores < 1), priced, scores)


def _in_steps(
    name: str, pairs: Tensor, group: Tensor, eligible: Tensor, units: list[Tensor], free: Tensor | None
) -> ScoredLayer:
    """The layer's structures in steps: every group loses as many channels, and as many filters, as the others."""
    groups = len(eligible)
    by_group = group_energy(pairs, group, groups)
    channel_scores, channel_steps = block_drops(by_group, eligible, units[1], unit_block(units[1]))
    filter_scores, filter_steps = _stay(group), torch.full_like(group, -1)
    if free is not None:
        member = group == torch.arange(groups)[:, None]
        block = block_size(len(group) // groups)
        scores, steps = block_drops(pairs.sum(1).expand(groups, -1), member, units[0], block, ~free)
        place = group.clamp(min=0), torch.arange(len(group))
        filter_scores, filter_steps = scores[place], steps[place]
    return ScoredLayer(name, pairs, group, channel_scores, filter_scores, (channel_steps, filter_steps))


def _stay(group: Tensor) -> Tensor:
    """Scores of filters of which none is dropped by itself."""
    return torch.where(group >= 0, torch.tensor(1.0).double(), torch.tensor(float("-inf")).double())


def order_structures(layers: list[ScoredLayer]) -> tuple[Tensor, Tensor, Sequence[int]]:
    """(scores, order, ends): all structures' scores, one layer after another, channels before filters; their indices,
    what is gone already first, then the lowest scores; and how many of these are gone after k structures or steps."""
    flat = [s.flatten() for layer in layers for s in (layer.channel_scores, layer.filter_scores)]
    scores = torch.cat(flat) if flat else torch.empty(0)
    gone, last = int((scores == float("-inf")).sum()), int((scores < 1).sum())  # a group's best channels score 1
    steps = [s.flatten() for layer in layers if layer.steps for s in layer.steps]
    if not steps:
        return scores, scores.argsort(stable=True), range(gone, last + 1)
    starts = torch.tensor([0, *(int(s.max()) + 1 for s in steps[:-1])]).cumsum(0)
    number = torch.cat([torch.where(s < 0, -1, s + start) for s, start in zip(steps, starts, strict=True)])
    order = number.argsort(stable=True)  # equal scores: one step after another
    order = order[scores[order].argsort(stable=True)]
    changes = number[order][gone:last].diff().nonzero().flatten() + gone + 1
    return scores, order, [gone, *changes.tolist(), *([last] if last > gone else [])]


def units(channels: ChannelGraph, wires: Tensor) -> Tensor:
    """int64 [n]: the number of what goes together; what is pinned goes nowhere and is read channel by channel."""
    alone = -1 - torch.arange(len(wires))
    roots = torch.where(channels.pinned()[wires], alone, channels.root[wires])
    return roots.unique(return_inverse=True)[1]


def _is_finite(values: Tensor) -> bool:
    """No entry is NaN or infinite; a finite sum says so at once."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())
