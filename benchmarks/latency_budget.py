"""What `Budget(latency=)` reaches: asked, measured while pruning, and measured again beside the dense network.

    python -m benchmarks.latency_budget --write docs/results/latency_budget.md

Freshly initialised torchvision networks and the ResNet20 for CIFAR-10: which channels go is not what is looked at, only
whether the time comes out. Started again, it goes on from what docs/results/latency_budget.jsonl holds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn

import dspfx
from dspfx.cli import models
from dspfx.errors import DspfxError

CASES = (
    ("resnet20", 32, (0.7, 0.5, 0.35)),
    ("resnet18", 224, (0.7, 0.5, 0.35)),
    ("mobilenet_v2", 224, (0.7, 0.5)),
    ("resnet50", 224, (0.5,)),
)
RUNTIMES = ("onnxruntime", "openvino", "eager")


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in models.BUILT_IN:
        return models.build(name, 10).eval()
    return torchvision.models.get_model(name, weights=None).eval()


def measure(name: str, size: int, runtime: str, latency: float) -> dict[str, Any]:
    """One budget, met and measured again."""
    model, image = build(name), torch.randn(1, 3, size, size)
    gm = dspfx.prepare(model, image)
    start = time.perf_counter()
    plan = dspfx.prune(gm, dspfx.Budget(latency=latency), runtime=runtime)
    seconds = time.perf_counter() - start
    small = dspfx.lower(gm, image, runtime)
    found = dspfx.benchmark({"dense": model, "ours": small}, image, runtime=runtime, rounds=40)
    return {
        "settled": plan.latency_left,
        "measured": found["ours"].ratio,
        "spread": found["ours"].spread,
        "dense_ms": found["dense"].median_ms,
        "flops_left": plan.flops_left,
        "params_left": plan.params_left,
        "form": small.meta["contest"].winner,
        "seconds": seconds,
        "setting": found.setting.partition(";")[2].strip(),
    }


def page(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown."""
    table = []
    for row in rows:
        head = (row["network"], row["runtime"], f"{row['latency']:.2f}")
        if "error" in row:
            table.append((*head, row["error"], *[""] * 5))
            continue
        measured = f"{row['measured']:.3f} ± {row['spread'] / 2:.3f}"
        left = f"{row['flops_left']:.1%}", f"{row['params_left']:.1%}"
        table.append((*head, f"{row['settled']:.3f}", measured, *left, row["form"], f"{row['seconds']:.0f} s"))
    headers = ["network", "runtime", "asked", "while pruning", "measured again", "FLOPs left", "parameters left"]
    headers += ["lowered to", "pruning took"]
    return "\n\n".join(
        [
            "# Budgets of latency",
            "`prune(gm, Budget(latency=...), runtime=...)`, then `lower`, then timed beside the dense network: "
            "batch 1, one thread, ratios to the dense network, median of interleaved rounds and half the interquartile range.",
            tabulate(table, headers, "github", disable_numparse=True),
            f"Measured on: {'; '.join(sorted({row['setting'] for row in rows if 'setting' in row}))}.",
            "Made by\n\n    OMP_NUM_THREADS=1 python -m benchmarks.latency_budget "
            "--write docs/results/latency_budget.md\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--rows", type=Path, default=Path("docs/results/latency_budget.jsonl"))
    parser.add_argument("--write", type=Path, help="write the page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    done = {(row["network"], row["runtime"], row["latency"]) for row in rows}
    for runtime in options.runtimes.split(","):
        for name, size, latencies in CASES:
            for latency in latencies:
                if options.only not in name or (name, runtime, latency) in done:
                    continue
                row: dict[str, Any] = {"network": name, "runtime": runtime, "latency": latency}
                try:
                    row |= measure(name, size, runtime, latency)
                except DspfxError as error:
                    row["error"] = str(error).splitlines()[-1]
                rows.append(row)
                print(row, flush=True)
                with options.rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if options.write:
        options.write.write_text(page(rows))


if __name__ == "__main__":
    main()
