"""The coverage sweep: its catalogue, its rows, its page, and a few of torchvision's models through all of dspfx."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from tools.sweep.cases import Case, enliven
from tools.sweep.catalogue import QUICK, find_cases
from tools.sweep.check import check
from tools.sweep.page import failed, page, proven
from tools.sweep.run import Results, _Job
from tools.sweep.timm_models import LIST, timm_cases

CATALOGUED = pytest.mark.skipif(
    not torchvision.__version__.startswith("0.29."), reason="the catalogue is of torchvision 0.29"
)
IN_PROCESS = (
    "squeezenet1_1",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "shufflenet_v2_x0_5",
    "quantized_resnet18",
    "mc3_18",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
)


class Small(nn.Module):
    """Two convolutions, a norm between them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).relu())
        return self.head(x.relu().mean((2, 3)))


class Undecided(Small):
    """Its path depends on its input's values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Moody(Small):
    """Its loss cannot be lowered by its weights: the outputs are cut off from them in training."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out * float("inf") if self.training else out


def case(make: Any, name: str = "small") -> Case:
    return Case(name, "torchvision", "classification", "3x8x8", make, lambda: torch.rand(2, 3, 8, 8), classes=4)


@CATALOGUED
def test_catalogue_is_all_of_torchvision_and_one_of_each_timm_file() -> None:
    cases = find_cases("all")
    kinds = {kind: sum(c.kind == kind for c in cases if c.suite == "torchvision") for kind in {c.kind for c in cases}}
    expected = {"classification": 80, "segmentation": 6, "quantizable": 12, "video": 9, "detection": 12}
    assert {k: n for k, n in kinds.items() if n} == {**expected, "optical flow": 2}
    assert len({(c.suite, c.name) for c in cases}) == len(cases) == 121 + len(timm_cases())
    rows = json.loads(LIST.read_text())
    assert len({row["file"] for row in rows}) == len(rows) == 98
    assert all(row["size"] >= 64 and row["params"] > 0 for row in rows)


@CATALOGUED
def test_suites_and_patterns() -> None:
    assert sorted(c.name for c in find_cases("quick")) == sorted(QUICK)
    assert [c.name for c in find_cases("torchvision", ["resnet1*", "vgg11"])] == [
        "resnet101", "resnet152", "resnet18", "vgg11",
    ]  # fmt: skip
    assert find_cases("quick", ["vgg11"]) == []


def test_constants_near_zero_are_made_random_and_others_are_kept() -> None:
    silent, norm = nn.Linear(3, 3), nn.LayerNorm(3)
    model = nn.Sequential(silent, norm, nn.Linear(3, 3))
    nn.init.zeros_(silent.weight)
    nn.init.constant_(norm.bias, 1e-6)
    kept = {name: p.clone() for name, p in model.named_parameters() if name not in ("0.weight", "1.bias")}
    enliven(model)
    assert len(silent.weight.unique()) == 9
    assert len(norm.bias.unique()) == 3
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if name in kept)


def test_row_of_a_network_that_passes() -> None:
    row = check(case(Small))
    assert row["failed"] == {}
    assert (row["parts"], row["gated_layers"], row["layers"]) == ([""], 1, 3)
    conv = 8 * 8 * 9
    macs = {"first": 3 * 6 * conv, "second": 6 * 8 * conv, "head": 8 * 4}
    assert row["gated"] == pytest.approx(macs["second"] / sum(macs.values()))
    assert row["conv_prunable"] == 1.0
    assert 0 < row["flops_left"] < 1
    assert row["error"] <= 1e-9
    assert row["pins"] == [("it is an output of the model", 4)]
    assert json.loads(json.dumps(row)) is not None
    assert proven(row)
    assert failed(row) == []


def test_row_of_a_network_that_is_refused_names_the_reason() -> None:
    row = check(case(Undecided))
    assert list(row["failed"]) == ["prepare"]
    assert row["failed"]["prepare"].startswith("TraceError: Undecided cannot be traced at ")
    assert not proven(row)


def test_row_of_a_training_step_that_fails() -> None:
    row = check(case(Moody))
    assert row["failed"]["training step"] == "_Unequal: the loss is inf"
    assert proven(row)
    assert failed(row)[0] == "training step: _Unequal: the loss is inf"


@CATALOGUED
@pytest.mark.parametrize("name", IN_PROCESS)
def test_models_pass_with_something_pruned(name: str) -> None:
    (found,) = find_cases("quick", [name])
    row = check(found)
    assert failed(row) == []
    assert proven(row)
    assert row["flops_left"] < 1


def test_results_survive_a_kill_and_keep_the_last_row(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    results = Results(path)
    for value in (1, 2):
        results.add({"suite": "torchvision", "model": "b", "value": value})
    results.add({"suite": "timm", "model": "b", "value": 3})
    with path.open("a") as file:
        file.write('{"suite": "torchvision", "mod')
    read = Results.read(path)
    assert {key: row["value"] for key, row in read.rows.items()} == {("torchvision", "b"): 2, ("timm", "b"): 3}
    read.tidy([("timm", "b"), ("torchvision", "a")])
    assert [json.loads(line)["value"] for line in path.read_text().splitlines()] == [3, 2]


class Stuck:
    """A process that never ends, until it is killed."""

    exitcode: int | None = None

    def is_alive(self) -> bool:
        return self.exitcode is None

    def kill(self) -> None:
        self.exitcode = -9

    def join(self) -> None:
        assert self.exitcode is not None


def test_a_process_that_dies_or_takes_too_long_is_a_row(tmp_path: Path) -> None:
    process: Any = Stuck()
    job = _Job(case(Small), process, tmp_path / "row.json", start=0.0)
    assert job.row(limit=1e12) is None
    row = job.row(limit=5)
    assert row is not None
    assert (row["model"], row["ended"], process.exitcode) == ("small", "stopped after 5 s", -9)
    died = job.row(limit=5)
    assert died is not None
    assert died["ended"] == "died with exit code -9"
    (tmp_path / "row.json").write_text('{"verdict": "right"}')
    assert job.row(limit=5) == {"suite": "torchvision", "model": "small", "verdict": "right"}


def test_page_tells_what_passes_what_fails_and_the_peer() -> None:
    names = ("small", "refused", "dead", "missing")
    cases = [case(Small, name) for name in names]
    rows: dict[tuple[str, str], Any] = {
        ("torchvision", "small"): check(cases[0]) | {"on": "a machine"},
        ("torchvision", "refused"): check(case(Undecided)),
        ("torchvision", "dead"): {"ended": "stopped after 600 s"},
    }
    peer = {
        ("torchvision", "small"): {"verdict": "differs", "error": 0.25, "stage": "done"},
        ("torchvision", "dead"): {"verdict": "right but for norms", "error": 0.1},
    }
    text = page(cases, rows, peer, "python made.py")
    assert "selfcheck passes on 1 of 3 models, with something pruned in 1; everything in the row passes on 1." in text
    assert "right on 0 of 2, and on 1 more but for norms" in text
    assert "Not run: missing." in text
    assert "- `dead`: stopped after 600 s" in text
    assert "- `refused`: prepare: TraceError: Undecided cannot be traced" in text
    assert "- `small`: differs by 2.5e-01" in text
    table = [line for line in text.splitlines() if line.startswith("| small ")]
    assert len(table) == 1
    cells = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert cells[:4] == ["small", "3x8x8", "whole", "1 of 3"]
    assert cells[-4:] == ["yes", "yes", "it is an output of the model (4)", "differs by 2.5e-01"]
    assert text.endswith("Made by\n\n    python made.py\n")
