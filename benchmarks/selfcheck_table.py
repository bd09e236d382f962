"""selfcheck on torchvision's networks at full size: masked = lowered, under a random plan.

OMP_NUM_THREADS=1 python -m benchmarks.selfcheck_table --write docs/results/selfcheck.md
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn

from dspfx.config import GateConfig
from dspfx.selfcheck import SelfcheckReport, selfcheck
from tests.zoo import ZOO

MODELS = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "googlenet", "shufflenet_v2_x1_0")
GROUPS = 2


def build(name: str) -> nn.Module:
    """A torchvision network with random weights, the same ones every time."""
    options: dict[str, Any] = {"init_weights": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **options)


def check(name: str, size: int) -> tuple[SelfcheckReport, float]:
    """The report, and seconds."""
    model = build(name)
    start = time.perf_counter()
    report = selfcheck(model, torch.zeros(2, 3, size, size), GateConfig(groups=GROUPS))
    return report, time.perf_counter() - start


def table(names: list[str], size: int) -> str:
    """One row a model."""
    rows = []
    for name in names:
        report, seconds = check(name, size)
        print(f"{name}: {report}", flush=True)
        macs = (f"{report.flops_left:.1%}", f"{report.flops_run:.1%}")
        errors = [f"{e:.1e}" for e in (report.error, report.float_error, report.rounding, report.response)]
        rows.append((name, report.gated, *macs, *errors, f"{seconds:.0f}"))
    zoo = [selfcheck(entry.build(), entry.inputs(), GateConfig(groups=GROUPS)) for entry in ZOO.values()]
    worst = [f"{max(r.__dict__[key] for r in zoo):.1e}" for key in ("error", "float_error", "rounding")]
    least = f"{min(r.response for r in zoo):.1e}"
    rows.append((f"zoo, {len(zoo)} networks, worst", sum(r.gated for r in zoo), "", "", *worst, least, ""))
    headers = ["model", "gates", "MACs left", "MACs run", "error float64", "float32", "rounding", "response", "seconds"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--write", type=Path, help="write the result page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = table(options.models, options.size)
    print(result)
    if options.write:
        options.write.write_text(
            "# Masked = lowered on torchvision's networks\n\n"
            f"A random plan (random groups, {GROUPS} a layer, random energies) on a network made alive: batch norms "
            "get random scales and shifts and statistics of random inputs. The lowered network is compared with the "
            f"masked one at batches 1 and 5, {options.size}x{options.size} images. Errors are the largest difference "
            "over the largest output, to be at most 1e-9 in float64 and 1e-5 in float32; `rounding` is the distance "
            "of the masked network in float32 from itself in float64: two float32 networks cannot agree better than "
            "either is right. `response` is how much the outputs change between two "
            f"random inputs. torch {torch.__version__}, torchvision {torchvision.__version__}, one CPU thread; the "
            f"seconds are of a shared machine.\n\n{result}\n\nMade by\n\n"
            f"    OMP_NUM_THREADS=1 python -m benchmarks.selfcheck_table --write {options.write}\n"
        )


if __name__ == "__main__":
    main()
