"""`compress --dry-run`: what would be pruned, what budgets leave and how long training takes; nothing is written."""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

import dspfx
from dspfx.cli import models, record
from dspfx.cli.data import Data, load_data
from dspfx.cli.machine import Machine
from dspfx.cli.options import Settings
from dspfx.config import Budget
from dspfx.errors import BudgetError

SHARES = (0.8, 0.65, 0.5, 0.35, 0.25)
STEPS = 3  # the first one is a warm-up
HEADS = ("budget", "FLOPs needed", "weights needed", "FLOPs executed", "weights stored")


def show(args: argparse.Namespace, settings: Settings, machine: Machine) -> None:
    """Prints coverage, a table of budgets and the hours of training; raises DspfxError, as the run itself would."""
    record.check_target(args.json)
    data = load_data(settings.data, models.default_image_size(settings.model), machine.device, machine.workers)
    torch.manual_seed(settings.recipe.seed)
    dense = models.build(settings.model, len(data.classes))
    if settings.checkpoint is not None:
        models.load_checkpoint(dense, Path(settings.checkpoint))
    dense.to(machine.device)
    example = next(data.val.in_order(2))[0]
    gm = dspfx.prepare(dense, example, settings.gates)
    coverage = dspfx.coverage(gm)
    budgets = dict.fromkeys([*filter(None, [settings.counted]), *(Budget(flops=share) for share in SHARES)])
    rows = [budget_row(dense, gm, budget, example) for budget in budgets]
    seconds = step_seconds(dense, data, settings)
    epochs = training_epochs(settings)
    steps = len(data.train) // settings.recipe.batch_size
    if args.json != "-":
        print(f"{len(data.train)} training and {len(data.val)} validation images; {machine}\n{coverage}\n")
        print(tabulate([_shown(row) for row in rows], HEADS, disable_numparse=True))
        print(
            "\nPredicted without training: needed by the weights that are kept, and executed and stored in PyTorch "
            "after lowering by rule.\nWhat a budget buys in time: python -m dspfx estimate. "
            + ("A latency is measured when the run begins.\n" if settings.budget.latency is not None else "\n")
            + f"A plain training step takes {seconds:.2g} s here, so the {epochs} epochs of {steps} steps take "
            f"{_hours(epochs * steps * seconds)}"
            + (" (and learning as much again, --mode exact)." if settings.mode == "exact" else ".")
            + "\nNothing was trained or written (--dry-run)."
        )
    record.write(
        args.json,
        {
            "arguments": settings.flat(),
            "versions": record.versions(),
            "machine": record.describe_machine(machine.device, torch.get_num_threads()),
            "coverage": asdict(coverage),
            "budgets": rows,
            "step_seconds": seconds,
            "steps_an_epoch": steps,
            "epochs": epochs,
        },
    )


def budget_row(dense: nn.Module, gm: nn.Module, budget: Budget, example: torch.Tensor) -> dict[str, Any]:
    """What the budget would leave of the network as it is now, groups found by clustering; or why it cannot be met."""
    work, image = copy.deepcopy(gm), example[:1].to("meta")
    row: dict[str, Any] = {"budget": {k: v for k, v in asdict(budget).items() if v is not None}}
    try:
        plan = dspfx.prune(work, budget)
    except BudgetError as error:
        return row | {"error": str(error)}
    whole, small = (dspfx.profile(n, image) for n in (dense, dspfx.lower(work, tune=None)))
    return row | {
        "flops_needed": plan.flops_left,
        "params_needed": plan.params_left,
        "flops": small.flops / whole.flops,
        "params": small.params / whole.params,
    }


def step_seconds(dense: nn.Module, data: Data, settings: Settings) -> float:
    """Of a plain training step at the batch size asked for, on a copy."""
    images, labels = next(data.train.in_order(min(settings.recipe.batch_size, len(data.train))))
    model = copy.deepcopy(dense).train()
    optimizer = torch.optim.SGD(model.parameters(), settings.lr, momentum=0.9)
    seconds = []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        output = model(images)
        loss = F.cross_entropy(output[0] if isinstance(output, tuple) else output, labels)  # the main head's
        loss.backward()
        optimizer.step()
        loss.item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def training_epochs(settings: Settings) -> int:
    """Of all stages together, the control's included."""
    stages = [settings.stage("dense"), settings.stage("learn"), *(stage for _, stage in settings.tuning())]
    stages += settings.unifying() if settings.epochs.unify else []
    stages += [settings.stage("control")] if settings.dense_control else []
    return sum(stage.epochs for stage in stages)


def _shown(row: dict[str, Any]) -> tuple[str, ...]:
    name = ", ".join(f"{what}={share}" for what, share in row["budget"].items())
    if "error" in row:
        return name, "cannot be met"
    return name, *(f"{row[key]:.1%}" for key in ("flops_needed", "params_needed", "flops", "params"))


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
