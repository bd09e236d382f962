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
        BudgetError: the latency cannot be reached; names the least that was measured, or predicted where nothing was.
    """
    best: PrunePlan | None = None
    impossible: list[BudgetError] = []
    measured: list[float] = []
    known = {1.0: 1.0}  # predicted share -> measured ratio; the dense network is there already
    share, low, high = latency, 0.0, 1.0  # predicted shares: too fast, too slow
    with tqdm(total=tries, desc=f"pruning to a latency of {latency:.2f}", disable=None, leave=False) as bar:
        for _ in range(tries):
            try:
                plan = plan_at(share)
            except BudgetError as error:
                impossible.append(error)
                low = share
            else:
                found = known[share] = measure(plan)
                measured.append(found)
                bar.set_postfix_str(f"{found:.3f} measured")
                if found <= SLACK * latency and (best is None or found > (best.latency_left or 0.0)):
                    best = replace(plan, latency_left=found)
                if CLOSE * latency <= found <= latency:
                    return replace(plan, latency_left=found)
                low, high = (share, high) if found < latency else (low, share)
            bar.update()
            if high - low < 0.005:
                break
            share = _next_share((1 + CLOSE) / 2 * latency, known, low, high)
    if best is not None:
        return best
    if not measured:
        raise impossible[0]
    raise BudgetError(
        f"a latency of {latency:.3f} is below what this network can reach: the fastest that was tried measured "
        f"{min(measured):.3f} of the dense network's time. Raise the budget, or gate more layers."
    )


def _next_share(aim: float, known: dict[float, float], low: float, high: float) -> float:
    """Where the line through the two measurements nearest to `aim` meets it, or else the middle of the bracket.

    What a network spends outside its layers makes lines that do not pass through zero.
    """
    nearest = sorted(known.items(), key=lambda item: abs(item[1] - aim))[:2]
    if len(nearest) == 2 and nearest[0][1] != nearest[1][1]:
        (a, at_a), (b, at_b) = nearest
        share = a + (aim - at_a) * (b - a) / (at_b - at_a)
        if low < share < high:
            return share
    return (low + high) / 2
