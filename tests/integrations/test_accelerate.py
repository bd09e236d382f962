"""Accelerate needs no glue: GroupLearner takes its optimizer, and a learner registers like any other object."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dspfx
from tests.integrations import loops

accelerate = pytest.importorskip("accelerate", reason="needs accelerate: the extra dspfx[integrations]")


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Accelerate keeps its precision and its accumulation for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(accelerator: Any, gm: Any, steps: range, clip: float | None = None) -> Any:
    """(learner, everything prepared) after a loop as in Accelerate's documentation."""
    optimizer = loops.sgd(gm)
    data = loops.loader()
    gm, optimizer, data = accelerator.prepare(gm, optimizer, data)
    total_steps = loops.STEPS // accelerator.gradient_accumulation_steps
    learner = dspfx.GroupLearner(accelerator.unwrap_model(gm), optimizer, total_steps)
    accelerator.register_for_checkpointing(learner)
    train(accelerator, gm, optimizer, data, steps, clip)
    return learner, (gm, optimizer, data)


def train(accelerator: Any, gm: Any, optimizer: Any, data: Any, steps: range, clip: float | None = None) -> None:
    gm.train()
    for step, (x, y) in enumerate(data):
        if step not in steps:
            continue
        with accelerator.accumulate(gm):
            loss = F.cross_entropy(gm(x), y)
            accelerator.backward(loss)
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(gm.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
    "clipping": ({}, {"clip": 0.05}),
    "bf16": ({"mixed_precision": "bf16"}, {"autocast": torch.bfloat16}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_learns_what_a_plain_loop_learns(name: str) -> None:
    theirs, ours = OPTIONS[name]
    gm, reference = loops.prepared(), loops.prepared()
    learner, _ = run(accelerate.Accelerator(cpu=True, **theirs), gm, range(loops.STEPS), ours.get("clip"))
    state = loops.plain(reference, **ours)
    loops.assert_same(reference, gm)
    loops.assert_same_state(state, learner.state_dict())


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    straight = loops.prepared()
    accelerator = accelerate.Accelerator(cpu=True)
    learner, _ = run(accelerator, straight, range(loops.STEPS))
    expected = learner.state_dict()

    accelerator = accelerate.Accelerator(cpu=True)
    run(accelerator, loops.prepared(), range(2))
    accelerator.save_state(str(tmp_path / "half"))
    accelerator = accelerate.Accelerator(cpu=True)
    gm = loops.prepared()
    learner, parts = run(accelerator, gm, range(0))
    accelerator.load_state(str(tmp_path / "half"))
    assert learner.steps == 2
    gm, optimizer, batches = parts
    train(accelerator, gm, optimizer, batches, range(2, 4))
    loops.assert_same(straight, gm)
    loops.assert_same_state(expected, learner.state_dict())


class Auxiliary(loops.Tiny):
    """Its graph of training has one output more."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.bn(self.a(x)))
        main = self.head(F.relu(self.c(F.relu(self.b(x)))).mean((2, 3)))
        return (main, self.aux(x.mean((2, 3)))) if self.training else main


def test_mixed_precision_keeps_the_graph_of_each_mode() -> None:
    """Accelerate replaces `forward` by a wrapper of what it found, in whichever mode that was."""
    x, _ = loops.batch(0)
    original = Auxiliary()
    gm = dspfx.prepare(original, x)
    wrapped = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(gm)
    reference = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(original)
    for mode in (True, False, True):
        expected, found = reference.train(mode)(x), wrapped.train(mode)(x)
        assert isinstance(expected, tuple) == isinstance(found, tuple) == mode
        pairs = zip(expected, found, strict=True) if mode else [(expected, found)]
        assert all(torch.equal(e, f) for e, f in pairs)
