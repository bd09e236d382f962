"""FormCase, build_form and AnyWidth: what is built has the case's sizes, and widths between nodes lie on lines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dspfx.forms import NODES, AnyWidth, Branch, FormCase, build_form, case_of
from dspfx.modules import GatedLayer, GroupConv2d

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(3, 5, 4, stride=2, padding=1, dilation=2), (2, 3, 20)),
    "conv2d": (nn.Conv2d(4, 6, (3, 1), stride=(1, 2), padding=(2, 0)), (1, 4, 9, 8)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=1), (1, 2, 3, 4, 5)),
    "same": (nn.Conv2d(3, 4, 3, padding="same", dilation=2), (1, 3, 8, 8)),
    "valid": (nn.Conv1d(3, 4, 3, padding="valid"), (1, 3, 8)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3), (1, 6, 5, 5)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 5)),
    "multiplied depthwise": (nn.Conv1d(4, 8, 3, groups=4), (2, 4, 9)),
    "transposed1d": (nn.ConvTranspose1d(3, 5, 2, stride=2), (1, 3, 6)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (1, 4, 5, 6)),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3)),
    "linear": (nn.Linear(7, 5), (2, 7)),
    "linear of tokens": (nn.Linear(7, 5), (2, 3, 4, 7)),
}
CONV = FormCase("dense", "Conv2d", (1, 64, 8, 8), 64, (3, 3), (1, 1), (1, 1), (1, 1))


def same_case(branches: tuple[Branch, ...], is_ordered: bool, channels: int = 20) -> FormCase:
    filters = sum(b.filters for b in branches)
    shape = (1, channels, 7, 6)
    return FormCase("branches", "Conv2d", shape, filters, (3, 3), (1, 1), (1, 1), (1, 1), 1, branches, is_ordered)


def case(name: str) -> FormCase:
    found = case_of(*LAYERS[name])
    assert found is not None
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_built_again_from_its_case(name: str) -> None:
    module, shape = LAYERS[name]
    built = build_form(case(name))
    assert type(built) is type(module)
    assert repr(built) == repr(module)
    assert [(k, v.shape) for k, v in built.named_parameters()] == [(k, v.shape) for k, v in module.named_parameters()]
    assert case_of(built, shape) == case(name)
    assert built(torch.zeros(shape)).shape == module(torch.zeros(shape)).shape


def test_gated_layers_count_as_the_layers_they_replaced() -> None:
    for name in ("conv1d", "same", "transposed3d", "linear"):
        module, shape = LAYERS[name]
        assert case_of(GatedLayer.gate(module, 2), shape) == case(name)


@pytest.mark.parametrize("module", [nn.BatchNorm2d(4), nn.ReLU(), nn.LSTM(4, 4), nn.Sequential(nn.Conv2d(4, 4, 1))])
def test_other_modules_have_no_case(module: nn.Module) -> None:
    assert case_of(module, (1, 4, 8, 8)) is None


def test_keys_are_equal_where_cases_are() -> None:
    one, other = Branch(4, 10, True), Branch(8, 10, False)
    cases = [
        *[case(name) for name in LAYERS],
        *[case_of(nn.Conv2d(4, 6, 3, **options), (1, 4, 9, 8)) for options in _options()],
        *[same_case(branches, flag) for branches in ((one, other), (other, one), (one, one)) for flag in (True, False)],
        same_case((Branch(4, 10, False), other), True),
        CONV.resized(6, 46),
        CONV.resized(64, 6),
    ]
    twins = [eval(repr(c)) for c in cases]
    assert twins == cases
    assert [c.key for c in twins] == [c.key for c in cases if c]
    assert len({c.key for c in twins}) == len(set(cases)) == len(cases)


def _options() -> list[dict[str, Any]]:
    return [{}, {"stride": 2}, {"padding": 2}, {"dilation": 2}, {"groups": 2}, {"padding": "same"}, {"stride": (1, 2)}]


@pytest.mark.parametrize("name", LAYERS)
def test_resized_layers_differ_in_widths_only(name: str) -> None:
    shape = LAYERS[name][1]
    whole = case(name)
    small = whole.resized(whole.filters - whole.filters // whole.groups or 1, whole.channels - whole.groups or 1)
    assert small.channels == (whole.channels - whole.groups or 1)
    assert small.resized(whole.filters, whole.channels) == whole
    axis = -1 if name.startswith("linear") else 1
    assert [n for i, n in enumerate(small.shape) if i != axis % len(shape)] == [
        n for i, n in enumerate(shape) if i != axis % len(shape)
    ]


@pytest.mark.parametrize("is_ordered", [True, False])
@pytest.mark.parametrize(
    "branches",
    [
        (Branch(4, 10, True), Branch(12, 14, True)),
        (Branch(8, 5, False), Branch(8, 19, False), Branch(4, 20, False)),
        (Branch(8, 5, False), Branch(16, 12, True), Branch(9, 2, False)),
        tuple(Branch(3, 1 + i, i % 2 == 0) for i in range(6)),
    ],
)
def test_branches_have_their_widths_and_ways_of_reading(branches: tuple[Branch, ...], is_ordered: bool) -> None:
    built = build_form(same_case(branches, is_ordered))
    assert isinstance(built, GroupConv2d)
    assert [(len(g.filters), len(g.channels)) for g in built.groups] == [(b.filters, b.channels) for b in branches]
    assert [tuple(m.state_dict()["weight"].shape[:2]) for m in built.branches] == [
        (b.filters, b.channels) for b in branches
    ]
    assert [span is not None for span in built.slices] == [b.is_slice or b.channels == 20 for b in branches]
    assert built.is_ordered == is_ordered
    for group in built.groups:
        assert list(group.channels) == sorted(set(group.channels))
        assert 0 <= group.channels[0] <= group.channels[-1] < 20
    assert built(torch.zeros(1, 20, 7, 6)).shape == (1, sum(b.filters for b in branches), 7, 6)


def test_slices_lie_at_even_distances() -> None:
    built = build_form(same_case(tuple(Branch(2, 8, True) for _ in range(4)), True))
    assert isinstance(built, GroupConv2d)
    assert built.slices == [(0, 8), (4, 12), (8, 16), (12, 20)]


class Asked:
    """A clock that notes what it was asked: a million pairs of (filters, channels) take a time of their own."""

    def __init__(self) -> None:
        self.cases: list[FormCase] = []

    def __call__(self, case: FormCase) -> float:
        self.cases.append(case)
        each = [(b.filters, b.channels) for b in case.branches] or [(case.filters, case.channels)]
        return sum((o * 7919 % 101) + (c * 104729 % 103) + o * c / 64 for o, c in each) + len(each) / 16


def test_widths_at_the_nodes_are_what_the_clock_says() -> None:
    for filters in (8, 16, 32, 48, 64):
        for channels in (8, 16, 32, 48, 64):
            clock = Asked()
            assert AnyWidth(clock, 8).dense(CONV, filters, channels) == clock(CONV.resized(filters, channels))


def bracket(size: int, nodes: list[int]) -> tuple[int, int, float]:
    """The nodes around a size, by looking at all of them, and how far it is from the first to the second."""
    below, above = [n for n in nodes if n <= size], [n for n in nodes if n >= size]
    low, high = max(below or above[:1]), min(above)
    return low, high, (size - low) / (high - low) if high > low else 0.0


@pytest.mark.parametrize(
    ("whole", "block", "nodes"),
    [((64, 64), 1, [8, 16, 32, 48, 64]), ((64, 64), 16, [8, 16, 32, 48, 64]), ((60, 60), 8, [8, 16, 32, 48, 60])],
)
def test_widths_between_nodes_lie_on_lines(whole: tuple[int, int], block: int, nodes: list[int]) -> None:
    clock, (o, c) = Asked(), whole
    times = AnyWidth(clock, block)
    layer = CONV.resized(o, c)
    for filters in (1, 5, 8, 9, 17, 23, 33, 40, o - 5, o - 1, o):
        for channels in (3, 20, 41, c):
            sizes = [min(n if n <= block else (n + block - 1) // block * block, o) for n in (filters, channels)]
            (o0, o1, p), (c0, c1, q) = (bracket(size, nodes) for size in sizes)
            at = {(a, b): clock(layer.resized(a, b)) for a in (o0, o1) for b in (c0, c1)}
            upper = (1 - q) * at[o1, c0] + q * at[o1, c1]
            expected = (1 - p) * ((1 - q) * at[o0, c0] + q * at[o0, c1]) + p * upper
            assert times.dense(layer, filters, channels) == pytest.approx(expected, rel=1e-12)


def test_whole_blocks_take_the_time_of_the_last_channel() -> None:
    times = AnyWidth(lambda case: float(case.filters * case.channels), 16)
    assert [times.dense(CONV, n, 64) / 64 for n in (16, 17, 31, 32, 33, 47, 48, 49, 64)] == [
        *(16, 32, 32, 32, 48, 48, 48, 64, 64)
    ]
    assert [times.dense(CONV, n, 64) / 64 for n in (8, 10, 12)] == [8, 10, 12]  # parts of the first block count


def test_branches_are_equal_and_lie_on_lines_too() -> None:
    clock = Asked()
    times = AnyWidth(clock, 8)
    at = {}
    for each, channels in ((8, 32), (12, 32), (8, 48), (12, 48)):
        branches = (Branch(each, channels, False),) * 4
        at[each, channels] = clock(
            FormCase(**(vars(CONV) | {"form": "branches", "filters": 4 * each, "branches": branches}))
        )
    clock.cases.clear()
    found = times.branches(CONV, 4, 40, 40)  # halfway between 32 and 48 in both
    assert found == pytest.approx(sum(at.values()) / 4, rel=1e-12)
    assert all(case.form == "branches" and case.shape == CONV.shape for case in clock.cases)
    assert {b.is_slice for case in clock.cases for b in case.branches} == {False}
    clock.cases.clear()
    times.branches(CONV, 2, 64, 32)
    assert {b.is_slice for case in clock.cases for b in case.branches} == {True}


def test_a_grouped_layer_loses_whole_groups() -> None:
    clock = Asked()
    times = AnyWidth(clock, 8)
    layer = FormCase("dense", "Conv2d", (1, 32, 8, 8), 64, (3, 3), (1, 1), (1, 1), (1, 1), groups=16)
    assert times.dense(layer, 64, 32) == clock(layer)
    half = FormCase("dense", "Conv2d", (1, 16, 8, 8), 32, (3, 3), (1, 1), (1, 1), (1, 1), groups=8)
    assert times.dense(layer, 32, 16) == times.dense(layer, 35, 1) == clock(half)
    assert all(c.filters / c.groups == 4 and c.channels / c.groups == 2 for c in clock.cases)


@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize("groups", [1, 4, 64])
def test_the_clock_is_asked_for_few_cases_of_a_layer(groups: int, block: int) -> None:
    clock = Asked()
    times = AnyWidth(clock, block)
    layer = FormCase("dense", "Conv2d", (1, 64, 8, 8), 64, (3, 3), (1, 1), (1, 1), (1, 1), groups=groups)
    found = [[times.dense(layer, o, c) for o in range(1, 65)] for c in (1, 7, 30, 64)]
    assert len(clock.cases) == len(set(clock.cases)) <= (len(NODES) ** 2 if groups == 1 else len(NODES))
    assert found[-1][-1] == Asked()(layer)
    clock.cases.clear()
    if groups == 1:
        for o in range(4, 65):
            for c in (1, 7, 30, 64):
                times.branches(layer, 4, o, c)
        assert len(clock.cases) == len(set(clock.cases)) <= len(NODES) ** 2
