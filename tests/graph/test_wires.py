"""Tensors of wires against the same operations done on ordinary, dense tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dspfx.graph.wires import along, compress, delete, spread, thin

LAYOUTS = [((2, 5, 3, 4), 1), ((2, 3, 4, 5), 3), ((5,), 0), ((2, 5), 1), ((1, 5, 1, 1), 1), ((2, 5, 0, 3), 1)]


def dense(vector: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """The loop that `spread` stands for."""
    out = torch.empty(shape, dtype=torch.int64)
    for index, wire in enumerate(vector.tolist()):
        out.select(axis, index).fill_(wire)
    return out


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_spread_lays_wires_along_an_axis_at_the_cost_of_the_channels(shape: tuple[int, ...], axis: int) -> None:
    vector = torch.tensor([7, 3, 9, 3, 1])
    wires = spread(vector, shape, axis)
    assert torch.equal(wires, dense(vector, shape, axis))
    assert thin(wires).numel() <= 5
    if wires.numel():
        found = along(wires, axis)
        assert found is not None
        assert torch.equal(found, vector)
        dense_found = along(wires.clone(), axis)
        assert dense_found is not None
        assert torch.equal(dense_found, vector)


def test_along_refuses_what_differs_elsewhere() -> None:
    wires = torch.arange(6).reshape(1, 2, 3)
    assert along(wires, 1) is None
    assert along(wires, 2) is None
    assert along(torch.tensor(3), 0) is None
    assert along(torch.zeros(0, 2, dtype=torch.int64), 1) is None


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5)])
def test_compress_keeps_the_values(shape: tuple[int, ...]) -> None:
    axis = shape.index(5)
    wires = dense(torch.tensor([4, 8, 15, 16, 23]), shape, axis)
    small = compress(wires)
    assert torch.equal(small, wires)
    assert sum(stride != 0 for stride in small.stride()) == 1
    mixed = torch.arange(30).reshape(shape)
    assert torch.equal(compress(mixed), mixed)


def test_delete_takes_channels_out() -> None:
    removed = torch.zeros(10, dtype=torch.bool)
    removed[[2, 7]] = True
    vector = torch.tensor([1, 2, 3, 7, 7, 9])
    found = delete(spread(vector, (2, 6, 4), 1), removed)
    assert found is not None
    assert torch.equal(found, dense(torch.tensor([1, 3, 9]), (2, 3, 4), 1))


def test_delete_takes_blocks_out_of_two_axes() -> None:
    wires = torch.arange(12).reshape(3, 4)
    removed = torch.zeros(12, dtype=torch.bool)
    removed[wires[1]] = True
    removed[wires[:, 2]] = True
    found = delete(wires, removed)
    assert found is not None
    assert found.tolist() == [[0, 1, 3], [8, 9, 11]]
    removed[0] = True
    assert delete(wires, removed) is None  # no block


def test_delete_of_nothing_and_of_everything() -> None:
    wires = spread(torch.tensor([0, 1]), (3, 2, 4), 1)
    assert delete(wires, torch.zeros(2, dtype=torch.bool)) is wires
    found = delete(wires, torch.ones(2, dtype=torch.bool))
    assert found is not None
    assert found.shape == (3, 0, 4)
    assert delete(torch.arange(4).reshape(2, 2), torch.ones(4, dtype=torch.bool)) is None
