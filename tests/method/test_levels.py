"""Levels for their entropy: the choice of each value is the cheapest, and Gaussian values cost what theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dspfx.method.levels import Sample, entropy_levels, slope_for


def coded(values: np.ndarray, slope: float, weight: float = 1.0) -> tuple[np.ndarray, np.ndarray, float]:
    """(levels, the level of each value, bits a value)."""
    found, edges = entropy_levels(Sample(values, np.full_like(values, weight)), slope)
    number = np.searchsorted(edges, values)
    shares = np.bincount(number, minlength=len(found)) / len(values)
    return found, number, float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_every_value_has_its_cheapest_level_and_every_level_is_a_mean(weight: float) -> None:
    values, slope = np.random.default_rng(0).laplace(size=2000), 0.05
    found, number, _ = coded(values, slope, weight)
    shares = np.bincount(number, minlength=len(found)) / len(values)
    for i, value in enumerate(values):
        costs = weight * (value - found) ** 2 + slope * -np.log2(shares)
        assert costs[number[i]] <= costs.min() + 1e-6
    for level in range(len(found)):
        assert found[level] == pytest.approx(values[number == level].mean(), abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_gaussian_values_reach_the_known_bound(bits: int) -> None:
    """1.53 dB from the rate-distortion function's 6.02 dB a bit, which entropy-coded scalars reach (2 bits: 1.49)."""
    values = np.random.default_rng(0).normal(size=100_000)
    slope = slope_for([Sample.of(values)], bits)
    found, number, taken = coded(values, slope)
    assert bits - 0.1 < taken <= bits
    noise = ((values - found[number]) ** 2).mean() / (values**2).mean()
    assert -10 * math.log10(noise) == pytest.approx(6.02 * taken - 1.53, abs=0.1)


def test_bits_go_where_they_save_most() -> None:
    """Of two lists at one slope, the wider one gets log2 of the ratio of their widths more."""
    narrow = np.random.default_rng(0).normal(size=20_000)
    wide = 4 * np.random.default_rng(1).normal(size=20_000)
    slope = slope_for([Sample.of(v) for v in (narrow, wide)], 4)
    (_, _, few), (_, _, many) = coded(narrow, slope), coded(wide, slope)
    assert few + many == pytest.approx(8, abs=0.05)
    assert many - few == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("values", [[0.25], [0.25] * 7, [-1.0, 1.0], [0.0, 0.0, 3.0]])
def test_few_different_values_are_their_own_levels(values: list[float]) -> None:
    found, number, _ = coded(np.array(values), 1e-9)
    assert found[number].tolist() == values
    assert len(found) == len(set(values))
