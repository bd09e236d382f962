"""The group convolution on a GPU: its Triton kernel beside cuDNN's dense, branch and grouped convolutions.

    python -m benchmarks.gpu_conv --write docs/results/gpu_conv.md

NOT YET RUN ON A GPU: no figure of this program exists. What has been done without one: its networks were built and
compared on a CPU, with the kernel in triton's interpreter.

Layers of a ResNet50, and a whole one, float16 at batch 1, 8, 32 and 64; two groups, each of half of the filters, that
read a third of the channels. Two kinds of lists: any channels (contiguous tensors), and aligned runs of eight channels
and filters (channels_last). Library convolutions are channels_last. Every form is a CUDA graph; rounds are interleaved,
and a ratio is the median over rounds of the ratios within a round.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dspfx.deploy.timing import Result, compare, complete, interleave
from dspfx.grouped import PaddedGroupConv2d
from dspfx.kernels.structure import pack
from dspfx.kernels.triton_conv import is_available, prepare_gpu
from dspfx.modules import GroupConv2d
from dspfx.plans import Group

SHARE, GROUPS, BLOCK = 1 / 3, 2, 8
REPEATS = 20  # calls of a layer in one graph, so that starting it does not count
TOLERANCE = 2e-2  # of the largest output, between forms in float16
# channels, filters, kernel, stride, input size
SHAPES = (
    (64, 64, 1, 1, 56), (64, 64, 3, 1, 56), (64, 256, 1, 1, 56), (256, 64, 1, 1, 56),
    (128, 128, 3, 2, 56), (128, 128, 3, 1, 28), (128, 512, 1, 1, 28), (512, 128, 1, 1, 28),
    (256, 256, 3, 2, 28), (256, 256, 3, 1, 14), (256, 1024, 1, 1, 14), (1024, 256, 1, 1, 14),
    (512, 512, 3, 2, 14), (512, 512, 3, 1, 7), (512, 2048, 1, 1, 7), (2048, 512, 1, 1, 7),
)  # fmt: skip
FORMS = ("dense", "branches", "streams", "grouped", "ours", "ours, runs")


class OnStreams(GroupConv2d):
    """Branches that run beside each other, each on a stream of its own."""

    streams: list[torch.cuda.Stream]

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "streams"):
            self.streams = [torch.cuda.Stream(x.device) for _ in self.branches]
        current, outputs = torch.cuda.current_stream(x.device), []
        for i, (branch, span, stream) in enumerate(zip(self.branches, self.slices, self.streams, strict=True)):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                part = x[:, span[0] : span[1]] if span else x.index_select(1, getattr(self, f"channels{i}"))
                outputs.append(branch(part))
        for stream in self.streams:
            current.wait_stream(stream)
        y = torch.cat(outputs, 1)
        return y if self.is_ordered else y.index_select(1, self.order)


class Library(nn.Module):
    """activation(conv(x) + residual), with torch's own operations."""

    def __init__(self, conv: nn.Module, is_active: bool) -> None:
        super().__init__()
        self.conv, self.is_active = conv, is_active

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        if residual is not None:
            y += residual
        return y.relu_() if self.is_active else y


class Ours(nn.Module):
    """The same in one call of the kernel."""

    def __init__(self, conv: nn.Conv2d, groups: tuple[Group, ...], is_active: bool, channels_last: bool) -> None:
        super().__init__()
        self.conv, self.bias = prepare_gpu(*pack(conv.weight.detach(), groups)), conv.bias
        self.options: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        self.options |= {"activation": "relu" if is_active else "none", "channels_last": channels_last}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.conv(x, self.bias, residual=residual, **self.options)


def lists(filters: int, channels: int, has_runs: bool, seed: int) -> tuple[Group, ...]:
    """Groups of equally many filters that read SHARE of the channels, anywhere or in runs of BLOCK."""
    generator = torch.Generator().manual_seed(seed)
    size = BLOCK if has_runs else 1
    width = max(round(SHARE * channels / BLOCK), 1) * BLOCK

    def chosen(count: int, width: int) -> tuple[int, ...]:
        starts = torch.randperm(count // size, generator=generator)[: width // size].sort().values * size
        return tuple(int(start) + i for start in starts for i in range(size))

    mine = set(chosen(filters, filters // GROUPS))
    halves = tuple(sorted(mine)), tuple(o for o in range(filters) if o not in mine)
    return tuple(Group(half, chosen(channels, width)) for half in halves)


def unit(form: str, conv: nn.Conv2d, is_active: bool, seed: int) -> nn.Module:
    """A form of a layer; "masked" is dense and computes what the forms on any channels do, "masked, runs" on runs."""
    groups = lists(conv.out_channels, conv.in_channels, "runs" in form, seed)
    if form.startswith("ours"):
        return Ours(conv, groups, is_active, "runs" in form)
    if form.startswith("masked"):
        keep = torch.zeros(conv.weight.shape[:2], device=conv.weight.device, dtype=conv.weight.dtype)
        for group in groups:
            for o in group.filters:
                keep[o, list(group.channels)] = 1
        conv = copy.deepcopy(conv)
        conv.weight = nn.Parameter(conv.weight * keep[:, :, None, None])
    kinds = {"branches": GroupConv2d, "streams": OnStreams, "grouped": PaddedGroupConv2d}
    return Library(kinds[form].from_conv(conv, groups) if form in kinds else conv, is_active)


class Bottleneck(nn.Module):
    """A block of a ResNet50, its norms folded."""

    def __init__(self, block: Any, form: str, seed: int) -> None:
        super().__init__()
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2), (block.conv3, block.bn3)]
        folded = [fuse_conv_bn_eval(conv, norm) for conv, norm in pairs]
        with torch.no_grad():
            folded[2].weight *= 0.25  # untrained residuals would grow beyond float16
        self.units = nn.ModuleList(unit(form, conv, True, 4 * seed + i) for i, conv in enumerate(folded))
        down = block.downsample
        self.down = None if down is None else unit(form, fuse_conv_bn_eval(down[0], down[1]), False, 4 * seed + 3)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.down is None else self.down(x)
        first, second, third = self.units
        return third(second(first(x)), identity)


class Network(nn.Module):
    """A ResNet50 whose layers, but for the first and the last, are of one form."""

    def __init__(self, model: Any, form: str) -> None:
        super().__init__()
        self.stem, self.head = fuse_conv_bn_eval(model.conv1, model.bn1), model.fc
        blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
        self.blocks = nn.Sequential(*(Bottleneck(block, form, seed) for seed, block in enumerate(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x).relu_(), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


def layer_forms(shape: tuple[int, ...], batch: int, device: Any, dtype: Any) -> tuple[dict[str, nn.Module], Tensor]:
    """The forms of a layer, the masked ones among them, and an input."""
    c, o, kernel, stride, size = shape
    torch.manual_seed(0)
    conv = nn.Conv2d(c, o, kernel, stride, kernel // 2).to(device, dtype)
    forms = {form: unit(form, conv, True, 0) for form in (*FORMS, "masked", "masked, runs")}
    return _last(forms), torch.randn(batch, c, size, size, device=device, dtype=dtype)


def network_forms(batch: int, size: int, device: Any, dtype: Any) -> tuple[dict[str, nn.Module], Tensor]:
    """The same of the whole network."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None).eval().to(device, dtype)
    nn.init.zeros_(model.fc.bias)  # or it would be most of the output, and all forms alike
    forms: dict[str, nn.Module] = {form: Network(model, form) for form in (*FORMS, "masked", "masked, runs")}
    return _last(forms), torch.randn(batch, 3, size, size, device=device, dtype=dtype)


def _last(forms: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Everything in channels_last, but for the kernel on lists of any channels."""
    return {form: m if form == "ours" else m.to(memory_format=torch.channels_last) for form, m in forms.items()}


def as_read(form: str, x: Tensor) -> Tensor:
    return x if form == "ours" else x.contiguous(memory_format=torch.channels_last)


def check(forms: dict[str, nn.Module], x: Tensor) -> None:
    """Every form computes what the masked dense one does, or the program ends."""
    for form, module in forms.items():
        if form == "dense" or form.startswith("masked"):
            continue
        wanted = forms["masked, runs" if "runs" in form else "masked"](as_read("masked", x)).float()
        error = float((module(as_read(form, x)).float() - wanted).abs().max() / wanted.abs().max())
        if not error < TOLERANCE:
            raise SystemExit(f"{form} differs from the masked dense form by {error:.1e} of the largest output.")


def captured(call: Callable[[], Any], repeats: int) -> Callable[[], Any]:
    """Some calls as one CUDA graph, after calls in which cuDNN and the kernel choose how to run."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay


def measure(forms: dict[str, nn.Module], x: Tensor, repeats: int, rounds: int) -> dict[str, Result]:
    """Each form's time, milliseconds of all repeats, and its ratio to the dense one."""
    check(forms, x)
    calls = {}
    for form in FORMS:
        module, own = forms[form], as_read(form, x)
        calls[form] = complete(captured(lambda module=module, own=own: module(own), repeats), x.device)
    return compare(interleave(calls, rounds))


def row(name: str, batch: int, found: dict[str, Result], repeats: int) -> list[str]:
    cells = [f"{found[form].ratio:.2f} ± {found[form].spread / 2:.2f}" for form in FORMS[1:]]
    return [name, str(batch), f"{found['dense'].median_ms / repeats:.4f}", *cells]


def share_of_network() -> float:
    """Multiply-adds of the grouped network to those of the dense one, counted as it runs on 224x224."""
    counts = {"dense": 0, "ours": 0}

    def count(conv: nn.Module, _: Any, y: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        dense = conv.weight.numel() * y.shape[2] * y.shape[3]
        counts["dense"] += dense
        groups = lists(conv.out_channels, conv.in_channels, False, 0) if conv.in_channels > 3 else ()
        pairs = sum(len(g.filters) * len(g.channels) for g in groups)
        counts["ours"] += dense * pairs // (conv.out_channels * conv.in_channels) if groups else dense

    with torch.device("meta"):
        model, image = torchvision.models.resnet50(weights=None).eval(), torch.empty(1, 3, 224, 224)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model(image)
    head = model.fc.weight.numel()
    return (counts["ours"] + head) / (counts["dense"] + head)


def page(layers: list[list[str]], networks: list[list[str]]) -> str:
    """Both tables in Markdown."""
    import triton

    headers = ["batch", "dense ms", *FORMS[1:]]
    ratios = {form: [float(cells[i].split()[0]) for cells in layers] for i, form in enumerate(FORMS[1:], start=3)}
    means = ", ".join(f"{form} {statistics.geometric_mean(values):.2f}" for form, values in ratios.items())
    return "\n\n".join(
        [
            "# The group convolution on a GPU",
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, cuDNN "
            f"{torch.backends.cudnn.version()}, float16. Time to that of the dense network, ± half of the "
            f"interquartile range over rounds; below 1 is faster.",
            f"## ResNet50, two groups, {share_of_network():.0%} of the multiply-adds\n\nWithout the kernel, bias, "
            "residual and ReLU are torch's own kernels, as they are in the dense network.",
            tabulate(networks, ["network", *headers], "github", disable_numparse=True),
            f"## Layers, two groups, about {SHARE:.0%} of the multiply-adds, ReLU included",
            tabulate(layers, ["layer", *headers], "github", disable_numparse=True),
            f"Geometric means: {means}.",
            "Made by\n\n    python -m benchmarks.gpu_conv --write docs/results/gpu_conv.md\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8,32,64")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", type=Path, help="write the page to this file")
    options = parser.parse_args()
    if not is_available():
        raise SystemExit("benchmarks.gpu_conv needs triton and a CUDA device, and one of them is missing here.")
    torch.backends.cudnn.benchmark = True
    device, layers, networks = torch.device("cuda"), [], []
    with torch.no_grad():
        for batch in map(int, options.batches.split(",")):
            forms, x = network_forms(batch, 224, device, torch.float16)
            networks.append(row("ResNet50, 224x224", batch, measure(forms, x, 1, options.rounds), 1))
            print(*networks[-1], sep=" | ", flush=True)
            for shape in SHAPES:
                c, o, kernel, stride, size = shape
                forms, x = layer_forms(shape, batch, device, torch.float16)
                name = f"{kernel}x{kernel}{f'/{stride}' if stride > 1 else ''} {c}-{o}, {size}x{size}"
                layers.append(row(name, batch, measure(forms, x, REPEATS, options.rounds), REPEATS))
                print(*layers[-1], sep=" | ", flush=True)
    if options.write:
        options.write.write_text(page(layers, networks))


if __name__ == "__main__":
    main()
