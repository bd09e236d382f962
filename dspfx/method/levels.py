"""Which few values stand for many: levels of least squared error, evenly spaced or anywhere (one-dimensional k-means).

Levels are written into the file, so nothing a reader does depends on the arithmetic here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STRIDE = 16  # the first magnitude is a whole number of sixteenths of a step
_RATIOS = 0.97 ** np.arange(110)  # of the largest value: where the levels end
_TAILS = (0.0, 0.002, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2)  # of the smallest and of the largest magnitudes, that may clip
_ROUNDS = 60
_NORMAL = np.finfo(np.float32)


@dataclass(frozen=True)
class Ladder:
    """Levels step * (first + stride * i), one IEEE multiplication of float32 each; i counts from 0 to size - 1."""

    step: np.float32
    first: int
    stride: int
    size: int

    @property
    def levels(self) -> NDArray[np.float32]:
        """[size] float32, ascending where the step is positive."""
        return self.step * (self.first + self.stride * np.arange(self.size, dtype=np.int32)).astype(np.float32)


class Sample:
    """Values with weights, sorted: the error of any levels is found from running sums, without passing over them."""

    def __init__(self, values: Floats, weights: Floats) -> None:
        order = np.argsort(values, kind="stable")
        self.values = values[order]
        powers = np.stack([np.ones_like(values), self.values, self.values**2]) * weights[order]
        self._sums = np.concatenate([np.zeros((3, 1)), powers.cumsum(1)], axis=1)

    def cells(self, levels: Floats) -> Floats:
        """[3, levels]: the weight, weighted sum and sum of squares of the values nearest to each level."""
        edges = np.searchsorted(self.values, (levels[1:] + levels[:-1]) / 2)
        ends = np.concatenate([[0], edges, [len(self.values)]])
        return np.diff(self._sums[:, ends])

    def error(self, levels: NDArray[np.floating]) -> float:
        """The sum of squared distances to the nearest of the levels, which ascend."""
        wide = levels.astype(np.float64)
        weight, total, squares = self.cells(wide)
        return float((squares - 2 * wide * total + wide**2 * weight).sum())


def signed_ladder(sample: Sample, bits: int) -> Ladder | None:
    """Symmetric levels for signed values: 2 ** bits of them, or one fewer with zero among them, whichever fits better.

    The widest level is searched from the largest value downwards: clipping a few large weights buys a finer step. None
    where the values are beyond what float32 can step through.
    """
    largest = float(np.abs(sample.values[[0, -1]]).max())
    sizes = [size for size in (2**bits, 2**bits - 1) if size > 1]
    return _best(sample, [(largest * ratio / (size - 1), 1 - size, 2, size) for size in sizes for ratio in _RATIOS])


def positive_ladder(sample: Sample, bits: int) -> Ladder | None:
    """2 ** bits levels for positive values, all of them positive; None as above."""
    size, candidates = 2**bits, []
    lows, highs = (np.quantile(sample.values, q) for q in (_TAILS, [1 - tail for tail in _TAILS]))
    for low in lows:
        for high in highs:
            step = max((high - low) / (size - 1), high * 1e-3) / STRIDE
            candidates.append((step, max(1, round(low / step)), STRIDE, size))
    return _best(sample, candidates)


def _best(sample: Sample, candidates: list[tuple[float, int, int, int]]) -> Ladder | None:
    inside = [c for c in candidates if _NORMAL.tiny <= c[0] <= _NORMAL.max / 2**16 and abs(c[1]) < 2**15]
    usable = [Ladder(np.float32(step), *rest) for step, *rest in inside]
    return min(usable, key=lambda ladder: sample.error(ladder.levels), default=None)


def k_means(sample: Sample, start: NDArray[np.floating]) -> Floats:
    """As many levels as `start` has, none further from its values' mean than Lloyd's rounds leave it; ascending."""
    quantiles = np.quantile(sample.values, (np.arange(len(start)) + 0.5) / len(start))
    return min((_lloyd(sample, begin.astype(np.float64)) for begin in (start, quantiles)), key=sample.error)


def _lloyd(sample: Sample, levels: Floats) -> Floats:
    for _ in range(_ROUNDS):
        weight, total, _ = sample.cells(levels)
        moved = np.sort(np.where(weight > 0, total / np.where(weight > 0, weight, 1), levels))
        if np.array_equal(moved, levels):
            break
        levels = moved
    return levels


def palette(values: Floats, bits: int) -> NDArray[np.float32]:
    """At most 2 ** bits levels of least squared error, ascending; of one sign where the values have one."""
    known = np.unique(values.astype(np.float32))
    if len(known) <= 2**bits:
        return known
    sample = Sample(values, np.ones_like(values))
    start = np.quantile(sample.values, (np.arange(2**bits) + 0.5) / 2**bits)
    ladder = (positive_ladder if values.min() > 0 else signed_ladder)(sample, bits)
    found = k_means(sample, start if ladder is None else ladder.levels)
    return np.unique(found.astype(np.float32))


def nearest(values: NDArray[np.floating], levels: NDArray[np.floating]) -> NDArray[np.uint8]:
    """The number of the nearest level; the levels ascend and are at most 256."""
    edges = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    return np.searchsorted(edges, values).astype(np.uint8)
