"""The job on two processes that torchrun starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dspfx
from tests.cli.test_compress import DATA

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = ["--epochs-dense", "1", "--epochs-learn", "1", "--epochs-tune", "1"]
pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch's gloo backend"),
    pytest.mark.slow,  # a minute of starting processes; tests/distributed trains with as many in seconds
]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [*launch, str(ROOT / "tools" / "compress.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_two_processes_make_one_network(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = torchrun("--out", str(out), *DATA, *EPOCHS, "--dense-control", "--batch-size", "32")
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("learn 1/1") == 1  # one of them speaks
    results = json.loads((out / "results.json").read_text())
    assert list(results["networks"]) == ["dense", "pruned", "lowered", "control"]
    assert results["left"]["flops"] <= 0.35
    tests = {name: results["networks"][name]["test"] for name in ("lowered", "pruned")}
    assert tests["lowered"] == pytest.approx(tests["pruned"], rel=1e-4)
    assert results["networks"]["lowered"]["test"]["images"] == 359  # each counted once
    small = dspfx.load(out / "network.safetensors")
    assert isinstance(small, torch.nn.Module)
    again = torchrun("--out", str(out), *DATA, *EPOCHS, "--dense-control", "--batch-size", "32")
    assert again.stdout.count("This run is finished") == 1


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    found = torchrun("--out", str(tmp_path / "out"), *DATA, "--batch-size", "33")
    assert found.returncode != 0
    assert "--batch-size is 33, of all 2 processes together; give a multiple of 2" in found.stderr


def test_two_processes_are_steered_and_their_fork_is_taught_in_cycles(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    found = torchrun("--out", str(source), *DATA, *EPOCHS, "--strength", "steered", "--batch-size", "32")
    assert found.returncode == 0, found.stderr
    recipe = ["--cycles", "2", "--epochs-tune", "2", "--distill", "0.5", "--budget", "flops=0.5"]
    found = torchrun("--fork", str(source), "--out", str(out), "--threads", "1", "--device", "cpu", *recipe)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("learn: 1 of 1 epochs found in") == 1
    assert found.stdout.count("tune-2 1/1") == 1
    results, before = (json.loads((folder / "results.json").read_text()) for folder in (out, source))
    assert results["curves"]["learn"] == before["curves"]["learn"]
    assert 0.4 < results["left"]["flops"] <= 0.5
    refused = torchrun("--fork", str(source), "--out", str(out), *DATA, *recipe, "--groups", "2")
    assert f"--fork {source} has learned with --groups 4, this run has --groups 2" in refused.stderr
