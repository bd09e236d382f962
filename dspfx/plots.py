"""Pictures of plans and results with matplotlib, an optional extra that is imported when one is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dspfx.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point: TypeAlias = "tuple[float, float] | str | PathLike[str]"
AXES = {
    "flops": "FLOPs that the kept weights need, of the dense network",
    "latency": "measured latency, of the dense network",
}
_MARKERS = "osD^vP*X"


def plot_shares(names: Sequence[str], shares: Sequence[float], whole: float, ax: Axes | None = None) -> Axes:
    """A horizontal bar a layer, from the first at the top, with the share of it that is left; `whole` is a line."""
    ax = _axes(ax, (7.0, 1.2 + 0.24 * len(names)))
    places = range(len(names))
    ax.barh(places, [1.0] * len(names), color="0.9", zorder=1)
    ax.barh(places, shares, color="#0b6e5a", zorder=2)
    ax.axvline(whole, color="#b0620f", linestyle="--", zorder=3, label=f"whole network: {whole:.1%}")
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(_percent())
    ax.set_xlabel("FLOPs left")
    ax.legend(loc="lower right")
    return ax


def plot_tradeoff(
    results: Mapping[str, Iterable[Point] | str | PathLike[str]] | Iterable[Point],
    against: Literal["flops", "latency"] = "flops",
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against cost, a curve for each method; returns the matplotlib Axes that it was drawn on.

        dspfx.plot_tradeoff({"dspfx": ["runs/a", "runs/b"], "other": [(0.35, 0.815), (0.5, 0.844)]})
        dspfx.plot_tradeoff(["runs/a", "runs/b"], against="latency").figure.savefig("tradeoff.svg")

    A point is a pair (cost, accuracy), both as shares: cost of the dense network's, accuracy in 0 .. 1; or the folder
    of a finished `compress` run (or its results.json), of which the lowered network's test accuracy is taken, and, as
    diamonds, that of its dense network at cost 1. Whether pairs and runs are of the same test images, machine and
    count of FLOPs, only the caller knows. Points of a method are joined in the order of their cost.

    Args:
        results: points by method, or the points of one.
        against: "flops", of the weights that are kept, or "latency", as the run measured it.
        ax: where to draw; None makes a new pyplot figure.

    Raises:
        ConfigError: matplotlib is missing; nothing to draw; a point is neither a pair of shares nor a folder with a
            results.json.
        StorageError: a results.json cannot be read.
    """
    if against not in AXES:
        raise ConfigError(f"plot_tradeoff: against is {against!r}; give {' or '.join(map(repr, AXES))}.")
    methods = results if isinstance(results, Mapping) else {"dspfx": results}
    series: dict[str, list[tuple[float, float]]] = {}
    dense: list[tuple[float, float]] = []
    for method, points in methods.items():
        if isinstance(points, (str, PathLike)):
            points = [points]
        series[method] = sorted(_read(point, against, dense) for point in points)
    if not any(series.values()):
        raise ConfigError("plot_tradeoff: there is no point; give (cost, accuracy) pairs or folders of finished runs.")
    ax = _axes(ax, (6.4, 4.4))
    for index, (method, found) in enumerate(series.items()):
        costs, accuracies = [cost for cost, _ in found], [accuracy for _, accuracy in found]
        ax.plot(costs, accuracies, marker=_MARKERS[index % len(_MARKERS)], label=method)
    if dense:
        unique = sorted(set(dense))
        ax.scatter([c for c, _ in unique], [a for _, a in unique], marker="D", color="0.4", label="dense", zorder=3)
    ax.xaxis.set_major_formatter(_percent())
    ax.yaxis.set_major_formatter(_percent())
    ax.set_xlabel(AXES[against])
    ax.set_ylabel("test accuracy")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def _read(point: Any, against: str, dense: list[tuple[float, float]]) -> tuple[float, float]:
    """(cost, accuracy); of a run, those of its dense network are added to `dense`."""
    if isinstance(point, (str, PathLike)):
        networks = _networks(Path(point))
        key = {"flops": "flops_needed", "latency": "latency_ratio"}[against]
        try:
            dense.append((1.0, float(networks["dense"]["test"]["accuracy"])))
            point = (networks["lowered"][key], networks["lowered"]["test"]["accuracy"])
        except (KeyError, TypeError) as error:
            raise StorageError(f"plot_tradeoff: the results in {point} have no {error}; run it again.") from error
    is_pair = isinstance(point, (tuple, list)) and len(point) == 2
    if not is_pair or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in point):
        raise ConfigError(f"plot_tradeoff: {point!r} is no point; give (cost, accuracy) or the folder of a run.")
    cost, accuracy = map(float, point)
    if cost <= 0 or not 0 <= accuracy <= 1:
        raise ConfigError(
            f"plot_tradeoff: the point {(cost, accuracy)} is not (cost, accuracy) as shares; give a cost above 0, 1 "
            "being the dense network's, and an accuracy in 0 .. 1."
        )
    return cost, accuracy


def _networks(path: Path) -> Any:
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"plot_tradeoff: {path} holds no results.json; give the --out of a finished `compress` run.")
    try:
        return json.loads(file.read_text())["networks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"plot_tradeoff: {file} cannot be read ({error}); run it again.") from error


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """`ax`, or that of a new pyplot figure; ConfigError where matplotlib is missing."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ConfigError("Plots need matplotlib; pip install 'dspfx[plots]'.") from error
    made: Axes = plt.subplots(figsize=size, layout="constrained")[1]
    return made


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=None)
