"""The verify command: a line for each link of a run's chain, and an error where one differs."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import dspfx
from dspfx.__main__ import main
from dspfx.cli import models
from tests.cli.test_compress import Tiny
from tests.deploy import fake_tensorrt

ROOT = Path(__file__).resolve().parents[2]
EQUAL = r"equal, \d\.\de[+-]\d\d of the output's scale, allowed 0\.0001"


@pytest.fixture(scope="module", autouse=True)
def tiny() -> Iterator[None]:
    """Every network that is named is a small one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", lambda name, classes: Tiny(classes))
        yield


@pytest.fixture(scope="module")
def made(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, as short as a run can be."""
    out = tmp_path_factory.mktemp("run") / "out"
    options = ("--data", "digits", "--image-size", "16", "--model", "resnet20", "--one-shot", "--limit-train", "80")
    epochs = ("--epochs-dense", "0", "--epochs-tune", "0")
    assert main(["compress", *options, *epochs, "--threads", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def verified(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> tuple[list[str], str]:
    capsys.readouterr()
    assert main(["verify", *map(str, argv)]) == code
    found = capsys.readouterr()
    return found.out.splitlines(), found.err


def export(folder: Path, *options: str) -> None:
    assert main(["export", str(folder / "network.safetensors"), "--rounds", "0", *options]) == 0


def test_a_run_of_compress_has_its_chain(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, _ = verified(capsys, folder)
    names = ["gated = pruned", "pruned = lowered", r"lowered = ONNX \(network\.onnx, fp32\)"]
    assert len(lines) == 3
    for line, name in zip(lines, names, strict=True):
        assert re.fullmatch(f"{name}: {EQUAL}", line)
    assert not (folder / "network.onnx").exists()


def test_every_exported_file_is_a_link(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(folder, "--to", "onnx,openvino,pt2")
    lines, _ = verified(capsys, folder)
    assert [line.partition(":")[0] for line in lines[2:]] == [
        "lowered = ONNX (network.onnx, fp32)",
        "lowered = OpenVINO (network.xml, fp32)",
        "lowered = torch.export (network.pt2, fp32)",
    ]
    assert all(re.search(f": {EQUAL}$", line) for line in lines)
    export(folder, "--precision", "fp16")
    lines, _ = verified(capsys, folder, folder / "network.onnx")
    assert lines[2].startswith("lowered = ONNX (network.onnx, fp16): equal, ")
    assert lines[2].endswith(", allowed 0.02")
    assert len(lines) == 3


def test_an_engine_is_compared_with_the_onnx_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_tensorrt.installed() as asked:
        export(folder)
        dspfx.build_tensorrt(folder / "network.onnx", folder / "network.engine")
        lines, _ = verified(capsys, folder)
        name = "ONNX (network.onnx, fp32) = engine (network.engine, fp32)"
        assert re.fullmatch(f"{re.escape(name)}: {EQUAL}", lines[3])
        asked["wrong"] = 0.01
        lines, error = verified(capsys, folder, code=2)
    assert lines[3].startswith(f"{name}: DIFFERS in output 0, 1.0e-02 of the output's scale, ")
    assert error == (
        "dspfx verify: error: 1 of 4 links differ: ONNX (network.onnx, fp32) and engine (network.engine, fp32).\n"
    )


def test_an_engine_that_cannot_run_here_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_tensorrt.installed():
        export(folder)
        dspfx.build_tensorrt(folder / "network.onnx", folder / "network.engine")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    lines, _ = verified(capsys, folder)
    start = "ONNX (network.onnx, fp32) = engine (network.engine): not compared: TensorRT cannot be imported ("
    assert lines[3].startswith(start)
    _, error = verified(capsys, folder, folder / "network.engine", code=2)  # asked for by name
    assert error.startswith("dspfx verify: error: TensorRT cannot be imported (")


def test_another_lowered_network_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "network.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    state = safetensors.torch.load_file(path)
    name = max(state, key=lambda key: state[key].numel())
    safetensors.torch.save_file(state | {name: state[name] * 1.1}, path, metadata)
    lines, error = verified(capsys, folder, code=2)
    assert lines[0].startswith("gated = pruned: equal, ")
    assert re.match(r"pruned = lowered: DIFFERS in output 0, \d\.\de[+-]\d\d of the output's scale", lines[1])
    assert error == "dspfx verify: error: 1 of 3 links differ: pruned and lowered.\n"


def test_a_file_of_another_lowering_differs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = dspfx.lower(models.build("resnet20", 10), torch.zeros(2, 3, 16, 16), tune=None)
    dspfx.export_onnx(dense, folder / "other.onnx", verbose=False)
    lines, error = verified(capsys, folder, code=2)
    assert re.fullmatch(
        r"lowered = ONNX \(other\.onnx, fp32\): DIFFERS, it was made of another lowering \(plan [0-9a-f]{12}\)",
        lines[2],
    )
    assert error == "dspfx verify: error: 1 of 3 links differ: lowered and ONNX (other.onnx, fp32).\n"


def test_foreign_files_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = dspfx.load(folder / "network.safetensors")
    torch.onnx.export(network, (torch.zeros(2, 3, 16, 16),), folder / "foreign.onnx", dynamo=True, verbose=False)
    torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 16, 16),)), folder / "foreign.pt2")
    lines, _ = verified(capsys, folder)
    for line, name in zip(lines[2:], ("ONNX (foreign.onnx)", "torch.export (foreign.pt2)"), strict=True):
        assert line.startswith(f"lowered = {name}: not compared: {folder}/foreign.")
        assert line.endswith(" does not say how it is called; the export functions of dspfx write files that do.")


def test_what_is_no_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, error = verified(capsys, tmp_path, code=2)
    message = f"{tmp_path} has no pruned.safetensors; give the folder of a finished `dspfx compress`."
    assert error == f"dspfx verify: error: {message}\n"
    _, error = verified(capsys, folder, folder / "plan.json", code=2)
    assert error.startswith(f"dspfx verify: error: {folder / 'plan.json'} is no exported file; give some that end in ")
    monkeypatch.setattr(models, "build", lambda name, classes: nn.Sequential(nn.Conv2d(3, classes, 1)))
    _, error = verified(capsys, folder, code=2)
    assert "pruned.safetensors does not fit this Sequential: at " in error


def test_the_tool_is_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/verify.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "tools" / "verify.py"), run_name="__main__")
    assert capsys.readouterr().err.startswith(f"dspfx verify: error: {tmp_path} has no pruned.safetensors; ")
