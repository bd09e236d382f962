"""reorder: where each channel comes from, and random orders of any network are refused or change nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dspfx.errors import MismatchError
from dspfx.graph.analyse import analyse
from dspfx.graph.arrange import END, START
from dspfx.graph.channels import ChannelGraph
from dspfx.graph.families import Families
from dspfx.graph.parts import trace_parts
from dspfx.graph.reorder import reordered
from dspfx.graph.simulate import simulate
from dspfx.graph.trace import trace
from dspfx.graph.traced import settle_eval
from dspfx.passes.lift_layers import lift_layers
from dspfx.passes.plan_lower import plan_lower
from dspfx.passes.remove_gates import remove_gates
from dspfx.passes.shrink_channels import kept_in_order, removed_wires, shrink_channels
from dspfx.plans import LowerPlan
from dspfx.selfcheck import TOLERANCE
from tests.compare import error, pruned, run
from tests.zoo import ZOO, ZooEntry

ROOT = torch.tensor([0, 1, 2, 3, 0, 1, 2])


@pytest.mark.parametrize(
    ("stands", "wires", "expected"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]),
        ([1, 2, 0, 3], [0, 1, 2, 3], [1, 2, 0, 3]),
        ([1, 0, 2, 3], [0, 3, 1], [2, 1, 0]),
        ([1, 0, 2, 3], [0, 1, 2, 4, 5, 6], [1, 0, 2, 4, 3, 5]),  # twice: each within its own half
        ([1, 0, 2, 3], [0, 4, 1, 5], [2, 3, 0, 1]),  # two wires of a class side by side
        ([1, 2, 0, 3], [0, 1, 3], None),
        ([1, 0, 2, 3], [0, 4, 1], None),
    ],
)
def test_places_are_filled_class_by_class(stands: list[int], wires: list[int], expected: list[int] | None) -> None:
    found = reordered(torch.tensor(wires), ROOT, torch.tensor(stands)[ROOT])
    assert (None if found is None else found.tolist()) == expected


class Halves(nn.Module):
    """Eight channels, of which the first four are read by themselves, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(13, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.c(torch.cat([x, self.b(x[:, :4])], 1))


def test_families_are_what_occurs_in_the_same_tensors() -> None:
    gm = trace(Halves(), torch.zeros(1, 3, 4, 4))
    channels = analyse(gm)
    nothing = torch.zeros(channels.num_wires, dtype=torch.bool)
    families = Families(channels, [simulate(gm, channels, gm.graph, nothing)], nothing)
    classes = {s.name: channels.root[s.out].tolist() for s in channels.steps if s.kind == "conv"}
    a, b, c = (families.of[classes[name]].tolist() for name in "abc")
    assert len({*a[:4]}) == len({*a[4:]}) == len({*b}) == 1
    assert len({a[0], a[4], b[0], c[0]}) == 4
    assert a[0] not in families.fixed
    assert c[0] in families.fixed
    families.show(classes["a"])
    runs = families.runs(classes["a"])
    assert runs == [(a[0], range(4)), (a[4], range(4, 8))]
    assert families.together(runs, classes["a"], [0, 2]) == ((a[0], frozenset({0, 2})),)
    assert families.together(runs, classes["a"], [0, 2, 5]) == (
        (a[0], frozenset({0, 2, END})),
        (a[4], frozenset({1, START})),
    )
    assert families.together(runs, classes["a"], [5, 6], last=True) == ((a[4], frozenset({1, 2, END})),)
    assert families.together(runs, classes["a"], [1, 5, 6], last=True) is None
    assert families.together(runs, classes["a"], range(4)) == ()


def any_order(channels: ChannelGraph, plan: LowerPlan, removed: Tensor, draw: random.Random) -> Tensor:
    """Some of the channels of one or two layers change places: of those that may, or of any."""
    stands = torch.arange(channels.num_wires)
    pinned = channels.pinned() if draw.random() < 0.8 else torch.zeros_like(removed)
    steps = {step.name: step for step in channels.steps if step.name in {layer.name for layer in plan.layers}}
    for name in draw.sample(sorted(steps), min(len(steps), draw.randint(1, 2))):
        out = steps[name].out
        classes = channels.root[out[~removed[out]]].unique().tolist()
        classes = [one for one in classes if stands[one] == one and not pinned[one]]
        if draw.random() < 0.5:
            classes = draw.sample(classes, min(len(classes), draw.randint(2, 4)))
        for old, new in zip(classes, draw.sample(classes, len(classes)), strict=True):
            stands[old] = new
    return stands[channels.root]


def ordered(channels: ChannelGraph, plan: LowerPlan, removed: Tensor, stands: Tensor) -> LowerPlan:
    steps = {step.name: step for step in reversed(channels.steps)}
    return LowerPlan(
        tuple(
            replace(one, filters=tuple(kept_in_order(steps[one.name].out, channels, removed, stands).tolist()))
            for one in plan.layers
        )
    )


@pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)
def test_any_order_is_refused_or_changes_nothing(entry: ZooEntry) -> None:
    gm = pruned(entry)
    inputs = entry.inputs(2, dtype=torch.float64)
    expected = run(gm.eval(), inputs)
    for seed in range(4):
        network: Any = settle_eval(trace_parts(gm, None))
        remove_gates(network)
        lift_layers(network)
        channels = analyse(network)
        plan = plan_lower(network, channels)
        removed = removed_wires(channels, plan)
        stands = any_order(channels, plan, removed, random.Random(seed))
        try:
            shrink_channels(network, channels, ordered(channels, plan, removed, stands))
        except MismatchError:
            continue
        assert error(expected, run(network, inputs)) <= TOLERANCE
