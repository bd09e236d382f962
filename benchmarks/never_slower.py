"""Is a lowered network ever slower than the dense one, or than plain removal of dead channels? Measured anew.

    python -m benchmarks.never_slower --write docs/results/never_slower.md

Every network is lowered for a runtime and a batch by `dspfx.lower(..., tune="auto")`, which measures and chooses; then
dense, plain and lowered are built again and timed beside each other, independently of what the choice was made from.
Started again, it goes on from what docs/results/never_slower.jsonl holds. `--again` chooses and times anew, in five
times the rounds, what came out above the limit: networks of a tenth of a millisecond differ by more than that from
themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn

import dspfx
from dspfx.config import Inputs
from dspfx.deploy.benchmark import describe_setting, first_device, forward_pass
from dspfx.deploy.quiet import torch_threads
from dspfx.deploy.runtimes import build
from dspfx.deploy.timing import compare, interleave
from dspfx.errors import BudgetError, DspfxError, ModelError
from dspfx.estimate import random_energy
from tests.compare import forced
from tests.data import DSP_RESNET20
from tests.nets.published import load_published
from tests.zoo import ZOO

ALLOWED = 1.03
ROUNDS = 20
AGAIN = 5  # times as many rounds
BATCHES = (1, 8, 64)
RUNTIMES = ("onnxruntime", "openvino", "eager")
BIG = {
    "resnet18": 0.35,
    "resnet50": 0.33,
    "mobilenet_v2": 0.5,
    "vgg11_bn": 0.3,
    "densenet121": 0.5,
    "shufflenet_v2_x1_0": 0.5,
}


def published() -> tuple[nn.Module, nn.Module, Callable[[int], Any]]:
    model = load_published(DSP_RESNET20)
    return model, model, lambda batch: torch.randn(batch, 3, 32, 32)


def random_structure(name: str, groups: int, share: float) -> tuple[nn.Module, nn.Module, Callable[[int], Any]]:
    """A torchvision network with random groups of random channels."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    gm = dspfx.prepare(model, torch.zeros(1, 3, 224, 224), dspfx.GateConfig(groups=groups))
    dspfx.prune(gm, dspfx.Budget(flops=share), random_energy(groups))
    return model, gm, lambda batch: torch.randn(batch, 3, 224, 224)


def from_zoo(name: str) -> tuple[nn.Module, nn.Module, Callable[[int], Any]]:
    """A small network of the tests with random groups, pruned to half of its FLOPs or as far as it goes."""
    entry = ZOO[name]
    torch.manual_seed(0)
    model = entry.build().eval()
    gm = dspfx.prepare(model, entry.inputs(2), dspfx.GateConfig(groups=2))
    for share in (0.5, 0.7, 0.9, 1.0):
        try:
            dspfx.prune(gm, dspfx.Budget(flops=share), random_energy(2))
        except BudgetError:
            continue
        except ModelError:  # nothing in it can be pruned, and lowering shall not make it slower either
            gm = model
        break
    return model, gm, lambda batch: entry.inputs(batch)


def networks() -> dict[str, Callable[[], tuple[nn.Module, nn.Module, Callable[[int], Any]]]]:
    found: dict[str, Callable[[], tuple[nn.Module, nn.Module, Callable[[int], Any]]]] = {}
    if DSP_RESNET20.exists():
        found["published ResNet20, 4 groups"] = published
    for name, share in BIG.items():
        for groups in (2, 4):
            found[f"{name}, {groups} groups, {share:.0%} of FLOPs"] = lambda name=name, groups=groups, share=share: (
                random_structure(name, groups, share)
            )
    for name in ZOO:
        found[f"zoo: {name}"] = lambda name=name: from_zoo(name)
    return found


def measure(
    parts: tuple[nn.Module, nn.Module, Callable[[int], Any]], runtime: str, batch: int, rounds: int = ROUNDS
) -> dict[str, Any]:
    """The times of a lowered network to those of the dense and the plain one, and how it was lowered."""
    dense, gm, inputs = parts
    example = inputs(batch)
    small = dspfx.lower(gm, example, runtime)
    contest = small.meta["contest"]
    forms = {"dense": dense, "plain": forced(gm, "dense", example_inputs=example), "lowered": small}
    inputs, device = Inputs.of(example), first_device(dense)
    built = {name: build(runtime, network, inputs) for name, network in forms.items()}
    with torch_threads(1), torch.inference_mode():
        samples = interleave({name: forward_pass(network, inputs, device) for name, network in built.items()}, rounds)
    to_dense = compare(samples)
    to_plain = compare({name: samples[name] for name in ("plain", "lowered")})
    return {
        "to_dense": round(to_dense["lowered"].ratio, 4),
        "to_plain": round(to_plain["lowered"].ratio, 4),
        "spread": round(to_dense["lowered"].spread, 4),
        "ms": round(to_dense["dense"].median_ms, 4),
        "form": contest.winner,
        "is_noisy": contest.is_noisy,
        "setting": describe_setting(runtime, device, 1),
    }


def is_above(row: dict[str, Any]) -> bool:
    """Whether it is slower than the faster of the two by more than is allowed."""
    return "to_dense" in row and max(row["to_dense"], row["to_plain"]) > ALLOWED


def page(rows: list[dict[str, Any]], title: str, command: str) -> str:
    """The table in Markdown, and the worst of it."""
    timed = [row for row in rows if "to_dense" in row]
    above = [row for row in timed if is_above(row)]
    worst = [row for row in above if is_above(row.get("again", row))]
    cleared = len(above) - len(worst)
    table = [
        (row["network"], row["runtime"], row["batch"], f"{row['ms']:.2f}", f"{row['to_dense']:.2f}",
         f"{row['to_plain']:.2f}", f"{row['spread']:.2f}", row["form"])
        for row in timed
    ]  # fmt: skip
    headers = ["network", "runtime", "batch", "dense ms", "to dense", "to plain", "spread", "chosen"]
    beyond = "; ".join(
        f"{row['network']} on {row['runtime']}, batch {row['batch']}: "
        + " and ".join(f"{x['to_dense']:.2f} / {x['to_plain']:.2f}" for x in (row, row.get("again")) if x)
        + f", of {row['ms']:.2f} ms, as {row['form']}"
        for row in worst
    )
    extra = [1e3 * row["ms"] * (row["to_dense"] - 1) for row in worst if row["runtime"] == "eager"]
    rejected = "; ".join(f"{row['network']} on {row['runtime']}" for row in rows if "error" in row)
    return "\n\n".join(
        [
            f"# {title}",
            "Time of the lowered network (chosen by measuring) to that of the dense network and of plain removal of "
            "dead channels, in the same runtime, one thread, timed again after the choice. *spread* is the "
            "interquartile range of the ratio to dense; both ratios are medians of paired ratios.",
            f"{len(timed)} cases of {len({row['network'] for row in timed})} networks; without --only the command goes "
            f"on with the rest of {len(networks())}, and rows of earlier calls stay. "
            f"{len(timed) - len(above)} cases at most {ALLOWED} of the faster of the two at once"
            + (f", {cleared} more chosen and timed anew in {AGAIN * ROUNDS} rounds" if cleared else "")
            + (f". Above it: {beyond}." if worst else ".")
            + (
                f" Those on eager are {min(extra):.0f} to {max(extra):.0f} microseconds, of a graph's Python."
                * bool(extra)
            )
            + (f" Rejected by the runtime in every form, dense included: {rejected}." if rejected else ""),
            tabulate(table, headers, "github", disable_numparse=True),
            f"Measured on: {'; '.join(sorted({row['setting'] for row in timed}))}.",
            f"Made by\n\n    OMP_NUM_THREADS=1 {command}\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--again", action="store_true", help="only what came out above the limit")
    parser.add_argument("--rows", type=Path, default=Path("docs/results/never_slower.jsonl"))
    parser.add_argument("--title", default="Never slower", help="of the page")
    parser.add_argument("--write", type=Path, help="write the page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    done = {(row["network"], row["runtime"], row["batch"]) for row in rows}
    for name, make in networks().items():
        cases = [(r, int(b)) for r in options.runtimes.split(",") for b in options.batches.split(",")]
        todo = [case for case in cases if (name, *case) not in done]
        if options.again or options.only not in name or not todo:
            continue
        parts = make()
        for runtime, batch in todo:
            row = {"network": name, "runtime": runtime, "batch": batch}
            try:
                row |= measure(parts, runtime, batch)
            except DspfxError as error:
                row |= {"error": str(error).splitlines()[-1]}
            rows.append(row)
            print(row, flush=True)
            with options.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
    for row in rows if options.again else ():
        if is_above(row) and "again" not in row:
            row["again"] = measure(networks()[row["network"]](), row["runtime"], row["batch"], AGAIN * ROUNDS)
            print(row, flush=True)
            options.rows.write_text("".join(json.dumps(r) + "\n" for r in rows))
    if options.write:
        preloaded = os.environ.get("LD_PRELOAD", "")  # benchmarks/avx2_only.c
        prefix = f"LD_PRELOAD=./{Path(preloaded).name} " if preloaded else ""
        words = [word for word in sys.argv[1:] if word != "--again"]
        calls = [words, ["--again", *words]] if options.again else [words]
        lines = [f"{prefix}python -m benchmarks.never_slower {shlex.join(call)}" for call in calls]
        command = "\n    OMP_NUM_THREADS=1 ".join(lines)
        options.write.write_text(page(rows, options.title, command))


if __name__ == "__main__":
    main()
