"""The page of `benchmarks.latency_accuracy`, from its results.json."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

LABELS = {
    "dense": "dense, the common start",
    "control": "dense, trained on for as many epochs",
    "peer": "Torch-Pruning, group norm",
    "ours": "dspfx, lowered",
}


def page(content: dict[str, Any]) -> str:
    """The page in Markdown."""
    settings = content["settings"]
    return (
        "\n\n".join(
            [
                "# Accuracy at equal measured latency",
                f"ResNet20 on the JPEG copy of CIFAR-10: trained dense for {settings['dense']} epochs from weights "
                f"trained on the lossless images, then in each arm {settings['learn']} epochs of learning, "
                f"pruning to {settings['target']} of the dense latency (ONNX Runtime, batch 1, one thread), and "
                f"{settings['tune']} epochs of fine-tuning. Short schedules: the accuracies are for comparison within "
                "this table.",
                _networks(content),
                _difference(content),
                "## How it was done",
                _method(content),
                "## Epochs",
                _curves(content["curves"]),
                "Made by",
                "    OMP_NUM_THREADS=1 python -m benchmarks.latency_accuracy --data DIR "
                f"--checkpoint resnet20_cifar10.safetensors --out runs/latency_accuracy{content['options']} "
                "--write docs/results/latency_accuracy.md",
            ]
        )
        + "\n"
    )


def _networks(content: dict[str, Any]) -> str:
    rows = []
    for name, label in LABELS.items():
        if name not in content["test"]:
            continue
        times = [
            f"{t['median_ms']:.2f} ms ({t['ratio']:.3f} ± {t['spread'] / 2:.3f})"
            for t in content["latency"][name].values()
        ]
        shares = [f"{content[key][name] / content[key]['dense']:.1%}" for key in ("macs", "params")]
        accuracies = [f"{content[key][name]:.2%}" for key in ("test", "validation")]
        rows.append((label, *accuracies, *shares, *times))
    headers = ["network", "test", "validation", "MACs run", "parameters", "batch 1", "batch 8"]
    table = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return (
        f"{table}\n\nAccuracy on {content['images']:,} test images, read once at the end. In brackets the median ratio "
        f"to the dense network within a round, and half its interquartile range; all in one run: "
        f"{content['setting'].partition(', ')[2]}. "
        "A control has the dense network's structure and is not timed."
    )


def _difference(content: dict[str, Any]) -> str:
    """Who is ahead, by how much, and how sure that is."""
    ours, theirs = content["test"]["ours"], content["test"]["peer"]
    points = 100 * (ours - theirs)
    error = 100 * sum(share * (1 - share) / content["images"] for share in (ours, theirs)) ** 0.5
    verdict = "ahead of" if points > 0 else "behind"
    own, others = content["latency"]["ours"], content["latency"]["peer"]
    latency = {batch: own[batch]["ratio"] / others[batch]["ratio"] for batch in ("1", "8")}
    return (
        f"dspfx is {abs(points):.2f} points {verdict} Torch-Pruning (standard error of the difference at most about "
        f"{error:.2f}; one seed each), at {latency['1']:.2f} of its latency at "
        f"batch 1 and {latency['8']:.2f} at batch 8."
    )


def _method(content: dict[str, Any]) -> str:
    settings, peer = content["settings"], content["peer"]
    cut = peer["cut"]
    ranking = "one ranking over all layers" if cut["is_global"] else "the same share of every layer"
    options = "; ".join(
        f"{o['learned']}: multiples of {o['cut']['round_to']}, {'global' if o['cut']['is_global'] else 'local'}, "
        f"{o['macs']:.1%} of MACs, {o['params']:.1%} of weights, validation {o['validation']:.2%}"
        for o in peer["options"]
    )
    ours = f"{content['flops']} of the FLOPs" if content["flops"] else f"`Budget(latency={settings['target']})`"
    lines = [
        f"Every stage: batch {settings['batch_size']}, SGD with momentum 0.9, cosine from {settings['lr']}, "
        f"weight decay {settings['weight_decay']}, random crops and mirroring; every arm sees the same "
        "images in the same order. "
        "Convolutions in bfloat16 (autocast) with tensors in channels-last order, the fastest form here, for every "
        "arm; validation, test and latency in float32.",
        "Shortcuts are 1x1 convolutions that start as what the parameter-free shortcuts computed, for every arm: "
        "Torch-Pruning does not understand the zero padding of channels.",
        "Torch-Pruning 1.6: settings of its own CIFAR-10 script (group_sl: importance normalised by the maximum, "
        "regulariser 5e-4 instead of weight decay while learning). It got two strengths, its own and one scaled to "
        "shrink weights as far in these fewer steps; for each, all structures of 34 pruning ratios, widths in "
        "multiples of 1, 8 and 16, ranked locally and globally, were timed, and of those that took at most "
        f"{settings['target'] + 0.02:g} of the dense network's time the one of most multiply-adds and the one of most "
        "weights had one epoch of training on trial; the best on validation images went on (its trial undone): "
        f"{peer['learned']}, multiples of {cut['round_to']}, {ranking}, "
        f"ratio {cut['ratio']} (widths {', '.join(map(str, peer['widths']))}). "
        f"On trial: {options}.",
        f"dspfx: gates of groups={settings['groups']}, {settings['strength']:g} times the learner's default strength, "
        f"pruned in one step to {ours}, lowered for ONNX Runtime.{_tries(content['curves'])}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _tries(curves: dict[str, list[dict[str, float]]]) -> str:
    """What was tried before and left: its stages carry the name of a folder."""
    tries = {name: epochs for name, epochs in curves.items() if ": " in name and "tune" in name}
    told = ", ".join(f"{name} {max(e['val_accuracy'] for e in epochs):.2%}" for name, epochs in tries.items())
    return f" Earlier tries, left for what they reached on validation images: {told}." if told else ""


def _curves(curves: dict[str, list[dict[str, float]]]) -> str:
    rows = []
    for stage, epochs in curves.items():
        best = max(epoch["val_accuracy"] for epoch in epochs)
        last = epochs[-1]
        rows.append(
            (
                stage,
                len(epochs),
                f"{last['train_loss']:.4f}",
                f"{last['val_accuracy']:.2%}",
                f"{best:.2%}",
                f"{sorted(epoch['seconds'] for epoch in epochs)[len(epochs) // 2]:.0f} s",
            )
        )
    headers = ["stage", "epochs", "last training loss", "last validation", "best validation", "median epoch"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
