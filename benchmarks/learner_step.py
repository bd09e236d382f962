"""What a learner step costs: ResNet20 (CIFAR), batch 128, plain / fused / exact training steps in interleaved rounds.

    OMP_NUM_THREADS=1 python -m benchmarks.learner_step --rounds 15 --write docs/results/learner_step.md

One step is zero_grad, forward, backward, optimizer.step and, in exact mode, learner.step. A round times one step of
each variant, in alternating order; the figure is the median over rounds of the ratio to the plain step of the same
round, so that a machine that slows down slows all three.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

import dspfx
from dspfx.cli.models import build
from dspfx.deploy.machine import processor
from dspfx.learner import GroupLearner

TARGETS = {"plain": 1.0, "fused": 1.10, "exact": 2.10}


def make_step(mode: str, batch: Tensor, labels: Tensor) -> Callable[[], None]:
    """One training step of a fresh ResNet20: plain SGD on the original, or on the prepared one with a learner."""
    torch.manual_seed(0)
    model = build("resnet20", 10)
    if mode != "plain":
        model = dspfx.prepare(model, torch.zeros(2, 3, 32, 32))
    model.to(batch.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    learner = None if mode == "plain" else GroupLearner(model, optimizer, 1000, mode=mode)  # type: ignore[arg-type]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()
        if learner is not None and mode == "exact":
            learner.step(lambda: F.cross_entropy(model(batch), labels))
        if batch.is_cuda:
            torch.cuda.synchronize()

    return step


def measure(rounds: int, batch_size: int, device: str) -> dict[str, list[float]]:
    """Seconds of each variant's step, a list over rounds."""
    batch = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    steps = {mode: make_step(mode, batch, labels) for mode in TARGETS}
    for step in steps.values():
        for _ in range(2):
            step()
    seconds: dict[str, list[float]] = {mode: [] for mode in steps}
    for index in range(rounds):
        for mode in list(steps)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            steps[mode]()
            seconds[mode].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Median milliseconds, median paired ratio and its quartiles, beside the target."""
    rows = []
    for mode, times in seconds.items():
        ratios = [ours / plain for ours, plain in zip(times, seconds["plain"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        median = statistics.median(ratios)
        goal = "" if mode == "plain" else f"<= {TARGETS[mode]:.2f}"
        rows.append((mode, f"{1e3 * statistics.median(times):.1f}", f"{median:.3f}", f"{low:.3f} - {high:.3f}", goal))
    return tabulate(
        rows,
        headers=["step", "median ms", "over plain", "quartiles", "target"],
        tablefmt="github",
        disable_numparse=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, help="write the result page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = table(measure(options.rounds, options.batch, options.device))
    print(result)
    if options.write:
        device = torch.cuda.get_device_name() if options.device != "cpu" else f"{processor()}, one thread"
        options.write.write_text(
            "# The cost of a learner step\n\n"
            f"ResNet20 (CIFAR), 4 groups in each of 18 convolutions, batch {options.batch}, SGD with momentum, "
            f"torch {torch.__version__}, {device}. {options.rounds} interleaved rounds; `over plain` is the median of "
            "the ratios to the plain step of the same round. The authors' released code takes 2.15 to 2.46 times a "
            f"plain step.\n\n{result}\n\nMade by\n\n"
            f"    OMP_NUM_THREADS=1 python -m benchmarks.learner_step --rounds {options.rounds} "
            f"--device {options.device} --write {options.write}\n"
        )


if __name__ == "__main__":
    main()
