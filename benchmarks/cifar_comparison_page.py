"""The page and the plots of benchmarks.cifar_comparison, from the files of its runs."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate

COMMAND = """\
    OMP_NUM_THREADS=1 python -m benchmarks.cifar_comparison --data DIR --checkpoints FOLDER --out runs/comparison \\
        --write docs/results/cifar10.md"""
RUNTIMES = {"onnxruntime": "ONNX Runtime", "native": "dspfx's kernels"}
TITLES = {
    "dspfx": "dspfx",
    "tp": "Torch-Pruning, group norm",
    "l1": "L1 filters",
    "dsp": "DSP, the authors' training",
    "l2": "dspfx, pruned by L2",
    "zeros": "dspfx, logits from zeros",
    "exact": "dspfx, second pass",
    "noise": "dspfx, the authors' noise",
    "two": "dspfx, 2 groups",
    "eight": "dspfx, 8 groups",
    "clusters": "clusters, not learned",
    "random": "random groups",
    "control": "dense",
}


def write(out: Path, path: Path | None) -> None:
    """Prints the tables of all finished runs below `out`; writes the page and its plots where there is a path."""
    results = list(read(out))
    text = page(results, out)
    print(text, flush=True)
    if path is not None and results:
        plots = [draw(results, axis, path.with_name(f"{path.stem}_{axis}.svg")) for axis in ("share", "latency")]
        pictures = "\n\n".join(f"![accuracy against {p.stem}]({p.name})" for p in plots if p is not None)
        path.write_text(f"{text}\n\n{pictures}\n\nMade by\n\n{COMMAND}\n\nwhich goes on where it was stopped.\n")


def read(out: Path) -> Iterator[dict[str, Any]]:
    """Every result with its network, seed, method and budget, and its latency where it was measured."""
    for file in sorted(out.glob("*/*/checkpoints/*.json")):
        network, seed = file.parts[-4:-2]
        method, _, budget = file.stem.rpartition("_") if file.stem != "control" else ("control", "", "1")
        times = file.parent.parent / "times.json"
        timed = json.loads(times.read_text()) if times.exists() else {}
        ratios = {r: timed[f"{file.stem} {r}"]["ratio"] for r in RUNTIMES if f"{file.stem} {r}" in timed}
        found = json.loads(file.read_text()) | {"network": network, "seed": int(seed)}
        yield found | {"method": method, "budget": float(budget)} | ratios


def page(results: list[dict[str, Any]], out: Path) -> str:
    """The tables in Markdown."""
    rows = []
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["network"], result["budget"], result["method"]].append(result)
    for (network, budget, method), found in sorted(groups.items(), key=lambda g: (g[0][0], -g[0][1], g[0][2])):
        controls = {r["seed"]: r["test"] for r in groups.get((network, 1.0, "control"), [])}
        losses = [100 * (controls[r["seed"]] - r["test"]) for r in found if r["seed"] in controls]
        peers = {r["seed"]: r["test"] for r in groups.get((network, budget, "tp"), [])}
        gains = [100 * (r["test"] - peers[r["seed"]]) for r in found if r["seed"] in peers and method != "tp"]
        ratios = [[r[runtime] for r in found if runtime in r] for runtime in RUNTIMES]
        rows.append(
            (
                network,
                f"{statistics.mean(r['share'] for r in found):.1%}",
                TITLES[method],
                len(found),
                _mean([100 * r["test"] for r in found], "%"),
                _mean(losses),
                _mean(gains, sign="+"),
                *(f"{statistics.mean(values):.2f}" if values else "" for values in ratios),
                f"{statistics.mean(r['hours'] for r in found):.2f}",
            )
        )
    heads = [
        "network", "FLOPs", "method", "seeds", "test accuracy", "loss to dense", "to Torch-Pruning", *RUNTIMES.values(),
        "hours of training",
    ]  # fmt: skip
    settings = next((json.loads(f.read_text()) for f in sorted(out.glob("*/*/settings.json"))), {})
    return "\n\n".join(
        [
            "# Pruning methods on CIFAR-10 (JPEG copy)",
            f"Settings: {', '.join(f'{k} {v}' for k, v in settings.items())}. Every method starts from the same dense "
            "network, sees the same images in the same order with the same learning rates for `learn` and then `tune` "
            "epochs; *dense* is that network, trained on for as many. Means over seeds, ± the standard deviation; "
            "losses and gains are in points, between networks of one seed. *ONNX Runtime* and *dspfx's kernels*: "
            "latency of each network there (in PyTorch, lowered by `dspfx.lower`, whoever pruned it), to the dense "
            "network in ONNX Runtime, batch 1, one thread. Short schedules on a part of the images: to be compared "
            "within this table only.",
            tabulate(rows, heads, "github", disable_numparse=True),
        ]
    )


def _mean(values: list[float], unit: str = "", sign: str = "") -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.2f}{unit}{spread}"


def draw(results: list[dict[str, Any]], axis: str, path: Path) -> Path | None:
    """Test accuracy against the share of FLOPs, or the latency in whichever runtime is faster, a panel a network."""
    from matplotlib.figure import Figure

    shown = []
    for r in results:
        x = r["share"] if axis == "share" else min((r[runtime] for runtime in RUNTIMES if runtime in r), default=None)
        if x is not None:
            shown.append((r["network"], r["method"], r["budget"], x, 100 * r["test"]))
    networks = sorted({network for network, *_ in shown})
    if not networks:
        return None
    figure = Figure(figsize=(4.5 * len(networks), 3.6), layout="constrained")
    for axes, network in zip(figure.subplots(1, len(networks), squeeze=False)[0], networks, strict=True):
        for method, title in TITLES.items():
            points = defaultdict(list)
            for _, _, budget, *point in (s for s in shown if s[:2] == (network, method)):
                points[budget].append(point)
            means = sorted(tuple(statistics.mean(v) for v in zip(*p, strict=True)) for p in points.values())
            if means:
                axes.plot(*zip(*means, strict=True), "o-", label=title)
        axes.set(title=network, xlabel="FLOPs left" if axis == "share" else "latency, to dense", ylabel="accuracy, %")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path)
    return path
