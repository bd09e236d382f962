"""choose_form and confirm_forms under clocks of the test's own; the rule without a clock is in test_lower_convs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from dspfx.forms import Form, FormCase
from dspfx.graph.analyse import analyse
from dspfx.graph.trace import trace
from dspfx.graph.traced import settle_eval
from dspfx.passes.choose_form import (
    BY_RULE,
    MAX_BRANCHES,
    Choice,
    LowerOptions,
    choose_form,
    confirm_forms,
    dense_case,
    groups_of,
    widened,
)
from dspfx.passes.lay_out import lay_out
from dspfx.passes.plan_lower import plan_lower
from dspfx.plans import Group

SHAPE = (1, 64, 8, 8)  # the layer's input before channels went; a choice is made for what is left


def kept(*rows: tuple[int, str]) -> Tensor:
    """bool [O, C]: so many filters that read the channels marked with x."""
    return torch.tensor([[c == "x" for c in row] for count, row in rows for _ in range(count)])


def choose(
    pairs: Tensor,
    clock: Callable[[FormCase], float],
    multiple: int = 1,
    splits: tuple[Form, ...] = ("branches",),
    padding: int | str = 1,
) -> Choice:
    conv = nn.Conv2d(64, 80, 3, padding=padding)
    return choose_form(conv, pairs, (SHAPE,), LowerOptions(multiple, clock, splits))


def work(case: FormCase) -> float:
    """The (filter, channel) pairs that are computed, and nothing for being several."""
    return float(sum(b.filters * b.channels for b in case.branches) or case.filters * case.channels)


def counting(cost: float) -> Callable[[FormCase], float]:
    """As `work`, and `cost` for each branch."""
    return lambda case: work(case) + cost * len(case.branches)


def never(case: FormCase) -> float:
    return 1.0


TWO = kept((4, "xxxx...."), (4, "....xxxx"))
FOUR = kept((2, "xx......"), (2, ".xx....."), (2, ".....xx."), (2, "......xx"))


@pytest.mark.parametrize("pairs", [TWO, FOUR, torch.ones(8, 8).bool()])
def test_dense_where_nothing_is_faster(pairs: Tensor) -> None:
    assert choose(pairs, never) == Choice("dense", (), 1.0)


def test_branches_where_the_clock_says_so() -> None:
    found = choose(TWO, work)
    assert found == Choice("branches", (Group((0, 1, 2, 3), (0, 1, 2, 3)), Group((4, 5, 6, 7), (4, 5, 6, 7))), ms=32.0)
    assert choose(TWO, work, splits=()) == Choice("dense", (), 64.0)


def test_the_kernel_where_it_is_allowed_and_can_pad() -> None:
    def clock(case: FormCase) -> float:
        return work(case) / (2 if case.form == "kernel" else 1)

    splits: tuple[Form, ...] = ("kernel", "branches")
    found = choose(TWO, clock, splits=splits)
    assert found == Choice("kernel", choose(TWO, clock).groups, 16.0)
    assert found.pairs(*TWO.shape) == 32
    assert choose(TWO, clock).form == "branches"
    assert choose(TWO, clock, splits=splits, padding="same").form == "branches"


@pytest.mark.parametrize(
    ("share", "form"),
    [(BY_RULE.margin + 1e-6, "dense"), (BY_RULE.margin, "dense"), (BY_RULE.margin - 1e-6, "branches")],
)
def test_branches_have_to_be_faster_by_the_margin(share: float, form: str) -> None:
    assert BY_RULE.margin == 0.97
    found = choose(TWO, lambda case: share if case.branches else 1.0)
    assert found.form == form
    assert found.ms == (share if form == "branches" else 1.0)


def test_among_branches_the_faster_wins_without_a_margin() -> None:
    times = {4: 0.9, 3: 0.899, 2: 0.95}
    found = choose(FOUR, lambda case: times.get(len(case.branches), 1.0))
    assert (len(found.groups), found.ms) == (3, 0.899)


def test_groups_merge_where_each_branch_costs() -> None:
    numbers = [len(choose(FOUR, counting(cost)).groups) for cost in (0.0, 3.9, 4.1, 20.0)]
    # 4 branches compute 4 * 4 = 16 pairs; 3: 8 + 12 = 20; 2: 24; one convolution of all 6 channels and 8 filters: 64.
    assert numbers == [4, 4, 2, 0]
    merged = choose(FOUR, counting(4.1))
    assert [g.filters for g in merged.groups] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [g.channels for g in merged.groups] == [(0, 1, 2), (5, 6, 7)]


def test_every_call_of_a_layer_counts() -> None:
    conv = nn.Conv2d(8, 8, 3)
    shapes = ((1, 8, 4, 4), (1, 8, 64, 64))

    def clock(case: FormCase) -> float:
        if case.form == "grouped":
            return 1e9
        return 10.0 if case.shape[2] == 4 and case.branches else float(case.shape[2]) / (1 + bool(case.branches))

    assert choose_form(conv, TWO, shapes, LowerOptions(1, clock)) == Choice("branches", _groups(TWO), 42.0)
    assert choose_form(conv, TWO, shapes[:1], LowerOptions(1, clock)) == Choice("dense", (), 4.0)


def _groups(pairs: Tensor) -> tuple[Group, ...]:
    """Filters with equal rows, in order of their first."""
    rows: dict[tuple[bool, ...], list[int]] = {}
    for o, row in enumerate(pairs.tolist()):
        rows.setdefault(tuple(row), []).append(o)
    return tuple(Group(tuple(members), tuple(c for c, x in enumerate(row) if x)) for row, members in rows.items())


def only(wanted: int, case: FormCase) -> float:
    """Just that many branches are fast."""
    return 1.0 if len(case.branches) == wanted else 2.0


@pytest.mark.parametrize("seed", range(8))
def test_what_is_computed_covers_what_is_kept(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(5, 12, generator=generator) < 0.4
    rows[:, 0] = True
    pairs = rows[torch.randint(5, (20,), generator=generator)]
    asked: list[FormCase] = []

    def clock(case: FormCase) -> float:
        asked.append(case)
        return work(case)

    for multiple in (1, 4):
        for wanted in range(1, len(pairs.unique(dim=0)) + 1):
            found = choose(pairs, partial(only, wanted), multiple)
            if found.form == "dense":  # one branch of all channels, or wider ones that leave nothing out
                assert wanted == 1 or multiple == 4
                continue
            assert len(found.groups) == wanted
            computed = torch.zeros_like(pairs)
            for group in found.groups:
                computed[torch.tensor(group.filters)[:, None], torch.tensor(group.channels)] = True
            assert bool((computed | ~pairs).all())
            assert found.pairs(*pairs.shape) == int(computed.sum()) < pairs.numel()
            assert sorted(o for g in found.groups for o in g.filters) == list(range(20))
            assert all(len(g.channels) % multiple == 0 or len(g.channels) == 12 for g in found.groups)
        choose(pairs, clock, multiple)
    assert {case.shape for case in asked} == {(1, 12, 8, 8)}
    assert {case.filters for case in asked} == {20}


def test_the_first_grouping_is_that_of_the_zeros_and_the_next_is_the_cheapest_merger() -> None:
    pairs = kept((3, "xx......"), (1, "xxx....."), (2, "....xx.."), (2, "......xx"))
    seen: dict[int, FormCase] = {}

    def clock(case: FormCase) -> float:
        seen[len(case.branches)] = case
        return work(case)

    assert choose(pairs, clock).groups == _groups(pairs)
    sizes = {n: [(b.filters, b.channels) for b in case.branches] for n, case in seen.items() if n}
    assert sizes[4] == [(3, 2), (1, 3), (2, 2), (2, 2)]
    best = min(
        sum(len(a) * int(pairs[list(a)].any(0).sum()) for a in parts)
        for parts in (
            [{*a, *b}, *(c for c in found if c not in (a, b))]
            for found in [_members(pairs)]
            for a, b in itertools.combinations(found, 2)
        )
    )
    assert sum(o * c for o, c in sizes[3]) == best == 20


def _members(pairs: Tensor) -> list[tuple[int, ...]]:
    return [group.filters for group in _groups(pairs)]


def test_branches_are_cases_of_what_is_left() -> None:
    cases: list[FormCase] = []
    choose(TWO, lambda case: cases.append(case) or 1.0)  # type: ignore[func-returns-value]
    dense, split = cases[:2]
    assert (dense.form, dense.filters, dense.shape, dense.padding) == ("dense", 8, (1, 8, 8, 8), (1, 1))
    assert (split.form, split.filters, split.shape, split.is_ordered) == ("branches", 8, (1, 8, 8, 8), True)
    assert [b.is_slice for b in split.branches] == [True, True]
    cases.clear()
    three = kept((2, "x.x....."), (2, ".xxx...."), (2, ".....xxx"))
    for pairs, is_ordered in ((three, True), (three[torch.tensor([0, 2, 4, 1, 3, 5])], False)):
        cases.clear()
        choose(pairs, lambda case: cases.append(case) or 1.0)  # type: ignore[func-returns-value]
        assert [b.is_slice for b in cases[1].branches] == [False, True, True]
        assert cases[1].is_ordered == is_ordered


def test_filters_that_read_nothing_cost_the_least() -> None:
    pairs = kept((2, "xxxx...."), (2, "........"), (3, "....xx.."))
    keep, row = groups_of(pairs)
    live = row[row >= 0]
    assert keep.tolist() == [list(pairs[0]), list(pairs[4])]
    assert [row[0].item(), row[4].item()] == [0, 1]
    assert set(live.tolist()) == {0, 1}
    assert 0 not in row[2:4].tolist()  # wherever they are, not in the wider group
    assert groups_of(torch.zeros(3, 4).bool())[0].shape == (0, 4)


@pytest.mark.parametrize("count", [MAX_BRANCHES, MAX_BRANCHES + 1])
def test_too_many_groups_stay_dense(count: int) -> None:
    pairs = torch.eye(count).bool().repeat_interleave(2, 0)
    assert choose(pairs, work).form == ("branches" if count <= MAX_BRANCHES else "dense")


@pytest.mark.parametrize("pairs", [torch.ones(8, 8).bool(), torch.zeros(8, 8).bool(), kept((1, "x"))])
def test_one_group_of_all_channels_is_dense(pairs: Tensor) -> None:
    assert choose(pairs, lambda case: 0.0 if case.branches else 1.0) == Choice("dense", (), 1.0)


def test_a_grouped_convolution_is_one_more_form() -> None:
    times = {"dense": 1.0, "branches": 0.6, "grouped": 0.5}
    cases: list[FormCase] = []

    def clock(case: FormCase) -> float:
        cases.append(case)
        return times[case.form]

    pairs = kept((4, "xxxx...."), (3, "....xxx."), (1, "......xx"))
    options = LowerOptions(1, clock)
    conv = nn.Conv2d(64, 80, 3)
    found = choose_form(conv, pairs, (SHAPE,), options)
    assert found == Choice("grouped", _groups(pairs), 0.5)
    assert found.pairs(8, 8) == 3 * 4 * 4  # padded to the largest
    grouped = [case for case in cases if case.form == "grouped"]
    assert [[(b.filters, b.channels) for b in case.branches] for case in grouped] == [[(4, 4), (3, 3), (1, 2)]]
    times["grouped"] = 0.6
    assert choose_form(conv, pairs, (SHAPE,), options).form == "grouped"  # the first of equals
    times["grouped"] = 0.61
    assert choose_form(conv, pairs, (SHAPE,), options).form == "branches"


@pytest.mark.parametrize(("copies", "form"), [(0.5, "branches"), (1.0, "dense")])
def test_branches_that_did_not_get_their_ranges_have_to_pay_all_the_same(copies: float, form: str) -> None:
    middle = nn.Conv2d(8, 8, 3, padding=1)
    with torch.no_grad():
        for half in (0, 1):
            middle.weight[half::2, 1 - half :: 2] = 0
    gm = settle_eval(trace(nn.Sequential(nn.Conv2d(3, 8, 1), middle, nn.Conv2d(8, 2, 1)), torch.zeros(1, 3, 4, 4)))

    def clock(case: FormCase) -> float:
        if case.form == "branches":
            return 0.25 if all(b.is_slice for b in case.branches) else copies
        return 1.0

    channels = analyse(gm)
    plan = plan_lower(gm, channels, LowerOptions(1, clock))
    hoped = plan.layers[1]
    assert (hoped.form, hoped.ms, 2 * hoped.macs_run) == ("branches", 0.25, hoped.macs)
    found = confirm_forms(gm, plan, LowerOptions(clock=clock)).layers  # nothing was laid out
    assert (found[0], found[2]) == (plan.layers[0], plan.layers[2])
    assert (found[1].form, found[1].ms) == (form, copies)
    assert found[1].groups == (hoped.groups if form == "branches" else ())
    assert found[1].macs_run == (hoped.macs_run if form == "branches" else hoped.macs)
    assert confirm_forms(gm, lay_out(gm, channels, plan), LowerOptions(clock=clock)).layers[1].ms == 0.25


def test_widths_grow_to_a_multiple_by_what_is_read_most() -> None:
    pairs = kept((5, "xx..x..."), (2, "..x...xx"), (1, "......x."))
    assert widened(pairs[0], pairs, 4).tolist() == [True, True, False, False, True, False, True, False]
    assert widened(pairs[0], pairs, 3).tolist() == pairs[0].tolist()
    assert widened(pairs[0], pairs, 16).all()
    for multiple, row in itertools.product(range(1, 10), pairs):
        wide = widened(row, pairs, multiple)
        assert bool((wide | ~row).all())
        assert int(wide.sum()) == min(-(-int(row.sum()) // multiple) * multiple, 8)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(8, 8, 3), (1, 8, 9)),
        (nn.Conv3d(8, 8, 1), (1, 8, 3, 3, 3)),
        (nn.ConvTranspose2d(8, 8, 3), (1, 8, 5, 5)),
        (nn.Linear(8, 8), (1, 8)),
        (nn.Conv2d(16, 16, 3, groups=2), (1, 16, 4, 4)),
    ],
)
def test_only_plain_2d_convolutions_have_branches(layer: nn.Module, shape: tuple[int, ...]) -> None:
    found = choose_form(layer, TWO, (shape,), LowerOptions(1, lambda case: 0.0 if case.branches else 1.0))
    assert found == Choice("dense", (), 1.0)


def test_layers_that_are_not_torchs_own_have_no_time() -> None:
    found = choose_form(nn.Identity(), TWO, (SHAPE,), LowerOptions(1, never))
    assert found == Choice("dense", (), None)
    assert dense_case(nn.Identity(), TWO, SHAPE) is None


def test_dense_computes_every_pair() -> None:
    assert Choice("dense").pairs(6, 7) == 42
    assert Choice("branches", (Group((0, 1, 2), (4,)), Group((3,), (0, 1, 2, 3, 4)))).pairs(6, 7) == 8
