"""Decides what a network keeps so that its layers take a share of their time: what goes is what buys the most of it.

Channels that are made and read by the same layers are a *family*; it loses whole blocks of channels, those of least
energy. A layer that is faster in branches can lose group channels as well, equally many in each group. What goes next
is what loses the least of its layers' energies for a millisecond, on a logarithmic scale.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspfx.errors import BudgetError
from dspfx.forms import AnyWidth, Clock, FormCase, case_of
from dspfx.graph.channels import ChannelGraph, Step
from dspfx.graph.liveness import Reads, liveness
from dspfx.method.importance import group_energy
from dspfx.passes.choose_form import BY_RULE
from dspfx.passes.plan_prune import Energy, Search
from dspfx.plans import PrunePlan


@dataclass(eq=False)
class _Layer:
    """A layer with what it keeps.

    Attributes:
        cases: its calls as they were before anything went.
        share: float64 [O, C], each pair's part of the layer's energy; zero where it is gone.
        reads: the groups, of a gated layer.
        filters, channels: its width in the dense form.
        width: the channels of each group, once group channels have gone for the sake of branches.
    """

    cases: list[FormCase]
    share: Tensor
    reads: Reads | None
    filters: int
    channels: int
    width: int = 0

    def ms(self, times: AnyWidth, filters: int = -1, channels: int = -1, width: int = -1) -> float:
        """Milliseconds, of other sizes where some are given."""
        filters, channels = (self.filters if filters < 0 else filters), (self.channels if channels < 0 else channels)
        width = min(self.width if width < 0 else width, channels)
        dense = sum(times.dense(case, filters, channels) for case in self.cases)
        if not width or self.reads is None:
            return dense
        groups = len(self.reads.keep)
        return min(dense, sum(times.branches(case, groups, filters, width) for case in self.cases) / BY_RULE.margin)


@dataclass(eq=False)
class _Family:
    """Classes of channels with the same makers and readers: (layer, True for maker) -> wires of each class [R, n]."""

    roots: Tensor
    wires: dict[tuple[str, bool], Tensor]


@dataclass(frozen=True, eq=False)
class _Step:
    """What can go next: classes of a family, or group channels of a layer down to `width`."""

    loss: float
    gain: float
    family: int = -1
    rows: Tensor | None = None
    layer: str = ""
    width: int = 0

    def price(self, useful: float) -> float:
        """Loss for a millisecond, of which no more than `useful` are wanted."""
        return self.loss / min(self.gain, useful)


def plan_latency(
    model: nn.Module, channels: ChannelGraph, target: float, energy: Energy, clock: Clock, block: int
) -> PrunePlan:
    """The PrunePlan after which the layers take `target` of their milliseconds before any pruning, by the clock.

    `block` is the number of channels that the runtime computes together. Raises BudgetError, naming the floor, where
    that cannot be reached, and ModelError where a weight or an energy is not finite.
    """
    state = _State(model, channels, Search(model, channels, energy), AnyWidth(clock, block))
    goal = target * state.dense_ms
    while (too_much := sum(state.ms.values()) - goal) > 0:
        step = min(state.steps(), key=lambda step: step.price(too_much), default=None)
        if step is None:
            raise BudgetError(
                f"a latency of {target:.3f} is below what this network can reach: with the least that can be kept, "
                f"its layers take {1 + (too_much - state.dense_ms + goal) / state.dense_ms:.3f} of their time. Raise "
                f"the budget, or gate more layers."
            )
        state.take(step)
    reads = {name: layer.reads for name, layer in state.layers.items() if layer.reads is not None}
    return state.search.plan(state.search.count(state.search.dense | reads))


class _State:
    """The network in the middle of pruning."""

    def __init__(self, model: nn.Module, channels: ChannelGraph, search: Search, times: AnyWidth) -> None:
        self.search, self.times = search, times
        kept = search.count(search.rows(0))
        gone = liveness(channels, kept.reads).removable(channels)
        modules = dict(model.named_modules())
        steps = {s.name: s for s in reversed(channels.steps) if s.kind in ("conv", "depthwise") and s.name in modules}
        self.layers: dict[str, _Layer] = {}
        self.dense_ms = 0.0
        for name, step in steps.items():
            cost = search.costs.get(name)
            cases = [case_of(modules[name], shape) for shape in cost.input_shapes] if cost else []
            known = [case for case in cases if case is not None]
            if known:
                self.dense_ms += sum(times.dense(case, case.filters, case.channels) for case in known)
                self.layers[name] = self._layer(model, step, known, kept.reads, gone)
        self.ms = {name: layer.ms(times) for name, layer in self.layers.items()}
        self.families = _families(channels, {name: steps[name] for name in self.layers}, gone, set(search.gated))
        self.found: dict[str | int, list[_Step]] = {}
        self.touching: dict[str, list[int]] = defaultdict(list)
        for index, family in enumerate(self.families):
            for name, _ in family.wires:
                self.touching[name].append(index)

    def _layer(
        self, model: nn.Module, step: Step, cases: list[FormCase], reads: dict[str, Reads], gone: Tensor
    ) -> _Layer:
        gate = next((layer for layer in self.search.layers if layer.name == step.name), None)
        filters, channels = int((~gone[step.out]).sum()), int((~gone[step.ins[0]]).sum())
        if gate is not None:
            read = reads[step.name]
            share = gate.energies * read.pairs()
            mine = Reads(read.keep.clone(), read.row.clone())
            return _Layer(cases, share / share.sum().clamp(min=1e-30), mine, filters, channels)
        weight = step.layer.tensor(model, "weight") if step.layer else None
        assert weight is not None
        assert step.layer is not None
        share = torch.zeros(len(step.out), len(step.ins[0]), dtype=torch.float64)
        if step.kind == "conv" and step.layer.groups == 1:
            share = step.layer.by_filter(weight.detach()).double().square().sum(-1).cpu()
        return _Layer(cases, share / share.sum().clamp(min=1e-30), None, filters, channels)

    def steps(self) -> Iterator[_Step]:
        """Everything that can go next and buys something; kept until a layer that it depends on changes."""
        for index in range(len(self.families)):
            if index not in self.found:
                self.found[index] = [step for step in self._family_steps(index) if step.gain > 0]
            yield from self.found[index]
        for name in self.layers:
            if name not in self.found:
                self.found[name] = [step for step in self._group_steps(name) if step.gain > 0]
            yield from self.found[name]

    def _family_steps(self, index: int) -> Iterator[_Step]:
        family = self.families[index]
        count = len(family.roots)
        each = []  # [layers of the family, R]: what a class is of the energy that a layer has left
        for (name, is_maker), wires in family.wires.items():
            share = self.layers[name].share
            each.append(share.sum(1 if is_maker else 0)[wires].sum(1) / share.sum().clamp(min=1e-30))
        part = torch.stack(each)
        order = part.sum(0).argsort(stable=True)
        lost = _loss(part[:, order].cumsum(1)).sum(0)
        for left in _levels(count, self.times.block):
            gain = 0.0
            for name in dict.fromkeys(name for name, _ in family.wires):  # in one order in every process
                layer, size = self.layers[name], [0, 0]
                for place, is_maker in enumerate((True, False)):
                    if (name, is_maker) in family.wires:
                        size[place] = family.wires[name, is_maker].shape[1] * (count - left)
                filters, channels = layer.filters - size[0], layer.channels - size[1]
                gain += self.ms[name] - layer.ms(self.times, max(filters, 1), max(channels, 1))
            yield _Step(float(lost[count - left - 1]), gain, index, order[: count - left])

    def _group_steps(self, name: str) -> Iterator[_Step]:
        layer = self.layers[name]
        can_split = all(case.kind == "Conv2d" and case.groups == 1 for case in layer.cases)
        if layer.reads is None or not can_split or len(layer.reads.keep) < 2:
            return
        width = int(layer.reads.keep.sum(1).max())
        shares = group_energy(layer.share, layer.reads.row, len(layer.reads.keep)).sort(1, descending=True).values
        for left in _levels(width, self.times.block):
            gain = self.ms[name] - layer.ms(self.times, width=left)
            part = shares[:, left:].sum() / shares.sum().clamp(min=1e-30)
            yield _Step(float(_loss(part)), gain, layer=name, width=left)

    def take(self, step: _Step) -> None:
        """Carries a step out."""
        changed = {step.layer}
        if step.layer:
            self._drop_group_channels(self.layers[step.layer], step.width)
        else:
            assert step.rows is not None
            family = self.families[step.family]
            for (name, is_maker), wires in family.wires.items():
                _drop(self.layers[name], is_maker, wires[step.rows].flatten())
            left = torch.ones(len(family.roots), dtype=torch.bool)
            left[step.rows] = False
            family.roots = family.roots[left]
            family.wires = {key: wires[left] for key, wires in family.wires.items()}
            changed = {name for name, _ in family.wires}
        for name in changed:
            self.ms[name] = self.layers[name].ms(self.times)
            self.found.pop(name, None)
            for index in self.touching[name]:
                self.found.pop(index, None)

    def _drop_group_channels(self, layer: _Layer, width: int) -> None:
        assert layer.reads is not None
        keep = layer.reads.keep
        shares = torch.where(keep, group_energy(layer.share, layer.reads.row, len(keep)), -1.0)
        best = torch.zeros_like(keep).scatter_(1, shares.topk(width, 1).indices, True)
        layer.reads.keep = keep & best
        layer.share = layer.share * layer.reads.pairs()
        layer.width = width


def _loss(part: Tensor) -> Tensor:
    """What losing `part` of a layer's remaining energy counts: to lose half of it counts the same however often it
    happens, so that no layer is emptied while others are whole."""
    return -torch.log1p(-part.clamp(0, 1 - 1e-9))


def _drop(layer: _Layer, is_maker: bool, wires: Tensor) -> None:
    """Filters or channels go; the groups only say so where the layer has a gate, all others follow by liveness."""
    if is_maker:
        layer.share[wires] = 0
        layer.filters = max(layer.filters - len(wires), 1)
        if layer.reads is not None:
            layer.reads.row[wires] = -1
    else:
        layer.share[:, wires] = 0
        layer.channels = max(layer.channels - len(wires), 1)
        if layer.reads is not None:
            layer.reads.keep[:, wires] = False


def _families(channels: ChannelGraph, steps: dict[str, Step], gone: Tensor, gated: set[str]) -> list[_Family]:
    """The families of all channels that can go: their makers all have gates, or their readers do."""
    places: dict[int, dict[tuple[str, bool], list[int]]] = defaultdict(lambda: defaultdict(list))
    fixed = gone | channels.pinned()
    for name, step in steps.items():
        for is_maker, wires in ((True, step.out), (False, step.ins[0])):
            for position, (root, is_fixed) in enumerate(
                zip(channels.root[wires].tolist(), fixed[wires].tolist(), strict=True)
            ):
                if not is_fixed:
                    places[root][name, is_maker].append(position)
    members: dict[frozenset[tuple[tuple[str, bool], int]], list[int]] = defaultdict(list)
    for root, found in places.items():
        members[frozenset((key, len(positions)) for key, positions in found.items())].append(root)
    families = []
    for signature, roots in members.items():
        keys = sorted(key for key, _ in signature)
        dense = {
            side: [n for n, is_maker in keys if is_maker == side and steps[n].kind == "conv"] for side in (True, False)
        }
        if len(roots) > 1 and any(names and gated.issuperset(names) for names in dense.values()):
            families.append(
                _Family(torch.tensor(roots), {key: torch.tensor([places[r][key] for r in roots]) for key in keys})
            )
    return families


def _levels(count: int, block: int) -> list[int]:
    """What may be left of `count`: 1, 2, 4, ... blocks less, then parts of a block; at least one."""
    top = -(-count // block)
    whole = {(top - 2**i) * block for i in range(top.bit_length()) if 2**i < top}
    small = {size for size in (block, block // 2, block // 4) if 0 < size < count and count <= 4 * block}
    return sorted(whole | small, reverse=True)
