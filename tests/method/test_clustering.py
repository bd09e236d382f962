"""Clustering keeps more energy than random groups and than whole channels, in groups of equal size, every time."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from dspfx.errors import ConfigError, ModelError
from dspfx.method.clustering import cluster_filters, kept_energy
from dspfx.method.grouping import kernel_energy

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "resnet20_cifar10.safetensors"


def planted(filters: int, channels: int, groups: int) -> tuple[Tensor, Tensor]:
    """(energy, the grouping planted in it): each group reads its own, overlapping, half of the channels."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randperm(filters, generator=generator) % groups
    reads = torch.stack([torch.randperm(channels, generator=generator) < channels // 2 for _ in range(groups)])
    noise = torch.rand(filters, channels, generator=generator)
    return noise * torch.where(reads[truth], 1.0, 0.2), truth


def loop_kept(energy: Tensor, group: Tensor, groups: int) -> float:
    """The share of energy kept by each group's better half of the channels, by hand."""
    kept = 0.0
    for g in range(groups):
        sums = energy[group == g].sum(dim=0).sort(descending=True).values
        kept += float(sums[: (energy.shape[1] + 1) // 2].sum())
    return kept / float(energy.sum())


@pytest.mark.parametrize(("filters", "channels", "groups"), [(32, 32, 2), (64, 48, 4), (60, 24, 3), (64, 64, 8)])
def test_planted_groups_are_found(filters: int, channels: int, groups: int) -> None:
    energy, truth = planted(filters, channels, groups)
    assert loop_kept(energy, cluster_filters(energy, groups), groups) >= loop_kept(energy, truth, groups) - 5e-3


@pytest.mark.parametrize(("filters", "groups"), [(16, 4), (17, 4), (19, 4), (5, 3), (7, 1), (3, 3), (2, 4)])
def test_group_sizes_differ_by_at_most_one_filter(filters: int, groups: int) -> None:
    group = cluster_filters(torch.rand(filters, 6), groups)
    sizes = torch.bincount(group, minlength=groups)
    assert group.dtype == torch.int64
    assert group.shape == (filters,)
    assert len(sizes) == groups
    assert int(sizes.max() - sizes.min()) <= 1


def test_the_best_balanced_split_of_a_small_layer_is_found() -> None:
    for seed in range(5):
        energy = torch.rand(8, 6, generator=torch.Generator().manual_seed(seed)) ** 2
        splits = itertools.combinations(range(8), 4)
        best = max(loop_kept(energy, torch.tensor([int(o in split) for o in range(8)]), 2) for split in splits)
        assert loop_kept(energy, cluster_filters(energy, 2), 2) >= 0.97 * best


def test_the_measure_equals_a_plain_loop() -> None:
    energy, truth = planted(20, 7, 3)
    assert kept_energy(energy, truth, 3) == pytest.approx(loop_kept(energy, truth, 3), rel=1e-6)


def test_a_trained_network_keeps_more_energy_than_with_whole_channels_or_random_groups() -> None:
    if not DATA.exists():
        pytest.skip(f"needs the trained network {DATA.name} in ../shared/data")
    weights = [w for key, w in safetensors.torch.load_file(DATA).items() if w.ndim == 4 and w.shape[1] > 3]
    gains = []
    for weight in weights:
        energy = kernel_energy(weight)
        whole = kept_energy(energy, torch.zeros(len(energy), dtype=torch.int64), 1)
        shuffled = (torch.arange(len(energy)) * 4 // len(energy))[torch.randperm(len(energy))]
        random = kept_energy(energy, shuffled, 4)
        clustered = kept_energy(energy, cluster_filters(energy, 4), 4)
        assert whole <= clustered
        assert random <= clustered
        gains.append(clustered - whole)
    assert len(gains) == 18
    assert sum(gains) / len(gains) >= 0.05


def test_the_same_energies_give_the_same_groups_and_leave_the_global_generator_alone() -> None:
    energy = torch.rand(40, 24)
    before = torch.get_rng_state()
    first = cluster_filters(energy, 4)
    torch.manual_seed(123)
    second = cluster_filters(energy.clone(), 4)
    assert torch.equal(first, second)
    torch.set_rng_state(before)
    cluster_filters(energy, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_dead_filters_and_one_channel_are_no_obstacle() -> None:
    energy = torch.rand(8, 5)
    energy[3:] = 0
    assert torch.bincount(cluster_filters(energy, 4), minlength=4).tolist() == [2, 2, 2, 2]
    assert torch.bincount(cluster_filters(torch.zeros(8, 1), 4), minlength=4).tolist() == [2, 2, 2, 2]
    assert kept_energy(torch.zeros(8, 1), torch.zeros(8, dtype=torch.int64), 1) == 1.0


def test_half_precision_energies_are_summed_in_float32() -> None:
    energy = torch.rand(40, 24).to(torch.bfloat16)
    assert torch.equal(cluster_filters(energy, 4), cluster_filters(energy.float(), 4))


def test_no_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("cluster_filters got groups=0; give at least 1.")):
        cluster_filters(torch.rand(4, 4), 0)


def test_nan_energies_are_refused_with_the_filter() -> None:
    energy = torch.rand(4, 4)
    energy[2, 1] = torch.nan
    message = "cluster_filters got a non-finite energy in filter 2; the weights hold NaN or infinity."
    with pytest.raises(ModelError, match=re.escape(message)):
        cluster_filters(energy, 2)
