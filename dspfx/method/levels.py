"""Which few values stand for many: those of the least squared error for their entropy.

Levels are written into the file, so nothing a reader does depends on the arithmetic here.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MOST = 256  # levels of a list
_ROUNDS = 60
_HALVINGS = 16


class Sample:
    """Values with weights, sorted, and running sums: what a range of them amounts to is found without passing over it.

    Attributes:
        values: ascending.
        sums: [2, values + 1], of the weights and of the weighted values before each.
        weight: the mean one.
    """

    def __init__(self, values: Floats, weights: Floats) -> None:
        order = np.argsort(values, kind="stable")
        self.values = values[order]
        parts = np.stack([np.ones_like(values), self.values]) * weights[order]
        self.sums = np.concatenate([np.zeros((2, 1)), parts.cumsum(1)], axis=1)
        self.weight = float(weights.mean())

    @classmethod
    def of(cls, values: Floats) -> Sample:
        """Values that count alike."""
        return cls(values, np.ones_like(values))


def entropy_levels(sample: Sample, slope: float) -> tuple[Floats, Floats]:
    """(levels, ascending, at most MOST; the values between them where one gives way to the next).

    Of squared error + slope * bits, where a level that n of N values have costs log2(N / n) bits: Lloyd's rounds with
    that cost in the choice of a level, from evenly spaced ones (entropy-constrained scalar quantisation, Chou,
    Lookabaugh and Gray 1989). Coded by their entropy, rare levels far out cost little.
    """
    total = len(sample.values)
    low, high = sample.values[[0, -1]]
    if low == high:
        return sample.values[:1], sample.values[:0]
    best = math.sqrt(6 * slope / (sample.weight * math.log(2)))  # at high rates
    step = max(best, (high - low) / (MOST - 2))
    levels = step * np.arange(math.floor(low / step + 0.5), math.floor(high / step + 0.5) + 1)
    edges = (levels[1:] + levels[:-1]) / 2
    for _ in range(_ROUNDS):
        ends = np.concatenate([[0], np.searchsorted(sample.values, edges), [total]])
        number = np.diff(ends)
        cells = np.diff(sample.sums[:, ends])[:, number > 0]
        levels, number = cells[1] / cells[0], number[number > 0]
        bits = -np.log2(number / total)
        gaps = np.maximum(np.diff(levels), np.finfo(np.float64).tiny)
        shifts = slope * np.diff(bits) / (2 * sample.weight * gaps)
        moved = np.maximum.accumulate((levels[1:] + levels[:-1]) / 2 + shifts)
        if np.array_equal(moved, edges):
            break
        edges = moved
    return levels, edges


def slope_for(samples: list[Sample], bits: float) -> float:
    """The slope at which all values together take about so many bits each, by entropy."""
    allowed = bits * sum(len(sample.values) for sample in samples)
    largest = max(float(np.abs(sample.values[[0, -1]]).max()) for sample in samples)
    low, high = -40.0, 10.0  # of log2 of the slope, to the largest value squared
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        taken = sum(_bits(sample, entropy_levels(sample, largest**2 * 2.0**middle)[1]) for sample in samples)
        low, high = (middle, high) if taken > allowed else (low, middle)
    return float(largest**2 * 2.0**high)


def _bits(sample: Sample, edges: Floats) -> float:
    number = np.diff(np.concatenate([[0], np.searchsorted(sample.values, edges), [len(sample.values)]]))
    number = number[number > 0]
    return float((number * np.log2(len(sample.values) / number)).sum())
