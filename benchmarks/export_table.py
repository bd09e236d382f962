"""ONNX against PyTorch on 80 torchvision classifiers and the zoo, each lowered under a random plan.

OMP_NUM_THREADS=1 python -m benchmarks.export_table --record docs/results/export.jsonl --write docs/results/export.md

The record grows a line a network; started again, the command goes on behind the last one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import nn

import dspfx
from benchmarks.selfcheck_table import build
from dspfx.config import GateConfig, Inputs
from dspfx.deploy.agree import disagreement
from dspfx.deploy.machine import describe_machine
from dspfx.deploy.onnx_file import read_graph
from dspfx.deploy.runtimes import describe_runtime
from dspfx.deploy.tensorrt_ops import SOURCE, operations
from dspfx.enliven import calibrate, random_inputs, revive
from dspfx.modules import GatedLayer
from tests.zoo import ZOO

SHARES = (0.5, 0.7, 0.9, 1.0)  # of the FLOPs: the first that a network can reach
TOLERANCE = 1e-4
SMALL = 100_000  # parameters: what the graph takes is more than a fiftieth of a smaller file


def names() -> list[str]:
    """Torchvision's classifiers, then the zoo's networks."""
    return torchvision.models.list_models(module=torchvision.models) + [f"zoo {name}" for name in ZOO]


def prepared(name: str) -> nn.Module:
    """The network, prepared, and made to respond to its input."""
    if name.startswith("zoo "):
        entry = ZOO[name.removeprefix("zoo ")]
        return dspfx.prepare(entry.build(), entry.inputs(2), GateConfig(groups=2))
    size = 299 if name == "inception_v3" else 224
    gates = GateConfig(groups=2, linear=True)  # in transformers, and ConvNeXt, there is little else to prune
    gm = dspfx.prepare(build(name).eval(), torch.zeros(2, 3, size, size), gates)
    revive(gm)
    return gm


def pruned(name: str) -> tuple[nn.Module, float]:
    """(the network pruned at random, its share of FLOPs left)."""
    torch.manual_seed(0)
    gm = prepared(name)
    left = 1.0
    if any(isinstance(m, GatedLayer) for m in gm.modules()):
        for share in SHARES:
            try:
                plan = dspfx.prune(gm, dspfx.Budget(flops=share), importance=lambda w: torch.rand(w.shape[:2]))
            except dspfx.DspfxError:
                continue
            left = plan.flops_left
            break
    if not name.startswith("zoo "):
        calibrate(gm)
    return gm.eval(), left


def measure(name: str) -> dict[str, Any]:
    """One line of the record."""
    gm, left = pruned(name)
    small = dspfx.lower(gm)
    (args, kwargs), (others, more) = random_inputs(gm, 2), random_inputs(gm, 2)
    with torch.no_grad():
        response = disagreement(gm(*others, **more), gm(*args, **kwargs))[0]
    del gm
    found: dict[str, Any] = {"name": name, "flops_left": left, "response": response}
    found["params"] = sum(p.numel() for p in small.parameters())
    found["values"] = sum(x.numel() for x in (*small.parameters(), *small.buffers()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        start = time.perf_counter()
        try:
            exported = dspfx.export_onnx(small, path, Inputs(*args, **kwargs), tolerance=float("inf"), verbose=False)
        except dspfx.DspfxError as error:
            return found | {"failed": str(error)}
        found["seconds"] = time.perf_counter() - start
        found["bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
        found["ops"], found["refused"] = operations(read_graph(path)), exported.outside_tensorrt
    return found | {"error": exported.max_error, "batches": exported.batches}


def page(lines: list[dict[str, Any]], command: str) -> str:
    """The page in Markdown."""
    rows, failed = [], [line for line in lines if "failed" in line]
    missing = [name for name in names() if name not in {line["name"] for line in lines}]
    for line in lines:
        if "failed" in line:
            rows.append((line["name"], f"{line['params']:,}", *[""] * 6))
            continue
        ratio = line["bytes"] / (4 * line["params"]) if line["params"] else float("nan")
        batches = "any" if len(line["batches"]) > 1 else str(line["batches"][0])
        numbers = (f"{line['params']:,}", f"{ratio:.3f}", f"{line['error']:.1e}", f"{line['response']:.1e}")
        rows.append((line["name"], *numbers, f"{line['seconds']:.1f}", batches, ", ".join(line["refused"])))
    headers = ["network", "parameters", "bytes / 4 a parameter", "error", "response", "seconds", "batch", "refused"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return "\n\n".join(
        [
            "# ONNX against PyTorch, 80 torchvision classifiers and the zoo",
            "Each network with random groups and a random plan of half of its FLOPs (more where it cannot reach that), "
            "made alive (random norms, statistics of random inputs), lowered, and exported with `dspfx.export_onnx`: "
            "checked by ONNX's checker with strict shape inference and run on ONNX Runtime at batches 2, 1 and 3. "
            "`error` is the largest difference from PyTorch over the largest output, `response` how much the outputs "
            "change between two random inputs, `seconds` the whole call, comparison included, `refused` what "
            f"TensorRT's published list ({SOURCE}) has no support for.",
            summary(lines),
            table,
            *(f"{line['name']} was not exported: {line['failed'].splitlines()[-1]}" for line in failed),
            *([f"Not measured yet: {', '.join(missing)}."] if missing else []),
            f"Operations met: {', '.join(sorted({op for line in lines for op in line.get('ops', ())}))}.",
            f"{describe_runtime('onnxruntime')}, {describe_machine(torch.device('cpu'), 1)}, torchvision "
            f"{torchvision.__version__}; the seconds are of a shared machine.",
            f"Made by\n\n    {command}\n",
        ]
    )


def summary(lines: list[dict[str, Any]]) -> str:
    """How many of each kind did what was asked."""
    rows = []
    for kind in ("torchvision", "zoo"):
        own = [line for line in lines if line["name"].startswith("zoo ") == (kind == "zoo")]
        done = [line for line in own if "failed" not in line]
        large = [line["bytes"] / (4 * line["params"]) for line in done if line["params"] >= SMALL]
        agreeing = sum(line["error"] <= TOLERANCE for line in done)
        whole = sum(name.startswith("zoo ") == (kind == "zoo") for name in names())
        rows.append((f"{kind}: measured", f"{len(own)} of {whole}"))
        rows.append((f"{kind}: exported and checked", f"{len(done)} of {len(own)}"))
        rows.append((f"{kind}: agree to {TOLERANCE:.0e} of scale", f"{agreeing} of {len(own)}"))
        rows.append((f"{kind}: largest error", f"{max((line['error'] for line in done), default=0.0):.1e}"))
        rows.append(
            (f"{kind}: networks with an operation that TensorRT refuses", sum(bool(x["refused"]) for x in done))
        )
        if large:
            rows.append((f"{kind}: largest file, of 4 bytes a parameter ({SMALL:,} and more)", f"{max(large):.4f}"))
    return tabulate(rows, headers=["what", "reached"], tablefmt="github", disable_numparse=True)


def main() -> None:
    """Measures what the record lacks, each network in a process of its own, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="a line of JSON for each network")
    parser.add_argument("--write", type=Path, help="write the result page to this file")
    parser.add_argument("--only", nargs="+", help="these networks instead of all")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    known = [json.loads(line)["name"] for line in options.record.read_text().splitlines()] if _there(options) else []
    for name in options.only or names():
        if name in known:
            continue
        command = [sys.executable, "-m", "benchmarks.export_table", "--record", str(options.record), "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}:\n{done.stderr}")
        with options.record.open("a") as file:
            file.write(done.stdout.splitlines()[-1] + "\n")
        print(done.stdout.splitlines()[-1][:200], flush=True)
    if options.write:
        lines = [json.loads(line) for line in options.record.read_text().splitlines()]
        place = f"--record {options.record} --write {options.write}"
        options.write.write_text(page(lines, f"OMP_NUM_THREADS=1 python -m benchmarks.export_table {place}"))


def _there(options: argparse.Namespace) -> bool:
    return bool(options.record.is_file())


if __name__ == "__main__":
    main()
