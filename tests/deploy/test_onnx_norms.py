"""Batch norms in files: the same function, from two values a channel."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.deploy.agree import disagreement
from dspfx.deploy.exported import TOLERANCES
from dspfx.deploy.onnx import Nesting
from dspfx.deploy.onnx_file import read_metadata, start_file

IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Preactivated(nn.Module):
    """Norms behind activations, where no convolution can take them: two of one width, one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 20, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(12, eps=0.1), nn.BatchNorm2d(12, affine=False), nn.BatchNorm2d(20)])
        generator = torch.Generator().manual_seed(0)
        for norm in self.norms:
            for value in norm.state_dict().values():
                if value.is_floating_point():
                    value.uniform_(0.5, 2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[1](self.norms[0](self.conv1(x).relu()).relu())
        return self.norms[2](self.conv2(x).relu())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_norms_share_a_mean_of_zero_and_a_variance_of_one(precision: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, path = Preactivated().eval(), tmp_path / "network.onnx"
    dspfx.export_onnx(network, path, IMAGES, precision=precision, verbose=False)
    onnx = importlib.import_module("onnx")
    model = onnx.load(path)
    values = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert len(norms) == 3
    assert {tuple(node.input[3:]) for node in norms} == {
        ("batch_norm_0_12", "batch_norm_1_12"),
        ("batch_norm_0_20", "batch_norm_1_20"),
    }
    assert {a.f for node in norms for a in node.attribute if a.name == "epsilon"} == {0.0}
    assert {value.dtype.name for value in values.values()} == {"float32" if precision == "fp32" else "float16"}
    weights = sum(p.numel() for p in network.parameters()) + 2 * 12  # the norm without any has two from now on
    assert sum(value.size for value in values.values()) == weights + 2 * 12 + 2 * 20
    found = start_file(path, Nesting.from_json(read_metadata(path)["dspfx.nesting"]))(IMAGES)
    with torch.no_grad():
        assert disagreement(found, network(IMAGES))[0] <= TOLERANCES[precision] / 10


def test_norms_that_share_their_values_keep_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Preactivated().eval()
    network.norms[1] = network.norms[0]
    dspfx.export_onnx(network, tmp_path / "network.onnx", IMAGES, verbose=False)
    model = importlib.import_module("onnx").load(tmp_path / "network.onnx")
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert norms[0].input[1:] == norms[1].input[1:]
    assert "batch_norm_0_12" not in norms[0].input
    assert norms[2].input[3:] == ["batch_norm_0_20", "batch_norm_1_20"]
