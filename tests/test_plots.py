"""What is drawn, read back from the Axes; pyplot is left alone where an Axes is given."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dspfx
from dspfx.errors import ConfigError, StorageError
from dspfx.plans import Group, PrunedLayer, PrunePlan

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib (the extra plots) is not installed")
from matplotlib.figure import Figure  # noqa: E402

PLAN = PrunePlan(
    layers=(
        PrunedLayer("conv1", 2, 2, (Group((0,), (0,)), Group((1,), (0, 1))), 400, 300),
        PrunedLayer("conv2", 2, 2, (Group((0,), (1,)),), 100, 25),
    ),
    flops_left=0.65,
    params_left=0.6,
    gated_flops_left=0.65,
    beta=0.1,
)


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    yield
    plt.close("all")


def write_run(folder: Path, accuracy: float, flops: float, latency: float, dense: float = 0.9) -> Path:
    folder.mkdir()
    networks = {
        "dense": {"test": {"accuracy": dense}, "flops_needed": 1.0, "latency_ratio": 1.0},
        "lowered": {"test": {"accuracy": accuracy}, "flops_needed": flops, "latency_ratio": latency},
    }
    (folder / "results.json").write_text(json.dumps({"networks": networks}))
    return folder


def curves(ax: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [(float(x), float(y)) for x, y in line.get_xydata()] for line in ax.get_lines()}


def test_a_plan_has_a_bar_a_layer() -> None:
    ax: Any = PLAN.plot()
    grey, green = ax.containers
    assert [bar.get_width() for bar in grey] == [1, 1]
    assert [bar.get_width() for bar in green] == [0.75, 0.25]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["conv1", "conv2"]
    assert ax.yaxis_inverted()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["whole network: 65.0%"]


def test_pairs_are_joined_in_the_order_of_their_cost() -> None:
    ax = dspfx.plot_tradeoff({"ours": [(0.5, 0.8), (0.25, 0.75)], "theirs": [(0.5, 0.7)]})
    assert curves(ax) == {"ours": [(0.25, 0.75), (0.5, 0.8)], "theirs": [(0.5, 0.7)]}
    assert ax.get_ylabel() == "test accuracy"


def test_runs_are_read_from_their_folders(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", 0.85, 0.35, 0.6), write_run(tmp_path / "b", 0.8, 0.2, 0.3)
    ax = dspfx.plot_tradeoff([a, str(b / "results.json")])
    assert curves(ax) == {"dspfx": [(0.2, 0.8), (0.35, 0.85)]}
    assert np.asarray(ax.collections[0].get_offsets()).tolist() == [[1.0, 0.9]]
    ax = dspfx.plot_tradeoff({"mine": a, "pairs": [(0.5, 0.5)]}, against="latency")
    assert curves(ax) == {"mine": [(0.6, 0.85)], "pairs": [(0.5, 0.5)]}
    assert ax.get_xlabel() == "measured latency, of the dense network"


def test_an_axes_that_is_given_is_used_and_pyplot_is_not_touched() -> None:
    ax = Figure().subplots()
    assert dspfx.plot_tradeoff([(0.5, 0.8)], ax=ax) is ax
    code = (
        "import sys, dspfx; assert 'matplotlib' not in sys.modules\n"
        f"from matplotlib.figure import Figure; PLAN = dspfx.plans.PrunePlan.from_json({PLAN.to_json()!r})\n"
        "ax = Figure().subplots(); assert PLAN.plot(ax=ax) is ax; dspfx.plot_tradeoff([(0.5, 0.8)], ax=ax)\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for draw in (PLAN.plot, lambda: dspfx.plot_tradeoff([(0.5, 0.8)])):
        with pytest.raises(ConfigError, match=r"^Plots need matplotlib; pip install 'dspfx\[plots\]'\.$"):
            draw()


@pytest.mark.parametrize(
    ("results", "against", "message"),
    [
        ([(0.5, 0.8)], "size", "plot_tradeoff: against is 'size'; give 'flops' or 'latency'."),
        ([], "flops", "plot_tradeoff: there is no point; give (cost, accuracy) pairs or folders of finished runs."),
        ({"a": []}, "flops", "plot_tradeoff: there is no point; give (cost, accuracy) pairs or folders of finished "),
        ([(0.5,)], "flops", "plot_tradeoff: (0.5,) is no point; give (cost, accuracy) or the folder of a run."),
        ([(0.5, float("nan"))], "flops", "plot_tradeoff: (0.5, nan) is no point; give (cost, accuracy) or the folder"),
        ([(0.5, 80)], "flops", "plot_tradeoff: the point (0.5, 80.0) is not (cost, accuracy) as shares; give a cost"),
        (["nowhere"], "flops", "plot_tradeoff: nowhere holds no results.json; give the --out of a finished `compress`"),
    ],
)
def test_mistakes_are_explained(results: Any, against: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        dspfx.plot_tradeoff(results, against)


def test_damaged_results_are_explained(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(StorageError, match=rf"^plot_tradeoff: {re.escape(str(tmp_path))}/results\.json cannot be read"):
        dspfx.plot_tradeoff([tmp_path])
    (tmp_path / "results.json").write_text('{"networks": {"dense": {}}}')
    with pytest.raises(
        StorageError, match=rf"^plot_tradeoff: the results in {re.escape(str(tmp_path))} have no 'test'"
    ):
        dspfx.plot_tradeoff([tmp_path])
