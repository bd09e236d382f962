"""The DSP authors' published ResNet20 (4 groups), lowered: predictions, error, FLOPs and time against the dense form.

    OMP_NUM_THREADS=1 python -m benchmarks.lower_published --write docs/results/lower_published.md

Needs shared/data/dsp_resnet20_g4.safetensors and cifar10-lossless-1k.npz beside the repository.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

import dspfx
from dspfx.deploy.benchmark import Results
from tests.data import CIFAR_LOSSLESS, DSP_RESNET20
from tests.nets.published import load_images, load_published, logits


def quality(model: nn.Module, small: nn.Module, images: Tensor, labels: Tensor) -> str:
    """Accuracy, differing predictions and the largest error over all images."""
    expected, found = logits(model, images), logits(small, images)
    accuracy = [float((x.argmax(1) == labels).double().mean()) for x in (expected, found)]
    differ = int((expected.argmax(1) != found.argmax(1)).sum())
    error = float((expected - found).abs().max())
    rows = [
        ("accuracy of the published network", f"{accuracy[0]:.2%}", "92.3%"),
        ("accuracy of the lowered network", f"{accuracy[1]:.2%}", "the same"),
        ("predictions that differ", f"{differ} of {len(images)}", "0"),
        ("largest difference of a logit", f"{error:.1e}", "<= 1e-04"),
    ]
    return tabulate(rows, headers=["", "found", "target"], tablefmt="github", disable_numparse=True)


def cost(networks: dict[str, nn.Module], timings: dict[int, Results]) -> str:
    """FLOPs, parameters and the time at each batch size, as fractions of the dense form's."""
    dense = dspfx.profile(networks["dense"], torch.zeros(1, 3, 32, 32))
    rows = []
    for name, network in networks.items():
        own = dspfx.profile(network, torch.zeros(1, 3, 32, 32))
        times = [
            f"{t[name].median_ms:.2f} ms ({t[name].ratio:.2f} ± {t[name].spread / 2:.2f})" for t in timings.values()
        ]
        share = (f"{own.flops / 1e6:.2f} M ({own.flops / dense.flops:.1%})", f"{own.params:,}")
        rows.append((name, *share, *times))
    headers = ["network", "FLOPs run", "parameters", *(f"time, batch {batch}" for batch in timings)]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--write", type=Path, help="write the result page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_published(DSP_RESNET20)
    images, labels = load_images(CIFAR_LOSSLESS)
    networks: dict[str, nn.Module] = {
        "dense": model,
        "dense, BN folded": dspfx.lower(_without_zeros(model), images[:2]),
        "lowered": dspfx.lower(model, images[:2]),
    }
    timings = {batch: dspfx.benchmark(networks, images[:batch], rounds=options.rounds) for batch in (1, 32)}
    plan = networks["lowered"].meta["lower_plan"]
    kept = sum(layer.macs_left for layer in plan.layers) / sum(layer.macs for layer in plan.layers)
    page = (
        "# The published pruned ResNet20, lowered\n\n"
        "The DSP authors' ResNet20 for CIFAR-10 (4 groups, a dense state_dict with zeros; Apache-2.0, "
        "github.com/irishev/DSP) through `dspfx.lower`, on the first 1,017 lossless test images of CIFAR-10.\n\n"
        f"{quality(model, networks['lowered'], images, labels)}\n\n"
        f"The kept (filter, input channel) pairs are {kept:.1%} of the convolutions' and the classifier's FLOPs.\n\n"
        f"{cost(networks, timings)}\n\n"
        "In brackets: FLOPs as a fraction of the dense form's; the median ratio of the times within a round, and half "
        "its interquartile range. `dense, BN folded` is the same network with no zero in it, lowered alike: what "
        "folding and dspfx's kernels buy by themselves. "
        f"Timed: {timings[1].setting.partition(', ')[2]}.\n\n"
        "Made by\n\n"
        f"    OMP_NUM_THREADS=1 python -m benchmarks.lower_published --rounds {options.rounds} "
        "--write docs/results/lower_published.md\n"
    )
    print(page)
    if options.write:
        options.write.write_text(page)


def _without_zeros(model: nn.Module) -> nn.Module:
    """The same architecture, freshly initialised: lowering removes nothing and only folds."""
    return type(model)().eval()


if __name__ == "__main__":
    main()
