"""The last stages of `compress`: blocks of weights become alike, and the file is small."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

import dspfx
from dspfx.cli.checkpoints import load_state, save_state
from dspfx.cli.options import Settings
from dspfx.cli.scoring import evaluate, recalibrate, say
from dspfx.cli.training import Progress, Trainer
from dspfx.plans import UnifyPlan


def unify(gm: nn.Module, settings: Settings, trainer: Trainer) -> tuple[UnifyPlan, Progress]:
    """Unifies and prunes blocks of `gm` in place: at once, or in training, before and after; (plan, joint curve)."""
    if not settings.epochs.unify:
        plan = dspfx.unify(gm, settings.blocks)
        recalibrate(gm, trainer.train, settings.recipe.batch_size)
        say(str(plan))
        return plan, Progress()
    first, last = settings.unifying()
    optimizer, steps, path = trainer.optimizer(gm), first.epochs * trainer.steps, trainer.folder / "unified.pt"
    whole = Progress()
    with dspfx.Unifier(gm, optimizer, settings.blocks, steps) as unifier:
        whole.curve += trainer.fit(gm, optimizer, first, unifier).curve
        state = load_state(path)
        if state is None:
            unifier.project(settings.bits if settings.trains_values else None)
            recalibrate(gm, trainer.train, settings.recipe.batch_size)
            state = {"model": gm.state_dict(), "unifier": unifier.state_dict()}
            save_state(path, state)
    gm.load_state_dict(state["model"])
    optimizer = trainer.optimizer(gm)
    with dspfx.Unifier(gm, optimizer, settings.blocks, steps) as unifier:
        unifier.load_state_dict(state["unifier"])
        assert unifier.plan is not None
        say(str(unifier.plan))
        say(f"unified: validation {evaluate(gm, trainer.val, settings.recipe.batch_size)}")
        whole.curve += trainer.fit(gm, optimizer, last, unifier).curve
        return unifier.plan, whole


def compressed(gm: nn.Module, dense: nn.Module, settings: Settings, path: Path) -> nn.Module:
    """The dense network's class with what the small file, written here, holds of `gm`."""
    is_exact = settings.bits == 32 or settings.trains_values
    written = dspfx.write_compressed(gm, path, settings.blocks, bits=None if is_exact else settings.bits)
    say(str(written))
    return dspfx.read_compressed(path, copy.deepcopy(dense))
