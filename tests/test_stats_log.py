"""StatsLog: every so many steps a line or scalars, on through a resumed run, and nothing of what it cannot write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dspfx
from dspfx.errors import ConfigError, StorageError


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return dspfx.prepare(model, torch.zeros(2, 3, 8, 8), dspfx.GateConfig(groups=2))


def train(gm: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(gm(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()


def learning() -> tuple[nn.Module, torch.optim.Optimizer, dspfx.GroupLearner]:
    gm = network()
    optimizer = torch.optim.SGD(gm.parameters(), 0.05)
    return gm, optimizer, dspfx.GroupLearner(gm, optimizer, 20)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_every_so_many_steps(tmp_path: Path) -> None:
    gm, optimizer, learner = learning()
    path = tmp_path / "new" / "groups.jsonl"
    with dspfx.StatsLog(learner, path, every=3):
        train(gm, optimizer, 6)
        assert records(path)[-1] == learner.stats()
        train(gm, optimizer, 1)
    train(gm, optimizer, 5)  # closed
    assert [r["steps"] for r in records(path)] == [3, 6]
    assert set(records(path)[0]) == {"steps", "penalty", "entropy", "sparsity", "hypergradient"}


def test_a_resumed_run_replaces_what_it_does_anew(tmp_path: Path) -> None:
    gm, optimizer, learner = learning()
    path = tmp_path / "groups.jsonl"
    with dspfx.StatsLog(learner, path, every=2):
        train(gm, optimizer, 4)
        saved = learner.state_dict()
        train(gm, optimizer, 6)
    with path.open("a") as file:
        file.write('{"steps": 12, "pena')  # killed while it wrote
    gm, optimizer, learner = learning()
    with dspfx.StatsLog(learner, path, every=2):
        learner.load_state_dict(saved)
        assert [r["steps"] for r in records(path)] == [2, 4, 6, 8, 10]
        train(gm, optimizer, 3)
    assert [r["steps"] for r in records(path)] == [2, 4, 6]


class Board:
    """What a SummaryWriter is to StatsLog."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))


def test_scalars_of_a_unifier() -> None:
    gm = network()
    optimizer, board = torch.optim.SGD(gm.parameters(), 0.05), Board()
    unifier = dspfx.Unifier(gm, optimizer, dspfx.BlockConfig((2, 2)), 10)
    with dspfx.StatsLog(unifier, board, every=5):
        train(gm, optimizer, 5)
        expected = unifier.stats()
        train(gm, optimizer, 2)
    assert board.scalars == [(f"dspfx/{n}", v, 5) for n, v in expected.items() if n != "steps"]


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
    from torch.utils.tensorboard import SummaryWriter

    gm, optimizer, learner = learning()
    with SummaryWriter(tmp_path) as writer, dspfx.StatsLog(learner, writer, every=2):
        train(gm, optimizer, 4)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("dspfx/entropy")] == [2, 4]
    assert events.Scalars("dspfx/entropy")[-1].value == pytest.approx(learner.stats()["entropy"])


def test_what_is_not_finite_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gm, optimizer, learner = learning()
    monkeypatch.setattr(learner, "stats", lambda: {"steps": learner.steps, "beta": math.nan})
    board, path = Board(), tmp_path / "groups.jsonl"
    with dspfx.StatsLog(learner, path, 1), dspfx.StatsLog(learner, board, 1):
        train(gm, optimizer, 1)
    assert path.read_text() == '{"steps": 1, "beta": null}\n'
    assert not board.scalars


def test_bad_input_is_refused_before_training(tmp_path: Path) -> None:
    _, _, learner = learning()
    with pytest.raises(ConfigError, match=r"^StatsLog got every=0; give a number of optimizer steps, at least 1\.$"):
        dspfx.StatsLog(learner, tmp_path / "a.jsonl", every=0)
    with pytest.raises(ConfigError, match=r"^StatsLog got to=int; give the path of a file, or an object"):
        dspfx.StatsLog(learner, 3)
    with pytest.raises(StorageError, match=r"cannot be read \(Is a directory\)"):
        dspfx.StatsLog(learner, tmp_path)
    other = tmp_path / "notes.txt"
    other.write_text("bread\nbutter\n")
    with pytest.raises(StorageError, match=r"^line 1 of .*notes\.txt is no record of a learner"):
        dspfx.StatsLog(learner, other)
    assert other.read_text() == "bread\nbutter\n"
