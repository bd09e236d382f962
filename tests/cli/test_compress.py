"""The job end to end, on a few digits of 16x16."""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import dspfx
from dspfx.__main__ import main
from dspfx.cli import compress, models
from dspfx.cli.arguments import add_arguments
from dspfx.cli.data import DataConfig, load_data
from dspfx.cli.options import read_settings
from dspfx.config import Inputs
from dspfx.deploy.costs import MEASURED_IN
from dspfx.deploy.runtimes import RUNTIMES, Runtime
from dspfx.plans import UnifyPlan

DATA = ["--image-size", "16", "--limit-train", "200", "--threads", "1", "--device", "cpu"]
EPOCHS = ["--epochs-dense", "2", "--epochs-learn", "3", "--epochs-tune", "3"]


def command(out: Path, *more: str) -> list[str]:
    return ["compress", "--out", str(out), *DATA, *(more or EPOCHS)]


def read(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(out)) == 0
    return out


def test_results_hold_every_network_and_epoch(finished: Path) -> None:
    results = read(finished)
    assert list(results["networks"]) == ["dense", "pruned", "lowered"]
    assert {name: len(curve) for name, curve in results["curves"].items()} == {"dense": 2, "learn": 3, "tune": 3}
    assert results["arguments"]["budget"] == ["flops=0.35"]
    assert results["left"]["flops"] <= 0.35
    assert results["machine"]["threads"] == 1
    for row in results["networks"].values():
        assert row["test"]["images"] == 359
        assert row["latency_ms"] > 0
    assert results["networks"]["lowered"]["test"] == pytest.approx(results["networks"]["pruned"]["test"], abs=0.003)
    assert results["networks"]["lowered"]["flops"] < results["networks"]["dense"]["flops"]


def test_results_hold_what_the_page_shows(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, text = read(finished), (finished / "report.html").read_text()
    assert [0 < epoch["entropy"] <= math.log(4) for epoch in results["curves"]["learn"]] == [True] * 3
    assert {"penalty", "hypergradient"} <= set(results["curves"]["learn"][0])
    assert "entropy" not in results["curves"]["tune"][0]
    skipped = [layer["name"] for layer in results["coverage"]["plan"]["skipped"]]
    assert skipped == ["conv1", "linear"]
    assert results["coverage"]["pins"][0]["reason"] == "it is an output of the model"
    assert 0 <= results["difference"] <= compress.TOLERANCE
    assert results["networks"]["lowered"]["latency_spread"] >= 0
    assert "What this page cannot show" not in text
    assert str(finished) not in text
    (finished / "report.html").unlink()
    assert main(command(finished)) == 0  # finished, but for the page
    assert (finished / "report.html").read_text() == text
    assert f"{finished / 'report.html'} shows them." in capsys.readouterr().out


def test_the_command_of_a_run_is_the_run(finished: Path, tmp_path: Path) -> None:
    results = read(finished)
    words = results["command"]
    assert words[:4] == ["python", "-m", "dspfx", "compress"]
    assert words[-4:] == ["--device", "cpu", "--threads", "1"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    settings = read_settings(parser.parse_args([*words[4:], "--out", str(tmp_path)]))
    assert json.loads(json.dumps(settings.flat())) == results["arguments"]


def test_results_name_the_runtime_and_what_was_compared_there(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, setting = read(finished), r"input 1x3x16x16, \d+ rounds; eager, .+, 1 thread, .+, torch .+"
    contest = results["contest"]
    assert (results["arguments"]["runtime"], results["runtime"]) == ("eager", "eager")
    assert re.fullmatch(setting, results["latency"])
    assert re.fullmatch(setting, contest["setting"])
    assert results["left"]["latency"] is None
    assert list(contest["results"])[:2] == ["dense", "dead channels removed"]
    assert contest["results"]["dense"]["ratio"] == 1
    assert contest["winner"] != "dense"
    chosen = contest["results"][contest["winner"]]["median_ms"]
    assert results["networks"]["lowered"]["latency_ms"] == pytest.approx(chosen)
    assert main(command(finished)) == 0
    notes = capsys.readouterr().out.splitlines()[-3:-1]
    count = len(contest["results"])
    assert notes == [
        f"Latency: {results['latency']}.",
        f"Lowered: {contest['winner']}, of {count} forms of the network that were timed there.",
    ]


def test_the_saved_network_is_the_one_that_was_measured(finished: Path) -> None:
    small = dspfx.load(finished / "network.safetensors")
    config = DataConfig("digits", 16, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True, 200, 0.1, 0)
    test = load_data(config, 32, torch.device("cpu"), 0).test()
    with torch.no_grad():
        right = sum(int((small(images).argmax(1) == labels).sum()) for images, labels in test.in_order(100))
    assert right / 359 == read(finished)["networks"]["lowered"]["test"]["accuracy"]


def test_the_saved_dense_network_loads_into_the_model(finished: Path) -> None:
    state = safetensors.torch.load_file(finished / "dense.safetensors")
    result = models.build("resnet20", 10).load_state_dict(state, strict=True)
    assert not result.missing_keys


def test_a_finished_run_only_shows_its_results(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "results.json").stat().st_mtime_ns
    assert main(command(finished)) == 0
    shown = capsys.readouterr().out
    assert "This run is finished; give another --out to run again." in shown
    assert "lowered" in shown
    assert (finished / "results.json").stat().st_mtime_ns == before


def test_another_run_in_the_same_folder_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(finished), "--groups", "2"]) == 2
    assert capsys.readouterr().err == (
        f"dspfx compress: error: --out {finished} holds a run with --groups 4, this one has --groups 2; give another "
        "--out, or delete that folder to start over.\n"
    )


def test_one_shot_trains_nothing(finished: Path, tmp_path: Path) -> None:
    checkpoint = str(finished / "dense.safetensors")
    assert main(command(tmp_path, "--checkpoint", checkpoint, "--one-shot", "--budget", "flops=0.6")) == 0
    results = read(tmp_path)
    assert results["curves"] == {"dense": [], "learn": [], "tune": []}
    assert results["networks"]["dense"]["test"] == read(finished)["networks"]["dense"]["test"]
    assert 0.5 < results["left"]["flops"] <= 0.6


UNIFY = ("--unify", "0.5", "--prune-blocks", "0.25", "--block", "4x2")


def test_blocks_become_alike_and_the_file_small(finished: Path, tmp_path: Path) -> None:
    """Interrupted before the last stage and before its results, too."""
    epochs = ("--epochs-tune", "1", "--epochs-unify", "1", "--bits", "4", "--dense-control")
    fork = ["compress", "--fork", str(finished), "--out", str(tmp_path), *DATA[4:], *UNIFY, *epochs]
    assert main(fork) == 0
    results, file = read(tmp_path), tmp_path / "compressed.safetensors"
    assert {name: len(curve) for name, curve in results["curves"].items() if name != "dense"} == {
        "learn": 3, "tune": 1, "unify": 2, "control": 6,
    }  # fmt: skip
    plan = UnifyPlan.from_json((tmp_path / "unify_plan.json").read_text())
    assert plan.config == dspfx.BlockConfig((4, 2), 0.25, 0.5)
    assert plan.unified >= 0.49
    pruned, small = results["networks"]["pruned"], results["networks"]["compressed"]
    assert small["file_bytes"] == file.stat().st_size < 0.12 * pruned["file_bytes"]
    assert small["test"] == pruned["test"]  # values that trained are written exactly
    before = file.read_bytes()
    for name in ("results.json", "compressed.safetensors", "checkpoints/settle.pt"):
        (tmp_path / name).unlink()
    assert main(fork) == 0
    assert file.read_bytes() == before
    one_shot = [*command(tmp_path / "one", "--fork", str(finished), "--one-shot"), *UNIFY, "--bits", "32"]
    assert main(one_shot) == 0
    networks = read(tmp_path / "one")["networks"]
    assert networks["compressed"]["test"] == networks["pruned"]["test"]


def test_control_trains_as_long_as_the_pruned_network(finished: Path, tmp_path: Path) -> None:
    checkpoint = str(finished / "dense.safetensors")
    epochs = ["--epochs-learn", "1", "--epochs-tune", "2", "--mode", "exact"]
    assert main(command(tmp_path, "--checkpoint", checkpoint, *epochs, "--dense-control")) == 0
    results = read(tmp_path)
    assert {name: len(curve) for name, curve in results["curves"].items()} == {
        "dense": 0,
        "learn": 1,
        "tune": 2,
        "control": 3,
    }
    assert results["networks"]["control"]["flops"] == results["networks"]["dense"]["flops"]
    assert results["networks"]["control"]["test"] != results["networks"]["dense"]["test"]


LATENCY = ("--one-shot", "--epochs-dense", "1", "--budget", "latency=0.7", "params=0.8")


class Tiny(nn.Sequential):
    """What takes the place of ResNet20 where only the command is at stake."""

    def __init__(self, classes: int) -> None:
        first, second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 96, 3, stride=2)
        middle = (nn.BatchNorm2d(64), nn.ReLU(), second, nn.BatchNorm2d(96), nn.ReLU())
        super().__init__(first, *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, classes))


@pytest.fixture(scope="module")
def tiny() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", lambda name, classes: Tiny(classes))
        yield


@pytest.fixture(scope="module")
def pruned_for_time(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that pruned to a latency, which is a matter of FLOPs here (conftest.py), and what it said."""
    out = tmp_path_factory.mktemp("latency") / "out"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(compress, "say", lines.append)
        assert main(command(out, *LATENCY)) == 0
    (out / "said").write_text("\n".join(lines))
    return out


def test_a_latency_is_tried_before_training_and_then_met(pruned_for_time: Path) -> None:
    results = read(pruned_for_time)
    assert results["arguments"]["budget"] == ["params=0.8", "latency=0.7"]
    assert 0.6 < results["left"]["latency"] <= 0.7 * 1.02
    assert results["left"]["params"] <= 0.8
    assert results["contest"]["results"][results["contest"]["winner"]]["ratio"] <= 0.7 * 1.02
    said = (pruned_for_time / "said").read_text()
    tried = said.index(
        "Can this network reach 70.0% of its time on eager? Tried before training; its layers are measured once on a "
        "machine.\nIt can: "
    )
    assert re.search(r"\nIt can: \d\d\.\d% was measured, with \d\d\.\d% of the FLOPs\.\n", said)
    assert tried < said.index("\ndense: validation")
    assert said.index("\nmeasured latency: ") < said.index("\nlowered for eager:\nnetwork ")


def test_a_run_that_goes_on_measures_no_latency_again(
    pruned_for_time: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(pruned_for_time, out)
    (out / "results.json").unlink()
    monkeypatch.setattr(dspfx, "prune", lambda *args, **options: pytest.fail("pruned again"))
    assert main(command(out, *LATENCY)) == 0
    expected, found = read(pruned_for_time), read(out)
    assert (found["left"], found["contest"]) == (expected["left"], expected["contest"])


def test_another_runtime_is_another_run(pruned_for_time: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(pruned_for_time, *LATENCY, "--runtime", "inductor")) == 2
    assert capsys.readouterr().err == (
        f"dspfx compress: error: --out {pruned_for_time} holds a run with --runtime eager, this one has --runtime "
        "inductor; give another --out, or delete that folder to start over.\n"
    )


def test_a_latency_out_of_reach_ends_the_run_before_training(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(tmp_path), "--budget", "latency=0.001"]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("dspfx compress: error: a latency of 0.001 is below ")
    assert streams.out.splitlines()[-1].startswith("Can this network reach 0.1% of its time on eager?")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_network_that_the_runtime_rejects_ends_the_run_before_training(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reject(*args: Any) -> Any:
        raise RuntimeError("it has no kernel")

    monkeypatch.setitem(RUNTIMES, "broken", Runtime(reject, tolerance=1e-5))
    assert main([*command(tmp_path), "--runtime", "broken"]) == 2
    streams = capsys.readouterr()
    assert streams.err == (
        "dspfx compress: error: dense: broken cannot run this Tiny; use another runtime ('eager' runs everything), or "
        "change in the model what the reason names:\nRuntimeError: it has no kernel\n"
    )
    assert "dense 1/2" not in streams.out


def test_a_run_for_another_runtime_is_pruned_lowered_and_timed_there(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def make(network: nn.Module, inputs: Inputs, threads: int, any_batch: bool) -> Any:
        calls.append(threads)
        return network.forward

    monkeypatch.setitem(RUNTIMES, "other", Runtime(make, tolerance=1e-5))
    monkeypatch.setitem(MEASURED_IN, "other", "eager")
    epochs = ("--epochs-dense", "1", "--epochs-learn", "1", "--epochs-tune", "1", "--budget", "latency=0.7")
    assert main(command(tmp_path, *epochs, "--runtime", "other")) == 0
    results, setting = read(tmp_path), r"input 1x3x16x16, \d+ rounds; other, .+, 1 thread, .+"
    assert (results["arguments"]["runtime"], results["runtime"]) == ("other", "other")
    assert re.fullmatch(setting, results["latency"])
    assert re.fullmatch(setting, results["contest"]["setting"])
    out = capsys.readouterr().out
    assert "Can this network reach 70.0% of its time on other? " in out
    assert "\nlowered for other:\nnetwork " in out
    timed = 2 + len(results["contest"]["results"]) + 3  # before training, in the contest, for the table
    assert len(calls) > timed
    assert set(calls) == {1}


def test_an_infeasible_budget_ends_the_run_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command(tmp_path), "--budget", "flops=0.0001"]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith("dspfx compress: error: ")
    assert "dense 1/2" not in streams.out
