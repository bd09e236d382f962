"""Blocks: tilings by a loop, projections and their selection against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dspfx.method.blocks import FREE, PRUNED, UNIFIED, Tiling, counts, distortions, projected, select, unified

SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 5), st.just(1), st.integers(1, 3)),
)
BLOCKS = st.tuples(st.integers(1, 5), st.integers(1, 5))


def looped(weight: Tensor, tiling: Tiling) -> list[list[float]]:
    """The blocks, by index arithmetic; without what reaches over the edge."""
    matrix = {"planes": lambda: weight.flatten(2).permute(2, 0, 1), "gemm": lambda: weight.flatten(1)[None]}
    planes = (weight[..., None] if weight.dim() == 2 else weight) if tiling.layout == "planes" else weight
    weight = planes
    found = []
    for plane in matrix[tiling.layout]():
        for i in range(0, plane.shape[0], tiling.block[0]):
            for j in range(0, plane.shape[1], tiling.block[1]):
                found.append(plane[i : i + tiling.block[0], j : j + tiling.block[1]].flatten().tolist())
    return found


@given(SHAPES, BLOCKS, st.sampled_from(["planes", "gemm"]))
def test_blocks_are_those_of_a_loop_and_join_to_the_weight(
    shape: tuple[int, ...], block: tuple[int, int], layout: str
) -> None:
    tiling = Tiling(shape, block, layout)
    weight = torch.arange(1.0, torch.Size(shape).numel() + 1).reshape(shape)
    blocks = tiling.split(weight)
    assert blocks.shape == (tiling.count, block[0] * block[1])
    assert [[x for x in row if x] for row in blocks.tolist()] == looped(weight, tiling)
    assert torch.equal(tiling.join(blocks), weight)


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_a_unified_block_is_the_nearest_of_one_magnitude(seed: int, size: int) -> None:
    """Against every sign pattern with its best magnitude; zeros stay zero."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(1, size, generator=generator, dtype=torch.float64)
    alive = torch.rand(1, size, generator=generator) < 0.8
    block = block * alive
    best = float("inf")
    for signs in itertools.product((-1.0, 1.0), repeat=size):
        pattern = torch.tensor(signs, dtype=torch.float64) * alive[0]
        u = max(float((pattern * block[0]).sum() / max(int(alive.sum()), 1)), 0.0)
        best = min(best, float((block[0] - u * pattern).square().sum()))
    unify, prune = distortions(block, alive)
    found = unified(block, alive)
    assert torch.isclose(unify, torch.tensor([best], dtype=torch.float64), atol=1e-12)
    assert torch.isclose((block - found).square().sum(), unify[0], atol=1e-12)
    assert torch.isclose(block.square().sum(), prune[0], atol=1e-12)
    assert len(set(found[alive].abs().tolist())) <= 1
    assert not found[~alive].any()


@given(st.integers(0, 2**31), st.integers(1, 7), st.data())
def test_the_selection_is_the_brute_force_optimum(seed: int, n: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    unify_cost = torch.randint(0, 6, (n,), generator=generator).double()  # small integers: many ties
    prune_cost = unify_cost + torch.randint(0, 6, (n,), generator=generator)
    prune = data.draw(st.integers(0, n))
    unify = data.draw(st.integers(0, n - prune))
    classes = select(unify_cost, prune_cost, unify, prune)
    assert [int((classes == kind).sum()) for kind in (UNIFIED, PRUNED)] == [unify, prune]

    def cost(kinds: tuple[int, ...]) -> float:
        per_kind = {FREE: torch.zeros(n), UNIFIED: unify_cost, PRUNED: prune_cost}
        return sum(float(per_kind[kind][i]) for i, kind in enumerate(kinds))

    best = min(
        cost(kinds)
        for kinds in itertools.product((FREE, UNIFIED, PRUNED), repeat=n)
        if kinds.count(UNIFIED) == unify and kinds.count(PRUNED) == prune
    )
    assert cost(tuple(classes.tolist())) == best


def test_pruning_first_would_not_be_the_projection() -> None:
    """The cheapest block to prune is the one that unifying would have cost most to leave."""
    unify_cost, prune_cost = torch.tensor([0.0, 4.0]), torch.tensor([3.0, 4.0])
    assert select(unify_cost, prune_cost, 1, 1).tolist() == [UNIFIED, PRUNED]


@pytest.mark.parametrize(
    ("blocks", "prune", "unify", "expected"),
    [
        (10, 0.3, 0.5, (3, 5)),
        (10, 0.25, 0.25, (3, 3)),
        (3, 0.5, 0.5, (2, 1)),
        (1, 0.1, 0.9, (1, 0)),
        (7, 0.0, 1.0, (0, 7)),
    ],
)
def test_fractions_are_met_at_least(blocks: int, prune: float, unify: float, expected: tuple[int, int]) -> None:
    assert counts(blocks, prune, unify) == expected


def test_a_projection_keeps_free_blocks_and_is_idempotent() -> None:
    generator = torch.Generator().manual_seed(0)
    tiling = Tiling((10, 6, 3, 3), (4, 4))
    weight = torch.randn(10, 6, 3, 3, generator=generator) * (torch.rand(10, 6, 1, 1, generator=generator) < 0.7)
    blocks, alive = tiling.split(weight), tiling.split(weight) != 0
    classes = select(*distortions(blocks, alive), unify=20, prune=10)
    found = projected(blocks, alive, classes)
    assert torch.equal(found[classes == FREE], blocks[classes == FREE])
    assert not found[classes == PRUNED].any()
    assert torch.equal(found[alive].sign()[found[alive] != 0], blocks[alive].sign()[found[alive] != 0])
    assert torch.equal(projected(found, alive, classes), found)
    assert not tiling.join(found)[weight == 0].any()
