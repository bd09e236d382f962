"""The estimate command: what it asks, tells and writes; time is FLOPs here (conftest.py)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dspfx
from dspfx.__main__ import main

KEYS = ["machine", "versions", "network", "runtime", "version", "batch", "input", "estimate"]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a dense network that remembers images of 12 pixels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))
    path = tmp_path_factory.mktemp("saved") / "network.safetensors"
    dspfx.save(dspfx.lower(model, torch.randn(4, 3, 12, 12), tune=None), path)
    return path


def test_it_prints_the_estimate_and_writes_its_record(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    argv = ["--runtime", "eager", "--budget", "flops=0.5", "--batch", "2", "--threads", "2", "--json", str(path)]
    assert main(["estimate", str(network), *argv]) == 0
    lines, content = capsys.readouterr().out.splitlines(), json.loads(path.read_text())
    assert list(content) == KEYS
    assert (content["network"], content["runtime"], content["version"]) == (str(network), "eager", "eager")
    assert (content["batch"], content["input"], content["machine"]["threads"]) == (2, "2x3x12x12", 2)
    found = content["estimate"]
    (trial,) = found["trials"]  # of less work is less time here, so the first budget pays
    assert (found["kind"], trial["budget"], found["is_worth"], found["worth_from"]) == ("flops", 0.5, True, 0.5)
    assert trial["flops_left"] <= 0.5
    assert trial["latency_left"] < 0.9
    assert re.split(r"\s{2,}", lines[0])[0] == "flops budget"
    left = f"{trial['latency_left']:.2f}"
    assert lines[-2] == f"Worth it: Budget(flops=0.5) takes {left} of the dense network's time here."
    assert lines[-1] == found["setting"]
    assert re.fullmatch(r"input 2x3x12x12, \d+ rounds; eager, .+, 2 threads, .+", lines[-1])


def test_with_a_dash_the_record_is_all_that_is_printed(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--runtime", "eager", "--budget", "params=0.6", "--input", "1,3,10,14", "--json", "-"]
    assert main(["estimate", str(network), *argv]) == 0
    content = json.loads(capsys.readouterr().out)
    assert (content["input"], content["estimate"]["kind"]) == ("1x3x10x14", "params")
    assert content["estimate"]["trials"][0]["params_left"] <= 0.6


def test_it_asks_onnxruntime_for_a_third_of_the_flops(
    network: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    class Found:
        def to_json(self) -> str:
            return "{}"

    def estimate(model: nn.Module, inputs: dspfx.Inputs, runtime: str, budget: dspfx.Budget, threads: int) -> Found:
        asked.extend([inputs.args[0].shape, runtime, budget, threads])
        return Found()

    monkeypatch.setattr(dspfx, "estimate", estimate)
    assert main(["estimate", "resnet20", "--json", "-"]) == 0
    assert asked == [(1, 3, 32, 32), "onnxruntime", dspfx.Budget(flops=0.35), 1]
    assert json.loads(capsys.readouterr().out)["estimate"] == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--runtime", "fast"], "runtime is 'fast', which dspfx does not know; give one of 'eager', "),
        (["--budget", "flops=2"], "Budget.flops is 2.0; give the fraction that remains, in (0, 1]: "),
        (["--json", "."], "--json . cannot be written; give a file in a folder that exists, or - to print."),
    ],
)
def test_what_cannot_be_done_is_one_line(
    argv: list[str], message: str, network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(network), *argv]) == 2
    assert capsys.readouterr().err.startswith(f"dspfx estimate: error: {message}")


def test_a_bad_batch_is_explained(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["estimate", str(network), "--batch", "1,8"])
    assert "argument --batch: '1,8' is no number of samples; give 1 or more" in capsys.readouterr().err
