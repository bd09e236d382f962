"""Decides which channels of a network go for good, and which form each convolution takes.

Everything is read from the weights: a channel goes where nobody needs it (graph/liveness.py) and nothing pins it;
the groups of a convolution are its rows of equal zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspfx.errors import ModelError
from dspfx.graph.channels import ChannelGraph, Step
from dspfx.graph.cost import LayerCost, layer_costs
from dspfx.graph.liveness import Reads, liveness, unique_rows
from dspfx.graph.simulate import keep_widths, pin_broken, simulate
from dspfx.graph.traced import parts_of
from dspfx.plans import Group, LoweredLayer, LowerPlan

# Measured on CPUs (batch 1, fp32): below these sizes the gathers and narrow convolutions of branches cost more than
# the multiply-adds they save.
BRANCH_POSITIONS = 14 * 14
BRANCH_WIDTH = 256
BRANCH_SHARE = 0.75
MAX_BRANCHES = 16


def plan_lower(model: nn.Module, channels: ChannelGraph, width_multiple: int = 1) -> LowerPlan:
    """The LowerPlan of a plain network in eval mode; pins in `channels` what turns out not to be removable.

    `width_multiple` keeps some dead channels so that each layer's width stays a multiple of it where it can.
    Raises ModelError where a weight is not finite.
    """
    steps = {step.name: step for step in reversed(channels.steps) if step.kind in ("conv", "depthwise")}
    reads: dict[str, Reads] = {}
    for name, step in steps.items():
        weight = step.layer.tensor(model, "weight") if step.layer else None
        assert weight is not None
        if not bool(weight.isfinite().all()):
            raise ModelError(f"{name}.weight holds NaN or infinity; restore finite weights before lowering.")
        if step.kind == "conv":
            reads[name] = Reads.of_weight(step, weight)
    live = liveness(channels, reads, model)
    made = torch.zeros(channels.num_wires, dtype=torch.bool)  # classes that a layer makes: the plan can name them
    for step in steps.values():
        made[channels.root[step.out]] = True
    while True:
        removed = keep_widths(channels, live.removable(channels) & made[channels.root], width_multiple)
        parts = parts_of(model).values()
        broken = [fault for part in parts for fault in simulate(part, channels, part.graph, removed).broken]
        if not broken:
            break
        pin_broken(channels, broken, removed)
    costs = layer_costs(model)
    return LowerPlan(
        tuple(
            _plan_layer(model, steps[name], reads.get(name), removed, cost)
            for name, cost in costs.items()
            if name in steps
        )
    )


def _plan_layer(model: nn.Module, step: Step, read: Reads | None, removed: Tensor, cost: LayerCost) -> LoweredLayer:
    filters = (~removed[step.out]).nonzero().flatten()
    if read is None:  # depthwise: one channel a filter
        macs = len(filters) * cost.in_channels * cost.macs_per_pair
        return LoweredLayer(step.name, "dense", tuple(filters.tolist()), (), (), cost.macs, macs, macs)
    channels = (~removed[step.ins[0]]).nonzero().flatten()
    pairs = read.pairs()[filters][:, channels]
    kept = tuple(filters.tolist()), tuple(channels.tolist())
    left = int(pairs.sum()) * cost.macs_per_pair
    if step.layer is not None and step.layer.groups > 1:  # whole groups are left
        run = len(filters) * cost.in_channels * cost.macs_per_pair
        return LoweredLayer(step.name, "dense", *kept, (), cost.macs, left, run)
    groups = _groups(pairs)
    dense = len(filters) * len(channels) * cost.macs_per_pair
    split = sum(len(g.filters) * len(g.channels) for g in groups) * cost.macs_per_pair
    wide = min(len(filters), len(channels)) >= BRANCH_WIDTH and cost.positions <= BRANCH_POSITIONS
    can_split = isinstance(model.get_submodule(step.name), nn.Conv2d) and wide and 0 < len(groups) <= MAX_BRANCHES
    if can_split and split <= BRANCH_SHARE * dense:
        return LoweredLayer(step.name, "branches", *kept, groups, cost.macs, left, split)
    return LoweredLayer(step.name, "dense", *kept, (), cost.macs, left, dense)


def _groups(pairs: Tensor) -> tuple[Group, ...]:
    """Filters with equal rows of kept channels; those that read nothing are in no group."""
    keep, row = unique_rows(pairs)
    return tuple(
        Group(tuple((row == g).nonzero().flatten().tolist()), tuple(keep[g].nonzero().flatten().tolist()))
        for g in keep.any(1).nonzero().flatten().tolist()
    )
