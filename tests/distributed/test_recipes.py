"""A steered strength, and a teacher that is wrapped by nothing: two processes train as one does; gloo."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import dspfx
from dspfx.cli.distill import Distill, Teacher
from dspfx.cli.images import Look, MemorySplit
from dspfx.cli.training import Recipe, Stage, Trainer
from tests.distributed.scenarios import BUDGET, SECONDS, Net, build

EPOCHS = 5  # of four steps: beta is looked at twice


def train() -> dict[str, Any]:
    """Learns, steered and taught at once, in the command line's own loop."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=generator, dtype=torch.uint8)
    look = Look(8, (0.5,) * 3, (0.25,) * 3, True, torch.device("cpu"), 0)
    first, rest = (MemorySplit(part, torch.arange(len(part)) % 4, look) for part in (images[:37], images[37:]))
    gm = build().float()
    torch.manual_seed(9)
    teacher = Teacher(Net(), Distill(0.5, 2.0))
    with TemporaryDirectory() as folder:
        trainer = Trainer(Recipe(8, 1e-3, 0.1, 0), first, rest, Path(folder))
        optimizer, steps = trainer.optimizer(gm), EPOCHS * trainer.steps
        with dspfx.GroupLearner(gm, optimizer, steps, strength=0.05, lr=0.05, budget=BUDGET) as learner:
            curve = trainer.fit(gm, optimizer, Stage("learn", ((EPOCHS, 0.1),)), learner, teacher).curve
            stats = learner.stats()
    return {"learned": gm.state_dict(), "loss": curve[-1]["train_loss"], "stats": stats}


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store, timeout = f"file://{folder}/store", timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timeout)
    torch.save(train(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch's gloo backend")
def test_two_processes_are_steered_and_taught_as_one_is(tmp_path: Path) -> None:
    expected = train()
    multiprocessing.set_forkserver_preload([__name__])
    multiprocessing.start_processes(run, (str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert expected["stats"]["factor"] not in (0, 1)
    for name in ("factor", "beta"):
        assert first["stats"][name] == second["stats"][name]
        assert first["stats"][name] == pytest.approx(expected["stats"][name], rel=1e-3)
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    for key, value in expected["learned"].items():
        assert torch.equal(first["learned"][key], second["learned"][key])
        assert torch.allclose(first["learned"][key], value, rtol=1e-3, atol=1e-4), key
