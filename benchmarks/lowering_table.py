"""One layer in each of its forms, on each runtime: what a grouped structure buys where.

    python -m benchmarks.lowering_table --write docs/results/lowering.md

Twenty layer shapes, 2, 4 and 8 groups; every group holds an equal part of the filters and reads a random 40% of the
channels (a multiple of 8). Each layer stands in a frame (narrow convolution -> layer -> global average), whose time is
taken off. Started again, it goes on from what docs/results/lowering.json holds. `--runtimes eager` measures one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

from dspfx.deploy.benchmark import describe_setting
from dspfx.deploy.machine import block_width
from dspfx.deploy.runtimes import build
from dspfx.deploy.timing import interleave
from dspfx.grouped import PaddedGroupConv2d
from dspfx.modules import GroupConv2d
from dspfx.plans import Group

SHARE = 0.4
ROUNDS = 12
GROUPS = (2, 4, 8)
# channels, filters, kernel, stride, input size: of CIFAR ResNets, VGG, ResNet-50 and MobileNet-like networks.
SHAPES = (
    (16, 16, 3, 1, 32), (32, 32, 3, 1, 16), (64, 64, 3, 1, 8),
    (64, 64, 3, 1, 112), (128, 128, 3, 1, 56), (512, 512, 3, 1, 14),
    (64, 64, 3, 1, 56), (128, 128, 3, 1, 28), (256, 256, 3, 1, 14), (512, 512, 3, 1, 7),
    (128, 128, 3, 2, 56), (256, 256, 3, 2, 28),
    (64, 256, 1, 1, 56), (256, 64, 1, 1, 56), (512, 128, 1, 1, 28), (128, 512, 1, 1, 28),
    (1024, 256, 1, 1, 14), (256, 1024, 1, 1, 14), (2048, 512, 1, 1, 7), (512, 2048, 1, 1, 7),
)  # fmt: skip
FORMS = ("dense", "zeros", "compact", "branches", "slices", "grouped", "matmul")


class Matmul(nn.Module):
    """A 1x1 convolution as one matrix product."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().flatten(1))
        self.bias = nn.Parameter(torch.zeros(len(self.weight), 1))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.matmul(self.weight, x.flatten(2)) + self.bias).unflatten(2, x.shape[2:])


def layers(shape: tuple[int, ...], groups: int) -> dict[str, nn.Module]:
    """The layer's forms by name, each on the channels that it is given; `dense` holds no zeros."""
    c, o, kernel, stride, _ = shape
    torch.manual_seed(groups)
    dense = nn.Conv2d(c, o, kernel, stride, kernel // 2)
    width = min(max(round(SHARE * c / 8) * 8, 4), c)
    keep = torch.rand(groups, c).argsort(1)[:, :width].sort(1).values
    filters = torch.arange(o).tensor_split(groups)
    parts = tuple(Group(tuple(f.tolist()), tuple(k.tolist())) for f, k in zip(filters, keep, strict=True))
    mixed = torch.randperm(o).tensor_split(groups)  # as learned: filters of a group stand anywhere
    random = tuple(Group(tuple(sorted(f.tolist())), g.channels) for f, g in zip(mixed, parts, strict=True))
    starts = [(c - width) * g // max(groups - 1, 1) for g in range(groups)]
    runs = tuple(Group(g.filters, tuple(range(s, s + width))) for g, s in zip(parts, starts, strict=True))
    zeros = nn.Conv2d(c, o, kernel, stride, kernel // 2)
    with torch.no_grad():
        for group in parts:
            gone = torch.ones(c, dtype=torch.bool)
            gone[list(group.channels)] = False
            zeros.weight[group.filters[0] : group.filters[-1] + 1, gone] = 0
    needed = len(keep.unique())
    compact = min(-(-needed // block_width()) * block_width(), c)
    found: dict[str, nn.Module] = {
        "dense": dense,
        "zeros": zeros,
        "compact": nn.Conv2d(compact, o, kernel, stride, kernel // 2),
        "branches": GroupConv2d.from_conv(dense, random),
        "slices": GroupConv2d.from_conv(dense, runs),
        "grouped": PaddedGroupConv2d.from_conv(dense, random),
    }
    if kernel == 1 and stride == 1:
        found["matmul"] = Matmul(dense)
    return found


class Framed(nn.Module):
    """A layer between a narrow convolution and an average, or nothing between them."""

    def __init__(self, layer: nn.Module | None, channels: int) -> None:
        super().__init__()
        self.first, self.layer = nn.Conv2d(16, channels, 1), layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return (x if self.layer is None else self.layer(x)).mean((2, 3))


def measure(runtime: str, shape: tuple[int, ...], groups: int) -> dict[str, float]:
    """Each form's time to the dense one's: the median over rounds, the frame's own time taken off in each."""
    c, _, _, _, size = shape
    image = torch.randn(1, 16, size, size)
    forms = layers(shape, groups)
    networks = {name: Framed(layer, layer.weight.shape[1] if name == "compact" else c) for name, layer in forms.items()}
    networks["frame"] = Framed(None, c)
    built = {name: build(runtime, network.eval(), image) for name, network in networks.items()}
    with torch.inference_mode():
        samples = interleave({name: (lambda b=b: b(image)) for name, b in built.items()}, ROUNDS)
    frame = samples.pop("frame")
    own = {name: [max(a - b, 1e-9) for a, b in zip(seconds, frame, strict=True)] for name, seconds in samples.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds, own["dense"], strict=True))
        for name, seconds in own.items()
    }
    return ratios | {"ms": 1e3 * statistics.median(own["dense"])}


def page(found: dict[str, dict[str, dict[str, float]]], settings: dict[str, str], runtimes: list[str]) -> str:
    """The tables in Markdown, and what they say."""
    parts = [
        "# One layer in each of its forms",
        f"Time of a layer to that of the dense one in the same runtime, batch 1, one thread: below 1 is faster. Every "
        f"group reads a random {SHARE:.0%} of the channels, so all groups together compute {SHARE:.0%} of the "
        "multiply-adds. *zeros*: the dense convolution with the zeros left in. *compact*: channels that no group reads "
        f"are removed, in blocks of {block_width()}. *branches*: a selection of channels and a convolution a group, "
        "and one reordering. *slices*: the same where channels and filters are laid out so that nothing is copied but "
        "slices. *grouped*: one selection and one convolution with groups. *matmul*: a dense 1x1 as matrix product: "
        "slower everywhere but on inductor, where it takes 0.86 to 1.12 of the dense one and dspfx's kernels less than "
        "half (native.md), so `lower` has no such form. The best is bold.",
    ]
    for runtime in runtimes:
        rows = []
        for shape in SHAPES:
            for groups in GROUPS:
                ratios = found.get(f"{runtime} {shape} {groups}")
                if ratios is None:
                    continue
                c, o, kernel, stride, size = shape
                name = f"{kernel}x{kernel}{f'/{stride}' if stride > 1 else ''} {c}-{o}, {size}x{size}"
                best = min((f for f in FORMS if f in ratios), key=lambda f: ratios[f])
                cells = [f"{ratios[f]:.2f}" if f in ratios else "" for f in FORMS[1:]]
                cells = [f"**{x}**" if f == best else x for f, x in zip(FORMS[1:], cells, strict=True)]
                rows.append((name, groups, f"{ratios['ms']:.3f}", *cells))
        if rows:
            headers = ["layer", "groups", "dense ms", *FORMS[1:]]
            parts += [f"## {settings[runtime]}", tabulate(rows, headers, "github", disable_numparse=True)]
            parts.append(summary(found, runtime))
    parts.append(
        "Made by\n\n    OMP_NUM_THREADS=1 python -m benchmarks.lowering_table --write docs/results/lowering.md\n"
    )
    return "\n\n".join(parts)


def summary(found: dict[str, dict[str, dict[str, float]]], runtime: str) -> str:
    """How often each form is the fastest, and its geometric mean, by number of groups."""
    lines = []
    for groups in GROUPS:
        ratios = [r for key, r in found.items() if key.startswith(f"{runtime} ") and key.endswith(f" {groups}")]
        if not ratios:
            continue
        means = [
            f"{form} {statistics.geometric_mean(r[form] for r in ratios if form in r):.2f} "
            f"({sum(min((f for f in FORMS if f in r), key=lambda f: r[f]) == form for r in ratios)})"
            for form in FORMS[1:]
        ]
        lines.append(f"- {groups} groups: {', '.join(means)}")
    return "Geometric means, and in brackets how often the form was the fastest:\n\n" + "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtimes", default="onnxruntime,openvino,eager,inductor")
    parser.add_argument("--groups", default=",".join(map(str, GROUPS)))
    parser.add_argument("--rows", type=Path, default=Path("docs/results/lowering.json"))
    parser.add_argument("--write", type=Path, help="write the page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    content = json.loads(options.rows.read_text()) if options.rows.exists() else {"settings": {}, "found": {}}
    for runtime in options.runtimes.split(","):
        for shape in SHAPES:
            for groups in map(int, options.groups.split(",")):
                key = f"{runtime} {shape} {groups}"
                if key in content["found"]:
                    continue
                content["settings"][runtime] = describe_setting(runtime, torch.device("cpu"), 1)
                ratios = content["found"][key] = {
                    name: round(x, 4) for name, x in measure(runtime, shape, groups).items()
                }
                options.rows.write_text(json.dumps(content, indent=0) + "\n")
                print(key, ratios, flush=True)
    if options.write:
        options.write.write_text(page(content["found"], content["settings"], options.runtimes.split(",")))


if __name__ == "__main__":
    main()
