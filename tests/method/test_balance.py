"""Balanced groups are the best ones of their sizes; blocks go evenly, weakest first, and score what is lost."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor

from dspfx.errors import ConfigError, ModelError
from dspfx.method.balance import balanced_groups, block_drops, block_size, unit_block
from dspfx.method.importance import cumulative_share, unit_share


def best_sum(logits: Tensor) -> float:
    """Of all assignments to groups whose sizes differ by at most one, by brute force."""
    groups, filters = logits.shape
    sums = []
    for assigned in itertools.product(range(groups), repeat=filters):
        sizes = [assigned.count(g) for g in range(groups)]
        if max(sizes) - min(sizes) <= 1:
            sums.append(sum(float(logits[g, o]) for o, g in enumerate(assigned)))
    return max(sums)


@pytest.mark.parametrize(
    ("groups", "filters"), [(1, 3), (2, 6), (2, 7), (3, 6), (3, 7), (3, 8), (4, 6), (4, 7), (5, 6), (4, 3), (3, 1)]
)
@pytest.mark.parametrize("kind", ["random", "tied", "skewed"])
def test_the_best_assignment_is_found(groups: int, filters: int, kind: str) -> None:
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(groups, filters, generator=generator, dtype=torch.float64)
        if kind == "tied":
            logits = logits.round()
        if kind == "skewed":
            logits[0] += 3
        group = balanced_groups(logits)
        sizes = torch.bincount(group, minlength=groups)
        assert int(sizes.max() - sizes.min()) <= 1
        assert float(logits[group, torch.arange(filters)].sum()) == pytest.approx(best_sum(logits), abs=1e-9)


@pytest.mark.parametrize(("groups", "filters"), [(4, 512), (8, 300), (7, 100)])
def test_no_swap_of_two_filters_improves_a_large_layer(groups: int, filters: int) -> None:
    logits = torch.randn(groups, filters, generator=torch.Generator().manual_seed(0))
    group = balanced_groups(logits)
    sizes = torch.bincount(group, minlength=groups)
    assert (int(sizes.min()), int(sizes.max())) == (filters // groups, -(-filters // groups))
    at = logits[group]  # [a, b]: filter b in a's group
    own = at.diagonal()
    assert float((at + at.T - own[:, None] - own[None]).max()) <= 1e-5


def test_groups_that_are_balanced_already_are_the_argmax() -> None:
    truth = torch.randperm(24, generator=torch.Generator().manual_seed(0)) % 4
    logits = torch.nn.functional.one_hot(truth, 4).T.float()
    assert torch.equal(balanced_groups(logits), truth)
    assert torch.equal(balanced_groups(logits.bfloat16()), truth)


def test_logits_that_say_nothing_give_balanced_groups_too() -> None:
    assert sorted(torch.bincount(balanced_groups(torch.zeros(3, 10))).tolist()) == [3, 3, 4]
    assert balanced_groups(torch.zeros(2, 0)).tolist() == []


def test_unsound_logits_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^balanced_groups got no group; give logits \[G, O\] with G of at least 1"):
        balanced_groups(torch.zeros(0, 3))
    message = "balanced_groups got logits that are NaN or infinite; restore a sound checkpoint."
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
            balanced_groups(torch.tensor([[0.0, bad]]))


def test_the_block_is_what_a_layer_holds_twice() -> None:
    assert [block_size(n) for n in (1, 2, 3, 4, 7, 8, 15, 16, 17, 64, 1000)] == [1, 1, 1, 2, 2, 4, 4, 8, 8, 8, 8]
    assert unit_block(torch.arange(64)) == 8
    assert unit_block(torch.arange(64) // 4) == 32  # 16 channels of four positions each
    assert unit_block(torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])) == 4
    assert unit_block(torch.empty(0, dtype=torch.int64)) == 1


def test_blocks_of_one_of_one_group_are_scored_as_single_channels() -> None:
    energy = torch.rand(1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    every, alone = torch.ones(1, 12, dtype=torch.bool), torch.arange(12)
    scores, steps = block_drops(energy, every, alone, 1)
    assert torch.allclose(scores, cumulative_share(energy, every), atol=1e-15)
    assert torch.equal(steps[0].argsort(), torch.cat([energy.argmax()[None], energy[0].argsort()[:-1]]))
    pairs = alone // 2
    together, _ = block_drops(energy, every, pairs, 2)
    assert torch.allclose(together, unit_share(energy, every, pairs), atol=1e-15)


def test_every_group_loses_its_weakest_and_the_score_is_what_all_lose() -> None:
    energy = torch.tensor([[8.0, 1.0, 2.0, 4.0, 3.0], [1.0, 2.0, 30.0, 4.0, 5.0]], dtype=torch.float64)
    every = torch.ones(2, 5, dtype=torch.bool)
    scores, steps = block_drops(energy, every, torch.arange(5), 2)
    # Five channels: first down to four, then to two, which stay.
    assert steps.tolist() == [[-1, 0, 1, -1, 1], [0, 1, -1, 1, -1]]
    assert scores[0, 1] == scores[1, 0] == 2 / 60
    assert scores[0, 2] == scores[0, 4] == scores[1, 1] == scores[1, 3] == 13 / 60
    assert bool((scores[steps < 0] == 1).all())


def test_groups_that_lost_some_already_wait_for_the_others() -> None:
    energy = torch.arange(1.0, 9.0, dtype=torch.float64).expand(2, 8)
    left = torch.ones(2, 8, dtype=torch.bool)
    left[1, :3] = False
    scores, steps = block_drops(energy, left, torch.arange(8), 2)
    assert steps.tolist() == [[0, 0, 1, 1, 2, 2, -1, -1], [-1, -1, -1, 1, 2, 2, -1, -1]]
    assert bool((scores[~left] == float("-inf")).all())
    assert float(scores[0, 0]) == 3 / (36 + 30)


def test_what_is_fixed_stays_and_counts_as_the_strongest() -> None:
    energy = torch.arange(1.0, 9.0, dtype=torch.float64)[None]
    fixed = torch.zeros(8, dtype=torch.bool)
    fixed[:3] = True
    scores, steps = block_drops(energy, torch.ones(1, 8, dtype=torch.bool), torch.arange(8), 2, fixed)
    assert steps.tolist() == [[-1, -1, -1, 0, 0, 1, 1, 2]]  # strongest first: 0, 1 | 2, 7 | 6, 5 | 4, 3
    assert bool((scores[0, :3] == 1).all())


def test_energies_of_zero_and_energies_that_round_away_leave_the_best_block() -> None:
    for energy in (torch.zeros(2, 8), torch.tensor([[1.0, 1e-30, 1e30, 1e-30] * 2] * 2)):
        scores, steps = block_drops(energy.double(), torch.ones(2, 8, dtype=torch.bool), torch.arange(8), block_size(8))
        assert (steps < 0).sum(1).tolist() == [4, 4]
        assert bool(((scores < 1) == (steps >= 0)).all())
    none = torch.zeros(2, 8, dtype=torch.bool)
    scores, steps = block_drops(torch.rand(2, 8).double(), none, torch.arange(8), 4)
    assert bool((scores == float("-inf")).all())
    assert bool((steps == -1).all())
