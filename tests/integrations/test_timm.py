"""timm's training loop, call by call, with its optimizers, schedule, scaler, averages and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import dspfx
from dspfx.modules import GatedLayer
from tests.integrations import loops

timm = pytest.importorskip("timm", reason="needs timm: the extra dspfx[integrations]")


def build() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return dspfx.prepare(timm.create_model("test_resnet", num_classes=4), loops.batch(0)[0])


def optimizer_of(gm: Any, name: str = "sgd") -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(gm, opt=name, lr=0.05, weight_decay=1e-3, momentum=0.9)


def train_one_epoch(
    gm: Any, optimizer: Any, epoch: int, schedule: Any, scaler: Any, ema: Any, clip: float, steps: int = 2
) -> None:
    """The body of timm's train.py for one epoch without its logging: two batches a step, unscaled or scaled."""
    gm.train()
    updates = epoch * steps
    optimizer.zero_grad()
    for index in range(2 * steps):
        x, y = loops.batch(2 * steps * epoch + index)
        need_update = index % 2 == 1
        loss = F.cross_entropy(gm(x), y) / 2
        if scaler is not None:
            scaler(
                loss, optimizer, clip_grad=clip, clip_mode="norm", parameters=gm.parameters(), need_update=need_update
            )
        else:
            loss.backward()
            if need_update:
                timm.utils.dispatch_clip_grad(gm.parameters(), clip, mode="norm")
                optimizer.step()
        if not need_update:
            continue
        updates += 1
        optimizer.zero_grad()
        ema.update(gm, step=updates)
        schedule.step_update(num_updates=updates, metric=None)
    schedule.step(epoch + 1, None)


def scheduler_of(optimizer: Any) -> Any:
    from timm.scheduler import create_scheduler_v2

    return create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=2,
        warmup_epochs=1,
        warmup_lr=0.01,
        step_on_epochs=False,
        updates_per_epoch=2,
    )[0]


@pytest.mark.parametrize("scaled", [False, True])
def test_the_loop_learns_and_its_checkpoint_continues_it(scaled: bool, tmp_path: Path) -> None:
    from timm.utils import ModelEmaV3, NativeScaler

    def start(gm: Any) -> tuple[Any, ...]:
        optimizer = optimizer_of(gm)
        scaler = NativeScaler(device="cpu") if scaled else None
        return optimizer, scheduler_of(optimizer), scaler, ModelEmaV3(gm, decay=0.9)

    straight = build()
    optimizer, schedule, scaler, ema = start(straight)
    learner = dspfx.GroupLearner(straight, optimizer, total_steps=4)
    for epoch in (0, 1):
        train_one_epoch(straight, optimizer, epoch, schedule, scaler, ema, clip=1.0)
        if epoch == 0:
            state = {"gm": straight.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.module.state_dict()}
            state |= {"learner": learner.state_dict(), "scaler": scaler.state_dict() if scaler else {}}
            torch.save(state, tmp_path / "last.pt")
    assert learner.steps == 4

    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    gm = build()
    gm.load_state_dict(saved["gm"])
    optimizer, schedule, scaler, average = start(gm)
    optimizer.load_state_dict(saved["optimizer"])
    average.module.load_state_dict(saved["ema"])
    if scaler:
        scaler.load_state_dict(saved["scaler"])
    schedule.step_update(2)
    again = dspfx.GroupLearner(gm, optimizer, total_steps=4, seed=9)
    again.load_state_dict(saved["learner"])
    train_one_epoch(gm, optimizer, 1, schedule, scaler, average, clip=1.0)
    loops.assert_same(straight, gm)
    loops.assert_same(ema.module, average.module)
    loops.assert_same_state(learner.state_dict(), again.state_dict())


def test_nothing_but_gated_weights_differ_from_the_loop_without_a_learner() -> None:
    from timm.utils import ModelEmaV3

    nets = [build(), build()]
    for gm in nets:
        optimizer = optimizer_of(gm)
        if gm is nets[0]:
            dspfx.GroupLearner(gm, optimizer, total_steps=4)
        train_one_epoch(gm, optimizer, 0, scheduler_of(optimizer), None, ModelEmaV3(gm), clip=1.0, steps=1)
    ours, plain = (loops.tensors(gm) for gm in nets)
    changed = {key for key, value in plain.items() if not torch.equal(value, ours[key])}
    gated = {
        layer.name
        for layer in dspfx.prepare(timm.create_model("test_resnet"), loops.batch(0)[0]).meta["gate_plan"].layers
    }
    weighed = {key for key in changed if key.endswith("fisher")}  # where squares do not vanish after one step
    assert changed - weighed == {f"{name}.{key}" for name in gated for key in ("weight", "gate_logits")}
    assert {key.rpartition(".")[0] for key in weighed} <= gated


NAMES = ["adamw", "lamb", "lars", "nadamw", "rmsproptf", "lion", "adopt", "muon", "lookahead_sgd", "adafactor"]


@pytest.mark.parametrize("name", NAMES)
def test_its_optimizers_step_the_learner(name: str) -> None:
    """Once for every step, at the learning rate of the moment, also below Lookahead."""
    gm = build()
    optimizer = optimizer_of(gm, name)
    learner = dspfx.GroupLearner(gm, optimizer, total_steps=4)
    gm.train()
    for step in range(3):
        x, y = loops.batch(step)
        optimizer.zero_grad()
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
    assert learner.steps == 3
    assert learner.stats()["hypergradient"] > 0


@pytest.mark.parametrize("name", ["lookahead_sgd", "lookahead_adamw"])
def test_slow_weights_of_lookahead_do_not_bring_pruned_ones_back(name: str) -> None:
    gm = build()
    optimizer = optimizer_of(gm, name)
    gm.train()
    for step in range(14):  # slow weights are taken at the 6th step, and mixed in at the 12th
        if step == 7:
            dspfx.prune(gm, dspfx.Budget(flops=0.5))
        x, y = loops.batch(step)
        optimizer.zero_grad()
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
        if step >= 7:
            gates = [m for m in gm.modules() if isinstance(m, GatedLayer) and m.is_pruned]
            assert gates
            assert not any(bool((gate.weight * gate.dropped()).any()) for gate in gates)
