"""estimate: what it tries, when it stops, and what it says; times are the test's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import dspfx
from dspfx import pipeline
from dspfx.config import Budget
from dspfx.deploy.compete import Contest, Entrant
from dspfx.deploy.timing import Result
from dspfx.errors import BudgetError
from dspfx.estimate import WORTH, random_energy
from dspfx.graph.traced import network_meta
from tests.compare import fingerprint, unchanged
from tests.zoo import ZOO

ENTRY = ZOO["resnet_bottleneck"]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float], float]], list[float]]:
    """Makes a contest come out as a function of the multiply-adds that are run; returns what was asked."""

    def install(ratio: Callable[[float], float]) -> list[float]:
        asked: list[float] = []

        def contest(runtime: str, entrants: Iterable[Entrant], *rest: Any) -> tuple[nn.Module, Contest]:
            network = list(entrants)[-1].make()
            asked.append(ratio(network_meta(network)["lower_plan"].flops_run))
            results = {"dense": Result(2.0, 1.0, 0.0), "ours": Result(2 * asked[-1], asked[-1], 0.01)}
            return network, Contest("ours", results, setting=f"on {runtime}")

        monkeypatch.setattr(pipeline, "compete", contest)
        return asked

    return install


def test_a_budget_that_pays_is_tried_once(timed: Any) -> None:
    asked = timed(lambda run: 0.5)
    model = ENTRY.build()
    before = fingerprint(model)
    found = dspfx.estimate(model, ENTRY.inputs(), "eager", Budget(flops=0.6))
    assert unchanged(before, fingerprint(model))
    assert asked == [0.5]
    assert found.is_worth
    assert found.worth_from == 0.6
    assert found.trials[0].flops_left <= 0.6
    assert str(found).splitlines()[-2:] == [
        "Worth it: Budget(flops=0.6) takes 0.50 of the dense network's time here.",
        "on eager",
    ]


def test_smaller_budgets_are_tried_until_one_pays(timed: Any) -> None:
    answers = iter([1.0, 0.95, 0.8])
    timed(lambda run: next(answers))
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    found = dspfx.estimate(wide, torch.zeros(1, 3, 8, 8), "eager", Budget(flops=0.8))
    assert not found.is_worth
    assert [trial.budget for trial in found.trials] == pytest.approx([0.8, 0.56, 0.4])
    assert found.worth_from == pytest.approx(0.4)
    message = (
        r"Not worth it: Budget\(flops=0\.8\) takes 1\.00 of the dense network's time here; it becomes worth it at "
        r"about flops=0\.4\."
    )
    assert re.search(message, str(found))
    content = json.loads(found.to_json())
    assert (content["is_worth"], len(content["trials"])) == (False, 3)


def test_where_nothing_pays_it_says_so(timed: Any) -> None:
    timed(lambda run: WORTH + 0.05)
    found = dspfx.estimate(ENTRY.build(), ENTRY.inputs(), "eager", Budget(params=0.9))
    assert found.worth_from is None
    assert len(found.trials) > 1
    assert "Not worth it on this runtime: down to params=" in str(found)
    assert all(trial.params_left <= trial.budget for trial in found.trials)


@pytest.mark.filterwarnings("ignore:.*this machine is busy")
def test_a_latency_is_one_question() -> None:
    found = dspfx.estimate(ENTRY.build(), ENTRY.inputs(), "eager", Budget(latency=1.0))
    assert [trial.budget for trial in found.trials] == [1.0]
    assert found.kind == "latency"


def test_two_questions_are_refused() -> None:
    message = "estimate answers one question at a time, and Budget(flops=0.5, params=0.5) asks 2; give one field."
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        dspfx.estimate(ENTRY.build(), ENTRY.inputs(), "eager", Budget(flops=0.5, params=0.5))


def test_an_impossible_budget_names_the_floor() -> None:
    with pytest.raises(BudgetError, match=r"^Budget\(flops=0\.0001\) is below what this network can reach"):
        dspfx.estimate(ENTRY.build(), ENTRY.inputs(), "eager", Budget(flops=0.0001))


def test_random_energies_make_runs_of_filters_that_read_the_same_channels() -> None:
    energy = random_energy(groups=2, seed=3)(torch.zeros(6, 5, 3, 3))
    assert energy.shape == (6, 5)
    shares = energy / energy.sum(1, keepdim=True)
    assert torch.allclose(shares[:3], shares[:1])
    assert torch.allclose(shares[3:], shares[3:4])
    assert not torch.allclose(shares[0], shares[3])
    assert torch.equal(energy, random_energy(groups=2, seed=3)(torch.zeros(6, 5, 3, 3)))
