"""The recipes of docs/training.md run as they stand, with tiny stand-ins for what is the user's."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import dspfx
from tests.integrations import loops

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
EPOCHS = 2


def recipes() -> dict[str, list[str]]:
    """Title of a section -> its blocks of code."""
    sections = re.split(r"^## (.*)\n", PAGE.read_text(), flags=re.MULTILINE)[1:]
    pairs = zip(sections[::2], sections[1::2], strict=True)
    return {title: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for title, text in pairs}


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the page calls the user's own."""
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "F": F, "dspfx": dspfx, "epochs": EPOCHS}
    dataset = [{"pixel_values": x, "labels": y} for x, y in loops.samples()]
    loader = loops.loader()
    return {**names, "network": loops.Tiny(), "images": loops.batch(0)[0], "loader": loader, "dataset": dataset}


def follow_page(title: str, names: dict[str, Any]) -> dict[str, Any]:
    for block in recipes()[title]:
        exec(compile(block, f"{PAGE}: {title}", "exec"), names)
    return names


def assert_small(gm: Any, small: Any) -> None:
    x = loops.batch(9)[0]
    expected = gm.eval()(x).detach()
    assert torch.allclose(small(x), expected, atol=1e-4 * float(expected.abs().max()))
    assert dspfx.profile(small, x).flops < dspfx.profile(gm, x).flops


def test_every_recipe_is_run() -> None:
    found = {title: len(blocks) for title, blocks in recipes().items() if blocks}
    loops = {"Plain PyTorch": 2, "Lightning": 1, "Accelerate": 1, "Hugging Face's Trainer": 1, "timm": 1}
    assert found == loops | {"Watching it": 1, "Recipes": 3}


def test_watching(user: dict[str, Any]) -> None:
    names = follow_page("Watching it", user)
    last = json.loads(Path("groups.jsonl").read_text().splitlines()[-1])
    assert last["steps"] == loops.STEPS // 2 * 2
    assert last["entropy"] > 0
    assert names["learner"].steps == loops.STEPS


def test_plain(user: dict[str, Any]) -> None:
    names = follow_page("Plain PyTorch", user)
    assert names["learner"].steps == EPOCHS * loops.STEPS
    assert abs(names["plan"].flops_left - 0.5) < 0.05
    assert_small(names["gm"], names["small"])
    saved = torch.load("last.pt", weights_only=True)
    assert saved["learner"]["steps"] == EPOCHS * loops.STEPS


def test_recipes_after_learning(user: dict[str, Any]) -> None:
    x, y = loops.batch(0)
    gm = dspfx.prepare(user["network"], x)
    names = follow_page("Recipes", user | {"gm": gm, "x": x, "y": y, "copy": copy, "cycles": 3})
    names["loss"].backward()
    assert all(p.grad is None for p in user["network"].parameters())
    left = {share: dspfx.profile(dspfx.lower(fork), x).flops for share, fork in names["halves"].items()}
    assert left[0.5] < left[0.7] < dspfx.profile(user["network"], x).flops
    assert 0.4 < names["plan"].flops_left <= 0.5
    assert_small(gm, dspfx.lower(gm))


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:.*tensorboardX.*")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
def test_lightning(user: dict[str, Any]) -> None:
    pytest.importorskip("lightning", reason="needs lightning: the extra dspfx[integrations]")
    names = follow_page("Lightning", user)
    (callback,) = [c for c in names["trainer"].callbacks if type(c).__name__ == "GroupLearning"]
    assert callback.learner.steps == EPOCHS * loops.STEPS
    gm = names["module"].net
    assert_small(gm, dspfx.lower(gm))


@pytest.fixture
def _own_accelerate() -> Iterator[None]:
    state = pytest.importorskip("accelerate.state", reason="needs accelerate: the extra dspfx[integrations]")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_own_accelerate")
def test_accelerate(user: dict[str, Any]) -> None:
    names = follow_page("Accelerate", user)
    assert names["learner"].steps == EPOCHS * loops.STEPS


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.usefixtures("_own_accelerate")
def test_transformers(user: dict[str, Any]) -> None:
    pytest.importorskip("transformers", reason="needs transformers: the extra dspfx[integrations]")
    names = follow_page("Hugging Face's Trainer", user)
    assert len(names["trainer"].state.log_history) > 0
    assert abs(names["plan"].flops_left - 0.5) < 0.05
    names["trainer"].train()
    gm = names["trainer"].model.net
    assert_small(gm, dspfx.lower(gm))


def test_timm(user: dict[str, Any]) -> None:
    pytest.importorskip("timm", reason="needs timm: the extra dspfx[integrations]")
    names = follow_page("timm", user)
    assert names["learner"].steps > 0
    assert_small(names["ema"].module, dspfx.lower(names["ema"].module))
