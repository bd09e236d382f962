"""The reader's questions, answered in plain sentences that are made of the run's numbers, good and bad ones alike."""

from __future__ import annotations

import math
from typing import Any

from dspfx.cli.pages.run import Run

NOTHING = 0.03  # of a time, a difference that is none: the contest's own margin
STAGES = {"dense": "of dense training", "learn": "of learning groups", "tune": "of fine-tuning", "unify": "of unifying"}


def plural(count: int, one: str, many: str | None = None) -> str:
    """ "1 filter", "2 filters"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def show_bytes(count: int) -> str:
    """In kB or MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e7 else f"{count / 1e3:,.0f} kB"


def show_ms(milliseconds: float) -> str:
    """With three digits that count."""
    digits = max(0, 2 - math.floor(math.log10(milliseconds))) if milliseconds > 0 else 0
    return f"{milliseconds:.{min(digits, 4)}f} ms"


def points(difference: float) -> str:
    """A difference of two shares, "+1.25 points"."""
    return f"{100 * difference:+.2f} points".replace("-", "−")


def chance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Half the width of a 95% interval of the difference of two accuracies, were other images drawn for each."""
    return 1.96 * math.sqrt(sum(s["accuracy"] * (1 - s["accuracy"]) / s["images"] for s in (one, other)))


def headline(run: Run) -> str:
    """One sentence: time, bytes, accuracy."""
    dense, lowered = run.results["networks"]["dense"], run.results["networks"]["lowered"]
    ratio, size = lowered["latency_ratio"], smallest(run)["file_bytes"] / dense["file_bytes"]
    gained = lowered["test"]["accuracy"] - dense["test"]["accuracy"]
    speed = (
        f"{1 / ratio:.1f} times as fast as the dense network" if is_faster(run) else "no faster than the dense network"
    )
    if ratio > 1 + NOTHING:
        speed = f"{ratio:.2f} times as slow as the dense network"
    file = f"{size:.0%} of its bytes" if size < 1 - NOTHING else "no smaller"
    bought = is_faster(run) or size < 1 - NOTHING
    return (
        f"{'' if bought else 'It bought nothing: '}{speed[0].upper() if bought else speed[0]}{speed[1:]}, {file}, "
        + ("and just as accurate." if gained == 0 else f"accuracy {points(gained)}.")
    )


def is_faster(run: Run) -> bool:
    """True where the lowered network's time is below the dense one's by more than what counts as none."""
    return bool(run.results["networks"]["lowered"]["latency_ratio"] < 1 - NOTHING)


def smallest(run: Run) -> dict[str, Any]:
    """The row of the smallest file of the compressed network."""
    networks = run.results["networks"]
    return networks.get("compressed", networks["lowered"])  # type: ignore[no-any-return]


def done(run: Run) -> list[str]:
    """What was done to the network."""
    results, left = run.results, run.results["left"]
    asked = ", ".join(_asked(text, left) for text in results["arguments"]["budget"])
    sentences = [
        f"{left['flops']:.1%} of the network's multiply-adds (FLOPs) and {left['params']:.1%} of its weights were "
        f"kept. {asked}."
    ]
    if run.layers:
        grouped = sum(len(layer.structure.groups) > 1 for layer in run.layers)
        filters = sum(layer.plan.out_channels for layer in run.layers)
        dead = sum(layer.structure.dead for layer in run.layers)
        how = f"In {grouped} of {plural(len(run.layers), 'layer')}" if grouped else "In no layer"
        sentences.append(
            f"{how} the filters fall into two or more groups, each of which reads only the input channels that it "
            f"needs; {dead:,} of {plural(filters, 'filter')} were removed altogether."
        )
    if run.skipped:
        sentences.append(f"{plural(len(run.skipped), 'layer')} got no groups; every reason is below.")
    trained = [
        f"{plural(len(curve), 'epoch')} {STAGES[name]}" for name, curve in results["curves"].items() if name in STAGES
        and curve
    ]  # fmt: skip
    if results["arguments"]["one_shot"]:
        sentences.append(
            "Groups were found by clustering the weights, and nothing was trained afterwards (--one-shot)."
        )
    if trained:
        sentences.append(f"Training took {', '.join(trained)}.")
    return sentences


def _asked(text: str, left: dict[str, Any]) -> str:
    name, _, value = text.partition("=")
    share = left.get(name)
    asked = f"Asked for was at most {float(value):.1%} of {'time' if name == 'latency' else name}"
    if share is None:
        return asked
    return f"{asked}, {'which is met' if share <= float(value) * (1 + NOTHING) else f'but it is {share:.1%}'}"


def bought(run: Run) -> list[str]:
    """What it bought, in time, size and accuracy."""
    return [_time(run), _size(run), *_accuracy(run)]


def _time(run: Run) -> str:
    dense, lowered = run.results["networks"]["dense"], run.results["networks"]["lowered"]
    times = f"{show_ms(lowered['latency_ms'])} an image instead of {show_ms(dense['latency_ms'])}"
    where = f"in {run.results['runtime']}, one image at a time"
    if is_faster(run):
        return f"Time: {times}, {1 / lowered['latency_ratio']:.1f} times as fast as the dense network, {where}."
    if run.results["contest"]["winner"] == "dense":
        return (
            f"Time: nothing. Of all forms of the pruned network that were timed, the one with dense layers was the "
            f"fastest ({times}, {where}), so it was kept. A smaller budget or another --runtime may change that."
        )
    if lowered["latency_ratio"] <= 1 + NOTHING:
        return f"Time: nothing beyond noise ({times}, {where})."
    return (
        f"Time: it is slower than the dense network ({times}, {where}). Use the dense network there, or measure again."
    )


def _size(run: Run) -> str:
    dense, row = run.results["networks"]["dense"], smallest(run)
    file = "compressed.safetensors" if "compressed" in run.results["networks"] else "network.safetensors"
    share = row["file_bytes"] / dense["file_bytes"]
    sizes = f"{show_bytes(row['file_bytes'])} instead of {show_bytes(dense['file_bytes'])} ({share:.0%})"
    return f"Size: {file} takes {sizes}." if share < 1 - NOTHING else f"Size: nothing; {file} takes {sizes}."


def _accuracy(run: Run) -> list[str]:
    networks = run.results["networks"]
    dense, lowered = networks["dense"]["test"], networks["lowered"]["test"]
    sentences = [
        f"Accuracy: {lowered['accuracy']:.2%} of {lowered['images']:,} test images. {_versus(lowered, dense, 'dense network')}"
    ]
    if "compressed" in networks and networks["compressed"]["test"]["accuracy"] != lowered["accuracy"]:
        sentences.append(f"The compressed file reaches {networks['compressed']['test']['accuracy']:.2%}.")
    if "control" in networks:
        control = networks["control"]["test"]
        sentences.append(_versus(lowered, control, "dense network that trained for as many epochs more"))
    elif lowered["accuracy"] > dense["accuracy"] and run.results["curves"].get("tune"):
        sentences.append(
            "The pruned network trained for more epochs than the dense one, which alone may explain why it is better; "
            "--dense-control would tell."
        )
    return sentences


def _versus(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> str:
    gained, noise = ours["accuracy"] - theirs["accuracy"], chance(ours, theirs)
    images = round(abs(gained) * ours["images"])
    if images == 0:
        return f"The {name} gets exactly as many right."
    size = f"{plural(images, 'image')} {'more' if gained > 0 else 'fewer'} than the {name} ({theirs['accuracy']:.2%}, {points(gained)})"
    verdict = "can be chance" if abs(gained) <= noise else "is more than chance"
    return f"That is {size}; on this many images a difference of up to {100 * noise:.2f} points can be chance, so this one {verdict}."


def trusted(run: Run) -> list[tuple[bool, str]]:
    """(whether it speaks for the result, a sentence) for everything that bears on whether it can be trusted."""
    results, contest = run.results, run.results["contest"]
    found: list[tuple[bool, str]] = []
    if "difference" in results:
        found.append((
            True,
            f"The lowered network was compared with the pruned one on images: outputs differ by "
            f"{results['difference']:.1e} of their scale (rounding; 1e-4 would have stopped the run).",
        ))  # fmt: skip
    if run.is_as_planned is not None:
        said = (
            "holds exactly the groups that plan.json decided"
            if run.is_as_planned
            else "has other groups than plan.json"
        )
        found.append((run.is_as_planned, f"pruned.safetensors {said}; compared when this page was made."))
    found.append((True, "Test images were used once, after everything was decided; weights were chosen on others."))
    if contest["is_noisy"]:
        found.append((False, "The machine was busy while forms were timed, so a safer form was kept; measure again."))
    else:
        found.append((True, f"Times are medians of interleaved rounds on one machine: {results['latency']}."))
    found.append(
        (
            False,
            f"This is one training run with one seed ({results['arguments']['seed']}); others will differ a little.",
        )
    )
    arguments = results["arguments"]
    if arguments["limit_train"] is not None:
        found.append((False, f"Only {arguments['limit_train']:,} training images were used (--limit-train)."))
    if not arguments["checkpoint"] and not arguments["epochs_dense"]:
        found.append((False, "The dense network in these tables was never trained; do not compare accuracy with it."))
    if results["networks"]["dense"]["test"]["images"] < 1000:
        found.append((False, f"{results['networks']['dense']['test']['images']} test images are few."))
    return found


def decided(run: Run) -> str:
    """How far filters had decided for one group when learning ended."""
    learned = [epoch for epoch in run.results["curves"].get("learn", []) if "entropy" in epoch]
    groups = run.results["arguments"]["groups"]
    if not learned or groups < 2:
        return ""
    last, whole = learned[-1]["entropy"], math.log(groups)
    share = last / whole
    how = "were decided" if share < 0.1 else "were mostly decided" if share < 0.5 else "were still largely undecided"
    return (
        f"When learning ended, filters {how} about their group: the mean entropy of a filter's probabilities was "
        f"{last:.3f} nats, {share:.0%} of log {groups} = {whole:.3f}, which is no preference at all."
    )
