"""settle: the plan that is measured closest below a latency, for networks whose time follows the prediction or not."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from dspfx.deploy.settle import CLOSE, SLACK, TRIES, settle
from dspfx.errors import BudgetError
from dspfx.plans import PrunePlan


class Network:
    """A network whose time is a function of what is left by the prediction, and which can lose only so much of it."""

    def __init__(self, time: Callable[[float], float], floor: float = 0.0, step: float = 0.0) -> None:
        self.time, self.floor, self.step = time, floor, step
        self.asked: list[float] = []
        self.measured: list[float] = []

    def plan_at(self, share: float) -> PrunePlan:
        self.asked.append(share)
        if share < self.floor:
            raise BudgetError(f"the floor of {share:.3f}.")
        left = share - share % self.step if self.step else share
        return PrunePlan((), left, left, left, 0.0)

    def measure(self, plan: PrunePlan) -> float:
        self.measured.append(self.time(plan.flops_left))
        return self.measured[-1]

    def settled(self, latency: float, tries: int = TRIES) -> PrunePlan:
        return settle(latency, self.plan_at, self.measure, tries)


CURVES: dict[str, Callable[[float], float]] = {
    "as predicted": lambda share: share,
    "less than half counts": lambda share: 0.3 + 0.7 * share,
    "more than predicted": lambda share: share**2,
    "the last bit costs": lambda share: share**0.4,
    "hardly anything until late": lambda share: 0.98 * share**0.25,
    "lowering alone is much": lambda share: 0.5 * share,
    "a step": lambda share: 0.1 + 0.3 * share + 0.4 / (1 + 2.718 ** (-40 * (share - 0.45))),
}


@pytest.mark.parametrize("latency", [0.45, 0.5, 0.75])
@pytest.mark.parametrize("name", CURVES)
def test_monotone_times_are_met(name: str, latency: float) -> None:
    network = Network(CURVES[name])
    plan = network.settled(latency)
    assert plan.latency_left == network.time(plan.flops_left)
    assert len(network.measured) <= TRIES
    assert all(0 < share <= 1 for share in network.asked)
    below = [found for found in network.measured if found <= SLACK * latency]
    assert plan.latency_left == max(below) or CLOSE * latency <= plan.latency_left <= latency
    if name == "lowering alone is much" and latency > 0.5:
        assert plan.latency_left > 0.49  # next to nothing was pruned
    else:
        assert CLOSE * latency <= plan.latency_left <= SLACK * latency


def test_the_first_that_fits_is_taken() -> None:
    network = Network(CURVES["as predicted"])
    assert network.settled(0.5).latency_left == 0.5
    assert network.asked == [0.5]
    for found in (CLOSE * 0.5, 0.5):
        network = Network(lambda _, found=found: found)  # type: ignore[misc]
        assert network.settled(0.5).latency_left == found
        assert network.asked == [0.5]


def test_the_whole_network_is_never_pruned_for_its_own_time() -> None:
    network = Network(lambda share: 0.9 * share)
    plan = network.settled(1.0)
    assert (plan.flops_left, plan.latency_left) == (1.0, 0.9)
    assert network.asked == [1.0]


def test_a_little_slower_than_asked_is_the_last_resort() -> None:
    times = iter([0.51, 0.3, 0.505, 0.2, 0.2, 0.2, 0.2])
    plan = settle(0.5, Network(lambda _: 0.0).plan_at, lambda _: next(times))
    assert plan.latency_left == 0.51
    times = iter([0.511, 0.3, 0.511, 0.2, 0.2, 0.2, 0.2])
    assert settle(0.5, Network(lambda _: 0.0).plan_at, lambda _: next(times)).latency_left == 0.3


def test_steps_end_the_search_early() -> None:
    network = Network(lambda share: 0.7 if share > 0.4 else 0.3)
    plan = network.settled(0.5, tries=50)
    assert plan.latency_left == 0.3
    assert network.asked[-1] == pytest.approx(0.4, abs=0.01)
    assert len(network.asked) < 15


def test_coarse_plans_are_met_as_closely_as_they_allow() -> None:
    network = Network(lambda share: share, step=0.25)
    assert network.settled(0.7).latency_left == 0.5


@pytest.mark.parametrize("tries", [1, 2, 5, TRIES])
def test_no_more_is_tried_than_allowed(tries: int) -> None:
    network = Network(lambda share: 0.9)
    message = (
        "a latency of 0.500 is below what this network can reach: the fastest that was tried measured 0.900 of the "
        "dense network's time. Raise the budget, or gate more layers."
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        network.settled(0.5, tries)
    assert len(network.asked) == tries


def test_a_floor_of_the_prediction_is_told_where_nothing_could_be_measured() -> None:
    network = Network(lambda share: share, floor=0.99)
    with pytest.raises(BudgetError, match=r"^the floor of 0\.500\.$"):  # of what the user asked for
        network.settled(0.5, tries=3)
    assert network.measured == []
    assert network.asked == [0.5, 0.75, 0.875]


def test_a_floor_of_the_prediction_leads_to_what_was_measured_above_it() -> None:
    network = Network(lambda share: 0.4 + 0.6 * share, floor=0.45)
    with pytest.raises(BudgetError) as caught:
        network.settled(0.5)
    assert f"the fastest that was tried measured {min(network.measured):.3f} of" in str(caught.value)
    assert min(network.measured) == pytest.approx(0.67, abs=0.03)


def test_the_whole_time_and_a_slower_network() -> None:
    with pytest.raises(BudgetError, match=r"^a latency of 1\.000 is below .+ measured 1\.050 of"):
        Network(lambda share: 1.05).settled(1.0, tries=1)


def test_shares_above_the_floor_are_tried_after_one_below_it() -> None:
    network = Network(lambda share: 0.2 + 0.6 * share, floor=0.45)
    plan = network.settled(0.49)  # 0.45 and a little measures 0.47 and more
    assert plan.latency_left is not None
    assert CLOSE * 0.49 <= plan.latency_left <= SLACK * 0.49


def test_nothing_else_of_the_plan_changes() -> None:
    plan = PrunePlan((), 0.5, 0.4, 0.3, 0.2)
    found = settle(0.6, lambda share: plan, lambda plan: 0.59)
    assert found == PrunePlan((), 0.5, 0.4, 0.3, 0.2, 0.59)
    assert plan.latency_left is None
