"""How far to prune for a latency: plans by predicted time, tried by measured time, until the two meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tqdm import tqdm

from dspfx.errors import BudgetError
from dspfx.plans import PrunePlan

TRIES = 7
CLOSE = 0.95  # of the latency asked: faster than this would have been pruned too far
SLACK = 1.02  # of it: how a measurement comes out another time


def settle(
    latency: float, plan_at: Callable[[float], PrunePlan], measure: Callable[[PrunePlan], float], tries: int = TRIES
) -> PrunePlan:
    """The plan whose network was measured at `latency` (a ratio to the dense network) or a little below.

    Args:
        plan_at: a plan after which the layers are predicted to take a share of their time; raises BudgetError where
            they cannot.
        measure: the measured ratio of a plan's network.

    Raises:
        BudgetError: the latency cannot be reached; names what was measured at the least.
    """
    best: PrunePlan | None = None
    measured: list[float] = []
    share, low, high = latency, 0.0, 1.0  # predicted shares: too fast, too slow
    with tqdm(total=tries, desc=f"pruning to a latency of {latency:.2f}", disable=None, leave=False) as bar:
        for _ in range(tries):
            try:
                plan = plan_at(share)
            except BudgetError as error:
                floor = error
                low = share
            else:
                plan = replace(plan, latency_left=measure(plan))
                assert plan.latency_left is not None
                found = plan.latency_left
                measured.append(found)
                bar.set_postfix_str(f"{found:.3f} measured")
                if found <= SLACK * latency and (best is None or found > (best.latency_left or 0.0)):
                    best = plan
                if CLOSE * latency <= found <= latency:
                    return plan
                low, high = (share, high) if found < latency else (low, share)
                floor = BudgetError(f"a latency of {latency:.3f} is below what was measured: {min(measured):.3f}.")
            bar.update()
            aim = share * (1 + CLOSE) / 2 * latency / measured[-1] if measured else (low + high) / 2
            share = aim if low < aim < high else (low + high) / 2
            if high - low < 0.005:
                break
    if best is not None:
        return best
    least = f" The fastest that was tried measured {min(measured):.3f}." if measured else ""
    raise BudgetError(f"{floor}{least}")
