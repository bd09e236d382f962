"""The benchmark command: what is timed, told and written; time is FLOPs here (conftest.py), so ratios are known."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dspfx
from dspfx.__main__ import main
from dspfx.cli import networks
from dspfx.config import Inputs
from dspfx.deploy import runtimes
from dspfx.deploy.runtimes import RUNTIMES, Runtime
from tests.zoo import OTHERS

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = ("--rounds", "2")


class Small(nn.Sequential):
    """A network with channels to remove, for images of any size."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small network lowered as it is, and lowered with half of its first filters zero."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model, found = Small(), {"dense": folder / "dense.safetensors", "half": folder / "half.safetensors"}
    dspfx.save(dspfx.lower(model, torch.randn(4, 3, 12, 12), tune=None), found["dense"])
    conv = model[0]
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    with torch.no_grad():
        conv.weight[::2], conv.bias[::2] = 0, 0
    dspfx.save(dspfx.lower(model, torch.randn(4, 3, 12, 12), tune=None), found["half"])
    return found


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["benchmark", *map(str, argv), *ROUNDS]) == 0
    return capsys.readouterr().out


def recorded(capsys: pytest.CaptureFixture[str], *argv: object) -> Any:
    return json.loads(shown(capsys, *argv, "--json", "-"))


def failed(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["benchmark", *map(str, argv)]) == 2
    return capsys.readouterr().err


def flops_ratio(files: dict[str, Path]) -> float:
    dense, half = (dspfx.profile(dspfx.load(files[name])).flops for name in ("dense", "half"))
    return half / dense


def test_one_table_for_each_runtime_and_batch(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    argv = (files["dense"], files["half"], "--runtime", "eager,onnxruntime", "--batch", "1,3", "--json", path)
    tables = shown(capsys, *argv).strip().split("\n\n")
    results = json.loads(path.read_text())["results"]
    assert [table.splitlines()[-1] for table in tables] == [result["setting"] for result in results]
    versions = ["eager"] * 2 + [f"onnxruntime {importlib.import_module('onnxruntime').__version__}"] * 2
    for result, batch, version in zip(results, [1, 3, 1, 3], versions, strict=True):
        assert (result["runtime"], result["version"], result["batch"]) == (version.split()[0], version, batch)
        expected = rf"input {batch}x3x12x12, 2 rounds; {re.escape(version)}, .+, 1 thread, \w+ \w+, torch .+"
        assert re.fullmatch(expected, result["setting"])
    header, _, dense, half = (re.split(r"\s{2,}", line.strip()) for line in tables[1].splitlines()[:-1])
    assert header == ["network", "median ms", f"ratio to {files['dense']}", "spread"]
    assert dense[::2] == [str(files["dense"]), "1.000"]
    assert half[0] == str(files["half"])
    assert float(half[2]) == pytest.approx(flops_ratio(files), abs=0.01)


def test_the_record_is_complete(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "record.json"
    text = shown(capsys, files["dense"], files["half"], "--batch", "2", "--threads", "2", "--json", path)
    content = json.loads(path.read_text())
    assert list(content) == ["machine", "versions", "threads", "rounds", "results"]
    assert list(content["machine"]) == ["processor", "device", "cores", "threads", "platform"]
    assert content["versions"]["torch"] == torch.__version__
    assert (content["threads"], content["machine"]["threads"], content["rounds"]) == (2, 2, 2)
    (result,) = content["results"]
    assert (result["runtime"], result["batch"], result["input"]) == ("eager", 2, "2x3x12x12")
    assert result["setting"] == text.strip().splitlines()[-1]
    assert list(result["networks"]) == [str(files["dense"]), str(files["half"])]
    dense, half = result["networks"].values()
    assert (dense["ratio"], dense["spread"], half["spread"]) == (1.0, 0.0, 0.0)
    assert half["ratio"] == pytest.approx(half["median_ms"] / dense["median_ms"])
    assert half["ratio"] == pytest.approx(flops_ratio(files), abs=0.01)
    assert list(tmp_path.iterdir()) == [path]


def test_inputs_are_what_a_file_remembers_or_what_is_given(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def shapes(*argv: str) -> list[str]:
        return [result["input"] for result in recorded(capsys, files["half"], *argv)["results"]]

    assert shapes() == ["4x3x12x12"]
    assert shapes("--batch", "1,9") == ["1x3x12x12", "9x3x12x12"]
    assert shapes("--input", "2,3,9,7") == ["2x3x9x7"]
    assert shapes("--input", "2,3,9,7", "--batch", "5") == ["5x3x9x7"]


def test_beside_named_networks_a_file_says_the_size(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """What was trained at another size than its architecture is known for is timed, and exported, at its own."""
    found = recorded(capsys, "resnet20", files["half"], "--batch", "3")["results"][0]
    assert found["input"] == "3x3x12x12"
    assert list(found["networks"]) == ["resnet20", str(files["half"])]
    assert recorded(capsys, files["half"], "resnet20")["results"][0]["input"] == "1x3x12x12"
    assert recorded(capsys, "resnet20")["results"][0]["input"] == "1x3x32x32"


def test_inputs_that_are_no_images_are_made_up_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = OTHERS["named_inputs"]
    path = tmp_path / "lowered.safetensors"
    dspfx.save(dspfx.lower(entry.build(), entry.inputs(), tune=None), path)
    remembered = dspfx.load(path).meta["inputs"]
    assert isinstance(remembered, Inputs)
    found = networks.random_inputs([str(path)], [dspfx.load(path)], None, 5)
    assert found.kwargs.keys() == remembered.kwargs.keys()
    assert recorded(capsys, path, "--batch", "5")["results"][0]["batch"] == 5


def test_networks_of_one_name_are_told_apart(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(files["half"])
    assert list(recorded(capsys, path, path, path)["results"][0]["networks"]) == [path, f"{path} (2)", f"{path} (3)"]
    assert networks.told_apart(["a", "b", "a (2)", "a"]) == ["a", "b", "a (2)", "a (3)"]


def test_lowered_forms_are_timed_behind_their_networks(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dspfx.prepare(Small(), torch.randn(1, 3, 12, 12))
    dspfx.prune(model, dspfx.Budget(flops=0.5))
    pruned = tmp_path / "pruned.safetensors"
    dspfx.save(dspfx.lower(model, tune=None, fold=False), pruned)
    rows = recorded(capsys, files["dense"], pruned, "--lowered")["results"][0]["networks"]
    assert list(rows) == [name + more for name in (str(files["dense"]), str(pruned)) for more in ("", ", lowered")]
    ratios = [row["ratio"] for row in rows.values()]
    assert ratios[0] == ratios[1] == 1
    assert ratios[3] <= ratios[2] < 1


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> str:
    """A runtime that rejects every network."""

    def reject(*args: Any) -> Any:
        raise RuntimeError("it has no kernel")

    monkeypatch.setitem(RUNTIMES, "broken", Runtime(reject, tolerance=1e-5))
    return (
        "broken cannot run this GraphModule; use another runtime ('eager' runs everything), or change in the model "
        "what the reason names:\nRuntimeError: it has no kernel"
    )


def test_a_network_that_a_runtime_rejects_is_an_error(
    files: dict[str, Path], broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = failed(capsys, files["half"], "--runtime", "broken")
    assert message == f"dspfx benchmark: error: {files['half']}: {broken}\n"


def test_among_several_runtimes_it_is_a_note(
    files: dict[str, Path], broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, reason = tmp_path / "record.json", f"{files['half']}: {broken}".replace("\n", " ")
    text = shown(capsys, files["half"], "--runtime", "broken,eager", "--json", path)
    assert text.splitlines()[0] == f"input 4x3x12x12 on broken is left out: {reason}"
    rejected, timed = json.loads(path.read_text())["results"]
    assert (rejected["runtime"], rejected["rejected"]) == ("broken", reason)
    assert "networks" not in rejected
    assert list(timed["networks"]) == [str(files["half"])]


def test_where_every_runtime_rejects_it_nothing_is_written(
    files: dict[str, Path], broken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    message = failed(capsys, files["half"], "--runtime", "broken,broken", "--json", path)
    assert message == f"dspfx benchmark: error: {files['half']}: {broken}\n"
    assert not path.exists()


def test_what_cannot_be_done_is_one_line(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start, half = "dspfx benchmark: error: ", files["half"]
    assert failed(capsys, half, "--runtime", "eager,fast") == (
        f"{start}runtime is 'fast', which dspfx does not know; give one of {', '.join(map(repr, RUNTIMES))}.\n"
    )
    assert failed(capsys, half, tmp_path / "none.safetensors") == (
        f"{start}{tmp_path / 'none.safetensors'} is not a file; give one that dspfx.save wrote, or the name of a "
        "network.\n"
    )
    for target in (tmp_path, tmp_path / "none" / "record.json"):
        assert failed(capsys, half, "--json", target) == (
            f"{start}--json {target} cannot be written; give a file in a folder that exists, or - to print.\n"
        )
    assert failed(capsys, half, "--rounds", "1", "--threads", "3") == (
        f"{start}benchmark got rounds=1 and threads=3; give at least 2 rounds and 1 thread.\n"
    )
    assert failed(capsys, half, "--input", "1,5,12,12").startswith(f"{start}")


def test_a_runtime_that_is_not_installed_names_the_extra(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = importlib.import_module

    def absent(name: str) -> Any:
        if name == "openvino":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name)

    monkeypatch.setattr(runtimes.importlib, "import_module", absent)
    assert failed(capsys, files["half"], "--runtime", "eager,openvino") == (
        "dspfx benchmark: error: the runtime 'openvino' needs the package openvino, which cannot be imported (No "
        "module named 'openvino'); run: pip install \"dspfx[openvino]\"\n"
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("batch", ["0", "1,", "-1", "many"])
def test_a_bad_batch_is_explained(batch: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["benchmark", "resnet20", f"--batch={batch}"])
    wrong = batch.split(",")[-1]
    message = f"argument --batch: {wrong!r} is no number of samples; give 1 or more"
    assert message in capsys.readouterr().err


def test_the_tool_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/benchmark.py", "resnet21"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "tools" / "benchmark.py"), run_name="__main__")
    assert capsys.readouterr().err.startswith("dspfx benchmark: error: network 'resnet21' is not known; give one of ")
