from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import dspfx
from dspfx.__main__ import main
from dspfx.cli import models, networks


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pruned and the lowered ResNet20."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    gm = dspfx.prepare(models.build("resnet20", 10), torch.zeros(1, 3, 32, 32))
    dspfx.prune(gm, dspfx.Budget(flops=0.2))
    found = {"pruned": folder / "pruned.safetensors", "lowered": folder / "lowered.safetensors"}
    dspfx.save(gm, found["pruned"])
    dspfx.save(dspfx.lower(gm), found["lowered"])
    return found


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["profile", *argv]) == 0
    return capsys.readouterr().out


def row(text: str, name: str) -> list[str]:
    return next(re.split(r"\s{2,}", line) for line in text.splitlines() if line.startswith(name + " "))


def test_a_named_network(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "resnet20")
    flops = 16 * 3 * 9 * 32 * 32
    assert row(text, "conv1") == ["conv1", "Conv2d", "16x3x3x3", f"{flops:,}", "432"]
    assert "269,722 parameters" in text


def test_input_and_classes_are_followed(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "resnet20", "--input", "1,3,16,48", "--classes", "7")
    assert row(text, "conv1")[3] == f"{16 * 3 * 9 * 16 * 48:,}"
    assert row(text, "linear")[2] == "7x64"


def test_dense_against_lowered(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "resnet20", "--against", str(files["lowered"]))
    dense, small = models.build("resnet20", 10), dspfx.load(files["lowered"])
    counts = [sum(p.numel() for p in network.parameters()) for network in (dense, small)]
    flops = [dspfx.profile(network, torch.zeros(1, 3, 32, 32)).flops for network in (dense, small)]
    total = row(text, "total")
    assert total[1:3] == [f"{flops[0]:,} / {counts[0]:,}", f"{flops[1]:,} / {counts[1]:,}"]
    assert total[3] == f"{flops[1] / flops[0]:.1%}"
    assert row(text, "layer3.2.conv2")[1] == "64x64x3x3"
    assert len(text.splitlines()) == 2 + 39 + 1 + 1  # header, layers of the dense network, total, bytes


def test_a_saved_network_alone(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(files["lowered"]))
    assert "for an input of 1x3x32x32" in text


def test_a_pruned_network_is_read_into_the_named_one(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, "resnet20", "--against", str(files["pruned"]))
    assert row(text, "total")[3] == "100.0%"  # masked, not yet lowered


def test_a_compressed_file_is_read_into_the_named_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.build("resnet20", 10)
    dspfx.write_compressed(model, tmp_path / "small.safetensors", bits=4)
    text = shown(capsys, "resnet20", "--against", str(tmp_path / "small.safetensors"))
    assert row(text, "total")[3] == "100.0%"
    _, read = networks.open_networks(["resnet20", str(tmp_path / "small.safetensors")], None)
    expected = dspfx.read_compressed(tmp_path / "small.safetensors", model).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in read.state_dict().items())
    assert main(["profile", str(tmp_path / "small.safetensors")]) == 2
    assert "read_compressed" in capsys.readouterr().err


def test_json(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = str(files["lowered"])
    content = json.loads(shown(capsys, "resnet20", "--against", path, "--json"))
    assert list(content) == ["resnet20", path]
    assert content["resnet20"]["params"] == 269_722
    assert content[path]["flops"] == sum(layer["flops"] for layer in content[path]["layers"])
    assert content[path]["flops"] < content["resnet20"]["flops"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["resnet21"], "dspfx profile: error: network 'resnet21' is not known; give one of "),
        (["runs/none.safetensors"], "dspfx profile: error: runs/none.safetensors is not a file; give one that dspfx."),
    ],
)
def test_what_is_not_there_is_explained(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *argv]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_bad_shape_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["profile", "resnet20", "--input", "1x3"])
    assert "argument --input: '1x3' is no shape; give sizes such as 1,3,224,224" in capsys.readouterr().err
