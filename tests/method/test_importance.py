"""Energies and cumulative shares against loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dspfx.errors import ConfigError
from dspfx.method.grouping import kernel_energy
from dspfx.method.importance import Fisher, cumulative_share, group_energy, resolve, unit_share


def test_l2_is_the_squared_norm_of_each_kernel() -> None:
    weight = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    energy = kernel_energy(weight)
    for o in range(3):
        for c in range(4):
            expected = sum(float(v) ** 2 for v in weight[o, c].flatten())
            assert float(energy[o, c]) == pytest.approx(expected, rel=1e-12)


def test_a_function_is_itself_and_a_name_must_be_known() -> None:
    def own(weight: Tensor) -> Tensor:
        return weight.flatten(2).abs().sum(2)

    for is_weighed in (True, False):
        assert resolve(own, is_weighed) is own
        assert resolve("l2", is_weighed) is kernel_energy
        with pytest.raises(
            ConfigError, match=r"^importance is 'l1'; give one of 'auto', 'fisher', 'l2', or a function"
        ):
            resolve("l1", is_weighed)
    assert isinstance(resolve("auto", True), Fisher)
    assert isinstance(resolve("fisher", True), Fisher)
    assert resolve("auto", False) is kernel_energy
    with pytest.raises(ConfigError, match="gathered by a GroupLearner while it trains every gated layer"):
        resolve("fisher", False)


def test_fisher_s_pairs_add_up_to_its_group_channels_and_filters() -> None:
    generator = torch.Generator().manual_seed(0)
    known = torch.rand(5, 4, generator=generator, dtype=torch.float64)
    group = torch.tensor([0, 1, 1, -1, 0])
    channels, filters = group_energy(known, group, 2), known.sum(1)
    pairs = Fisher().pairs(channels, filters, group)
    torch.testing.assert_close(group_energy(pairs, group, 2), channels)
    torch.testing.assert_close(pairs.sum(1), filters * (group >= 0))


def test_group_energy_sums_the_filters_of_each_group() -> None:
    energy = torch.rand(7, 3, dtype=torch.float64)
    group = torch.tensor([0, 2, -1, 0, 2, 2, -1])
    expected = [[sum(float(energy[o, c]) for o in range(7) if group[o] == g) for c in range(3)] for g in range(4)]
    assert torch.allclose(group_energy(energy, group, 4), torch.tensor(expected, dtype=torch.float64), rtol=1e-13)


def loop(energy: list[float], eligible: list[bool]) -> list[float]:
    """Sorted ascending, the share of all energy up to and including each entry; the last one scores 1."""
    usable = [i for i, e in enumerate(eligible) if e]
    values = {i: energy[i] for i in usable}
    if sum(values.values()) == 0:
        values = dict.fromkeys(usable, 1.0)
    scores = [float("-inf")] * len(energy)
    passed = 0.0
    order = sorted(usable, key=lambda i: values[i])
    for i in order:
        passed += values[i]
        scores[i] = passed / sum(values.values())
    if order:
        scores[order[-1]] = 1.0
    return scores


@pytest.mark.parametrize("seed", range(5))
def test_cumulative_share_is_the_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    energy = torch.rand(6, 9, dtype=torch.float64, generator=generator).square()
    eligible = torch.rand(6, 9, generator=generator) > 0.3
    energy[4], eligible[5] = 0, False
    found = cumulative_share(energy, eligible)
    for row in range(6):
        expected = torch.tensor(loop(energy[row].tolist(), eligible[row].tolist()), dtype=torch.float64)
        assert torch.allclose(found[row], expected, rtol=1e-12)


def test_dropping_below_beta_keeps_the_largest_and_drops_nothing_at_zero() -> None:
    energy = torch.tensor([[4.0, 1.0, 0.0, 5.0]])
    scores = cumulative_share(energy, torch.ones(1, 4, dtype=torch.bool))
    assert scores.tolist() == [[0.5, pytest.approx(0.1), 0.0, 1.0]]
    assert int((scores < 0).sum()) == 0
    assert int((scores < 1).sum()) == 3
    assert int((scores < 0.2).sum()) == 2


def test_units_share_the_score_of_their_sum() -> None:
    energy = torch.tensor([[1.0, 2.0, 4.0, 8.0, 1.0]], dtype=torch.float64)
    unit = torch.tensor([0, 1, 0, 2, 1])  # sums 5, 3, 8
    everything = torch.ones(1, 5, dtype=torch.bool)
    assert unit_share(energy, everything, unit).tolist() == [[0.5, 3 / 16, 0.5, 1.0, 3 / 16]]
    without = torch.tensor([[False, True, True, True, True]])  # sums 4, 3, 8
    assert unit_share(energy, without, unit).tolist() == [[float("-inf"), 3 / 15, 7 / 15, 1.0, 3 / 15]]
    alone = torch.arange(5)
    assert torch.equal(unit_share(energy, without, alone), cumulative_share(energy, without))
