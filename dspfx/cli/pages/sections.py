"""The sections of the page that are tables and sentences, each a function of the run."""

from __future__ import annotations

import shlex
from typing import Any

from dspfx.cli import commands
from dspfx.cli.pages import words
from dspfx.cli.pages.layers import forms
from dspfx.cli.pages.markup import Html, breakable, join, table, tag
from dspfx.cli.pages.run import Run
from dspfx.cli.report import TITLES

WHAT = {
    "dense": "before pruning",
    "pruned": "with zeros, for further training",
    "lowered": "what to deploy",
    "control": "for comparison",
    "compressed": "the small file, read back",
}


def tiles(run: Run) -> Html:
    """Four numbers."""
    dense, lowered, left = run.results["networks"]["dense"], run.results["networks"]["lowered"], run.results["left"]
    small = words.smallest(run)
    rival, who = words.rival(run)
    gained = lowered["test"]["accuracy"] - rival["accuracy"]
    executed = f"of {dense['flops'] / 1e6:,.1f} M; {lowered['flops'] / dense['flops']:.1%} executed"
    numbers = [
        ("Accuracy", f"{lowered['test']['accuracy']:.2%}", f"{words.points(gained)} to {who}"),
        ("FLOPs needed", f"{left['flops']:.1%}", executed),
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
            words.show_ms(row["latency_ms"]),
            f"{row['latency_ratio']:.2f}" + (f" ±{spread / 2:.2f}" if spread else ""),
            f"{row['flops_needed']:.1%}",
            f"{row['flops'] / 1e6:,.1f} M ({row['flops'] / dense['flops']:.0%})",
            f"{row['params_needed']:.1%}",
            words.show_bytes(row["file_bytes"]),
        ))  # fmt: skip
    heads = ["network", "test accuracy", "latency", "to dense", "FLOPs needed", "executed", "weights needed", "file"]
    note = (
        f"{dense['test']['images']:,} test images. Needed: by the weights that were kept, groups counted exactly. "
        "Executed: by PyTorch, where multiplying some zeros can be faster than leaving them out. Latency: "
        f"{run.results['latency']}; ± is half the interquartile range over rounds."
    )
    return join([table("Every network of this run", heads, rows, numbers=range(1, 8)), tag("p", note, class_="note")])


def lowering(run: Run) -> Html:
    """The contest between forms of the whole network."""
    contest: dict[str, Any] = run.results["contest"]
    expected = contest.get("expected_ms", {})
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
        "Each form computes the same network. They were timed against each other in interleaved rounds; a later one "
        "had to beat the safer ones before it by 3%. Expected is the sum over layers from the machine's table of layer "
        "times, so it leaves out everything between them.",
        *contest.get("notes", ()),
        f"Timed on: {contest.get('setting') or run.results['latency']}.",
    ]
    if contest["winner"] == "native kernels":
        text.append(
            "Native kernels run whole chains of layers in one call, which has no times for single layers; anywhere but "
            "on a CPU in float32, plain layers stand in for them."
        )
    caption = "The contest between forms of the whole network"
    contest_table = table(caption, heads, rows, numbers=(1, 2, 3), attributes=own)
    return join([contest_table, *(tag("p", sentence, class_="note") for sentence in text), forms(run)])


def coverage(run: Run) -> Html:
    """Skipped layers and pinned channels with their reasons."""
    parts: list[Html] = []
    found = run.results.get("coverage")
    if found is not None:
        gated = len(found["plan"]["layers"])
        said = f"{gated} of {gated + len(found['plan']['skipped'])} layers have groups"
        shares = f"they make {found['gated']:.1%} of the multiply-adds, and {found['prunable']:.1%} could be pruned"
        parts.append(tag("p", f"{said}; {shares}."))
    skipped = run.skipped
    if skipped:
        rows = [(breakable(layer.name), layer.kind, f"{layer.macs / 1e6:,.2f} M", layer.reason) for layer in skipped]
        parts.append(table("Layers without groups", ["layer", "type", "FLOPs", "because"], rows, numbers=(2,)))
    elif skipped is not None:
        parts.append(tag("p", "Every layer got groups."))
    if found is not None and found["pins"]:
        rows = [
            (pin["reason"], f"{pin['filters']:,}", ", ".join([*pin["nodes"][:3], *(["…"] if pin["nodes"][3:] else [])]),
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
    runtime = shlex.quote(str(arguments.get("runtime", "eager")))
    words_ = results.get("command") or commands.compress(arguments, device, machine["threads"])
    lines = [
        "# in the folder where the run was started (paths are as they were given)",
        shlex.join([*words_, "--out", "runs/again"]),
        "# in the folder of this page",
        "python -m dspfx verify .",
        "python -m dspfx profile network.safetensors",
        f"python -m dspfx benchmark network.safetensors --runtime {runtime}",
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
