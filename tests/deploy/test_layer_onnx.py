"""write_layer: what ONNX Runtime computes from the file is what PyTorch computes, with the frame of the file's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from dspfx.deploy.engines import OpenVino, start_onnxruntime
from dspfx.deploy.layer_onnx import FRAME, write_layer
from dspfx.forms import Branch, FormCase, build_form, case_of
from dspfx.grouped import EMPTY, PaddedGroupConv2d
from dspfx.modules import GroupConv2d
from dspfx.plans import Group

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
HALVES = (Group((0, 1, 2), (0, 1, 2, 3)), Group((3, 4, 5), (2, 3, 4, 5)))
APART = (Group((4, 1), (0, 2, 5)), Group((0, 3, 5), (1, 2)), Group((2,), (0, 1, 2, 3, 4, 5)))
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "plain": (nn.Conv2d(6, 5, 3), (2, 6, 9, 8)),
    "no bias": (nn.Conv2d(6, 5, 3, bias=False), (1, 6, 9, 8)),
    "stride": (nn.Conv2d(6, 5, (3, 2), stride=(2, 3)), (1, 6, 9, 8)),
    "padding": (nn.Conv2d(6, 5, 3, padding=(2, 1)), (1, 6, 9, 8)),
    "dilation": (nn.Conv2d(6, 5, 3, dilation=(1, 2), padding=1), (1, 6, 9, 8)),
    "groups": (nn.Conv2d(6, 9, 3, groups=3), (1, 6, 9, 8)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1, stride=2), (1, 6, 9, 8)),
    "same": (nn.Conv2d(6, 5, 3, padding="same"), (1, 6, 9, 8)),
    "same, even kernel": (nn.Conv2d(6, 5, (4, 2), padding="same"), (1, 6, 9, 8)),
    "same, dilated": (nn.Conv2d(6, 5, 3, padding="same", dilation=2), (1, 6, 9, 8)),
    "valid": (nn.Conv2d(6, 5, 3, padding="valid"), (1, 6, 9, 8)),
    "1d": (nn.Conv1d(6, 5, 4, stride=2, padding=1, dilation=2), (2, 6, 20)),
    "1d, same": (nn.Conv1d(6, 5, 4, padding="same"), (2, 6, 20)),
    "3d": (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 2), groups=1), (1, 2, 4, 5, 6)),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1), (1, 6, 5, 4)),
    "transposed groups": (nn.ConvTranspose2d(6, 4, (3, 2), dilation=2, groups=2), (1, 6, 5, 4)),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 3, stride=3), (2, 6, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 4, 2, bias=False), (1, 2, 3, 3, 3)),
    "linear": (nn.Linear(6, 5), (2, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (2, 6)),
    "linear of tokens": (nn.Linear(6, 5), (2, 3, 6)),
    "linear of maps": (nn.Linear(6, 5), (2, 3, 4, 6)),
    "slices": (GroupConv2d(6, 6, 3, HALVES), (2, 6, 7, 7)),
    "selections": (GroupConv2d(6, 6, 3, APART, padding=1, stride=2), (1, 6, 7, 7)),
    "one branch": (GroupConv2d(6, 2, 1, (Group((0, 1), (1, 3, 5)),)), (1, 6, 7, 7)),
    "filters that read nothing": (GroupConv2d(6, 8, 3, HALVES), (1, 6, 7, 7)),
    "and others after them": (GroupConv2d(6, 9, 3, (HALVES[0], Group((4, 8), (1, 5)))), (1, 6, 7, 7)),
    "padded groups": (
        PaddedGroupConv2d(6, 6, 3, (Group((0, 1, 2), (0, 1, 2)), Group((3, 4, 5), (3, 4, 5))), padding=1),
        (1, 6, 7, 7),
    ),
    "padded groups apart": (
        PaddedGroupConv2d(6, 5, 3, (Group((4, 1, 0), (0, 2, 5)), Group((3, 2, EMPTY), (1, 2, 1)))),
        (1, 6, 7, 7),
    ),
    "padded groups in ranges": (
        PaddedGroupConv2d(8, 5, 3, (Group((0, 1, 2), (2, 3, 4)), Group((3, 4, EMPTY), (5, 6, 7)))),
        (1, 8, 7, 7),
    ),
}


def split_off(path: Path, framed: bool) -> nn.Module | None:
    """The frame's convolution, with the file's weights; afterwards the file ends before its average."""
    if not framed:
        return None
    model = onnx.load(path)
    first, last = model.graph.node[0], model.graph.node.pop()
    assert (first.op_type, last.op_type) == ("Conv", "GlobalAveragePool")
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(last.input[0], onnx.TensorProto.FLOAT, None))
    onnx.save(model, path)
    arrays = {c.name: torch.from_numpy(numpy_helper.to_array(c).copy()) for c in model.graph.initializer}
    frame = nn.Conv2d(FRAME, arrays[first.input[1]].shape[0], 1)
    frame.load_state_dict({"weight": arrays[first.input[1]], "bias": arrays[first.input[2]]})
    return frame


def check(module: nn.Module, shape: tuple[int, ...], path: Path, start: Any = start_onnxruntime) -> None:
    framed = len(shape) == 4 and not isinstance(module, nn.Linear)
    outer = write_layer(module, shape, path)
    assert outer == ((shape[0], FRAME, *shape[2:]) if framed else shape)
    x = torch.randn(outer)
    averaged: Tensor = torch.from_numpy(start(path, ["x"], 1)([x.numpy()])[0].copy())
    frame = split_off(path, framed)
    found = torch.from_numpy(start(path, ["x"], 1)([x.numpy()])[0].copy())
    with torch.no_grad():
        expected = module(frame(x) if frame is not None else x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if framed:
        torch.testing.assert_close(averaged, F.adaptive_avg_pool2d(expected, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_the_file_computes_what_the_layer_does(name: str, tmp_path: Path) -> None:
    check(*LAYERS[name], tmp_path / "layer.onnx")


@pytest.mark.parametrize("name", ["plain", "selections", "and others after them", "padded groups apart", "linear"])
def test_openvino_reads_it_too(name: str, tmp_path: Path) -> None:
    check(*LAYERS[name], tmp_path / "layer.onnx", OpenVino)


@pytest.mark.parametrize("name", [n for n, (m, _) in LAYERS.items() if case_of(m, (1, 6, 9, 8)) is not None])
def test_what_is_built_from_a_case_can_be_written(name: str, tmp_path: Path) -> None:
    module, shape = LAYERS[name]
    case = case_of(module, shape)
    assert case is not None
    check(build_form(case), shape, tmp_path / "layer.onnx")


@pytest.mark.parametrize("form", ["branches", "grouped"])
@pytest.mark.parametrize("is_ordered", [True, False])
def test_forms_of_groups_can_be_written(form: Any, is_ordered: bool, tmp_path: Path) -> None:
    branches = (Branch(4, 6, True), Branch(3, 5, False), Branch(6, 2, False))
    options = ((3, 3), (2, 2), (1, 1), (1, 1), 1, branches, is_ordered)
    case = FormCase(form, "Conv2d", (2, 12, 6, 5), 13, *options)
    check(build_form(case), case.shape, tmp_path / "layer.onnx")


def test_slices_are_slices_and_selections_are_gathers(tmp_path: Path) -> None:
    kinds = {}
    for name in ("slices", "selections", "padded groups", "padded groups in ranges", "filters that read nothing"):
        module, shape = LAYERS[name]
        write_layer(module, shape, tmp_path / "layer.onnx")
        kinds[name] = [node.op_type for node in onnx.load(tmp_path / "layer.onnx").graph.node][1:-1]
    assert kinds == {
        "slices": [*["Slice", "Conv"] * 2, "Concat"],
        "selections": ["Gather", "Conv", *["Slice", "Conv"] * 2, "Concat", "Gather"],
        "padded groups": ["Conv"],
        "padded groups in ranges": ["Slice", "Conv", "Slice"],
        "filters that read nothing": [*["Slice", "Conv"] * 2, "Concat", "Pad"],
    }


def test_the_frame_alone(tmp_path: Path) -> None:
    path = tmp_path / "frame.onnx"
    assert write_layer(None, (2, 5, 4, 3), path) == (2, FRAME, 4, 3)
    x = torch.randn(2, FRAME, 4, 3)
    found = start_onnxruntime(path, ["x"], 1)([x.numpy()])[0]
    frame = split_off(path, True)
    assert frame is not None
    with torch.no_grad():
        np.testing.assert_allclose(found, frame(x).mean((2, 3), keepdim=True).numpy(), rtol=1e-5, atol=1e-6)
