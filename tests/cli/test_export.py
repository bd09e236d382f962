"""The export command: what is written, told and refused; time is FLOPs here (conftest.py)."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dspfx
from dspfx.__main__ import main
from dspfx.cli import export, verify
from dspfx.deploy.onnx_file import read_graph, read_metadata
from dspfx.deploy.tensorrt_ops import operations
from dspfx.kernels.library import library_or_none
from dspfx.passes.fuse_native import fuse_native
from tests.deploy import fake_tensorrt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small lowered network for digits."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    path = tmp_path / "small.safetensors"
    dspfx.save(dspfx.lower(nn.Sequential(*layers, nn.Linear(8, 10)), torch.zeros(2, 3, 16, 16), tune=None), path)
    return path


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["export", *map(str, argv), "--rounds", "2"]) == 0
    return capsys.readouterr().out


def failed(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["export", *map(str, argv)]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    return found.err


def test_every_kind_beside_the_network(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, file, "--against", file, "--to", "onnx,openvino,pt2")
    names = ["small.bin", "small.onnx", "small.pt2", "small.safetensors", "small.xml"]
    assert sorted(x.name for x in file.parent.iterdir()) == names
    lines = text.splitlines()
    for line, suffix in zip(lines, (".onnx", ".xml", ".pt2"), strict=False):
        assert line.startswith(f"{file.with_suffix(suffix)}: ")
        assert ", fp32, any batch (compared at 2, 1, 3), differs from PyTorch by " in line
    table = [line.split() for line in lines if line.startswith(("kind", "onnx", "openvino", "pt2"))]
    assert table[0] == ["kind", "file", "precision", "MB", "error", "ours", "ms", "dense", "ms", "ratio"]
    assert [row[:3] for row in table[1:]] == [
        ["onnx", "small.onnx", "fp32"],
        ["openvino", "small.xml", "fp32"],
        ["pt2", "small.pt2", "fp32"],
    ]
    assert [row[-1] for row in table[1:]] == ["1.000"] * 3  # the same network on both sides
    assert [line.split("rounds; ")[1].split()[0] for line in lines[-3:]] == ["eager,", "onnxruntime", "openvino"]


@pytest.mark.skipif(library_or_none() is None, reason="the native kernels need a C++ compiler")
def test_the_kernels_go_along_and_the_file_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    lowered = dspfx.lower(model, torch.zeros(2, 3, 16, 16), tune=None)
    dspfx.save(fuse_native(lowered), tmp_path / "network.safetensors")
    text = shown(capsys, tmp_path / "network.safetensors", "--kernels", "portable")
    assert "with dspfx's kernels for portable" in text
    assert "onnxruntime-native" in text.splitlines()[-1]
    assert {"network.onnx", "network.portable.so"} <= {x.name for x in tmp_path.iterdir()}
    (tmp_path / "network.portable.so").write_bytes(b"not what is loaded")
    images = torch.randn(3, 3, 16, 16)
    found = verify.opened(tmp_path / "network.onnx", tmp_path).call(images)
    assert torch.allclose(found, model.eval()(images), atol=1e-6)


def test_a_record_instead_of_the_table(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    content = json.loads(shown(capsys, file, "--out", out, "--json", "-"))
    (line,) = content["files"]
    assert line["file"] == str(out / "small.onnx")
    assert line["bytes"] == (out / "small.onnx").stat().st_size
    assert line["metadata"] == read_metadata(out / "small.onnx")
    assert list(line["networks"]) == ["ours"]
    assert line["networks"]["ours"]["median_ms"] > 0


def test_a_named_network_goes_into_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", "resnet20", "--precision", "fp16", "--rounds", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:3] == ["onnx", "resnet20.onnx", "fp16"]
    assert [x.name for x in tmp_path.iterdir()] == ["resnet20.onnx"]


def test_int8_is_calibrated_with_images_of_the_run(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file.parent / "settings.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.25] * 3}))
    seen: list[torch.Tensor] = []
    calibrate = export.calibration

    def noted(*args: Any) -> list[torch.Tensor]:
        seen.extend(calibrate(*args))
        return seen

    monkeypatch.setattr(export, "calibration", noted)
    shown(capsys, file, "--precision", "int8", "--calibration", "digits", "--images", "50")
    assert [tuple(x.shape) for x in seen] == [(32, 3, 16, 16), (18, 3, 16, 16)]
    images = torch.cat(seen)
    assert float(images.min()) == -2.0  # black, (0 - 0.5) / 0.25
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(operations(read_graph(file.with_suffix(".onnx"))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "onnx,tflite"), "--to 'tflite' is not known; give some of onnx, openvino, pt2, tensorrt."),
        (
            ("--to", "pt2", "--precision", "bf16"),
            "--precision bf16 is for onnx and tensorrt; leave pt2 out of --to.",
        ),
        (
            ("--precision", "int8"),
            "--calibration goes with --precision int8, and only with that; give both or neither.",
        ),
        (("--batch", "1,8"), "--batch names 2 sizes; give the smallest, usual and largest: 1,8,32."),
    ],
)
def test_options_that_cannot_be(
    options: tuple[str, ...], message: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failed(capsys, file, *options) == f"dspfx export: error: {message}\n"
    assert [x.name for x in file.parent.iterdir()] == ["small.safetensors"]


def test_a_gated_network_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gm = dspfx.prepare(dspfx.cli.models.build("resnet20", 10), torch.zeros(1, 3, 32, 32))
    dspfx.save(gm, tmp_path / "gated.safetensors")
    text = failed(capsys, tmp_path / "gated.safetensors", "--against", "resnet20", "--rounds", "0")
    assert "still has gates (the first is " in text
    assert text.endswith("lower first: small = dspfx.lower(gm), and export that.\n")


def test_an_unwritable_folder(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be written (" in failed(capsys, file, "--out", file.parent / "none")


def test_tensorrt_that_is_not_there_is_told_before_anything_is_written(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    text = failed(capsys, file, "--to", "onnx,tensorrt")
    assert text.startswith("dspfx export: error: the runtime 'tensorrt' needs the package tensorrt, which cannot be")
    assert [x.name for x in file.parent.iterdir()] == ["small.safetensors"]


def test_an_engine_in_one_command(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--precision", "fp16", "--batch", "1,2,4", "--timing-cache", file.parent / "timings", "--aux-streams", 1)
    with fake_tensorrt.installed() as asked:
        assert main(["export", str(file), "--to", "onnx,tensorrt", *map(str, options), "--rounds", "0"]) == 0
        profile, streams = asked["profile"], asked["config"].max_aux_streams
    assert (profile["input0"], streams) == (((1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16)), 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(
        f"{file.with_suffix('.engine')}: TensorRT engine on tensorrt 10.99.0, NVIDIA Fake, fp16, "
    )
    assert lines[-1].split()[:3] == ["tensorrt", "small.engine", "fp16"]
    assert (file.parent / "timings").is_file()


def test_the_tool_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/export.py", "resnet21"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "tools" / "export.py"), run_name="__main__")
    assert capsys.readouterr().err.startswith("dspfx export: error: network 'resnet21' is not known; give one of ")
    assert importlib.import_module("dspfx.cli.export").__doc__
