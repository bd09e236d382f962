"""The results of a run: results.json and the table that is printed from it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from dspfx import ranks
from dspfx.cli import commands, record
from dspfx.cli.checkpoints import read_json, write_text
from dspfx.cli.machine import Machine
from dspfx.cli.options import Settings
from dspfx.cli.scoring import Score
from dspfx.coverage import Coverage
from dspfx.deploy.compete import Contest
from dspfx.deploy.runtimes import describe_runtime
from dspfx.plans import PrunePlan

FILE = "results.json"
HEADERS = (
    "network", "test accuracy", "FLOPs needed", "executed", "weights needed", "stored", "file", "latency"
)  # fmt: skip
TITLES = {"control": "dense, trained as long"}


@dataclass(frozen=True)
class Row:
    """One network, measured.

    Attributes:
        test: its score on the test split.
        flops_needed, params_needed: share of the dense network's that its kept weights need.
        flops, params: what PyTorch executes for one image, and the parameters it stores.
        file_bytes: on disk.
        latency_ms, latency_ratio: at batch 1, and over that of the dense network.
        latency_spread: the interquartile range of that ratio over rounds.
    """

    name: str
    test: Score
    flops_needed: float
    params_needed: float
    flops: int
    params: int
    file_bytes: int
    latency_ms: float
    latency_ratio: float
    latency_spread: float


@dataclass(frozen=True)
class Measured:
    """Every network's row, and what the latency was measured on, in words."""

    rows: list[Row]
    setting: str


@dataclass(frozen=True)
class Findings:
    """What came out of a run.

    Attributes:
        plan: what is left.
        measured: every network, measured.
        contest: which form of the pruned network was chosen, and how.
        coverage: what could be gated, and why not the rest.
        difference: of the lowered network's output from the pruned one's, the largest, of the output's scale.
    """

    plan: PrunePlan
    measured: Measured
    contest: Contest
    coverage: Coverage
    difference: float


def write(
    out: Path, settings: Settings, machine: Machine, found: Findings, curves: dict[str, list[dict[str, float]]]
) -> None:
    """Writes results.json, whose presence says that the run is finished."""
    plan, measured = found.plan, found.measured
    threads = torch.get_num_threads()
    content = {
        "command": commands.compress(settings.flat(), machine.device.type, threads, ranks.count()),
        "arguments": settings.flat(),
        "versions": record.versions(),
        "machine": record.describe_machine(machine.device, threads),
        "networks": {row.name: asdict(row) for row in measured.rows},
        "left": {
            "flops": plan.flops_left,
            "params": plan.params_left,
            "gated_flops": plan.gated_flops_left,
            "latency": plan.latency_left,
        },
        "runtime": describe_runtime(settings.runtime),
        "latency": measured.setting,
        "contest": asdict(found.contest),
        "coverage": asdict(found.coverage),
        "difference": found.difference,
        "curves": curves,
    }
    write_text(out / FILE, json.dumps(content, indent=1))


def show(out: Path) -> str:
    """The table of results.json: dense, pruned and lowered side by side, and where the files are."""
    content = read_json(out / FILE)
    networks = content["networks"]
    dense = networks["dense"]
    rows = [
        (
            TITLES.get(name, name),
            f"{row['test']['accuracy']:.2%}",
            f"{row['flops_needed']:.1%}",
            f"{row['flops'] / 1e6:.1f} M ({row['flops'] / dense['flops']:.0%})",
            f"{row['params_needed']:.1%}",
            f"{row['params'] / 1e3:.1f} k ({row['params'] / dense['params']:.0%})",
            f"{row['file_bytes'] / 1e3:.0f} kB",
            f"{row['latency_ms']:.2f} ms ({row['latency_ratio']:.2f}x)",
        )
        for name, row in networks.items()
    ]
    table = tabulate(rows, headers=HEADERS)
    images, contest = dense["test"]["images"], content["contest"]
    limit = content["arguments"]["limit_train"]
    notes = [
        f"Accuracy on {images} test images, read once. Needed: by the weights that were kept, groups counted exactly; "
        "executed and stored: in PyTorch.",
        f"Latency: {content['latency']}.",
        f"Lowered: {contest['winner']}, of {len(contest['results'])} forms of the network that were timed there.",
        f"The network is {out / 'network.safetensors'} (for dspfx.load), all numbers are in {out / FILE}, and "
        f"{out / 'report.html'} shows them.",
    ]
    if content["arguments"].get("fork") is not None:
        notes.insert(1, f"The dense and the learned network are those of {content['arguments']['fork']} (--fork).")
    if not content["arguments"]["checkpoint"] and not content["arguments"]["epochs_dense"]:
        notes.insert(1, "The dense network was never trained: groups were learned from scratch, or not at all.")
    if limit is not None:
        notes.insert(1, f"Trained on {limit} images only (--limit-train).")
    return "\n".join([table, *notes])
