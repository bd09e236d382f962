"""Constants are computed at the export, but for products that are larger than what they are made of."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dspfx

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Embedded(nn.Conv2d):
    """Adds what a linear layer makes of a table of positions to the features of a convolution."""

    table: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(3, 8, 1)
        self.wide, self.narrow = nn.Linear(2, width), nn.Linear(width, 8)
        self.register_buffer("table", torch.linspace(-1, 1, 2 * 64).reshape(1, 64, 2))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.narrow(self.wide(self.table).relu())
        return super().forward(x) + bias.transpose(1, 2).reshape(1, 8, 8, 8)


@pytest.mark.parametrize(("width", "has_table"), [(128, True), (1, False)])
def test_only_what_shrinks_is_multiplied(width: int, has_table: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, path = Embedded(width).eval(), tmp_path / "network.onnx"
    found = dspfx.export_onnx(network, path, IMAGES, verbose=False)
    assert found.max_error <= 1e-6
    onnx = importlib.import_module("onnx")
    graph = onnx.load(path).graph
    sizes = [onnx.numpy_helper.to_array(x).size for x in graph.initializer]
    assert (64 * 2 in sizes) is has_table
    assert 64 * 128 not in sizes
    assert sum(sizes) <= 1.3 * sum(x.numel() for x in (*network.parameters(), network.table)) + 64 * 8
