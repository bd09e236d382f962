"""The reader's questions, answered in plain sentences that are made of the run's numbers, good and bad ones alike."""

from __future__ import annotations

import math
from typing import Any

from dspfx.cli.pages.run import Run

NOTHING = 0.03  # of a time or a size, a difference that is none: the contest's own margin
FEW = 1000  # test images
STAGES = {"dense": "of dense training", "learn": "of learning groups", "tune": "of fine-tuning", "unify": "of unifying"}
SHARES = {"flops": "the FLOPs", "params": "the weights", "latency": "the time"}
RUNTIMES = {"eager": "PyTorch", "inductor": "PyTorch's torch.compile"}


def plural(count: int, one: str) -> str:
    """ "1 filter", "2 filters"."""
    return f"{count:,} {one}{'' if count == 1 else 's'}"


def show_bytes(count: int) -> str:
    """In kB or MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e7 else f"{count / 1e3:,.0f} kB"


def show_ms(milliseconds: float) -> str:
    """With three digits that count."""
    digits = 2 - math.floor(math.log10(milliseconds)) if milliseconds > 0 else 0
    return f"{milliseconds:.{min(max(digits, 0), 4)}f} ms"


def points(difference: float) -> str:
    """A difference of two shares, "+1.25 points"."""
    return f"{100 * difference:+.2f} points".replace("-", "−")


def chance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Half the width of a 95% interval of the difference of two accuracies, were other images drawn for each."""
    return 1.96 * math.sqrt(sum(s["accuracy"] * (1 - s["accuracy"]) / s["images"] for s in (one, other)))


def smallest(run: Run) -> dict[str, Any]:
    """The row of the file that is made to be small: the compressed one where there is one."""
    networks = run.results["networks"]
    return networks.get("compressed", networks["lowered"])


def is_untrained(run: Run) -> bool:
    """True where the dense network has random weights, and no control was trained to compare with."""
    arguments = run.results["arguments"]
    trained = arguments.get("fork"), arguments.get("checkpoint"), arguments.get("epochs_dense")
    return not any(trained) and "control" not in run.results["networks"]


def rival(run: Run) -> tuple[dict[str, Any], str]:
    """(the score to compare with, whose it is): where there is one, of the dense network that trained as long."""
    networks = run.results["networks"]
    if "control" in networks:
        return networks["control"]["test"], "a dense network trained as long"
    return networks["dense"]["test"], "dense"


def headline(run: Run) -> str:
    """One sentence: time, bytes, accuracy; it begins with what it bought, or says that it bought nothing."""
    dense, lowered = run.results["networks"]["dense"], run.results["networks"]["lowered"]
    ratio, size = lowered["latency_ratio"], smallest(run)["file_bytes"] / dense["file_bytes"]
    speed = f"{1 / ratio:.1f} times as fast as the dense network"
    if ratio >= 1 - NOTHING:
        speed = "no faster than the dense network"
    if ratio > 1 + NOTHING:
        speed = f"slower than the dense network ({ratio:.2f} times its time)"
    file = f"{size:.0%} of its bytes" if size < 1 - NOTHING else "a file that is no smaller"
    is_bought = min(ratio, size) < 1 - NOTHING
    said = f"{speed}, {file}, {_gain(run)}."
    return said[0].upper() + said[1:] if is_bought else f"It bought nothing: {said}"


def _gain(run: Run) -> str:
    ours, (theirs, who) = run.results["networks"]["lowered"]["test"], rival(run)
    if is_untrained(run):
        return "and no accuracy to compare, since the dense network was never trained"
    gained = ours["accuracy"] - theirs["accuracy"]
    to_whom = "" if who == "dense" else f" to {who}"
    if gained == 0:
        return f"and just as accurate{to_whom.replace(' to ', ' as ')}"
    return f"accuracy {points(gained)}{to_whom}{' (can be chance)' if abs(gained) <= chance(ours, theirs) else ''}"


def done(run: Run) -> list[str]:
    """What was done to the network."""
    results, left = run.results, run.results["left"]
    sentences = [
        f"{left['flops']:.1%} of the multiply-adds (FLOPs) and {left['params']:.1%} of the weights were kept.",
        *(_asked(text, left) for text in results["arguments"]["budget"]),
    ]
    if run.layers:
        grouped = sum(len(layer.structure.groups) > 1 for layer in run.layers)
        filters = sum(layer.plan.out_channels for layer in run.layers)
        dead = sum(layer.structure.dead for layer in run.layers)
        where = f"In {grouped} of {plural(len(run.layers), 'layer')}" if grouped else "In no layer do"
        sentences.append(
            f"{where} the filters fall into two or more groups, each of which reads only the input channels that it "
            f"needs. {dead:,} of {plural(filters, 'filter')} were removed altogether."
        )
    if run.skipped:
        sentences.append(f"{plural(len(run.skipped), 'layer')} got no groups, for reasons that are listed below.")
    if results["arguments"].get("one_shot"):
        sentences.append("Groups were found by clustering the weights; nothing was trained afterwards (--one-shot).")
    curves = results["curves"]
    trained = [f"{plural(len(curves[name]), 'epoch')} {what}" for name, what in STAGES.items() if curves.get(name)]
    if trained:
        sentences.append(f"Training took {', '.join(trained)}.")
    return sentences


def _asked(text: str, left: dict[str, Any]) -> str:
    name, _, value = text.partition("=")
    share, asked = left.get(name), f"Asked for was at most {float(value):.1%} of {SHARES.get(name, name)}"
    if share is None:
        return f"{asked}."
    is_met = share <= float(value) * (1 + NOTHING if name == "latency" else 1.0001)
    return f"{asked}: {'met' if is_met else 'not met'}, with {share:.1%}."


def bought(run: Run) -> list[str]:
    """What it bought, in time, size and accuracy."""
    return [_time(run), _size(run), *_accuracy(run)]


def _time(run: Run) -> str:
    dense, lowered = run.results["networks"]["dense"], run.results["networks"]["lowered"]
    ratio = lowered["latency_ratio"]
    runtime = RUNTIMES.get(run.results["runtime"], run.results["runtime"])
    times = f"{show_ms(lowered['latency_ms'])} an image instead of {show_ms(dense['latency_ms'])}, in {runtime}"
    if ratio < 1 - NOTHING:
        return f"Time: {times}, one image at a time. That is {1 / ratio:.1f} times as fast as the dense network."
    if run.results["contest"]["winner"] == "dense":
        return (
            f"Time: nothing. Of all forms that were timed, the one with every layer as it was is the fastest or the "
            f"safest ({times}), and was kept. A smaller budget or another --runtime may change that."
        )
    if ratio <= 1 + NOTHING:
        return f"Time: nothing beyond noise ({times})."
    return f"Time: it is slower than the dense network ({times}). Use the dense one there, or measure again."


def _size(run: Run) -> str:
    dense, row = run.results["networks"]["dense"], smallest(run)
    file = "compressed.safetensors" if "compressed" in run.results["networks"] else "network.safetensors"
    share = row["file_bytes"] / dense["file_bytes"]
    sizes = f"{show_bytes(row['file_bytes'])} instead of {show_bytes(dense['file_bytes'])} ({share:.0%})"
    if share < 1 - NOTHING:
        return f"Size: {file} takes {sizes}."
    return f"Size: nothing; {file} takes {sizes}. It stores zeros, too; dspfx.write_compressed leaves them out."


def _accuracy(run: Run) -> list[str]:
    networks = run.results["networks"]
    dense, lowered = networks["dense"]["test"], networks["lowered"]["test"]
    said = f"Accuracy: {lowered['accuracy']:.2%} of {lowered['images']:,} test images."
    sentences = [f"{said} {_versus(lowered, dense, 'the dense network')}"]
    if "control" in networks:
        name = "the dense network that trained for as many epochs"
        sentences.append(_versus(lowered, networks["control"]["test"], name))
    elif lowered["accuracy"] > dense["accuracy"] and run.results["curves"].get("tune"):
        sentences.append(
            "The pruned network trained for more epochs than the dense one, which alone may explain why it is better; "
            "--dense-control would tell."
        )
    if "compressed" in networks and networks["compressed"]["test"]["accuracy"] != lowered["accuracy"]:
        sentences.append(f"The compressed file reaches {networks['compressed']['test']['accuracy']:.2%}.")
    return sentences


def _versus(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> str:
    gained, noise = ours["accuracy"] - theirs["accuracy"], chance(ours, theirs)
    images = round(abs(gained) * ours["images"])
    if images == 0:
        return f"It gets exactly as many right as {name}."
    size = f"{plural(images, 'image')} {'more' if gained > 0 else 'fewer'}"
    verdict = "can be chance" if abs(gained) <= noise else "is more than chance"
    return (
        f"It gets {size} right than {name} ({theirs['accuracy']:.2%}, {points(gained)}); with this many images a "
        f"difference of up to {100 * noise:.2f} points can be chance, so this one {verdict}."
    )


def trusted(run: Run) -> list[tuple[bool, str]]:
    """(whether it speaks for the result, a sentence) for everything that bears on whether it can be trusted."""
    results, contest, arguments = run.results, run.results["contest"], run.results["arguments"]
    found: list[tuple[bool, str]] = []
    if "difference" in results:
        said = (
            f"differ by {results['difference']:.1e} of their scale, which is rounding (1e-4 would have been an error)"
        )
        found.append((True, f"The lowered network was compared with the pruned one on images: their outputs {said}."))
    if run.is_as_planned is not None:
        said = "exactly the groups" if run.is_as_planned else "other groups than those"
        found.append((run.is_as_planned, f"pruned.safetensors holds {said} that plan.json decided, as of this page."))
    found.append((True, "Test images were used once, after everything was decided; weights were chosen on others."))
    if contest.get("is_noisy"):
        found.append((False, "The machine was busy while forms were timed, so a safer form was kept; measure again."))
    if run.is_noisy:
        found.append((False, "Times varied widely: the pruned network, which does the dense one's work, came out at "
                      f"{results['networks']['pruned']['latency_ratio']:.2f} of its time. Measure again when nothing "
                      "else runs."))  # fmt: skip
    found.append((True, f"Times are medians of interleaved rounds on one machine: {results['latency']}."))
    seed = f"This is one training run with one seed ({arguments['seed']}); another one comes out a little different."
    found.append((False, seed))
    if arguments.get("limit_train") is not None:
        found.append((False, f"Only {arguments['limit_train']:,} training images were used (--limit-train)."))
    if is_untrained(run):
        found.append((False, "The dense network in these tables was never trained: its accuracy means nothing."))
    images = results["networks"]["dense"]["test"]["images"]
    if images < FEW:
        found.append((False, f"{images} test images are few: one of them is {100 / images:.2f} points."))
    return found


def decided(run: Run) -> str:
    """How far filters had decided for one group when learning ended; empty where that was not recorded."""
    learned = [epoch for epoch in run.results["curves"].get("learn", []) if "entropy" in epoch]
    groups = run.results["arguments"].get("groups", 1)
    if not learned or groups < 2:
        return ""
    last, whole = learned[-1]["entropy"], math.log(groups)
    how = "had decided" if last < 0.1 * whole else "had mostly decided" if last < 0.5 * whole else "had hardly decided"
    return (
        f"When learning ended, filters {how} which group they belong to: the mean entropy of a filter's probabilities "
        f"was {last:.3f} nats, {last / whole:.0%} of log {groups} = {whole:.3f}, which is no preference at all."
    )
