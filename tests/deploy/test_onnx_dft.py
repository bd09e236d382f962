"""Fourier transforms in files: sums of products that equal torch's, and no DFT where it can be told how long it is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.deploy import onnx_dft
from dspfx.deploy.onnx_dft import coefficients, equation
from dspfx.deploy.onnx_file import read_graph
from dspfx.deploy.tensorrt_ops import operations
from tests.deploy.test_export import IMAGES, Applied


def as_complex(x: np.ndarray) -> np.ndarray:
    return x[..., 0] + 1j * x[..., 1]


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_coefficients_are_those_of_numpy(length: int) -> None:
    values = np.random.default_rng(0).normal(size=(length, 2))
    for is_inverse, transform in ((False, np.fft.fft), (True, np.fft.ifft)):
        found = np.einsum("nc,ncmd->md", values, coefficients(length, 2, is_inverse, False))
        np.testing.assert_allclose(as_complex(found), transform(as_complex(values)), atol=1e-12)
    found = np.einsum("nc,ncmd->md", values[:, :1], coefficients(length, 1, False, True))
    np.testing.assert_allclose(as_complex(found), np.fft.rfft(values[:, 0]), atol=1e-12)


def test_equations() -> None:
    assert equation(4, 1) == "abcd,bdef->aecf"
    assert equation(2, 0) == "ab,abcd->cd"
    values = np.random.default_rng(0).normal(size=(2, 3, 5, 4, 2))
    for axis in (0, 1, 2, 3):
        found = np.einsum(equation(5, axis), values, coefficients(values.shape[axis], 2, False, False))
        np.testing.assert_allclose(as_complex(found), np.fft.fft(as_complex(values), axis=axis), atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        lambda y: torch.fft.fft2(torch.fft.fft(y, dim=1)).abs(),
        lambda y: torch.fft.rfft(y).abs(),
        lambda y: torch.fft.ifft(torch.fft.fft(y) * 2).real,
    ],
    ids=["along channels and pixels", "one side", "there and back"],
)
def test_files_have_no_transform(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    path = tmp_path / "network.onnx"
    found = dspfx.export_onnx(Applied(function), path, IMAGES, verbose=False)
    assert found.any_batch
    assert found.max_error <= 1e-5
    assert found.outside_tensorrt == ()
    assert "Einsum" in operations(read_graph(path))
    assert dspfx.export_openvino(Applied(function), tmp_path / "n.xml", IMAGES, verbose=False).max_error <= 1e-5


def test_what_is_too_long_or_cut_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_dft, "LONGEST", 5)
    path = tmp_path / "network.onnx"
    found = dspfx.export_onnx(Applied(lambda y: torch.fft.fft(y).abs()), path, IMAGES, verbose=False)
    assert found.outside_tensorrt == ("DFT",)
    assert str(found).endswith(", allowed 0.0001; TensorRT has no DFT")
    monkeypatch.undo()
    ir = importlib.import_module("onnx_ir")
    length = ir.Value(name="n", const_value=ir.tensor(np.array(4)))
    for more, attributes in (([length], {}), ([], {"inverse": 1, "onesided": 1})):
        x = ir.Value(name="x", shape=ir.Shape([2, 8, 1]), type=ir.TensorType(ir.DataType.FLOAT))
        node = ir.node("DFT", [x, *more], attributes=attributes)
        graph = ir.Graph([x], node.outputs, nodes=[node])
        onnx_dft.write_out_transforms(graph)
        assert [n.op_type for n in graph] == ["DFT"]


def test_half_precision_has_half_coefficients(tmp_path: Path) -> None:
    class Transformed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x.float()).abs().to(x.dtype)

    found = dspfx.export_onnx(Transformed(), tmp_path / "n.onnx", IMAGES, precision="fp16", verbose=False)
    assert found.max_error <= found.tolerance
    assert found.outside_tensorrt == ()
