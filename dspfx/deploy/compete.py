"""Which of several equal networks is the fastest in a runtime: a contest in interleaved rounds.

Networks enter in the order of their risk; a later one has to be faster than the best before it by a margin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from dspfx.config import Inputs
from dspfx.deploy.agree import disagreement, tolerance_of
from dspfx.deploy.benchmark import describe_setting, describe_shapes, first_device, forward_pass
from dspfx.deploy.quiet import torch_threads
from dspfx.deploy.runtimes import build
from dspfx.deploy.timing import Result, compare, interleave
from dspfx.errors import MismatchError, RuntimeBuildError
from dspfx.graph.inputs import realise

MARGIN = 0.03  # by which an entrant has to be faster than what is safer
ROUNDS = 12  # at first; up to MAX_ROUNDS where the machine is too busy to tell
MAX_ROUNDS = 48
SAME = 1e-4  # of an output's largest value, by which equal networks may differ in float32
AGAIN = "dense once more"  # the reference against itself: what a difference of nothing looks like now
NOISE = 0.03  # of that ratio from 1, beyond which twice as much is added to the margin


@dataclass(frozen=True)
class Entrant:
    """A network in the contest.

    Attributes:
        name: in the report.
        make: makes it.
        expected_ms: the milliseconds expected of it; None: not predicted.
        is_checked: its numbers are compared with those of the first that ran, since it has kernels of our own.
    """

    name: str
    make: Callable[[], nn.Module]
    expected_ms: float | None = None
    is_checked: bool = False


@dataclass(frozen=True)
class Contest:
    """What came of it.

    Attributes:
        winner: the name of the network that was chosen.
        results: of every network that ran; ratios are to the dense one.
        expected_ms: by name, of those that were predicted.
        is_noisy: the machine was too busy to tell small differences, and the margin was larger.
        notes: what was left out and why, in words.
        setting: what was measured, and on what.
    """

    winner: str
    results: dict[str, Result]
    expected_ms: dict[str, float] = field(default_factory=dict)
    is_noisy: bool = False
    notes: tuple[str, ...] = ()
    setting: str = ""

    @property
    def ratio(self) -> float:
        """Of the winner's time to the dense network's; of the fastest, where it was too noisy to choose one."""
        if self.is_noisy:
            return min(result.ratio for result in self.results.values())
        return self.results[self.winner].ratio

    def __str__(self) -> str:
        rows = []
        for name, result in self.results.items():
            expected = f"{self.expected_ms[name]:.3f}" if name in self.expected_ms else ""
            chosen = "<- chosen" if name == self.winner else ""
            rows.append(
                (name, expected, f"{result.median_ms:.3f}", f"{result.ratio:.3f}", f"{result.spread:.3f}", chosen)
            )
        headers = ["network", "convolutions, expected ms", "measured ms", "ratio to dense", "spread", ""]
        table = tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 4, "left"))
        return "\n".join([table, *self.notes, self.setting])


def compete(runtime: str, entrants: Iterable[Entrant], inputs: Inputs, threads: int = 1) -> tuple[nn.Module, Contest]:
    """(the network that was chosen, how it came to that); the first entrant is the dense network, and is never slow.

    A network that the runtime rejects, or on which it computes something else, is left out with a note. Where the
    dense network against itself does not come out equal, even after more rounds, the machine is too busy to tell
    small differences, and the safer network is kept unless the difference is far larger than that.

    Raises:
        RuntimeBuildError, MismatchError: the runtime rejects every one of the networks; of the first.
    """
    networks: dict[str, nn.Module] = {}
    built: dict[str, nn.Module] = {}
    expected: dict[str, float] = {}
    failures: list[RuntimeBuildError | MismatchError] = []
    notes: list[str] = []
    for entrant in tqdm(entrants, f"building for {runtime}", disable=None, leave=False):
        network = entrant.make()
        if not networks:
            args, kwargs = realise(network, inputs)
            inputs = Inputs(*args, **kwargs)
        try:
            ready = build(runtime, network, inputs, threads)
            if entrant.is_checked and built:
                _check_equal(ready, *next(iter(built.items())), inputs)
            built[entrant.name] = ready
        except (RuntimeBuildError, MismatchError) as error:
            failures.append(error)
            notes.append(f"{entrant.name} is left out: {str(error).splitlines()[-1]}")
            continue
        networks[entrant.name] = network
        if entrant.expected_ms is not None:
            expected[entrant.name] = entrant.expected_ms
    if not networks:
        raise failures[0]
    samples = _measure(built, inputs, first_device(next(iter(networks.values()))), threads)
    results = compare(samples)
    noise = abs(results[AGAIN].ratio - 1)
    margin = MARGIN + 2 * noise if noise > NOISE else MARGIN
    winner = choose(samples, margin)
    if noise > NOISE:
        notes.append(
            f"this machine is busy: the dense network against itself came out at {results[AGAIN].ratio:.2f}, so "
            f"nothing was taken that is not {margin:.0%} faster than what is safer; measure again when nothing else "
            f"runs."
        )
    del results[AGAIN]
    setting = f"input {describe_shapes(inputs)}, {len(samples[winner])} rounds; " + describe_setting(
        runtime, first_device(networks[winner]), threads
    )
    return networks[winner], Contest(winner, results, expected, noise > NOISE, tuple(notes), setting)


def _check_equal(network: nn.Module, name: str, other: nn.Module, inputs: Inputs) -> None:
    """MismatchError unless the network returns what the other does."""
    expected = other(*inputs.args, **inputs.kwargs)
    worst, place = disagreement(network(*inputs.args, **inputs.kwargs), expected)
    allowed = tolerance_of(expected, SAME)
    if not worst <= allowed:
        raise MismatchError(
            f"it differs from {name} by {worst:.1e} of the largest value of {place}, and {allowed:.1e} is allowed"
        )


def choose(samples: dict[str, list[float]], margin: float = MARGIN) -> str:
    """The winner by each network's seconds, round by round: whoever beats the best before it by the margin."""
    names = [name for name in samples if name != AGAIN]
    best = names[0]
    for name in names[1:]:
        if compare({best: samples[best], name: samples[name]})[name].ratio < 1 - margin:
            best = name
    return best


def _measure(built: dict[str, nn.Module], inputs: Inputs, device: torch.device, threads: int) -> dict[str, list[float]]:
    """Seconds by name, in more rounds where the machine is busy."""
    calls = {name: forward_pass(network, inputs, device) for name, network in built.items()}
    calls[AGAIN] = next(iter(calls.values()))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    rounds = ROUNDS
    with torch_threads(threads), torch.inference_mode():
        while True:
            for name, seconds in interleave(calls, rounds).items():
                samples[name] += seconds
            is_quiet = abs(compare(samples)[AGAIN].ratio - 1) <= NOISE
            if is_quiet or len(samples[AGAIN]) + rounds > MAX_ROUNDS:
                return samples
