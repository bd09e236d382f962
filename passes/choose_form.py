"""Decides in which form a convolution runs: the fastest by the clock that is given, or by a rule measured on CPUs.

dense       one convolution of all kept filters and channels, zeros included
branches    a convolution for each group of filters, over the channels that this group reads
grouped     one convolution with groups, padded to the largest
kernel      the branches in one kernel of our own, on GPUs

Groups may share a branch: fewer and wider convolutions compute some zeros, and pay for themselves on small maps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dspfx.forms import Branch, Clock, Form, FormCase, case_of
from dspfx.graph.cost import LayerCost, layer_costs
from dspfx.graph.liveness import unique_rows
from dspfx.grouped import pad_groups
from dspfx.kernel_conv import suits_kernel
from dspfx.plans import Group, LoweredLayer, LowerPlan

MAX_BRANCHES = 16
# Without a clock (CPUs, batch 1, fp32): below these sizes the copies and narrow convolutions of branches cost more than
# the multiply-adds they save.
BRANCH_POSITIONS = 14 * 14
BRANCH_WIDTH = 256
BRANCH_SHARE = 0.75


@dataclass(frozen=True)
class LowerOptions:
    """What a lowering aims at.

    Attributes:
        multiple: widths of layers and branches are kept a multiple of this where they can be; 0 keeps every channel.
        clock: milliseconds of a layer; None for the rule.
        splits: the forms that a layer of several groups may take; empty keeps every layer dense.
        margin: of the dense form's time, what another form may take at most: isolated measurements flatter what has
            more parts.
    """

    multiple: int = 1
    clock: Clock | None = None
    splits: tuple[Form, ...] = ("grouped", "branches")
    margin: float = 0.97


BY_RULE = LowerOptions()


@dataclass(frozen=True)
class Choice:
    """A form with its groups (of indices into the kept filters and channels) and the milliseconds expected of it."""

    form: Form
    groups: tuple[Group, ...] = ()
    ms: float | None = None

    def pairs(self, filters: int, channels: int) -> int:
        """The (filter, input channel) pairs that are computed."""
        if self.form == "dense":
            return filters * channels
        groups = pad_groups(channels, filters, self.groups) if self.form == "grouped" else self.groups
        return sum(len(g.filters) * len(g.channels) for g in groups)


def choose_form(conv: nn.Module, pairs: Tensor, shapes: tuple[tuple[int, ...], ...], options: LowerOptions) -> Choice:
    """The form of a layer of which `pairs` (bool [O, C]) are kept, called on inputs of `shapes` [N, C before, ...]."""
    dense = [case for case in (dense_case(conv, pairs, shape) for shape in shapes) if case is not None]
    can_split = isinstance(conv, nn.Conv2d) and conv.groups == 1 and 0 not in pairs.shape
    clock = options.clock
    splits = list(_groupings(pairs, max(options.multiple, 1))) if can_split and dense and options.splits else []
    if clock is None:
        return _by_rule(pairs, shapes, splits)
    best = Choice("dense", (), sum(map(clock, dense)) if dense else None)
    allowed = options.margin * (best.ms or 0.0)
    for form, groups in _forms(splits):
        if form not in options.splits or (form == "kernel" and not suits_kernel(conv)):
            continue
        ms = sum(clock(split_case(case, form, groups, is_laid_out=False)) for case in dense)
        if ms < allowed:
            best, allowed = Choice(form, groups, ms), ms
    return best


def dense_case(conv: nn.Module, pairs: Tensor, shape: tuple[int, ...]) -> FormCase | None:
    """The dense form's case on an input that had `shape` before channels went."""
    case = case_of(conv, shape)
    if case is None or case.groups > 1:
        return case
    return case.resized(*pairs.shape)


def _forms(splits: list[tuple[Group, ...]]) -> Iterator[tuple[Form, tuple[Group, ...]]]:
    """Every grouping in branches, and the finest one as a grouped convolution and for a kernel."""
    if splits and len(splits[0]) > 1:
        yield "grouped", splits[0]
    if splits:
        yield "kernel", splits[0]
    for groups in splits:
        yield "branches", groups


def split_case(case: FormCase, form: Form, groups: tuple[Group, ...], is_laid_out: bool = True) -> FormCase:
    """The case of these groups in a form; before channels are laid out, as they will be if nothing stands against
    it: up to two groups are read as slices."""
    hope = not is_laid_out and len(groups) < 3
    branches = tuple(Branch(len(g.filters), len(g.channels), hope or _is_run(g.channels)) for g in groups)
    filters = [o for g in groups for o in g.filters]
    is_ordered = hope or filters == list(range(len(filters)))
    return replace(case, form=form, branches=branches, is_ordered=is_ordered)


def confirm_forms(model: nn.Module, plan: LowerPlan, options: LowerOptions) -> LowerPlan:
    """The plan, laid out, without the branches that did not get the ranges that they would pay with."""
    costs = layer_costs(model)
    return LowerPlan(tuple(_confirmed(model, layer, costs[layer.name], options) for layer in plan.layers))


def _confirmed(model: nn.Module, layer: LoweredLayer, cost: LayerCost, options: LowerOptions) -> LoweredLayer:
    clock = options.clock
    if layer.form == "dense" or clock is None:
        return layer
    cases = [case for shape in cost.input_shapes if (case := case_of(model.get_submodule(layer.name), shape))]
    dense = [case.resized(len(layer.filters), len(layer.channels)) for case in cases]
    ms, dense_ms = sum(clock(split_case(case, layer.form, layer.groups)) for case in dense), sum(map(clock, dense))
    if ms < options.margin * dense_ms:
        return replace(layer, ms=ms)
    run = len(layer.filters) * len(layer.channels) * cost.macs_per_pair
    return replace(layer, form="dense", groups=(), macs_run=run, ms=dense_ms)


def _by_rule(pairs: Tensor, shapes: tuple[tuple[int, ...], ...], splits: list[tuple[Group, ...]]) -> Choice:
    dense = Choice("dense")
    positions = max(shape[-1] * shape[-2] for shape in shapes) if splits else 0
    if not splits or min(pairs.shape) < BRANCH_WIDTH or positions > BRANCH_POSITIONS:
        return dense
    split = Choice("branches", splits[0])
    return split if split.pairs(*pairs.shape) <= BRANCH_SHARE * dense.pairs(*pairs.shape) else dense


def _groupings(pairs: Tensor, multiple: int) -> Iterator[tuple[Group, ...]]:
    """The groups that the zeros make, then with the two merged again and again that cost the fewest pairs."""
    keep, row = groups_of(pairs)
    members = [(row == g).nonzero().flatten() for g in range(len(keep))]
    rows = list(keep)
    if not 0 < len(rows) <= MAX_BRANCHES:
        return
    whole = pairs.shape[0] * pairs.shape[1]
    while True:
        groups = tuple(
            Group(tuple(m.tolist()), tuple(widened(r, pairs, multiple).nonzero().flatten().tolist()))
            for m, r in zip(members, rows, strict=True)
        )
        if sum(len(g.filters) * len(g.channels) for g in groups) < whole:
            yield groups
        if len(rows) == 1:
            return
        a, b = _closest(members, rows)
        members[a], rows[a] = torch.cat([members[a], members[b]]).sort().values, rows[a] | rows[b]
        del members[b], rows[b]


def groups_of(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """(bool [G, C] the channels of each group, int64 [O] each filter's group): filters with equal rows of kept
    channels; those that read nothing are in no group, -1."""
    keep, row = unique_rows(pairs)
    live = keep.any(1)
    number = torch.where(live, live.cumsum(0) - 1, -1)
    return keep[live], number[row]


def widened(channels: Tensor, pairs: Tensor, multiple: int) -> Tensor:
    """bool [C]: `channels` and, up to a multiple, those others that the most filters read."""
    lacking = min(-int(channels.sum()) % multiple, int((~channels).sum()))
    if lacking == 0:
        return channels
    use = torch.where(channels, -1, pairs.sum(0))
    wide = channels.clone()
    wide[use.argsort(descending=True, stable=True)[:lacking]] = True
    return wide


def _closest(members: list[Tensor], rows: list[Tensor]) -> tuple[int, int]:
    """The two groups whose merging adds the fewest pairs."""
    best, found = float("inf"), (0, 1)
    for b in range(len(rows)):
        for a in range(b):
            union = int((rows[a] | rows[b]).sum())
            added = sum(len(members[i]) * (union - int(rows[i].sum())) for i in (a, b))
            if added < best:
                best, found = added, (a, b)
    return found


def _is_run(channels: tuple[int, ...]) -> bool:
    return channels == tuple(range(channels[0], channels[-1] + 1))
