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


COMPARED = ("control", "dspfx", "tp", "l1", "dsp")


def write(out: Path, path: Path | None) -> None:
    """Prints the tables of all finished runs below `out`; writes the pages and plots where there is a path."""
    results = list(read(out))
    compared = [r for r in results if r["method"] in COMPARED]
    text, ablations = page(compared, out), ablation_page(results, out)
    print(f"{text}\n\n{ablations}", flush=True)
    if path is None or not results:
        return
    plots = [draw(compared, axis, path.with_name(f"{path.stem}_{axis}.svg")) for axis in ("share", "latency")]
    pictures = "\n\n".join(f"![accuracy against {p.stem}]({p.name})" for p in plots if p is not None)
    path.write_text(f"{text}\n\n{pictures}\n\nMade by\n\n{COMMAND}\n\nwhich goes on where it was stopped.\n")
    if ablations:
        names = " ".join(name for name in TITLES if name not in COMPARED)
        path.with_name("ablations.md").write_text(
            f"{ablations}\n\nMade by\n\n{COMMAND} \\\n"
            f"        --networks resnet20 --budgets 0.35 --methods dspfx {names}\n"
        )


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
    groups = grouped(results)
    for (network, budget, method), found in sorted(groups.items(), key=lambda g: (g[0][0], -g[0][1], g[0][2])):
        losses = differences(groups.get((network, 1.0, "control"), []), found)
        gains = differences(found, groups.get((network, budget, "tp"), [])) if method != "tp" else []
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
    parts = [
        "# Pruning methods on CIFAR-10 (JPEG copy)",
        "Every method starts from the same dense network, sees the same images in the same order with the same "
        "learning rates for `learn` and then `tune` epochs; *dense* is that network, trained on for as many. Means "
        "over seeds, ± the standard deviation; losses and gains are in points, between networks of one seed. *ONNX "
        "Runtime* and *dspfx's kernels*: latency of each network there (in PyTorch, lowered by `dspfx.lower`, whoever "
        "pruned it), to the dense network in ONNX Runtime, batch 1, one thread. Short schedules on a part of the "
        "images: to be compared within this table only.",
        settings_of(out, {r["network"] for r in results}),
        tabulate(rows, heads, "github", disable_numparse=True),
    ]
    equal = at_equal_latency(groups)
    if equal:
        heads = ["network", "latency, to dense", "dspfx", "Torch-Pruning", "gain"]
        parts += [
            "## At equal latency",
            "Of each network the faster of the two runtimes; times are of one seed's networks, accuracies means of "
            "all. Torch-Pruning's accuracy at the latency of ours, on the straight line between its networks that are "
            "next to it; where it has none on both sides, the nearest, and the table says which way that errs.",
            tabulate(equal, heads, "github", disable_numparse=True),
        ]
    return "\n\n".join(parts)


def settings_of(out: Path, networks: set[str]) -> str:
    """What each network's runs were told."""
    lines = []
    for network in sorted(networks):
        file = next(out.glob(f"{network}/*/settings.json"))
        lines.append(f"- {network}: {', '.join(f'{k} {v}' for k, v in json.loads(file.read_text()).items())}")
    return "\n".join(lines)


Groups = dict[tuple[str, float, str], list[dict[str, Any]]]


def grouped(results: list[dict[str, Any]]) -> Groups:
    """By network, budget and method, the results of all seeds."""
    groups: Groups = defaultdict(list)
    for result in results:
        groups[result["network"], result["budget"], result["method"]].append(result)
    return groups


def differences(better: list[dict[str, Any]], worse: list[dict[str, Any]]) -> list[float]:
    """Points between results of one seed."""
    scores = {r["seed"]: r["test"] for r in worse}
    return [100 * (r["test"] - scores[r["seed"]]) for r in better if r["seed"] in scores]


def at_equal_latency(groups: Groups) -> list[tuple[str, ...]]:
    """Rows: ours, and Torch-Pruning's accuracy at the same latency."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for (network, _, method), found in groups.items():
        timed = [r for r in found if latency(r) is not None]
        if timed:
            score = statistics.mean(100 * r["test"] for r in found)
            points[network, method].append((statistics.mean(latency(r) or 0.0 for r in timed), score))
    rows = []
    for (network, method), ours in sorted(points.items()):
        theirs = sorted(points.get((network, "tp"), []))
        if method != "dspfx" or not theirs:
            continue
        for x, score in sorted(ours):
            below, above = [p for p in theirs if p[0] <= x], [p for p in theirs if p[0] >= x]
            if below and above:
                (x0, y0), (x1, y1) = below[-1], above[0]
                other = y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
                note = ""
            else:
                x0, other = (below or above)[-1 if below else 0]
                note = f" (at {x0:.2f}, {'faster: too little' if below else 'slower: too much'})"
            rows.append((network, f"{x:.2f}", f"{score:.2f}%", f"{other:.2f}%{note}", f"{score - other:+.2f}"))
    return rows


def latency(result: dict[str, Any]) -> float | None:
    """In whichever runtime is faster."""
    return min((result[runtime] for runtime in RUNTIMES if runtime in result), default=None)


def ablation_page(results: list[dict[str, Any]], out: Path) -> str:
    """One thing changed at a time, beside our defaults; empty where nothing of it was run."""
    groups = grouped(results)
    rows = []
    for (network, budget, method), found in sorted(groups.items(), key=lambda g: (g[0][0], -g[0][1])):
        if method in COMPARED and method not in ("dspfx", "dsp"):
            continue
        ours = groups.get((network, budget, "dspfx"), [])
        if not any(b == budget and n == network and m not in COMPARED for n, b, m in groups):
            continue
        gains = differences(found, ours) if method != "dspfx" else []
        mean = statistics.mean(r["test"] for r in found)
        rows.append(
            (mean, network, f"{budget:.0%}", TITLES[method], len(found), _mean([100 * r["test"] for r in found], "%"),
             _mean(gains, sign="+"), f"{statistics.mean(r['hours'] for r in found):.2f}")
        )  # fmt: skip
    if not rows:
        return ""
    heads = ["network", "FLOPs", "what", "seeds", "test accuracy", "to the defaults", "hours of training"]
    return "\n\n".join(
        [
            "# What makes groups good?",
            "One thing changed at a time in how groups are learned and in what pruning drops, under the protocol of "
            "cifar10.md. Defaults: four groups, logits that lean towards clusters, the textbook's noise, the gradients "
            "of the training step itself (fused), and pruning by Fisher information for a multiply-add. *DSP, the "
            "authors' training* is the second pass, logits from zeros, their noise and their strength, pruned by L2 "
            "norms. *clusters* and *random groups* train plainly, which gathers no Fisher information, and are pruned "
            "by L2 norms too. Differences are in points, between networks of one seed, ± the standard deviation over "
            "seeds.",
            settings_of(out, {row[1] for row in rows}),
            tabulate([row[1:] for row in sorted(rows, reverse=True)], heads, "github", disable_numparse=True),
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
        x = r["share"] if axis == "share" else latency(r)
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
