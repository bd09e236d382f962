"""The strength of the group regulariser, steered so that pruning to a budget will cost little of the weights."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from dspfx import ranks
from dspfx.config import Budget
from dspfx.errors import BudgetError
from dspfx.graph.analyse import analyse
from dspfx.method.importance import resolve
from dspfx.passes.plan_prune import plan_prune

TARGET = 0.03  # of a group's energy may still be dropped by pruning
REACHED_AT = 0.75  # of the steps; the rest is learned with a strength that no longer changes
WINDOWS, SHORTEST = 50, 10  # how often beta is looked at in a run, and the steps between, at least
PER_WINDOW, ALTOGETHER = 1.3, 1e3  # the factor by which the strength may change, up or down
LEAST = 1e-9  # a smaller beta is taken for this one


class Steering:
    """A factor on the strength lambda, so that log(beta) falls in a straight line to log(TARGET).

    beta is the cumulative share of its group's energy up to which `prune` would drop channels to meet the budget now:
    plan_prune's. Every fiftieth of the steps (of short runs, every tenth step) it is determined anew, and the factor
    is multiplied by the rate at which log(beta) has to fall from here on over the rate at which it fell since the last
    time; by at most 1.3 for each fiftieth of the run. From three quarters of the steps on the factor stays.

        step:   0        window        2 window   ...   3/4 total
        beta:   0.44     0.43          0.40             0.03 (wanted)
        factor: 1        1.3           1.69      ...    as it is then

    A function of the weights and of `state_dict()` alone; in a distributed training rank 0 decides.

    Raises:
        BudgetError: the budget holds a latency, or, already when constructed, cannot be reached.
    """

    def __init__(self, gm: nn.Module, budget: Budget, total_steps: int, is_shared: bool) -> None:
        if budget.latency is not None:
            raise BudgetError(
                f"{budget} has a latency, which is not measured while groups learn; give GroupLearner's budget as a "
                "share of flops or params."
            )
        self.factor = 1.0
        self.beta: float | None = None  # when last looked at
        self._gm, self._budget, self._is_shared = gm, budget, is_shared
        self._window, self._end = max(SHORTEST, total_steps // WINDOWS), round(REACHED_AT * total_steps)
        self._limit = PER_WINDOW ** max(1.0, self._window * WINDOWS / total_steps)
        self._channels = analyse(gm)
        self._measure()

    def adjust(self, step: int) -> float:
        """The factor at optimizer step `step`, counted from 0; to be called at every one."""
        if step % self._window == 0 and step <= self._end:
            beta = self._measure()
            if self.beta is not None:
                change = relative_rate(self.beta, beta, (self._end - step) / self._window)
                change = min(max(change, 1 / self._limit), self._limit)
                self.factor = min(max(self.factor * change, 1 / ALTOGETHER), ALTOGETHER)
            self.beta = beta
        return self.factor

    def state_dict(self) -> dict[str, Any]:
        """Two numbers."""
        return {"factor": self.factor, "beta": self.beta}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict()` was taken."""
        self.factor, self.beta = state["factor"], state["beta"]

    def _measure(self) -> float:
        def decide() -> str:
            return repr(plan_prune(self._gm, self._channels, self._budget, resolve("l2")).beta)

        with ranks.gathered(self._gm):
            return float(ranks.decided_by_first(decide) if self._is_shared else decide())


def relative_rate(before: float, now: float, windows_left: float) -> float:
    """The rate at which log(beta) has to fall to reach TARGET in the windows left, over that of the last window.

    0 where the target is reached, infinity where it is not and beta does not fall.
    """
    start, here, goal = (math.log(max(beta, LEAST)) for beta in (before, now, TARGET))
    if here <= goal:
        return 0.0
    wanted, observed = (here - goal) / max(windows_left, 1.0), start - here
    return wanted / observed if observed > 0 else math.inf
