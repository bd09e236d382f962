"""What would a budget buy on a runtime? Answered before any training, by pruning at random and measuring."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from dspfx.config import Budget, GateConfig
from dspfx.deploy.compete import Contest
from dspfx.errors import BudgetError
from dspfx.graph.traced import Network, network_meta
from dspfx.method.importance import Importance
from dspfx.pipeline import lower, prepare, prune

WORTH = 0.9  # of the dense network's time: what saves less is not worth a training
STEPS = (1.0, 0.7, 0.5, 0.35, 0.25)  # of the budget asked, tried in turn until one is worth it
GROUPS = GateConfig(balanced=True)


@dataclass(frozen=True)
class Trial:
    """One budget: what its structures keep of the FLOPs and parameters, and the measured time left, with its spread."""

    budget: float
    flops_left: float
    params_left: float
    latency_left: float
    spread: float
    form: str


@dataclass(frozen=True)
class Estimate:
    """What budgets would buy on a runtime, of the dense network.

    Attributes:
        kind: the field of the budget, "flops", "params" or "latency".
        trials: the budget asked first, then smaller ones until one was worth it.
        setting: what was measured, and on what.
        notes: what to know about the measurements, such as that the machine was too busy.
    """

    kind: str
    trials: tuple[Trial, ...]
    setting: str
    notes: tuple[str, ...] = ()

    @property
    def is_worth(self) -> bool:
        """The budget asked makes the network at least a tenth faster."""
        return self.trials[0].latency_left <= WORTH

    @property
    def worth_from(self) -> float | None:
        """The largest budget tried that does; None where none did."""
        return next((trial.budget for trial in self.trials if trial.latency_left <= WORTH), None)

    def to_json(self) -> str:
        """The estimate as one line of JSON."""
        return json.dumps(dataclasses.asdict(self) | {"is_worth": self.is_worth, "worth_from": self.worth_from})

    def __str__(self) -> str:
        rows = [
            (
                f"{t.budget:.2f}",
                f"{t.flops_left:.1%}",
                f"{t.params_left:.1%}",
                f"{t.latency_left:.2f}",
                f"{t.spread:.2f}",
                t.form,
            )
            for t in self.trials
        ]
        headers = [f"{self.kind} budget", "FLOPs left", "parameters left", "time left", "spread", "lowered to"]
        table = tabulate(rows, headers, disable_numparse=True)
        asked, left = self.trials[0].budget, self.trials[0].latency_left
        if self.is_worth:
            verdict = f"Worth it: Budget({self.kind}={asked:g}) takes {left:.2f} of the dense network's time here."
        elif self.worth_from is not None:
            verdict = (
                f"Not worth it: Budget({self.kind}={asked:g}) takes {left:.2f} of the dense network's time here; it "
                f"becomes worth it at about {self.kind}={self.worth_from:g}."
            )
        else:
            verdict = (
                f"Not worth it on this runtime: down to {self.kind}={self.trials[-1].budget:g} the network takes at "
                f"least {min(t.latency_left for t in self.trials):.2f} of the dense network's time. Another runtime, "
                f"or Budget(latency=...), which removes what costs time, may do better."
            )
        return "\n".join([table, verdict, *self.notes, self.setting])


def estimate(
    model: nn.Module,
    example_inputs: Any = None,
    runtime: str = "onnxruntime",
    budget: Budget = Budget(flops=0.35),  # noqa: B008 - frozen
    *,
    threads: int = 1,
    config: GateConfig = GROUPS,
) -> Estimate:
    """What a budget would buy on a runtime, in a minute or two and before any training; `model` is left as it was.

    Structures of the budget are drawn at random, balanced and in whole blocks of channels as far as `config` says,
    lowered as `lower` does and timed beside the dense network. Where the budget asked does not make it a tenth
    faster, smaller ones are tried. What a trained network keeps differs, its time hardly: that depends on sizes.

    Args:
        model: as for `prepare`.
        example_inputs: as for `prepare`; their batch is what is timed.
        runtime: where it is to be fast, see `lower`.
        threads: CPU threads of a call there.
        budget: one field; for a latency, the answer is how much of the FLOPs may stay.
        config: groups of the structures.

    Raises:
        BudgetError: a budget of several fields, or none of it can be reached.
        Exception: what `prepare` and `lower` raise.
    """
    given = [(field.name, getattr(budget, field.name)) for field in dataclasses.fields(budget)]
    asked = [(kind, value) for kind, value in given if value is not None]
    if len(asked) > 1:
        raise BudgetError(f"estimate answers one question at a time, and {budget} asks {len(asked)}; give one field.")
    kind, value = asked[0]
    trials: list[Trial] = []
    contest: Contest | None = None
    prepared = prepare(model, example_inputs, config)
    steps = (1.0,) if kind == "latency" else STEPS
    with tqdm(total=len(steps), desc=f"estimating on {runtime}", disable=None, leave=False) as bar:
        for step in steps:
            try:
                trial, contest = _try(prepared, kind, value * step, runtime, threads)
            except BudgetError:
                if not trials:
                    raise
                break
            trials.append(trial)
            bar.update()
            if trial.latency_left <= WORTH:
                break
    assert contest is not None
    return Estimate(kind, tuple(trials), contest.setting, contest.notes)


def _try(prepared: Network, kind: str, value: float, runtime: str, threads: int) -> tuple[Trial, Contest]:
    gm = copy.deepcopy(prepared)
    plan = prune(gm, Budget(**{kind: value}), random_energy(), None, runtime, threads=threads)
    small = lower(gm, network_meta(gm)["inputs"], runtime, threads=threads)
    contest: Contest = network_meta(small)["contest"]
    won = contest.results[contest.winner]
    trial = Trial(value, plan.flops_left, plan.params_left, won.ratio, won.spread, contest.winner)
    return trial, contest


def random_energy(groups: int = GROUPS.groups, seed: int = 0) -> Importance:
    """An importance that makes runs of filters read random channels, whatever the weights are."""
    generator = torch.Generator().manual_seed(seed)

    def energy(weight: Tensor) -> Tensor:
        filters, channels = weight.shape[:2]
        likes = torch.exp(1.5 * torch.randn(min(groups, filters), channels, generator=generator))
        own = torch.exp(0.5 * torch.randn(filters, 1, generator=generator))
        return likes[torch.arange(filters) * len(likes) // filters] * own

    return energy
