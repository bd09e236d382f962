"""The training of the page: learning curves, what the groups did meanwhile, and the numbers of both."""

from __future__ import annotations

import math

from dspfx.cli.pages import words
from dspfx.cli.pages.charts import Band, Line, chart, show_number
from dspfx.cli.pages.markup import Html, join, table, tag
from dspfx.cli.pages.run import Run

Curves = dict[str, list[dict[str, float]]]
LEARNED = {
    "entropy": "Undecidedness of filters about their group (entropy, nats)",
    "sparsity": "Share of weights that the groups do not need (sparsity)",
    "penalty": "What the group regulariser penalises (unweighted)",
    "factor": "Factor on the regulariser's strength (steered)",
    "beta": "Share of energy that pruning to the budget would drop (beta)",
}


def training(run: Run) -> Html:
    """Learning curves, what the groups did meanwhile, and the numbers of both."""
    curves: Curves = run.results["curves"]
    if not any(curves.values()):
        return tag("p", "Nothing was trained in this run.")
    starts, bands = _stages(curves)
    figures = []
    for what, title, show in (
        ("accuracy", "Accuracy", "{:.0%}".format if _range(curves, "accuracy") > 0.08 else "{:.1%}".format),
        ("loss", "Loss, on a logarithmic scale", show_number),
    ):
        lines = [
            Line("validation", "a", _points(curves, starts, f"val_{what}", control=False)),
            Line("training", "b", _points(curves, starts, f"train_{what}", control=False)),
            Line("validation, dense trained as long", "c", _points(curves, starts, f"val_{what}", control=True)),
        ]
        figures.append(chart(title, lines, bands, show, is_log=what == "loss"))
    learned = curves.get("learn", [])
    groups = run.results["arguments"].get("groups", 1)
    level = (math.log(groups), f"undecided: log {groups}") if groups > 1 else None
    for key, title in LEARNED.items():
        points = [(float(i + 1), epoch[key]) for i, epoch in enumerate(learned) if key in epoch]
        reference = level if key == "entropy" else None
        figures.append(
            chart(title, [Line("while groups were learned", "a", points)], [], reference=reference, from_zero=True)
        )
    said = words.decided(run)
    return join([
        tag("p", said) if said else "",
        tag("div", *figures, class_="charts"),
        tag("details", tag("summary", "The numbers, epoch by epoch"), _epochs(curves)),
    ])  # fmt: skip


def _stages(curves: Curves) -> tuple[dict[str, int], list[Band]]:
    """Epochs before each stage; the control starts where the dense network ended."""
    starts, bands, epoch = {"control": len(curves.get("dense", []))}, [], 0
    for name, curve in curves.items():
        if name != "control" and curve:
            starts[name] = epoch
            bands.append(Band(name, epoch, epoch + len(curve)))
            epoch += len(curve)
    return starts, bands


def _points(curves: Curves, starts: dict[str, int], key: str, control: bool) -> list[tuple[float, float]]:
    return [
        (float(starts[name] + index + 1), epoch[key])
        for name, curve in curves.items()
        if (name == "control") == control
        for index, epoch in enumerate(curve)
        if math.isfinite(epoch.get(key, math.nan))
    ]


def _range(curves: Curves, what: str) -> float:
    values = [epoch[f"{kind}_{what}"] for curve in curves.values() for epoch in curve for kind in ("train", "val")]
    return max(values) - min(values)


def _epochs(curves: Curves) -> Html:
    """Everything but the seconds, which another run would not repeat."""
    keys = list(dict.fromkeys(key for curve in curves.values() for epoch in curve for key in epoch if key != "seconds"))
    rows = [
        (f"{name} {index + 1}", *(f"{epoch[key]:.4g}" if key in epoch else "" for key in keys))
        for name, curve in curves.items()
        for index, epoch in enumerate(curve)
    ]
    heads = ["stage, epoch", *(key.replace("_", " ") for key in keys)]
    return table("Learning curves", heads, rows, numbers=range(1, len(heads)))
