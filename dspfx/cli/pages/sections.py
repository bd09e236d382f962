"""The sections of the page, each a function of the run."""

from __future__ import annotations

import math
import shlex
from typing import Any

from dspfx.cli import commands
from dspfx.cli.pages import words
from dspfx.cli.pages.charts import Band, Line, chart
from dspfx.cli.pages.markup import Html, join, table, tag
from dspfx.cli.pages.run import Layer, Run
from dspfx.cli.report import TITLES

WHAT = {
    "dense": "as it came",
    "pruned": "with zeros, for further training",
    "lowered": "what to deploy",
    "control": "for comparison",
    "compressed": "the small file, read back",
}
LEARNED = {
    "entropy": "Undecidedness of filters about their group (entropy, nats)",
    "sparsity": "Share of weights that the groups do not need (sparsity)",
    "penalty": "What the group regulariser penalises (unweighted)",
    "factor": "Factor on the regulariser's strength (steered)",
    "beta": "Share of energy that pruning to the budget would drop (beta)",
}


def tiles(run: Run) -> Html:
    """Four numbers."""
    dense, lowered, left = run.results["networks"]["dense"], run.results["networks"]["lowered"], run.results["left"]
    small = words.smallest(run)
    gained = lowered["test"]["accuracy"] - dense["test"]["accuracy"]
    numbers = [
        ("Accuracy", f"{lowered['test']['accuracy']:.2%}", f"{words.points(gained)} to dense"),
        ("FLOPs needed", f"{left['flops']:.1%}", f"of {dense['flops'] / 1e6:,.1f} M; {lowered['flops'] / dense['flops']:.1%} executed"),
        ("File", words.show_bytes(small["file_bytes"]), f"{small['file_bytes'] / dense['file_bytes']:.0%} of dense"),
        ("Latency", words.show_ms(lowered["latency_ms"]), f"{lowered['latency_ratio']:.2f} of dense"),
    ]  # fmt: skip
    parts = [tag("div", tag("dt", name), tag("dd", value, tag("small", note))) for name, value, note in numbers]
    return tag("dl", *parts, class_="tiles")


def questions(run: Run) -> Html:
    """The three questions and their answers."""
    trust = [
        tag("li", tag("span", "For: " if good else "Mind: ", class_="good" if good else "mind"), sentence)
        for good, sentence in words.trusted(run)
    ]
    return tag(
        "div",
        tag("div", tag("h3", "What was done to the network?"), *(tag("p", s) for s in words.done(run))),
        tag("div", tag("h3", "What did it buy?"), *(tag("p", s) for s in words.bought(run))),
        tag("div", tag("h3", "Can I trust it?"), tag("ul", *trust)),
        class_="questions",
    )


def networks(run: Run) -> Html:
    """One row a network."""
    rows = []
    dense = run.results["networks"]["dense"]
    for name, row in run.results["networks"].items():
        spread = row.get("latency_spread")
        rows.append((
            join([TITLES.get(name, name), tag("small", WHAT.get(name, ""))]),
            f"{row['test']['accuracy']:.2%}",
            f"{row['flops_needed']:.1%}",
            f"{row['flops'] / 1e6:,.1f} M ({row['flops'] / dense['flops']:.0%})",
            f"{row['params_needed']:.1%}",
            words.show_bytes(row["file_bytes"]),
            words.show_ms(row["latency_ms"]),
            f"{row['latency_ratio']:.2f}" + (f" ±{spread / 2:.2f}" if spread else ""),
        ))  # fmt: skip
    heads = ["network", "test accuracy", "FLOPs needed", "executed", "weights needed", "file", "latency", "to dense"]
    note = (
        f"{dense['test']['images']:,} test images. Needed: by the weights that were kept, groups counted exactly; executed: "
        f"by PyTorch, where multiplying some zeros can be faster than leaving them out. Latency: {run.results['latency']}"
        "; ± is half the interquartile range over rounds."
    )
    return join([table("Every network of this run", heads, rows, numbers=range(1, 8)), tag("p", note, class_="note")])


def layers(run: Run) -> Html:
    """The layers, with a button each that shows the structure."""
    if not run.layers:
        return tag("p", "plan.json is not in this folder, so there is nothing to show.")
    total = sum(layer.plan.macs for layer in run.layers) or 1
    rows, own = [], []
    for index, layer in enumerate(run.layers):
        shapes = ", ".join(f"{filters}×{channels}" for filters, channels in layer.structure.groups)
        form, ms = (layer.lowered.form, layer.lowered.ms) if layer.lowered else ("", None)
        rows.append((
            tag("button", layer.plan.name, type="button", class_="open", aria_expanded="false"),
            tag("canvas", class_="thumb", width=1, height=1, aria_hidden="true"),
            f"{layer.plan.out_channels}×{layer.plan.in_channels}",
            tag("span", shapes or "nothing", class_="shapes"),
            bar(layer),
            f"{layer.plan.macs / 1e6:,.2f} M ({layer.plan.macs / total:.0%})",
            form,
            "" if ms is None else f"{ms:.3f}",
        ))  # fmt: skip
        own.append({"class_": "layer", "data_layer": str(index)})
    heads = ["layer", "picture", "filters × inputs", "groups: filters × inputs read", "FLOPs left", "FLOPs before",
             "lowered to", "expected ms"]  # fmt: skip
    note = (
        "Press a layer to see which filter reads which input channel. A convolution of 64×32 has 64 filters that each "
        "read 32 input channels; a group of 5×12 has five filters that read the same twelve."
    )
    caption = "Layers with groups: what is left, and the form that each was lowered to"
    return join([
        tag("p", note, class_="note"),
        Html("<noscript><p>The pictures need JavaScript; the groups are in the table too.</p></noscript>"),
        table(caption, heads, rows, numbers=(2, 5, 7), wide=(2, 3, 5, 6, 7), attributes=own),
    ])  # fmt: skip


def bar(layer: Layer) -> Html:
    """The share that is left, as a number and as a bar."""
    fill = tag("span", style=f"width:{100 * min(max(layer.left, 0), 1):.1f}%")
    return join([tag("span", fill, class_="bar", aria_hidden="true"), tag("span", f"{layer.left:.1%}", class_="share")])


def training(run: Run) -> Html:
    """Learning curves, what the groups did meanwhile, and the numbers of both."""
    curves: dict[str, list[dict[str, float]]] = run.results["curves"]
    if not any(curves.values()):
        return tag("p", "Nothing was trained in this run.")
    starts, bands = _stages(curves)
    figures = []
    for what, title, show in (
        ("accuracy", "Accuracy", "{:.0%}".format if _range(curves, "accuracy") > 0.08 else "{:.1%}".format),
        ("loss", "Loss", "{:.3g}".format),
    ):
        lines = [
            Line("validation", "a", _points(curves, starts, f"val_{what}", control=False)),
            Line("training", "b", _points(curves, starts, f"train_{what}", control=False)),
            Line("validation, dense trained as long", "c", _points(curves, starts, f"val_{what}", control=True)),
        ]
        figures.append(chart(title, lines, bands, show))
    learned = curves.get("learn", [])
    groups = run.results["arguments"]["groups"]
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


def _stages(curves: dict[str, list[dict[str, float]]]) -> tuple[dict[str, int], list[Band]]:
    """Epochs before each stage; the control starts where the dense network ended."""
    starts, bands, epoch = {"control": len(curves.get("dense", []))}, [], 0
    for name, curve in curves.items():
        if name != "control" and curve:
            starts[name] = epoch
            bands.append(Band(name, epoch, epoch + len(curve)))
            epoch += len(curve)
    return starts, bands


def _points(
    curves: dict[str, list[dict[str, float]]], starts: dict[str, int], key: str, control: bool
) -> list[tuple[float, float]]:
    return [
        (float(starts[name] + index + 1), epoch[key])
        for name, curve in curves.items()
        if (name == "control") == control
        for index, epoch in enumerate(curve)
        if math.isfinite(epoch.get(key, math.nan))
    ]


def _range(curves: dict[str, list[dict[str, float]]], what: str) -> float:
    values = [epoch[f"{kind}_{what}"] for curve in curves.values() for epoch in curve for kind in ("train", "val")]
    return max(values) - min(values)


def _epochs(curves: dict[str, list[dict[str, float]]]) -> Html:
    """Everything but the seconds, which another run would not repeat."""
    keys = list(dict.fromkeys(key for curve in curves.values() for epoch in curve for key in epoch if key != "seconds"))
    rows = [
        (f"{name} {index + 1}", *(f"{epoch[key]:.4g}" if key in epoch else "" for key in keys))
        for name, curve in curves.items()
        for index, epoch in enumerate(curve)
    ]
    heads = ["stage, epoch", *(key.replace("_", " ") for key in keys)]
    return table("Learning curves", heads, rows, numbers=range(1, len(heads)))


def lowering(run: Run) -> Html:
    """The contest between forms of the whole network."""
    contest: dict[str, Any] = run.results["contest"]
    expected = contest["expected_ms"]
    rows = [
        (
            join([name, tag("small", "chosen", class_="good")]) if name == contest["winner"] else name,
            f"{expected[name]:.3f}" if name in expected else "not predicted",
            f"{result['median_ms']:.3f}",
            f"{result['ratio']:.3f} ±{result['spread'] / 2:.3f}",
        )
        for name, result in contest["results"].items()
    ]
    own = [{"class_": "chosen"} if name == contest["winner"] else {} for name in contest["results"]]
    heads = ["form of the whole network", "convolutions, expected ms", "measured ms", "ratio to dense"]
    text = [
        "Each form computes the same network. They were timed against each other in interleaved rounds; a later one had "
        "to beat the safer ones before it by 3%. Expected is the sum over layers from the machine's table of layer times, "
        "so it leaves out everything between them.",
        *contest["notes"],
        f"Timed on: {contest['setting']}.",
    ]
    if contest["winner"] == "native kernels":
        text.append(
            "Native kernels run whole chains of layers in one call, so the form and the expected time of single layers "
            "above are those of the plain layers that stand in for them elsewhere."
        )
    forms = [layer.lowered.form for layer in run.layers if layer.lowered]
    if forms:
        count = ", ".join(f"{forms.count(form)} {form}" for form in dict.fromkeys(forms))
        text.append(f"Forms of the layers with groups: {count}. Dense is one plain layer of what is left.")
    caption = "The contest between forms of the whole network"
    return join(
        [table(caption, heads, rows, numbers=(1, 2, 3), attributes=own), *(tag("p", t, class_="note") for t in text)]
    )


def coverage(run: Run) -> Html:
    """Skipped layers and pinned channels with their reasons."""
    parts: list[Html] = []
    found = run.results.get("coverage")
    if found is not None:
        layers = len(found["plan"]["layers"])
        total = layers + len(found["plan"]["skipped"])
        parts.append(tag("p", f"{layers} of {total} layers have groups; they make {found['gated']:.1%} of the multiply-adds, and {found['prunable']:.1%} could be pruned."))  # fmt: skip
    skipped = run.skipped
    if skipped:
        rows = [(layer.name, layer.kind, f"{layer.macs / 1e6:,.2f} M", layer.reason) for layer in skipped]
        parts.append(table("Layers without groups", ["layer", "type", "FLOPs", "because"], rows, numbers=(2,)))
    elif skipped is not None:
        parts.append(tag("p", "Every layer got groups."))
    if found is not None and found["pins"]:
        rows = [
            (pin["reason"], f"{pin['filters']:,}", ", ".join(pin["nodes"][:3]) + (" …" if len(pin["nodes"]) > 3 else ""),
             " ".join([*pin["where"], pin["remedy"]]).strip() or "nothing")
            for pin in found["pins"]
        ]  # fmt: skip
        heads = ["reason", "filters", "at", "what would free them"]
        parts.append(table("Filters that had to keep their place", heads, rows, numbers=(1,)))
    return join(parts) or tag("p", "This was not recorded.")


def again(run: Run) -> Html:
    """Commands, settings, machine and versions."""
    results = run.results
    machine, arguments = results["machine"], results["arguments"]
    device = "cpu" if machine["device"] == "cpu" else "cuda"
    words_ = results.get("command") or commands.compress(arguments, device, machine["threads"])
    lines = [
        "# in the folder where the run was started (paths are as they were given)",
        shlex.join([*words_, "--out", "runs/again"]),
        "# in the folder of this page",
        "python -m dspfx verify .",
        "python -m dspfx profile network.safetensors",
        f"python -m dspfx benchmark network.safetensors --runtime {shlex.quote(str(arguments['runtime']))}",
        "python -m dspfx report .",
    ]
    load = 'import dspfx\nnetwork = dspfx.load("network.safetensors")'
    facts = [*machine.items(), *((f"{name} version", value) for name, value in results["versions"].items())]
    return join([
        tag("pre", tag("code", "\n".join(lines)), tabindex="0", aria_label="Commands that repeat this run"),
        tag("pre", tag("code", load), tabindex="0", aria_label="Python that loads the network"),
        table("Machine and versions", ["what", "value"], facts),
        tag("details", tag("summary", "Every setting"), table("Settings of the run", ["option", "value"], [
            (f"--{name.replace('_', '-')}", _setting(value)) for name, value in arguments.items()
        ])),
    ])  # fmt: skip


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not given" if value is None else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def missing(run: Run) -> Html:
    """What older runs, or folders that lost files, have not."""
    return tag("ul", *(tag("li", sentence) for sentence in run.missing))
