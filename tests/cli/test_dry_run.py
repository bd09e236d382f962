"""compress --dry-run: coverage, a table of budgets and the time of training, and nothing on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dspfx.__main__ import main

SMALL = ["--image-size", "16", "--limit-train", "200", "--threads", "1", "--device", "cpu"]
EPOCHS = ["--epochs-dense", "2", "--epochs-learn", "2", "--epochs-tune", "3"]


def dry(tmp_path: Path, *more: str) -> list[str]:
    return ["compress", "--out", str(tmp_path / "out"), *SMALL, "--dry-run", *more]


def test_it_tells_what_would_be_done_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(dry(tmp_path, "--budget", "flops=0.4", *EPOCHS, "--dense-control")) == 0
    text = capsys.readouterr().out
    assert "layer1.0.conv1" in text  # coverage
    lines = [line.split() for line in text.splitlines() if line.startswith("flops=")]
    shares = [line[0].partition("=")[2] for line in lines]
    assert shares == ["0.4", "0.8", "0.65", "0.5", "0.35", "0.25"]
    assert all(float(line[1].rstrip("%")) <= 100 * float(line[0].partition("=")[2]) + 0.05 for line in lines)
    assert "so the 12 epochs of 2 steps take" in text  # 2 + 2 + 3, and 5 of the control
    assert text.endswith("Nothing was trained or written (--dry-run).\n")
    assert not (tmp_path / "out").exists()


def test_the_record_is_complete_and_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(dry(tmp_path, "--budget", "params=0.5", "--json", "-")) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["budgets"][0]["budget"] == {"params": 0.5}
    assert found["budgets"][0]["params_needed"] <= 0.5
    assert found["step_seconds"] > 0
    assert found["coverage"]["gated"] > 0.9
    assert found["arguments"]["budget"] == ["params=0.5"]


def test_a_budget_below_the_floor_is_told_and_others_are_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(dry(tmp_path, "--budget", "flops=0.001", "--json", str(tmp_path / "dry.json"))) == 0
    assert "flops=0.001  cannot be met" in capsys.readouterr().out
    first, second, *_ = json.loads((tmp_path / "dry.json").read_text())["budgets"]
    assert first["error"].startswith("Budget(flops=0.001) is below what this network can reach")
    assert second["flops_needed"] <= 0.8


def test_mistakes_are_those_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(dry(tmp_path, "--model", "resnet21")) == 2
    assert "'resnet21' is not known" in capsys.readouterr().err
    assert main(["compress", "--out", str(tmp_path / "out"), *SMALL, "--json", "-"]) == 2
    assert capsys.readouterr().err.endswith("--json goes with --dry-run; a run writes results.json into --out.\n")
    assert not (tmp_path / "out").exists()
