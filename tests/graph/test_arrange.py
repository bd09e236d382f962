"""arrange: against all permutations, and what a tree has to keep."""

from __future__ import annotations

import itertools
import random

import pytest

from dspfx.graph.arrange import END, START, Tree, gather, order, row


def together(found: tuple[int, ...], wanted: set[int]) -> bool:
    """Whether the wanted ones are neighbours, the ends counted among them."""
    places = [i for i, leaf in enumerate((START, *found, END)) if leaf in wanted]
    return places == list(range(places[0], places[-1] + 1))


@pytest.mark.parametrize("seed", range(40))
def test_every_set_that_fits_is_met_and_no_other(seed: int) -> None:
    draw = random.Random(seed)
    leaves = list(range(draw.randint(2, 6)))
    tree: Tree = row(leaves)
    left = list(itertools.permutations(leaves))
    for _ in range(8):
        wanted = set(draw.sample(leaves, draw.randint(1, len(leaves))))
        wanted |= set(draw.choice(([], [], [START], [END])))
        fitting = [one for one in left if together(one, wanted)]
        found = gather(tree, wanted)
        assert (found is None) == (not fitting)
        if found is not None:
            tree, left = found, fitting
        assert tuple(order(tree)) in left


def test_two_sets_stand_as_only_one_both_only_other() -> None:
    tree = row(range(8))
    for wanted in ({0, 2, 4, 6, 7}, {1, 3, 5, 6, 7}):
        tree = gather(tree, wanted)
        assert tree is not None
    assert order(tree) == [0, 2, 4, 6, 7, 1, 3, 5]


def test_what_nothing_asks_for_stays() -> None:
    assert order(row([3, 5, 9])) == [3, 5, 9]
    tree = gather(row(range(6)), {1, 2})
    assert order(tree) == list(range(6))
    assert order(gather(row(range(4)), {0, END})) == [1, 2, 3, 0]
    assert order(gather(row(range(4)), {3, START})) == [3, 0, 1, 2]


def test_a_fixed_row_meets_what_it_meets_already() -> None:
    tree = row([4, 1, 7], fixed=True)
    assert gather(tree, {4, 7}) is None
    assert gather(tree, {4, END}) is None
    for wanted in ({4, 1}, {1, 7, END}, {START, 4}):
        assert order(gather(tree, wanted)) == [4, 1, 7]
