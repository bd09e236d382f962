"""Decides in which order the kept channels stand, so that branches read ranges and their results need no reordering.

    conv1 -> conv2, whose filters 0 2 read channels 0 2 3 and whose filters 1 3 read channels 1 3

    conv1 makes its channels in the order 0 2 3 1, conv2 its own in the order 0 2 1 3:
    branch 0 reads [0:3], branch 1 reads [2:4], and the next layer reads what stands there

All of it goes into weights. What is asked for is that branches copy few elements in selecting and in reordering. Two
groups of one layer alone on its channels get their ranges; where more groups, or several layers of one residual
stream, ask for what cannot be had together, a search decides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from dspfx.graph.arrange import Tree, gather, order, row
from dspfx.graph.channels import ChannelGraph, Step, tensors_in
from dspfx.graph.cost import layer_costs
from dspfx.graph.families import Families, Sets
from dspfx.graph.reorder import check_order
from dspfx.graph.simulate import Outcome, simulate
from dspfx.graph.traced import TracedModule, parts_of
from dspfx.passes.shrink_channels import kept_in_order, removed_wires
from dspfx.plans import Group, LoweredLayer, LowerPlan

_EFFORT = 1_000_000  # channels looked at, for each set of wishes that depend on each other, to try other priorities

Orders = dict[int, list[int]]  # family -> its classes in order


def lay_out(model: nn.Module, channels: ChannelGraph, plan: LowerPlan) -> LowerPlan:
    """The plan of `plan_lower` with filters, channels and branches in an order of their own; nothing else changes.

    Channels that something pins keep their place, and so do those whose order some operation relies on.
    """
    if not any(layer.groups for layer in plan.layers):
        return plan
    layout = _Layout(model, channels, plan)
    held = set(layout.families.fixed)
    while True:
        orders = layout.arranged(held)
        moved = {family for family, found in orders.items() if found != layout.families.members[family]}
        stands = layout.standing(orders)
        if not moved or layout.copied(stands) >= layout.copied(channels.root):
            return layout.planned(channels.root)
        touched = layout.broken(stands)
        if touched is None:
            return layout.planned(stands)
        held |= (touched & moved) or moved


@dataclass(frozen=True)
class _Wish:
    """What is to stand together all at once, and how many copied elements that saves."""

    sets: Sets
    saved: float


class _Layout:
    def __init__(self, model: nn.Module, channels: ChannelGraph, plan: LowerPlan) -> None:
        self.channels, self.plan = channels, plan
        self.removed = removed_wires(channels, plan)
        self.outcomes: dict[TracedModule, Outcome] = {
            part: simulate(part, channels, part.graph, self.removed) for part in parts_of(model).values()
        }
        self.families = Families(channels, self.outcomes.values(), self.removed)
        self.steps: dict[str, Step] = {s.name: s for s in reversed(channels.steps) if s.kind in ("conv", "depthwise")}
        self.prices = _prices(model, plan)
        self.wishes = list(self._wishes())

    def _wishes(self) -> Iterator[_Wish]:
        vectors = {layer.name: self._classes(self.steps[layer.name]) for layer in self.plan.layers}
        # Families take their order from where another one is wanted: from what branches read, then what they make.
        split = [vectors[layer.name] for layer in self.plan.layers if len(layer.groups) > 1]
        for classes in (*(ins for _, ins in split), *(outs for outs, _ in split), *itertools.chain(*vectors.values())):
            self.families.show(classes)
        for layer in self.plan.layers:
            if not layer.groups:
                continue
            (outs, ins), (price_out, price_in) = vectors[layer.name], self.prices[layer.name]
            out_runs, in_runs = self.families.runs(outs), self.families.runs(ins)
            for group in layer.groups:
                sets = self.families.together(in_runs, ins, group.channels)
                if sets:
                    yield _Wish(sets, price_in * len(group.channels))
            grouped = [group.filters for group in layer.groups]
            rest = set(range(len(outs))).difference(*grouped)
            found = [self.families.together(out_runs, outs, filters) for filters in grouped]
            found.append(self.families.together(out_runs, outs, rest, last=True))
            if any(found) and None not in found:
                yield _Wish(tuple(pair for sets in found for pair in sets or ()), price_out * len(outs))

    def _classes(self, step: Step) -> tuple[list[int], list[int]]:
        """The classes of a layer's filters and of its input channels, as they are kept."""
        outs, ins = (self.channels.root[v[~self.removed[v]]].tolist() for v in (step.out, step.ins[0]))
        return outs, ins

    def arranged(self, held: set[int]) -> Orders:
        """The order of each family in which as much as possible of what is wished for holds, but those `held`."""
        members = self.families.members
        trees = {family: row(range(len(found)), family in held) for family, found in members.items()}
        for wishes in _independent(self.wishes):
            best, saved, refused = _granted(trees, wishes)
            size = sum(len(members[family]) for family in best)
            for wish in refused[: _EFFORT // (size * len(wishes))]:
                other, more, _ = _granted(trees, [wish, *(w for w in wishes if w is not wish)])
                if more > saved:
                    best, saved = other, more
            trees |= best
        return {family: [members[family][place] for place in order(tree)] for family, tree in trees.items()}

    def standing(self, orders: Orders) -> Tensor:
        """int64 [wires]: the class that stands where each wire's class stood."""
        stands = self.channels.root.clone()
        for family, found in orders.items():
            stands[self.families.members[family]] = stands.new_tensor(found)
        return stands[self.channels.root]

    def broken(self, stands: Tensor) -> set[int] | None:
        """The families at operations that would no longer mean the same; None where there is none."""
        faults = []
        for part, outcome in self.outcomes.items():
            trial = replace(outcome, repairs=dict(outcome.repairs))
            faults += check_order(part, self.channels, part.graph, self.removed, trial, stands)
        read = [self.channels.values[n] for node, _ in faults for n in (node, *node.all_input_nodes)]
        return self.families.touching(tensors_in(read)) if faults else None

    def planned(self, stands: Tensor) -> LowerPlan:
        """The plan in this order."""
        return LowerPlan(tuple(self._planned(layer, stands) for layer in self.plan.layers))

    def _planned(self, layer: LoweredLayer, stands: Tensor) -> LoweredLayer:
        step = self.steps[layer.name]
        filters, sources = (kept_in_order(v, self.channels, self.removed, stands) for v in (step.out, step.ins[0]))
        # Where the first, second, ... of the kept ones, which the groups count, stand now.
        o, c = filters.argsort().tolist(), sources.argsort().tolist()
        groups = [
            Group(tuple(sorted(o[i] for i in g.filters)), tuple(sorted(c[i] for i in g.channels))) for g in layer.groups
        ]
        return replace(
            layer,
            filters=tuple(filters.tolist()),
            channels=tuple(sources.tolist()) if layer.channels else (),
            groups=tuple(sorted(groups, key=lambda group: group.filters)),
        )

    def copied(self, stands: Tensor) -> float:
        """The elements that all branches copy in selecting and in reordering, for one image."""
        layers = [layer for layer in self.planned(stands).layers if layer.groups]
        return sum(_copied(layer, *self.prices[layer.name]) for layer in layers)


def _copied(layer: LoweredLayer, price_out: float, price_in: float) -> float:
    selected = sum(len(g.channels) for g in layer.groups if g.channels[-1] - g.channels[0] >= len(g.channels))
    filters = [o for g in layer.groups for o in g.filters]
    reordered = 0 if filters == list(range(len(filters))) else len(layer.filters)
    return price_in * selected + price_out * reordered


def _prices(model: nn.Module, plan: LowerPlan) -> dict[str, tuple[float, float]]:
    """Of the layers with branches: the elements of one channel of the output and of the input, in all calls."""
    split = {layer.name for layer in plan.layers if layer.groups}
    prices = {}
    for name, cost in layer_costs(model).items():
        if name in split:
            positions = cost.macs_per_pair / cost.params_per_pair
            stride: tuple[int, ...] = model.get_submodule(name).stride  # type: ignore[assignment]
            prices[name] = positions, positions * math.prod(stride)
    return prices


def _granted(trees: dict[int, Tree], wishes: Sequence[_Wish]) -> tuple[dict[int, Tree], float, list[_Wish]]:
    """(the trees in which one wish after the other holds that can, what that saves, the wishes that cannot)."""
    granted = {family: trees[family] for wish in wishes for family, _ in wish.sets}
    saved, refused = 0.0, []
    for wish in wishes:
        trial = dict(granted)
        for family, leaves in wish.sets:
            trial[family] = gather(trial[family], leaves)
            if trial[family] is None:
                refused.append(wish)
                break
        else:
            granted, saved = trial, saved + wish.saved
    return granted, saved, refused


def _independent(wishes: Sequence[_Wish]) -> list[list[_Wish]]:
    """The wishes, the largest first, in lists that share no family."""
    found: list[tuple[set[int], list[_Wish]]] = []
    for wish in wishes:
        families, joined = {family for family, _ in wish.sets}, [wish]
        for one in [one for one in found if one[0] & families]:
            found.remove(one)
            families, joined = families | one[0], one[1] + joined
        found.append((families, joined))
    return [sorted(joined, key=lambda wish: -wish.saved) for _, joined in found]
