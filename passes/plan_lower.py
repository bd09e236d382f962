"""Decides which channels of a network go for good, and which form each convolution takes (passes/choose_form.py).

Everything is read from the weights: a channel goes where nobody needs it (graph/liveness.py) and nothing pins it;
the groups of a convolution are its rows of equal zeros.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dspfx.errors import ModelError
from dspfx.forms import Clock, case_of
from dspfx.graph.channels import ChannelGraph, Step
from dspfx.graph.cost import LayerCost, layer_costs
from dspfx.graph.liveness import Reads, liveness
from dspfx.graph.simulate import keep_widths, pin_broken, simulate
from dspfx.graph.traced import parts_of
from dspfx.passes.choose_form import BY_RULE, LowerOptions, choose_form
from dspfx.plans import LoweredLayer, LowerPlan


def plan_lower(model: nn.Module, channels: ChannelGraph, options: LowerOptions = BY_RULE) -> LowerPlan:
    """The LowerPlan of a plain network in eval mode; pins in `channels` what turns out not to be removable.

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
        removable = live.removable(channels) & made[channels.root] & (options.multiple > 0)
        removed = keep_widths(channels, removable, max(options.multiple, 1))
        parts = parts_of(model).values()
        broken = [fault for part in parts for fault in simulate(part, channels, part.graph, removed).broken]
        if not broken:
            break
        pin_broken(channels, broken, removed)
    costs = layer_costs(model)
    return LowerPlan(
        tuple(
            _plan_layer(model, steps[name], reads.get(name), removed, cost, options)
            for name, cost in costs.items()
            if name in steps
        )
    )


def _plan_layer(
    model: nn.Module,
    step: Step,
    read: Reads | None,
    removed: Tensor,
    cost: LayerCost,
    options: LowerOptions,
) -> LoweredLayer:
    layer = model.get_submodule(step.name)
    filters = (~removed[step.out]).nonzero().flatten()
    if read is None or (step.layer is not None and step.layer.groups > 1):  # depthwise, or whole groups are left
        channels = filters[:0] if read is None else (~removed[step.ins[0]]).nonzero().flatten()
        run = len(filters) * cost.in_channels * cost.macs_per_pair
        left = run if read is None else int(read.pairs()[filters][:, channels].sum()) * cost.macs_per_pair
        ms = None if options.clock is None else _grouped_ms(layer, cost, len(filters), options.clock)
        kept = tuple(filters.tolist()), tuple(channels.tolist())
        return LoweredLayer(step.name, "dense", *kept, (), cost.macs, left, run, ms)
    channels = (~removed[step.ins[0]]).nonzero().flatten()
    pairs = read.pairs()[filters][:, channels]
    choice = choose_form(layer, pairs, cost.input_shapes, options)
    left, run = (count * cost.macs_per_pair for count in (int(pairs.sum()), choice.pairs(*pairs.shape)))
    kept = tuple(filters.tolist()), tuple(channels.tolist())
    return LoweredLayer(step.name, choice.form, *kept, choice.groups, cost.macs, left, run, choice.ms)


def _grouped_ms(layer: nn.Module, cost: LayerCost, filters: int, clock: Clock) -> float | None:
    """The milliseconds of a grouped layer of which whole groups are left."""
    cases = [case for case in (case_of(layer, shape) for shape in cost.input_shapes) if case is not None]
    groups = [max(case.groups * filters // case.filters, 1) for case in cases]
    return sum(
        clock(replace(case.resized(filters, case.channels * g // case.groups), groups=g))
        for case, g in zip(cases, groups, strict=True)
    )
