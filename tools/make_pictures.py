"""`python tools/make_pictures.py` draws docs/pictures/*.svg from plans of a small residual network."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import dspfx
from dspfx.grouped import pad_groups
from dspfx.plans import Group, LowerPlan, PrunedLayer, PrunePlan

COLOURS = ("#3b7dd8", "#e07b39", "#4c9f70", "#a05fb4")
GREY, FAINT, LINE, INK = "#c9ccd1", "#eef0f2", "#8a9099", "#30343a"
CELL = 10
LAYER = "second.0"  # the one that is drawn filter by filter


class Block(nn.Module):
    """x + two convolutions of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.b(self.a(x)))


class Residual(nn.Module):
    """Two convolutions, a residual block, a wider convolution, a residual block, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.third = Block(16)
        self.wider = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.fourth = Block(32)
        self.classes = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x)))
        return self.classes(self.fourth(self.wider(x)).mean((2, 3)))


@torch.no_grad()
def trained() -> nn.Module:
    """The network with weights as learning leaves them: groups of filters, in any order, that need few channels."""
    generator = torch.Generator().manual_seed(7)
    model = Residual()
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        filters, channels = conv.weight.shape[:2]
        group = torch.randperm(filters, generator=generator) % 4
        needs = (torch.rand(4, channels, generator=generator) < 0.45).float() + 0.02
        weight = torch.rand(conv.weight.shape, generator=generator) + 0.5
        conv.weight.copy_(weight * needs[group][:, :, None, None] / math.sqrt(9 * channels))
    return model.eval()


class Svg:
    """Shapes of one picture on a white ground."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.size, self.title, self.shapes = (width, height), title, list[str]()

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, line: str = "none", r: float = 0
    ) -> None:
        box = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.shapes.append(f'<rect {box} rx="{r:g}" fill="{fill}" stroke="{line}"/>')

    def text(self, x: float, y: float, text: str, size: int = 12, anchor: str = "middle", fill: str = INK) -> None:
        style = f'font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" {style}>{text}</text>')

    def arrow(self, x: float, y: float, length: float) -> None:
        end = x + length
        path = f"M{x:g} {y:g}H{end:g}M{end - 5:g} {y - 4:g}L{end:g} {y:g}L{end - 5:g} {y + 4:g}"
        self.shapes.append(f'<path d="{path}" fill="none" stroke="{LINE}" stroke-width="1.5"/>')

    def __str__(self) -> str:
        width, height = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">'
        ground = f'<rect width="{width:g}" height="{height:g}" rx="6" fill="#ffffff"/>'
        return "\n".join([head, f"<title>{self.title}</title>", ground, *self.shapes, "</svg>", ""])


def matrix(
    svg: Svg,
    x: float,
    y: float,
    rows: Sequence[int],
    columns: Sequence[int],
    groups: Iterable[Group],
    fill: str = FAINT,
) -> None:
    """Filters as rows and channels as columns; what a group holds has its colour."""
    svg.rect(x, y, CELL * len(columns), CELL * len(rows), fill, GREY)
    for colour, group in zip(COLOURS, groups, strict=False):
        for filter_ in group.filters:
            for channel in group.channels:
                place = x + CELL * columns.index(channel), y + CELL * rows.index(filter_)
                svg.rect(place[0] + 0.5, place[1] + 0.5, CELL - 1, CELL - 1, colour)


def stack(svg: Svg, x: float, y: float, shapes: Iterable[tuple[int, int]], paddings: Iterable[tuple[int, int]]) -> None:
    """Small dense matrices below each other; padding is hollow."""
    for colour, (rows, columns), (padded_rows, padded_columns) in zip(COLOURS, shapes, paddings, strict=False):
        svg.rect(x, y, CELL * padded_columns, CELL * padded_rows, "#ffffff", colour)
        svg.rect(x, y, CELL * columns, CELL * rows, colour)
        y += CELL * padded_rows + 6


def sizes(groups: Iterable[Group]) -> list[tuple[int, int]]:
    return [(len(group.filters), len(group.channels)) for group in groups]


def draw_groups(layer: PrunedLayer) -> Svg:
    """The layer's dense weight, what is kept of it in its own order, sorted by group, and as dense matrices."""
    svg = Svg(780, 250, "One layer: dense, pruned, sorted by group, as small dense convolutions")
    rows, columns = list(range(layer.out_channels)), list(range(layer.in_channels))
    by_group = [f for group in layer.groups for f in group.filters]
    by_group += [f for f in rows if f not in by_group]
    panels = (
        "dense: filters x channels",
        "pruned: each group its channels",
        "filters sorted by group",
        "small dense ones",
    )
    for index, title in enumerate(panels):
        svg.text(20 + 190 * index + 80, 30, title)
    svg.rect(20, 45, CELL * len(columns), CELL * len(rows), GREY, LINE)
    matrix(svg, 210, 45, rows, columns, layer.groups)
    matrix(svg, 400, 45, by_group, columns, layer.groups)
    stack(svg, 615, 45, sizes(layer.groups), sizes(layer.groups))
    for index in range(3):
        svg.arrow(184 + 190 * index, 125, 18)
    kept = sum(a * b for a, b in sizes(layer.groups))
    whole = layer.out_channels * layer.in_channels
    svg.text(390, 238, f"{kept} of {whole} pairs of a filter and an input channel are kept", fill=LINE)
    return svg


def draw_network(model: nn.Module, pruned: PrunePlan, lowered: LowerPlan) -> Svg:
    """Every layer as a rectangle, filters wide and channels high: dense, and what is left."""
    svg, x, scale = Svg(780, 220, "Widths of the network, dense and pruned"), 24.0, 2.9
    for layer in lowered.layers:
        filters, channels = model.get_parameter(f"{layer.name}.weight").shape[:2]
        svg.rect(x, 160 - scale * channels, scale * filters, scale * channels, GREY)
        svg.rect(
            x, 160 - scale * len(layer.channels), scale * len(layer.filters), scale * len(layer.channels), COLOURS[0]
        )
        middle = x + scale * filters / 2
        svg.text(middle, 178, layer.name.removesuffix(".0"), 11)
        svg.text(middle, 193, f"{layer.macs_left / layer.macs:.0%}", 11, fill=LINE)
        x += max(scale * filters, 34) + 26
    svg.text(390, 28, f"{pruned.flops_left:.0%} of the multiply-adds are left; below each layer, of its own")
    svg.text(390, 212, "width: filters, height: input channels", 11, fill=LINE)
    return svg


def draw_forms(layer: PrunedLayer) -> Svg:
    """What each form of the layer multiplies."""
    svg = Svg(780, 260, "The forms of one pruned layer, and what each of them multiplies")
    rows = sorted({f for group in layer.groups for f in group.filters})
    columns = sorted({c for group in layer.groups for c in group.channels})
    padded = pad_groups(layer.in_channels, layer.out_channels, layer.groups)
    counts = {
        "dense": len(rows) * len(columns),
        "branches": sum(a * b for a, b in sizes(layer.groups)),
        "grouped": sum(a * b for a, b in sizes(padded)),
        "native": sum(a * b for a, b in sizes(layer.groups)),
    }
    for index, (form, count) in enumerate(counts.items()):
        x = 30 + 190 * index
        svg.text(x + 80, 30, form, 13)
        svg.text(x + 80, 246, f"{count} pairs", 11, fill=LINE)
        if form == "dense":
            matrix(svg, x, 45, rows, columns, layer.groups, GREY)
        elif form == "native":
            matrix(svg, x, 45, rows, columns, layer.groups)
        else:
            stack(svg, x + 30, 45, sizes(layer.groups), sizes(padded if form == "grouped" else layer.groups))
    return svg


def draw_steps(gated: tuple[int, int], pruned: PrunePlan) -> Svg:
    """The way from a model to a file, with what the plans of this network say."""
    svg = Svg(780, 110, "prepare, learn, prune, fine-tune, lower, deploy")
    steps = (
        ("prepare", f"{gated[0]} of {gated[1]} gated"),
        ("learn", "your loop"),
        ("prune", f"{pruned.flops_left:.0%} left"),
        ("fine-tune", "your loop"),
        ("lower", "plain torch"),
        ("deploy", "one file"),
    )
    for index, (step, what) in enumerate(steps):
        x = 15 + 127 * index
        own = what == "your loop"
        svg.rect(x, 25, 105, 60, FAINT if own else COLOURS[0], LINE if own else "none", 6)
        svg.text(x + 52, 50, step, 14, fill=INK if own else "#ffffff")
        svg.text(x + 52, 70, what, 11, fill=INK if own else "#ffffff")
        if index + 1 < len(steps):
            svg.arrow(x + 107, 55, 17)
    return svg


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "pictures")
    out = parser.parse_args(argv).out
    model = trained()
    gm = dspfx.prepare(model, torch.zeros(1, 3, 32, 32))
    gates = dspfx.coverage(gm).plan
    pruned = dspfx.prune(gm, dspfx.Budget(flops=0.35), "l2")
    lowered = dspfx.lower(gm).meta["lower_plan"]
    (layer,) = (layer for layer in pruned.layers if layer.name == LAYER)
    pictures = {
        "groups": draw_groups(layer),
        "network": draw_network(model, pruned, lowered),
        "forms": draw_forms(layer),
        "steps": draw_steps((len(gates.layers), len(gates.layers) + len(gates.skipped)), pruned),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, svg in pictures.items():
        (out / f"{name}.svg").write_text(str(svg))


if __name__ == "__main__":
    main()
