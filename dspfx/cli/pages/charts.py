"""Line charts as inline SVG: coloured by the page's style, told apart by dashes as well, and described in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspfx.cli.pages.markup import Html, join, tag

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 26, 34
CHARACTER = 6.2  # pixels, about


@dataclass(frozen=True)
class Line:
    """A curve: its name, the class that styles it, and its points (epoch, value)."""

    name: str
    style: str
    points: list[tuple[float, float]]


@dataclass(frozen=True)
class Band:
    """A stage: its name, and after which epochs it begins and ends."""

    name: str
    first: int
    last: int


def show_number(value: float) -> str:
    """Three digits that count, and no powers of ten for what fits without."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def chart(
    title: str,
    lines: Sequence[Line],
    bands: Sequence[Band],
    show: Callable[[float], str] = show_number,
    reference: tuple[float, str] | None = None,
    from_zero: bool = False,
    is_log: bool = False,
) -> Html:
    """A figure with its legend; empty where no line has a point. `reference` is a level and what it means."""
    lines = [line for line in lines if line.points]
    if not lines:
        return Html("")
    values = [value for line in lines for _, value in line.points]
    values += [0.0] * from_zero + ([reference[0]] if reference else [])
    is_log = is_log and min(values) > 0
    scale: Callable[[float], float] = math.log10 if is_log else float
    ticks = (log_ticks if is_log else nice_ticks)(min(values), max(values))
    low, high = min(ticks[0], *values), max(ticks[-1], *values)
    last = max(max(x for line in lines for x, _ in line.points), *(band.last for band in bands), 1)

    def x(epoch: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * epoch / last

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (scale(high) - scale(value)) / ((scale(high) - scale(low)) or 1)

    parts = [_band(band, x, index) for index, band in enumerate(bands)]
    for tick in ticks:
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y(tick):.1f}", y2=f"{y(tick):.1f}", class_="grid"))
        parts.append(tag("text", show(tick), x=LEFT - 6, y=f"{y(tick) + 4:.1f}", text_anchor="end"))
    for tick in (t for t in nice_ticks(0, last, 8) if t == int(t) and t <= last):
        parts.append(tag("text", int(tick), x=f"{x(tick):.1f}", y=HEIGHT - BOTTOM + 16, text_anchor="middle"))
    parts.append(tag("text", "epoch", x=WIDTH - RIGHT, y=HEIGHT - 4, text_anchor="end"))
    if reference is not None:
        level = f"{y(reference[0]):.1f}"
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=level, y2=level, class_="reference"))
        parts.append(tag("text", reference[1], x=WIDTH - RIGHT - 4, y=f"{y(reference[0]) - 5:.1f}", text_anchor="end"))
    parts += [_line(line, x, y) for line in lines]
    name = describe(title, lines, show)
    picture = tag("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=name)
    legend = tag("ul", *(tag("li", _sample(line), line.name) for line in lines), class_="legend")
    return tag("figure", tag("figcaption", title), picture, legend, class_="chart")


def describe(title: str, lines: Sequence[Line], show: Callable[[float], str]) -> str:
    """The chart in words: where each line begins and ends."""
    said = [f"{line.name} from {show(line.points[0][1])} to {show(line.points[-1][1])}" for line in lines]
    return f"{title}, by epoch: {'; '.join(said)}. The numbers are in the table below."


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """About so many round numbers that span the range."""
    span = (high - low) or abs(high) or 1.0
    rough = span / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, count = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, max(count, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers that span a range above 0: powers of ten, with 2 and 5 of each where these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [float(f"{factor}e{power}") for power in range(first, last + 1) for factor in factors]
    start = max(index for index, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    end = min((index for index, tick in enumerate(ticks) if tick >= high * (1 - 1e-9)), default=len(ticks) - 1)
    return ticks[start : max(end, start + 1) + 1]


def _band(band: Band, x: Callable[[float], float], index: int) -> Html:
    start, width = x(band.first), x(band.last) - x(band.first)
    box = tag(
        "rect", x=f"{start:.1f}", y=TOP - 18, width=f"{width:.1f}", height=HEIGHT - TOP - BOTTOM + 18,
        class_="band" if index % 2 else "band other",
    )  # fmt: skip
    fits = width > CHARACTER * len(band.name)
    return join([box, tag("text", band.name, x=f"{start + 3:.1f}", y=TOP - 6, class_="stage") if fits else ""])


def _line(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> Html:
    """A path, with a dot at each of few points."""
    places = [(f"{x(epoch):.1f}", f"{y(value):.1f}") for epoch, value in line.points]
    path = tag("path", d="M" + "L".join(f"{px} {py}" for px, py in places), class_=f"line {line.style}")
    dots = (
        [tag("circle", cx=px, cy=py, r=2.5, class_=f"dot {line.style}") for px, py in places]
        if len(places) < 30
        else []
    )
    return join([path, *dots])


def _sample(line: Line) -> Html:
    stroke = tag("path", d="M0 6L28 6", class_=f"line {line.style}")
    return tag("svg", stroke, viewBox="0 0 28 12", class_="sample", aria_hidden="true")
