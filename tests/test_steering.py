"""The strength that is steered by what pruning to a budget would cost."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dspfx
from dspfx import Budget, GroupLearner
from dspfx.errors import BudgetError, ConfigError, MismatchError
from dspfx.graph.analyse import analyse
from dspfx.method.importance import resolve
from dspfx.passes.plan_prune import plan_prune
from dspfx.steering import REACHED_AT, TARGET, Steering, relative_rate

BUDGET = Budget(flops=0.5)
STEPS = 60


def build() -> Any:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*body, nn.Conv2d(12, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return dspfx.prepare(network, torch.zeros(2, 3, 8, 8))


def sgd(gm: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(gm.parameters(), lr=0.05, momentum=0.9)


def train(gm: nn.Module, optimizer: torch.optim.Optimizer, learner: GroupLearner, steps: range) -> list[float]:
    """The factor at every step."""
    factors = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(6, 3, 8, 8, generator=generator), torch.randint(4, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
        if learner.mode == "exact":
            assert learner.step(lambda x=x, y=y: F.cross_entropy(gm(x), y))  # type: ignore[misc]
        factors.append(learner.stats().get("factor", 1.0))
    return factors


def steered(gm: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> GroupLearner:
    options: dict[str, Any] = {"budget": BUDGET, "strength": 0.01, "lr": 0.05} | more
    return GroupLearner(gm, optimizer, STEPS, **options)


# The rule


@pytest.mark.parametrize(
    ("before", "now", "windows", "expected"),
    [
        (0.4, 0.3, 1, math.log(0.3 / TARGET) / math.log(0.4 / 0.3)),
        (0.4, 0.3, 10, math.log(0.3 / TARGET) / 10 / math.log(0.4 / 0.3)),
        (0.4, 0.3, 0, math.log(0.3 / TARGET) / math.log(0.4 / 0.3)),  # what is left is to be made up for in one window
        (0.3, 0.3, 5, math.inf),
        (0.2, 0.3, 5, math.inf),
        (0.2, TARGET, 5, 0.0),
        (0.2, 0.0, 5, 0.0),
        (0.0, 0.0, 5, 0.0),
    ],
)
def test_the_rate_wanted_over_the_rate_observed(before: float, now: float, windows: float, expected: float) -> None:
    assert relative_rate(before, now, windows) == pytest.approx(expected)


@pytest.mark.parametrize("response", [10.0**k for k in range(-5, 0)])
@pytest.mark.parametrize("total", [100, 5000])
def test_a_plant_that_answers_weakly_or_strongly_is_steered_to_the_target(
    response: float, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """log(beta) falls, each 1% of the run, by the response times the strength, which ramps up; over four decades."""
    level = math.log(0.4)
    monkeypatch.setattr(Steering, "_measure", lambda self: math.exp(level))
    steering = Steering(build(), BUDGET, total, is_shared=False)
    at_end, steady = 0.0, set()
    for step in range(total):
        if step == round(REACHED_AT * total):
            at_end = level
        factor = steering.adjust(step)
        if step > REACHED_AT * total:
            steady.add(factor)
        level -= response * factor * (step + 1) / total * 100 / total
    assert len(steady) == 1
    if response in (1e-5, 1e-4):  # 1.3 a window and 1000 altogether are too little time for these
        assert at_end < math.log(0.4)
    else:
        assert at_end == pytest.approx(math.log(TARGET), abs=0.35)


# In a learner


def test_it_looks_at_every_window_until_three_quarters_and_then_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = build()
    optimizer, seen = sgd(gm), []
    with steered(gm, optimizer) as learner:
        measure = Steering._measure

        def spy(self: Steering) -> float:
            found = measure(self)
            assert found == plan_prune(gm, analyse(gm), BUDGET, resolve("l2")).beta
            seen.append((learner.steps, found))
            return found

        monkeypatch.setattr(Steering, "_measure", spy)
        factors = train(gm, optimizer, learner, range(STEPS))
        assert learner.stats()["beta"] == seen[-1][1]
    assert [step for step, _ in seen] == [0, 10, 20, 30, 40]
    assert len(set(factors[:10])) == 1
    assert factors[0] == 1
    limit = 1.3 ** (10 * 50 / STEPS)
    assert factors[10] == pytest.approx(min(max(relative_rate(seen[0][1], seen[1][1], 3.5), 1 / limit), limit))
    assert factors[10] != 1
    assert len(set(factors[40:])) == 1


def test_a_strength_that_is_steered_is_the_given_one_times_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held at a factor of 3, it learns what a fixed strength of three times as much learns, bit for bit."""
    states = []
    monkeypatch.setattr(Steering, "adjust", lambda self, step: 3.0)
    for options in ({"strength": 0.25}, {"strength": 0.75, "budget": None}):
        gm = build()
        optimizer = sgd(gm)
        with steered(gm, optimizer, **options) as learner:
            train(gm, optimizer, learner, range(5))
        states.append(gm.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("mode", ["fused", "exact"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(mode: str) -> None:
    whole = build()
    optimizer = sgd(whole)
    with steered(whole, optimizer, mode=mode) as learner:
        expected = train(whole, optimizer, learner, range(35))
    for cut in (7, 20, 21):
        gm = build()
        optimizer = sgd(gm)
        with steered(gm, optimizer, mode=mode) as learner:
            train(gm, optimizer, learner, range(cut))
            saved = copy.deepcopy([gm.state_dict(), optimizer.state_dict(), learner.state_dict()])
        again = build()
        optimizer = sgd(again)
        with steered(again, optimizer, mode=mode) as learner:
            for part, state in zip((again, optimizer, learner), saved, strict=True):
                part.load_state_dict(state)
            assert train(again, optimizer, learner, range(cut, 35)) == expected[cut:]
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


def test_looking_at_beta_changes_nothing() -> None:
    gm = build()
    before, rng = copy.deepcopy(gm.state_dict()), torch.get_rng_state()
    learner = steered(gm, sgd(gm), start="zeros")
    assert gm.training
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())
    assert learner.stats()["factor"] == 1
    assert math.isnan(learner.stats()["beta"])


def test_states_of_other_learners_are_told_apart() -> None:
    """Those of version 1 are read; a learner with a budget needs the state of one."""
    gm = build()
    plain, other = GroupLearner(gm, sgd(gm), STEPS), steered(gm, sgd(gm))
    old = plain.state_dict() | {"version": 1, "steps": 7}
    del old["steering"]
    plain.load_state_dict(old)
    assert plain.steps == 7
    message = "The GroupLearner state is of a learner {} a budget to steer by, this one has {}; construct it as it was."
    with pytest.raises(MismatchError, match=re.escape(message.format("without", "one"))):
        other.load_state_dict(old)
    with pytest.raises(MismatchError, match=re.escape(message.format("with", "none"))):
        plain.load_state_dict(other.state_dict())
    assert other.steps == 0


def test_budgets_that_cannot_steer_are_refused_at_once() -> None:
    gm = build()
    with pytest.raises(BudgetError, match=r"^Budget\(flops=0\.5, latency=0\.5\) has a latency, which is not measured"):
        steered(gm, sgd(gm), budget=Budget(flops=0.5, latency=0.5))
    with pytest.raises(BudgetError, match=r"^Budget\(flops=0\.0001\) is below what this network can reach"):
        steered(gm, sgd(gm), budget=Budget(flops=1e-4))
    with pytest.raises(ConfigError, match="strength='much'"):
        steered(gm, sgd(gm), strength="much")
