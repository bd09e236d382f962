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
from dspfx.graph.simulate import pin_nodes, simulate
from dspfx.graph.traced import TracedModule
from dspfx.plans import Group, LoweredLayer, LowerPlan

# Measured on CPUs (batch 1, fp32): below these sizes the gathers and narrow convolutions of branches cost more than
# the multiply-adds they save.
BRANCH_POSITIONS = 14 * 14
BRANCH_WIDTH = 256
BRANCH_SHARE = 0.75
MAX_BRANCHES = 16


def plan_lower(gm: TracedModule, channels: ChannelGraph, width_multiple: int = 1) -> LowerPlan:
    """The LowerPlan of a plain network in eval mode; pins in `channels` what turns out not to be removable.

    `width_multiple` keeps some dead channels so that each layer's width stays a multiple of it where it can.
    Raises ModelError where a weight is not finite.
    """
    steps = {step.module: step for step in reversed(channels.steps) if step.kind in ("conv", "depthwise")}
    reads: dict[str, Reads] = {}
    for name, step in steps.items():
        weight = gm.get_parameter(f"{name}.weight")
        if not bool(weight.isfinite().all()):
            raise ModelError(f"{name}.weight holds NaN or infinity; restore finite weights before lowering.")
        if step.kind == "conv":
            reads[name] = Reads.of_weight(weight)
    live = liveness(channels, reads, gm)
    made = torch.zeros(channels.num_wires, dtype=torch.bool)  # classes that a layer makes: the plan can name them
    for step in steps.values():
        made[channels.root[step.out]] = True
    while True:
        removed = _keep_widths(channels, live.removable(channels) & made[channels.root], width_multiple)
        broken = simulate(gm, channels, gm.graph, removed).broken
        if not broken:
            break
        pin_nodes(channels, broken)
    costs = layer_costs(gm)
    return LowerPlan(
        tuple(
            _plan_layer(gm, steps[name], reads.get(name), removed, cost)
            for name, cost in costs.items()
            if name in steps
        )
    )


def _keep_widths(channels: ChannelGraph, removable: Tensor, multiple: int) -> Tensor:
    """`removable` less what keeps every layer at least one channel wide and, if it can be, a multiple of `multiple`."""
    removed = removable.clone()
    for step in channels.steps:
        if step.kind == "map":
            continue
        for wires in (step.out, step.ins[0]):
            gone = removed[wires]
            left = int((~gone).sum())
            lacking = max(1, -(-left // multiple) * multiple) - left
            if lacking > 0 and bool(gone.any()):
                roots = channels.root[wires[gone]].unique()[:lacking]
                removed[torch.isin(channels.root, roots)] = False
    return removed


def _plan_layer(gm: TracedModule, step: Step, read: Reads | None, removed: Tensor, cost: LayerCost) -> LoweredLayer:
    filters = (~removed[step.out]).nonzero().flatten()
    if read is None:  # depthwise: one channel a filter
        macs = len(filters) * cost.in_channels * cost.macs_per_pair
        kept = tuple(filters.tolist())
        return LoweredLayer(step.module, "dense", kept, (), (), cost.macs, macs, macs)
    channels = (~removed[step.ins[0]]).nonzero().flatten()
    pairs = read.pairs()[filters][:, channels]
    groups = _groups(pairs)
    dense = len(filters) * len(channels) * cost.macs_per_pair
    split = sum(len(g.filters) * len(g.channels) for g in groups) * cost.macs_per_pair
    module = gm.get_submodule(step.module)
    wide = min(len(filters), len(channels)) >= BRANCH_WIDTH and cost.positions <= BRANCH_POSITIONS
    is_split = (
        isinstance(module, nn.Conv2d) and wide and 0 < len(groups) <= MAX_BRANCHES and split <= BRANCH_SHARE * dense
    )
    return LoweredLayer(
        step.module,
        "branches" if is_split else "dense",
        tuple(filters.tolist()),
        tuple(channels.tolist()),
        groups if is_split else (),
        cost.macs,
        int(pairs.sum()) * cost.macs_per_pair,
        split if is_split else dense,
    )


def _groups(pairs: Tensor) -> tuple[Group, ...]:
    """Filters with equal rows of kept channels; those that read nothing join the narrowest group."""
    keep, row = unique_rows(pairs)
    width = keep.sum(1)
    live = (width > 0).nonzero().flatten()
    if len(live) == 0:
        return ()
    host = int(live[width[live].argmin()])
    row = torch.where(width[row] > 0, row, host)
    groups = []
    for g in live.tolist():
        members = (row == g).nonzero().flatten().tolist()
        groups.append(Group(tuple(members), tuple(keep[g].nonzero().flatten().tolist())))
    return tuple(groups)
