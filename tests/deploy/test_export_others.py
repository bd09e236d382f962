"""OpenVINO's files and torch.export's: what they compute and hold, and what stays behind where none can be made."""

from __future__ import annotations

import copy
import hashlib
import importlib
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dspfx
from dspfx.deploy import export_pt2 as pt2
from dspfx.deploy.agree import disagreement
from dspfx.deploy.export_openvino import read_openvino_metadata, start_openvino
from dspfx.deploy.export_pt2 import read_pt2_metadata
from dspfx.deploy.onnx import Nesting
from dspfx.errors import ConfigError, MismatchError, ModelError, RuntimeBuildError, StorageError
from dspfx.graph.traced import network_meta
from tests.compare import fingerprint, unchanged
from tests.deploy.test_export import ENTRIES, IMAGES, Applied, _looks_at_the_batch, plain, small

KINDS = {".xml": dspfx.export_openvino, ".pt2": dspfx.export_pt2}
NETWORKS = ("fourier_channels", "resnet_bottleneck", "siamese", "named_inputs", "dict_output", "shuffle_unit")

both = pytest.mark.parametrize("suffix", KINDS)


def read(path: Path) -> dict[str, str]:
    return read_openvino_metadata(path) if path.suffix == ".xml" else read_pt2_metadata(path)


def call(path: Path, *inputs: Any) -> Any:
    """What the file returns, called as its network is."""
    if path.suffix == ".xml":
        return start_openvino(path, Nesting.from_json(read(path)["dspfx.nesting"]))(*inputs)
    with torch.no_grad():
        return torch.export.load(path).module()(*inputs)


@both
@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(n, marks=pytest.mark.slow) for n in ENTRIES if n not in NETWORKS)]
)
def test_files_equal_the_network(name: str, suffix: str, tmp_path: Path) -> None:
    network, entry, path = small(name), ENTRIES[name], tmp_path / f"small{suffix}"
    before = fingerprint(network)
    found = KINDS[suffix](network, path, entry.inputs(2), verbose=False)
    assert unchanged(before, fingerprint(network))
    assert found.any_batch
    for batch in (1, 5):
        inputs = entry.inputs(batch, seed=batch)
        with torch.no_grad():
            expected = network(*inputs)
        again = call(path, *inputs)
        assert isinstance(again, type(expected))
        again, expected = (pytree.tree_leaves(x) for x in (again, expected))
        assert disagreement(again, expected)[0] <= found.tolerance == 1e-4


@both
def test_the_file_says_what_it_is(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, path = dspfx.lower(plain(), IMAGES, tune=None), tmp_path / f"small{suffix}"
    found = KINDS[suffix](network, path)
    assert capsys.readouterr().out == f"{found}\n"
    assert ", fp32, any batch (compared at 2, 1, 3), differs from PyTorch by " in str(found)
    metadata = read(path)
    assert metadata == found.metadata
    assert metadata["dspfx.plan"] == hashlib.sha256(network_meta(network)["lower_plan"].to_json().encode()).hexdigest()
    assert metadata["dspfx.compared"] == found.kind
    files = ["small.bin", "small.xml"] if suffix == ".xml" else ["small.pt2"]
    assert sorted(x.name for x in tmp_path.iterdir()) == files


def test_weights_in_half_the_bytes(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3)).eval()
    sizes = []
    for precision in ("fp32", "fp16"):
        found = dspfx.export_openvino(network, tmp_path / "s.xml", IMAGES, precision=precision, verbose=False)
        assert found.max_error <= found.tolerance
        sizes.append((tmp_path / "s.bin").stat().st_size)
    weights = sum(p.numel() for p in network.parameters())
    assert 4 * weights <= sizes[0] <= 1.02 * 4 * weights
    assert 2 * weights <= sizes[1] <= 1.02 * 2 * weights
    with pytest.raises(ConfigError, match=r"^precision is 'int8'; an OpenVINO file takes one of 'fp32', 'fp16'\.$"):
        dspfx.export_openvino(network, tmp_path / "s.xml", IMAGES, precision="int8")


@pytest.mark.parametrize("order", [[1, 2, 3, 0], [2, 0, 3, 1]])
def test_reordered_channels_are_right_in_any_reader(order: list[int], tmp_path: Path) -> None:
    """OpenVINO folds a reordering before a convolution by the wrong order; the file is written so that it does not."""
    openvino = importlib.import_module("openvino")
    after = nn.Conv2d(4, 3, 3)
    network = Applied(lambda y: after(y.index_select(1, torch.tensor(order)).relu())).eval()
    path = tmp_path / "s.xml"
    dspfx.export_openvino(network, path, IMAGES, verbose=False)
    found = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([IMAGES.numpy()])[0]
    with torch.no_grad():
        assert disagreement(torch.from_numpy(found), network(IMAGES))[0] <= 1e-5


@both
def test_a_graph_for_one_batch_says_so(suffix: str, tmp_path: Path) -> None:
    found = KINDS[suffix](Applied(_looks_at_the_batch), tmp_path / f"even{suffix}", IMAGES, verbose=False)
    assert found.batches == (2,)
    assert ", batch 2 only, " in str(found)


@both
def test_what_cannot_be_exported_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"small{suffix}"
    path.write_bytes(b"old")
    gm = dspfx.prepare(plain(), IMAGES)
    with pytest.raises(ModelError, match=r"lower first: small = dspfx\.lower\(gm\), and export that\.$"):
        KINDS[suffix](gm, path)

    def branches(y: Tensor) -> Tensor:
        return y if y.sum() > 0 else -y

    with pytest.raises(RuntimeBuildError, match=r"\nGuardOnDataDependentSymNode: Could not guard on "):
        KINDS[suffix](Applied(branches), path, IMAGES)
    with pytest.raises(StorageError, match=f"is named as another kind of file; end it with {re.escape(suffix)}\\.$"):
        KINDS[suffix](plain(), tmp_path / "small.onnx", IMAGES)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = pt2._program

    def wrong(network: nn.Module, nesting: Nesting) -> Any:
        twin = copy.deepcopy(network)
        with torch.no_grad():
            next(twin.parameters()).mul_(0.5)
        return program(twin, nesting)

    monkeypatch.setattr(pt2, "_program", wrong)
    with pytest.raises(
        MismatchError, match=r"^this Sequential as torch\.export file on torch .* differs from PyTorch by"
    ):
        dspfx.export_pt2(plain(), tmp_path / "s.pt2", IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_pickled_and_the_images_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dspfx.export_pt2(plain(), tmp_path / "s.pt2", IMAGES, verbose=False)
    with zipfile.ZipFile(tmp_path / "s.pt2") as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    assert any(name.endswith("weight_0") for name in contents)
    pickles = (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))  # in an archive of torch.save, or bare
    assert [name for name, data in contents.items() if data.startswith(pickles)] == []

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("it unpickles")

    for name in ("load", "loads"):
        monkeypatch.setattr(f"pickle.{name}", never)
    monkeypatch.setattr(torch, "load", never)
    assert disagreement(call(tmp_path / "s.pt2", IMAGES), plain()(IMAGES).detach())[0] <= 1e-5
