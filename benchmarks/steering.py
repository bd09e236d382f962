"""Does steering the strength help? ResNet20 on digits, from initial strengths that are right and far off.

OMP_NUM_THREADS=1 python -m benchmarks.steering --out runs/steering --seeds 0 1 --write docs/results/steering.md

The settings of `make demo` with shorter fine-tuning. Each seed's dense network is shared; each arm learns, is pruned to
35% of the FLOPs and fine-tuned. Started again, it goes on from the last finished epoch.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import dspfx
from dspfx.cli import models
from dspfx.cli.arguments import add_arguments
from dspfx.cli.checkpoints import write_text
from dspfx.cli.data import Data, load_data
from dspfx.cli.options import Settings, read_settings
from dspfx.cli.scoring import evaluate, recalibrate, say
from dspfx.cli.training import Stage, Trainer
from dspfx.deploy.machine import processor
from dspfx.graph.analyse import analyse
from dspfx.method.importance import resolve
from dspfx.passes.plan_prune import plan_prune

MULTIPLES = (0.01, 1.0, 100.0)  # of strength "auto"
TUNE = 4
CONCLUSION = "\n## What it says\n"  # written by hand, and kept when the page is written anew
Row = dict[str, Any]


def beta_of(gm: nn.Module, settings: Settings) -> float:
    """The share of a group's energy that pruning to the budget would drop."""
    return plan_prune(gm, analyse(gm), settings.budget, resolve("l2")).beta


def measure_cost(learner: dspfx.GroupLearner) -> float:
    """Processor seconds of one look at beta: the median of five."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        assert learner._steering is not None
        learner._steering._measure()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


def run_arm(gm: nn.Module, multiple: float, steered: bool, settings: Settings, trainer: Trainer, data: Data) -> Row:
    """Learns, prunes and fine-tunes `gm`; what came of it."""
    name = f"{'steered' if steered else 'fixed'}_{multiple:g}"
    auto = 540 / sum(p.numel() for p in gm.parameters())
    stage, optimizer = settings.stage("learn"), trainer.optimizer(gm)
    row: Row = {"seed": settings.recipe.seed, "multiple": multiple, "steered": steered}
    row["start"] = beta_of(gm, settings)
    budget = settings.budget if steered else None
    steps = stage.epochs * trainer.steps
    with dspfx.GroupLearner(gm, optimizer, steps, multiple * auto, seed=settings.recipe.seed, budget=budget) as learner:
        learn = Stage(f"{name}_learn", stage.cycles, keep="last")
        begun = time.process_time()
        trainer.fit(gm, optimizer, learn, learner)
        seconds = time.process_time() - begun  # of a run that was not interrupted
        row["factor"] = learner.stats().get("factor", 1.0)
        if steered:
            looks = math.floor(0.75 * steps / max(10, steps // 50)) + 1
            row["cost"] = looks * measure_cost(learner) / seconds
    row["beta"] = beta_of(gm, settings)
    batch = settings.recipe.batch_size
    row["learned"] = evaluate(gm, data.val, batch).accuracy
    row["flops"] = dspfx.prune(gm, settings.budget).flops_left
    recalibrate(gm, trainer.train, batch)
    row["pruned"] = evaluate(gm, data.val, batch).accuracy
    tune = Stage(f"{name}_tune", ((TUNE, settings.lr_tune),), first_epoch=stage.epochs)
    trainer.fit(gm, trainer.optimizer(gm), tune)
    row["tuned"] = evaluate(gm, data.val, batch).accuracy
    row["test"] = evaluate(gm, data.test(), batch).accuracy
    say(json.dumps(row))
    return row


def run_seed(seed: int, out: Path, epochs_learn: int) -> list[Row]:
    """Every arm of one seed."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--out", str(out), "--seed", str(seed), "--epochs-learn", str(epochs_learn)]
    settings = read_settings(parser.parse_args(given))
    data = load_data(settings.data, models.default_image_size(settings.model), torch.device("cpu"), 0)
    folder = out / f"seed{seed}_learn{epochs_learn}"
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings.recipe, data.train, data.val, folder)
    torch.manual_seed(seed)
    dense = models.build(settings.model, len(data.classes))
    trainer.fit(dense, trainer.optimizer(dense), settings.stage("dense"))
    gm = dspfx.prepare(dense, next(data.val.in_order(2))[0], settings.gates)
    found = []
    for multiple in MULTIPLES:
        for steered in (False, True):
            path = folder / f"{multiple:g}_{steered}.json"
            if not path.exists():
                write_text(path, json.dumps(run_arm(copy.deepcopy(gm), multiple, steered, settings, trainer, data)))
            found.append(json.loads(path.read_text()))
    return found


def table(rows: list[Row]) -> str:
    """Means over seeds, a line for each arm."""
    lines = []
    for multiple in MULTIPLES:
        for steered in (False, True):
            arm = [row for row in rows if (row["multiple"], row["steered"]) == (multiple, steered)]

            def mean(key: str, arm: list[Row] = arm) -> float:
                return statistics.mean(row[key] for row in arm)

            factors = " ".join(f"{row['factor']:.3g}" for row in arm) if steered else "-"
            betas = " ".join(f"{row['beta']:.3f}" for row in arm)
            shares = [f"{mean(key):.2%}" for key in ("learned", "pruned", "tuned", "test")]
            spread = " ".join(f"{row['test']:.2%}" for row in arm)
            lines.append((f"{multiple:g}", "steered" if steered else "fixed", factors, betas, *shares, spread))
    heads = (
        "strength, of auto", "", "factor at the end", "beta at the end", "val: learned", "pruned", "tuned", "test",
        "test of each seed",
    )  # fmt: skip
    return tabulate(lines, heads, "github", disable_numparse=True)


def page(rows: list[Row], options: argparse.Namespace) -> str:
    """The page in Markdown, but for what to conclude."""
    seeds = " ".join(map(str, options.seeds))
    costs = statistics.median(row["cost"] for row in rows if row["steered"])
    start = statistics.mean(row["start"] for row in rows)
    return (
        "# Steering the strength of the group regulariser\n\n"
        f"ResNet20 on scikit-learn's digits, pruned to 35% of the FLOPs; `make demo`'s settings with {options.learn} "
        f"epochs of learning (20 steps each) and {TUNE} of fine-tuning. One dense network a seed (seeds {seeds}), "
        "means over seeds; 143 validation and 359 test images: one image is 0.7 and 0.28 points. beta is the share of "
        f"its group's energy up to which pruning drops channels; it was {start:.3f} before learning, and steering "
        "wants it to be 0.03 when three quarters of the steps are done. "
        f"torch {torch.__version__}, {processor()}, one thread.\n\n"
        f"{table(rows)}\n\nLooking at beta took {costs:.1%} of learning's processor time (median).\n\n"
        "Made by\n\n"
        f"    OMP_NUM_THREADS=1 python -m benchmarks.steering --out {options.out} --seeds {seeds} "
        f"--learn {options.learn} --write docs/results/steering.md\n"
    )


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/steering"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--learn", type=int, default=6, help="epochs of learning (default: %(default)s)")
    parser.add_argument("--write", type=Path, help="write the result page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for seed in options.seeds for row in run_seed(seed, options.out, options.learn)]
    text = page(rows, options)
    print(text)
    if options.write:
        said = options.write.read_text().partition(CONCLUSION)[1:] if options.write.exists() else ()
        options.write.write_text("".join([text, *said]))


if __name__ == "__main__":
    main()
