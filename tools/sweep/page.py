"""docs/coverage.md from the rows: a summary, what fails and why, and a table a kind of model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby
from statistics import median
from typing import Any

from tabulate import tabulate

from tools.sweep.cases import Case

Row = dict[str, Any]
HEADERS = (
    "model", "input", "traced", "gates", "gated", "prunable", "conv prunable", "float64", "float32", "FLOPs left",
    "prepare", "all", "step", "stored", "pinned because",
)  # fmt: skip
PEER_HEADER = "Torch-Pruning"
WORDS = 90


def page(cases: list[Case], rows: dict[tuple[str, str], Row], peer: dict[tuple[str, str], Row], command: str) -> str:
    """The page in Markdown. Models without a row are listed as not run."""
    have = [(case, rows[case.suite, case.name]) for case in cases if (case.suite, case.name) in rows]
    parts = ["# Coverage: every model, what dspfx does with it", INTRODUCTION, "## Summary", summary(have, peer)]
    missing = [case.name for case in cases if (case.suite, case.name) not in rows]
    if missing:
        parts.append(f"Not run: {', '.join(missing)}.")
    failures = [f"- `{case.name}`: {why}" for case, row in have for why in failed(row)]
    parts += ["## What fails", "\n".join(failures) or "Nothing."]
    for (suite, kind), group in groupby(have, lambda pair: (pair[0].suite, _table_of(pair[0]))):
        parts += [f"## {suite}: {kind}" if kind else f"## {suite}", _table(list(group), peer)]
    if peer:
        parts += ["## Torch-Pruning, checked", PEER_TEXT, _peer_failures(cases, peer)]
    machines = sorted({row["on"] for _, row in have if "on" in row})
    return "\n\n".join([*parts, "Machine: " + "; ".join(machines) + ".", f"Made by\n\n    {command}"]) + "\n"


INTRODUCTION = (
    "One row a model, with random weights. *Traced*: whole, or the parts that are. *Gates*: layers with a gate, of all "
    "convolutions and linear layers; linear ones get one too where they are the majority. *Gated*, *prunable*: share "
    "of their multiply-adds that gated layers make, and that pruning can reach; *conv prunable*: the same over "
    "convolutions alone. *float64*, *float32*: `dspfx.selfcheck`, the largest difference of the lowered network from "
    "the pruned one over the largest output, under a random plan that leaves *FLOPs left*. *prepare*, *all*: seconds "
    "for `prepare`, and for the whole row. *Step*: a training step of the prepared network gives a finite loss and "
    "changes weights. *Stored*: the prepared network, pruned, and the lowered one come back from a file with bitwise "
    "the same outputs. *Pinned because*: the two reasons that hold most filters, with their number. Images are smaller "
    "than usual where the model takes them, since neither tracing nor pruning depends on their size; parameters that "
    "start as a constant near zero are made random, so that outputs respond to inputs."
)
PEER_TEXT = (
    "Half of the channels of every layer, with the layers left alone that make the outputs (in detectors and RAFT "
    "those of its own torchvision example). *Right*: in float64 its outputs are within 1e-9 of the original network's "
    "with exactly the removed channels zeroed where they are made. *Right but for norms*: so they are once the "
    "reference's layer and group norms and attention count only the channels left, as they do in the pruned network; "
    "removing a channel there is not zeroing it. Detectors get the best of three attempts: alive with two images, with "
    "one, and as initialised. What is stopped ran into the time limit."
)


def failed(row: Row) -> list[str]:
    """What went wrong in a row, in words; empty where everything passed."""
    if "ended" in row:
        return [row["ended"]]
    reasons = [f"{stage}: {_cut(why, 300)}" for stage, why in row["failed"].items()]
    if not reasons and row["gated_layers"] and row["flops_left"] >= 1:
        reasons.append("selfcheck pruned nothing though layers are gated")
    return reasons


def proven(row: Row) -> bool:
    """True where the model was prepared and selfcheck passed."""
    return "ended" not in row and "error" in row and not {"prepare", "selfcheck"} & set(row["failed"])


def summary(have: list[tuple[Case, Row]], peer: dict[tuple[str, str], Row]) -> str:
    """The figures on top."""
    lines = []
    for suite in dict.fromkeys(case.suite for case, _ in have):
        rows = [row for case, row in have if case.suite == suite]
        good = [row for row in rows if proven(row)]
        lines.append(
            f"- {suite}: selfcheck passes on {len(good)} of {len(rows)} models, with something pruned in "
            f"{sum(row['flops_left'] < 1 for row in good)}; everything in the row passes on "
            f"{sum(not failed(row) for row in rows)}."
        )
    checked = [row for (suite, _), row in peer.items() if suite == "torchvision"]
    if checked:
        count = {word: sum(row.get("verdict") == word for row in checked) for word in ("right", "right but for norms")}
        lines.append(
            f"- Torch-Pruning on torchvision, outputs checked: right on {count['right']} of {len(checked)}, and on "
            f"{count['right but for norms']} more but for norms over the channels left."
        )
    convs = [row for case, row in have if case.kind == "classification" and row.get("conv_prunable") is not None]
    if convs:
        share = median(row["conv_prunable"] for row in convs)
        lines.append(f"- Multiply-adds of convolutions that can go, median over classification: {share:.1%}.")
    timed = [(row["prepare_s"], case.name) for case, row in have if "prepare_s" in row]
    if timed:
        typical = median(seconds for seconds, _ in timed)
        lines.append(f"- Slowest `prepare`: {max(timed)[0]:.1f} s ({max(timed)[1]}), median {typical:.1f} s.")
    errors = [(row["error"], case.name) for case, row in have if proven(row)]
    if errors:
        lines.append(f"- Largest error in float64: {max(errors)[0]:.1e} ({max(errors)[1]}).")
    return "\n".join(lines)


def _table_of(case: Case) -> str:
    return case.kind if case.suite == "torchvision" else ""


def _table(have: list[tuple[Case, Row]], peer: dict[tuple[str, str], Row]) -> str:
    beside = any((case.suite, case.name) in peer for case, _ in have)
    cells = [
        _cells(case, row) + ([_verdict(peer.get((case.suite, case.name)))] if beside else []) for case, row in have
    ]
    headers = [*HEADERS, PEER_HEADER] if beside else HEADERS
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def _cells(case: Case, row: Row) -> list[str]:
    name = f"{case.name} ({case.kind})" if case.suite == "timm" else case.name
    size = f"{case.size}; {case.note}" if case.note else case.size
    if "ended" in row or "prepare" in row["failed"]:
        reason = row["ended"] if "ended" in row else f"refused: {row['failed']['prepare']}"
        return [name, size, _cut(reason)] + [""] * (len(HEADERS) - 3)
    share: Callable[[str], str] = lambda key: "" if row.get(key) is None else f"{row[key]:.1%}"  # noqa: E731
    return [
        name,
        size,
        "whole" if row["parts"] == [""] else "parts: " + ", ".join(row["parts"]),
        f"{row['gated_layers']} of {row['layers']}" + (" (linear too)" if row["linear"] else ""),
        *(share(key) for key in ("gated", "prunable", "conv_prunable")),
        *(f"{row[key]:.1e}" if key in row else "fails" for key in ("error", "float_error")),
        share("flops_left"),
        f"{row['prepare_s']:.1f}",
        f"{row['seconds']:.0f}",
        "fails" if "training step" in row["failed"] else "yes",
        _stored(row),
        _cut("; ".join(f"{_cut(reason, 60)} ({filters})" for reason, filters in row["pins"]), 160),
    ]


def _stored(row: Row) -> str:
    if {"store prepared", "store lowered"} & set(row["failed"]):
        return "fails"
    return "prepared only: " + _cut(row["not_stored"], 60) if "not_stored" in row else "yes"


def _verdict(row: Row | None) -> str:
    if row is None:
        return ""
    if "ended" in row:
        return "stopped"
    return f"differs by {row['error']:.1e}" if row["verdict"] == "differs" and "error" in row else row["verdict"]


def _peer_failures(cases: Iterable[Case], peer: dict[tuple[str, str], Row]) -> str:
    lines = []
    for case in cases:
        row = peer.get((case.suite, case.name))
        if row is not None and (row.get("verdict") not in ("right", "right but for norms")):
            told = row.get("ended") or row.get("reason") or ""
            where = f" ({row['stage']})" if row.get("verdict") == "fails" else ""
            lines.append(f"- `{case.name}`: {_verdict(row)}{where}{': ' + _cut(told, 200) if told else ''}")
    return "\n".join(lines)


def _cut(text: str, most: int = WORDS) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
