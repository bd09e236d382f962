"""Comparison of outputs: by the scale of the tensor, and infinite where no number says it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dspfx.deploy.agree import disagreement, tolerance_of

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("found", "expected", "error", "place"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0, "none"),
        ([1.0, 2.5], [1.0, 2.0], 0.25, "output 0"),
        ([1.0, NAN], [1.0, NAN], 0.0, "none"),
        ([1.0, INF], [1.0, INF], 0.0, "none"),
        ([1.0, -INF], [1.0, INF], INF, "output 0: other values that are not finite"),
        ([1.0, NAN], [1.0, INF], INF, "output 0: other values that are not finite"),
        ([1.0, NAN], [1.0, 2.0], INF, "output 0: other values that are not finite"),
        ([1.0, 2.0], [1.0, NAN], INF, "output 0: other values that are not finite"),
        ([NAN], [NAN], 0.0, "none"),
        ([], [], 0.0, "none"),
        ([1.0], [1.0, 2.0], INF, "output 0: float32[1] instead of float32[2]"),
        ([1], [1.0], INF, "output 0: int64[1] instead of float32[1]"),
        ([1, 2], [1, 3], INF, "output 0: other integers"),
        ([True], [True], 0.0, "none"),
    ],
)
def test_one_tensor(found: list[Any], expected: list[Any], error: float, place: str) -> None:
    largest, where = disagreement(torch.tensor(found), torch.tensor(expected))
    assert largest == pytest.approx(error)
    assert where == place


def test_the_worst_of_several_tensors_is_named() -> None:
    ones, fours = torch.ones(2), torch.full((2,), 4.0)
    expected = {"a": ones, "b": (fours, None)}
    assert disagreement({"a": ones * 1.25, "b": (fours * 1.5, None)}, expected) == (0.5, "output 1")
    assert disagreement({"a": ones, "b": (fours, "x")}, expected) == (INF, "output 2: 'x' instead of None")


def test_another_nesting_is_no_agreement() -> None:
    error, place = disagreement([torch.ones(1)], (torch.ones(1),))
    assert error == INF
    assert place.startswith("the outputs' nesting: ")


def test_coarser_numbers_are_given_more_room() -> None:
    assert tolerance_of(torch.ones(1), 1e-5) == 1e-5
    assert tolerance_of(torch.ones(1, dtype=torch.float64), 1e-5) == 1e-5
    assert tolerance_of([torch.ones(1), torch.ones(1).half()], 1e-5) == pytest.approx(1e-5 * 2**13)
    assert tolerance_of([torch.ones(1, dtype=torch.int64)], 1e-5) == 1e-5
