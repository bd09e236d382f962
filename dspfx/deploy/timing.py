"""Seconds of calls: one by itself, or several in interleaved rounds so that what slows one slows all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
WARM_UP = 3  # calls before anything counts
SAMPLE_SECONDS = 0.005  # a fast network is called more than once a sample, or the clock would be what is measured


@dataclass(frozen=True)
class Result:
    """The time of one network.

    Attributes:
        median_ms: milliseconds of a call, the median over rounds.
        ratio: to the first network, the median of the ratios within a round; below 1 is faster.
        spread: the interquartile range of those ratios.
    """

    median_ms: float
    ratio: float
    spread: float


def compare(samples: Mapping[str, list[float]]) -> dict[str, Result]:
    """Results from each network's seconds, round by round; the first network is the reference."""
    reference = next(iter(samples.values()))
    results = {}
    for name, seconds in samples.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds, reference, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        results[name] = Result(1e3 * statistics.median(seconds), middle, high - low)
    return results


def interleave(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call, by name, a list over rounds; every round calls all of them, in alternating order."""
    repeats = {name: _repeats(call, SAMPLE_SECONDS) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            samples[name].append(_seconds(calls[name], repeats[name]))
    return samples


def time_alone(call: Call, samples: int = 12, sample_seconds: float = 0.001) -> float:
    """Seconds of a call: the lower quartile of some samples, since what disturbs a measurement only adds to it."""
    repeats = _repeats(call, sample_seconds)
    return statistics.quantiles([_seconds(call, repeats) for _ in range(samples)], n=4)[0]


def complete(call: Call, device: torch.device) -> Call:
    """The call, and everything that it started on the device."""
    if device.type != "cuda":
        return call

    def waiting() -> None:
        call()
        torch.cuda.synchronize(device)

    return waiting


def _repeats(call: Call, sample_seconds: float) -> int:
    seconds = min(_seconds(call, 1) for _ in range(WARM_UP))
    return max(1, math.ceil(sample_seconds / max(seconds, 1e-9)))


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
