"""The job end to end, on a few digits of 16x16."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import dspfx
from dspfx.__main__ import main
from dspfx.cli import models
from dspfx.cli.data import DataConfig, load_data

DATA = ["--image-size", "16", "--limit-train", "200", "--threads", "1", "--device", "cpu"]
EPOCHS = ["--epochs-dense", "2", "--epochs-learn", "3", "--epochs-tune", "3"]
NETWORKS = ("network.safetensors", "pruned.safetensors", "dense.safetensors")


def command(out: Path, *more: str) -> list[str]:
    return ["compress", "--out", str(out), *DATA, *(more or EPOCHS)]


def read(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def without_seconds(curves: dict[str, list[dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
    return {name: [{**epoch, "seconds": 0.0} for epoch in curve] for name, curve in curves.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(out)) == 0
    return out


def test_results_hold_every_network_and_epoch(finished: Path) -> None:
    results = read(finished)
    assert list(results["networks"]) == ["dense", "pruned", "lowered"]
    assert {name: len(curve) for name, curve in results["curves"].items()} == {"dense": 2, "learn": 3, "tune": 3}
    assert results["arguments"]["budget"] == ["flops=0.35"]
    assert results["left"]["flops"] <= 0.35
    assert results["machine"]["threads"] == 1
    for row in results["networks"].values():
        assert row["test"]["images"] == 359
        assert row["latency_ms"] > 0
    assert results["networks"]["lowered"]["test"] == pytest.approx(results["networks"]["pruned"]["test"], abs=0.003)
    assert results["networks"]["lowered"]["flops"] < results["networks"]["dense"]["flops"]


def test_the_saved_network_is_the_one_that_was_measured(finished: Path) -> None:
    small = dspfx.load(finished / "network.safetensors")
    config = DataConfig("digits", 16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True, 200, 0.1, 0)
    test = load_data(config, 32, torch.device("cpu"), 0).test()
    with torch.no_grad():
        right = sum(int((small(images).argmax(1) == labels).sum()) for images, labels in test.in_order(100))
    assert right / 359 == read(finished)["networks"]["lowered"]["test"]["accuracy"]


def test_the_saved_dense_network_loads_into_the_model(finished: Path) -> None:
    state = safetensors.torch.load_file(finished / "dense.safetensors")
    result = models.build("resnet20", 10).load_state_dict(state, strict=True)
    assert not result.missing_keys


def test_a_finished_run_only_shows_its_results(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "results.json").stat().st_mtime_ns
    assert main(command(finished)) == 0
    shown = capsys.readouterr().out
    assert "This run is finished; give another --out to run again." in shown
    assert "lowered" in shown
    assert (finished / "results.json").stat().st_mtime_ns == before


def test_another_run_in_the_same_folder_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(finished), "--groups", "2"]) == 2
    assert capsys.readouterr().err == (
        f"dspfx compress: error: --out {finished} holds a run with --groups 4, this one has --groups 2; give another "
        "--out, or delete that folder to start over.\n"
    )


@pytest.fixture(params=["learn", "tune"])
def killed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A run that got `kill -9` soon after the first epoch of a stage."""
    path = tmp_path / "checkpoints" / f"{request.param}.pt"
    process = subprocess.Popen([sys.executable, "-m", "dspfx", *command(tmp_path)], stdout=subprocess.DEVNULL)
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return tmp_path


def test_a_killed_run_ends_like_an_uninterrupted_one(
    killed: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not (killed / "results.json").exists()
    assert main(command(killed)) == 0
    assert "epochs found in" in capsys.readouterr().out
    expected, found = read(finished), read(killed)
    assert without_seconds(found["curves"]) == without_seconds(expected["curves"])
    for name in NETWORKS:
        whole, parts = (safetensors.torch.load_file(out / name) for out in (finished, killed))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    assert (killed / "plan.json").read_text() == (finished / "plan.json").read_text()


def test_one_shot_trains_nothing(finished: Path, tmp_path: Path) -> None:
    checkpoint = str(finished / "dense.safetensors")
    assert main(command(tmp_path, "--checkpoint", checkpoint, "--one-shot", "--budget", "flops=0.6")) == 0
    results = read(tmp_path)
    assert results["curves"] == {"dense": [], "learn": [], "tune": []}
    assert results["networks"]["dense"]["test"] == read(finished)["networks"]["dense"]["test"]
    assert 0.5 < results["left"]["flops"] <= 0.6


def test_control_trains_as_long_as_the_pruned_network(finished: Path, tmp_path: Path) -> None:
    checkpoint = str(finished / "dense.safetensors")
    epochs = ["--epochs-learn", "1", "--epochs-tune", "2", "--mode", "exact"]
    assert main(command(tmp_path, "--checkpoint", checkpoint, *epochs, "--dense-control")) == 0
    results = read(tmp_path)
    assert {name: len(curve) for name, curve in results["curves"].items()} == {
        "dense": 0,
        "learn": 1,
        "tune": 2,
        "control": 3,
    }
    assert results["networks"]["control"]["flops"] == results["networks"]["dense"]["flops"]
    assert results["networks"]["control"]["test"] != results["networks"]["dense"]["test"]


def test_an_infeasible_budget_ends_the_run_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(tmp_path), "--budget", "flops=0.0001"]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("dspfx compress: error: ")
    assert "dense 1/2" not in streams.out
