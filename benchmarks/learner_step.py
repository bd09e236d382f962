"""What a learner step costs: training steps, plain and with a learner, in interleaved rounds.

    OMP_NUM_THREADS=1 python -m benchmarks.learner_step --write docs/results/learner_step.md

One step is zero_grad, forward, backward, optimizer.step and, in exact mode, learner.step. A round times one step of
each variant, in alternating order; the figure is the median over rounds of the ratio to the plain step of the same
round, so that a machine that slows down slows all of them. With two ranks a step ends when both have ended theirs.
"unify" is a step with a Unifier that projects at every step (by default it does at every twentieth part of a
training), "alike" one after its projection. Memory is the peak of a process of its own for each variant, above what it
held before there was a network.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torchvision
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import dspfx
from dspfx.cli import models
from dspfx.deploy.machine import processor
from dspfx.learner import GroupLearner

Seconds = dict[str, list[float]]
MEMORY_TARGET = 1.05


@dataclass(frozen=True)
class Case:
    """A network and its images, how many processes train it, and what each variant may cost over "plain"."""

    network: str
    size: int
    batch: int
    targets: dict[str, float]
    ranks: int = 1

    @property
    def title(self) -> str:
        ranks = "" if self.ranks == 1 else f", {self.ranks} ranks of DistributedDataParallel with {self.batch} each"
        return f"{self.network}, {self.size}x{self.size}, batch {self.batch * self.ranks}{ranks}"


CASES = (
    Case("resnet20", 32, 128, {"plain": 1.0, "fused": 1.10, "exact": 2.10, "unify": 1.10, "alike": 1.10}),
    Case("resnet50", 224, 8, {"plain": 1.0, "fused": 1.05, "alike": 1.10}),
    Case("resnet20", 32, 64, {"plain": 1.0, "fused": 1.10}, ranks=2),
)


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    if case.network in models.BUILT_IN:
        return models.build(case.network, 10)
    network: nn.Module = torchvision.models.get_model(case.network, weights=None)
    return network


def make_step(case: Case, mode: str, device: str) -> Callable[[], None]:
    """One training step of a fresh network: plain SGD on the original, or on the prepared one with a learner."""
    images = torch.randn(case.batch, 3, case.size, case.size, device=device)
    labels = torch.randint(10, (case.batch,), device=device)
    model = build(case)
    if mode in ("fused", "exact"):
        model = dspfx.prepare(model, torch.zeros(2, 3, case.size, case.size))
    model.to(device)
    call = DistributedDataParallel(model) if case.ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    learner = GroupLearner(model, optimizer, 1000, mode=mode) if mode in ("fused", "exact") else None  # type: ignore[arg-type]
    if mode in ("unify", "alike"):
        unifier = dspfx.Unifier(model, optimizer, dspfx.BlockConfig((4, 4), prune=0.3, unify=0.5), 1000, every=1)
        if mode == "alike":
            unifier.project()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(call(images), labels).backward()
        optimizer.step()
        if learner is not None and mode == "exact":
            learner.step(lambda: F.cross_entropy(call(images), labels))
        if images.is_cuda:
            torch.cuda.synchronize()

    return step


def measure(case: Case, rounds: int, device: str) -> Seconds:
    """Seconds of each variant's step, a list over rounds; of all ranks together, where there are several."""
    steps = {mode: make_step(case, mode, device) for mode in case.targets}
    for step in steps.values():
        for _ in range(2):
            step()
    seconds: Seconds = {mode: [] for mode in steps}
    for index in range(rounds):
        for mode in list(steps)[:: 1 if index % 2 else -1]:
            wait(case)
            start = time.perf_counter()
            steps[mode]()
            wait(case)
            seconds[mode].append(time.perf_counter() - start)
    return seconds


def wait(case: Case) -> None:
    """Until all ranks are here."""
    if case.ranks > 1:
        dist.barrier()


def run_rank(rank: int, case: Case, rounds: int, folder: str) -> None:
    """One process of several; the first writes what it timed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=case.ranks)
    seconds = measure(case, rounds, "cpu")
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def measure_ranks(case: Case, rounds: int) -> Seconds:
    """As `measure`, with a process for each rank."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run_rank, (case, rounds, folder), nprocs=case.ranks)
        found: Seconds = json.loads((Path(folder) / "seconds.json").read_text())
    return found


def peak(case: Case, mode: str) -> int:
    """Bytes of this process's peak above what it holds now, over three steps."""
    before = current_bytes()
    step = make_step(case, mode, "cpu")
    for _ in range(3):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def current_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_elsewhere(case: Case, mode: str) -> int:
    """`peak`, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.learner_step", "--peak", str(CASES.index(case)), mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def rows(case: Case, seconds: Seconds) -> list[tuple[str, ...]]:
    """Median milliseconds, median paired ratio and its quartiles, beside the target."""
    found = []
    for mode, times in seconds.items():
        ratios = [ours / plain for ours, plain in zip(times, seconds["plain"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        goal = "" if mode == "plain" else f"<= {case.targets[mode]:.2f}"
        ms = f"{1e3 * statistics.median(times):.1f}"
        found.append((case.title, mode, ms, f"{median:.3f}", f"{low:.3f} - {high:.3f}", goal))
    return found


def memory_row(case: Case) -> tuple[str, ...]:
    """The median of three processes for each variant."""
    plain, fused = (statistics.median(peak_elsewhere(case, mode) for _ in range(3)) for mode in ("plain", "fused"))
    return case.title, f"{plain / 2**20:.0f}", f"{fused / 2**20:.0f}", f"{fused / plain:.3f}", f"<= {MEMORY_TARGET}"


def page(times: list[tuple[str, ...]], memory: list[tuple[str, ...]], rounds: int, device: str) -> str:
    """The tables in Markdown."""
    heads = (
        ["training", "step", "median ms", "over plain", "quartiles", "target"],
        ["training", "plain, MiB", "fused, MiB", "over plain", "target"],
    )
    tables = [tabulate(t, h, "github", disable_numparse=True) for t, h in zip((times, memory), heads, strict=True)]
    machine = torch.cuda.get_device_name() if device != "cpu" else f"{processor()}, one thread a process"
    return (
        "# The cost of a learner step\n\n"
        f"Four groups a convolution, SGD with momentum, torch {torch.__version__}, {machine}. {rounds} interleaved "
        "rounds; `over plain` is the median of the ratios to the plain step of the same round. The authors' released "
        f"code takes 2.15 to 2.46 times a plain step.\n\n{tables[0]}\n\n"
        "Peak memory of training above that of the process without a network, the median of three processes. The "
        f"authors' code holds two extra copies of the network.\n\n{tables[1]}\n\n"
        f"Made by\n\n    OMP_NUM_THREADS=1 python -m benchmarks.learner_step --rounds {rounds} --device {device} "
        "--write docs/results/learner_step.md\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--write", type=Path, help="write the result page to this file")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        print(peak(CASES[int(options.peak[0])], options.peak[1]))
        return
    times = []
    for case in CASES:
        if case.ranks == 1:
            times += rows(case, measure(case, options.rounds, options.device))
        elif options.device == "cpu":
            times += rows(case, measure_ranks(case, options.rounds))
        print(tabulate(times), flush=True)
    text = page(times, [memory_row(CASES[1])], options.rounds, options.device)
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
