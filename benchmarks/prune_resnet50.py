"""prune(ResNet50, flops=0.35) on one core: how close it comes to the budget, and how long it takes.

OMP_NUM_THREADS=1 python -m benchmarks.prune_resnet50 --write docs/results/prune_resnet50.md
"""

from __future__ import annotations

import argparse
import cProfile
import platform
import pstats
import statistics
import time
from pathlib import Path

import torch
import torchvision
from tabulate import tabulate

import dspfx
from dspfx.deploy.machine import processor
from dspfx.plans import PrunePlan

BUDGET = dspfx.Budget(flops=0.35)


def measure(rounds: int) -> tuple[list[float], list[float], PrunePlan]:
    """(seconds and processor seconds of each prune of a freshly prepared ResNet50, the plan: the same every time)."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    seconds, busy, plans = [], [], []
    for _ in range(rounds):
        gm = dspfx.prepare(model)
        start, start_busy = time.perf_counter(), time.process_time()
        plans.append(dspfx.prune(gm, BUDGET))
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - start_busy)
    assert all(plan == plans[0] for plan in plans)
    return seconds, busy, plans[0]


def page(seconds: list[float], busy: list[float], plan: PrunePlan, command: str) -> str:
    """The result as Markdown."""
    rows = [
        ("FLOPs left", f"{plan.flops_left:.2%}", "35% ± 0.5 points"),
        ("parameters left", f"{plan.params_left:.2%}", ""),
        ("FLOPs left, gated convolutions only (the papers' count)", f"{plan.gated_flops_left:.2%}", ""),
        ("seconds, median", f"{statistics.median(seconds):.2f}", "<= 2"),
        ("seconds, least and most", f"{min(seconds):.2f} - {max(seconds):.2f}", ""),
        ("processor seconds, median", f"{statistics.median(busy):.2f}", ""),
    ]
    return (
        "# Pruning ResNet50\n\n"
        "`dspfx.prune(gm, dspfx.Budget(flops=0.35))` of torchvision's resnet50 with random weights, prepared with 4 "
        "groups: clustering of the filters (its gates never learned), global threshold, liveness to a fixed point, "
        f"masks. torch {torch.__version__}, {processor()}, {platform.system()}, one thread, {len(seconds)} runs.\n\n"
        f"{tabulate(rows, headers=['', 'found', 'target'], tablefmt='github', disable_numparse=True)}\n\n"
        f"Made by\n\n    {command}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where the time goes instead")
    parser.add_argument("--write", type=Path, help="write the result page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.profile:
        gm = dspfx.prepare(torchvision.models.resnet50())
        with cProfile.Profile() as profiler:
            dspfx.prune(gm, BUDGET)
        pstats.Stats(profiler).sort_stats("cumulative").print_stats(40)
        return
    target = "docs/results/prune_resnet50.md"
    command = f"OMP_NUM_THREADS=1 python -m benchmarks.prune_resnet50 --rounds {options.rounds} --write {target}"
    text = page(*measure(options.rounds), command)
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
