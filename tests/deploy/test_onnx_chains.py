"""dspfx's kernels as an operator of ONNX Runtime: exact, for every batch, and safe from damaged files."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.deploy import export
from dspfx.deploy.onnx_file import read_metadata
from dspfx.deploy.runtimes import build
from dspfx.errors import ConfigError, RuntimeBuildError
from dspfx.kernels.library import FEATURES, PORTABLE, can_run, library_or_none, processor_features
from dspfx.native import NativeChain, has_chains
from dspfx.passes.fuse_native import fuse_native
from tests.compare import error, forced, leaves, pruned
from tests.test_native import UNFIT
from tests.zoo import OTHERS, ZOO

pytestmark = pytest.mark.skipif(library_or_none() is None, reason="the native kernels need a C++ compiler")
ROUNDING = 2e-5  # as of every runtime
ENTRIES = ZOO | OTHERS
# One chain; several with other layers between; several outputs of a chain; several inputs.
NETWORKS = ("resnet_bottleneck", "group_norm", "dict_output", "siamese", "shuffle_unit", "unet", "squeeze_excite")
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def plain(name: str) -> nn.Module:
    """A pruned network of the zoo in float32, lowered without splitting a layer."""
    network: nn.Module = forced(pruned(ENTRIES[name]).float(), "dense")
    return network


def fused(name: str) -> nn.Module:
    network: nn.Module = fuse_native(plain(name))
    return network


class Forked(nn.Module):
    """A chain of two outputs, since what lies between them is no layer of the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.left(x).cumsum(2) * self.right(x)


def check_network(name: str) -> None:
    entry, network, exact = ENTRIES[name], fused(name), plain(name).double()
    assert has_chains(network)
    built = build("onnxruntime-native", network, entry.inputs(2))
    for batch in (1, 2, 5):
        inputs = entry.inputs(batch)
        with torch.no_grad():
            expected = exact(*(x.double() for x in inputs))
        assert error(leaves(expected), leaves(built(*inputs))) <= ROUNDING


@pytest.mark.parametrize("name", NETWORKS)
def test_chains_equal_float64_at_every_batch(name: str) -> None:
    check_network(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ZOO if name not in (*NETWORKS, *UNFIT)])
def test_chains_of_every_other_network_equal_float64(name: str) -> None:
    check_network(name)


def test_a_chain_of_several_outputs() -> None:
    torch.manual_seed(0)
    model = Forked().eval()
    network = fuse_native(forced(model, "dense"))
    (chain,) = (m for m in network.modules() if isinstance(m, NativeChain))
    assert len(chain.chain(((3, 16, 16),)).outputs) == 2
    found = build("onnxruntime-native", network, IMAGES)(IMAGES)
    assert error([model.double()(IMAGES.double())], [found]) <= ROUNDING


def test_two_threads_and_several_calls_at_once_equal_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 32, 32, 3, padding=1) for i in range(4))).eval()
    images = torch.randn(4, 3, 64, 64)  # enough work for two
    network = fuse_native(forced(model, "dense"))
    one, two = (build("onnxruntime-native", network, images, threads) for threads in (1, 2))
    expected = one(images)
    assert error([model.double()(images.double())], [expected]) <= ROUNDING
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: two(images), range(12)):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_lower_enters_the_kernels_into_the_contest() -> None:
    torch.manual_seed(0)
    gm = dspfx.prepare(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)), IMAGES)
    dspfx.prune(gm, dspfx.Budget(flops=0.5))
    small = dspfx.lower(gm, IMAGES, "onnxruntime-native")
    assert "native kernels" in small.meta["contest"].results
    assert error([gm.eval()(IMAGES)], [build("onnxruntime-native", small, IMAGES)(IMAGES)]) <= ROUNDING


def start(file: Path, library: Path) -> Any:
    """ONNX Runtime as a user starts it."""
    ort = importlib.import_module("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(str(file), options)


@pytest.mark.parametrize("features", [*FEATURES, PORTABLE, "native"])
def test_exported_files_run_with_their_library(features: str, tmp_path: Path) -> None:
    network = fused("resnet_bottleneck")
    inputs = ENTRIES["resnet_bottleneck"].inputs(2)
    exported = dspfx.export_onnx(network, tmp_path / "small.onnx", inputs, kernels=features, verbose=False)
    kind = processor_features() if features == "native" else features
    library = tmp_path / f"small.{kind.lower()}.so"
    assert sorted(tmp_path.iterdir()) == sorted([library, tmp_path / "small.onnx"])
    assert exported.any_batch
    assert exported.max_error <= 1e-5
    assert exported.outside_tensorrt == ("dspfx.Chain",)
    assert read_metadata(exported.path)["dspfx.kernels"] == kind
    if can_run(kind):
        (found,) = start(exported.path, library).run(None, {"input0": inputs[0].numpy()})
        assert error([network(*inputs)], [torch.from_numpy(found)]) <= 1e-5
    else:
        with pytest.raises(Exception, match="needs a processor with"):
            start(exported.path, library)


def test_a_file_for_another_processor_is_compared_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this processor could not run what is exported."""
    monkeypatch.setattr(export, "can_run", lambda features: False)
    network, inputs = fused("resnet_bottleneck"), ENTRIES["resnet_bottleneck"].inputs(2)
    exported = dspfx.export_onnx(network, tmp_path / "small.onnx", inputs, kernels=PORTABLE, verbose=False)
    (found,) = start(exported.path, tmp_path / "small.portable.so").run(None, {"input0": inputs[0].numpy()})
    assert error([network(*inputs)], [torch.from_numpy(found)]) <= 1e-5


def test_without_kernels_a_file_is_plain_and_says_what_it_lacks(tmp_path: Path) -> None:
    network, inputs = fused("resnet_bottleneck"), ENTRIES["resnet_bottleneck"].inputs(2)
    with pytest.warns(UserWarning, match="kernels='native'"):
        exported = dspfx.export_onnx(network, tmp_path / "small.onnx", inputs, verbose=False)
    assert exported.outside_tensorrt == ()
    assert list(tmp_path.iterdir()) == [exported.path]


def test_a_network_without_chains_comes_with_the_library_all_the_same(tmp_path: Path) -> None:
    """Whoever deploys need not know what was the fastest."""
    exported = dspfx.export_onnx(nn.Conv2d(3, 4, 3), tmp_path / "a.onnx", IMAGES, kernels=PORTABLE, verbose=False)
    session = start(exported.path, tmp_path / "a.portable.so")
    assert session.run(None, {"input0": IMAGES.numpy()})[0].shape == (2, 4, 14, 14)


@pytest.mark.parametrize("options", [{"kernels": "AVX1024"}, {"kernels": "native", "precision": "fp16"}])
def test_impossible_kernels_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kernels"):
        dspfx.export_onnx(nn.Conv2d(3, 4, 3), tmp_path / "a.onnx", IMAGES, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file and its library."""
    file = tmp_path_factory.mktemp("chains") / "small.onnx"
    inputs = ENTRIES["resnet_bottleneck"].inputs(2)
    dspfx.export_onnx(fused("resnet_bottleneck"), file, inputs, kernels="native", verbose=False)
    return file, file.with_suffix(f".{processor_features().lower()}.so")


def changed(exported: tuple[Path, Path], name: str, change: Any) -> Path:
    """The file with another value of a constant, beside it."""
    onnx = importlib.import_module("onnx")
    model = onnx.load(str(exported[0]))
    (constant,) = (t for t in model.graph.initializer if t.name.endswith(f"_{name}"))
    array = change(onnx.numpy_helper.to_array(constant).copy())
    constant.CopyFrom(onnx.numpy_helper.from_array(array, constant.name))
    file = exported[0].with_name("changed.onnx")
    onnx.save(model, str(file))
    return file


def put(index: int | list[int], value: int | list[int]) -> Any:
    def change(array: Any) -> Any:
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("layout", put(0, 2), "another version"),
        ("layout", put(1, 999), "vectors of 999 floats"),
        ("layout", put(2, 1 << 40), "reaches outside"),
        ("layout", put(2, -5), "reaches outside"),
        ("layout", put(3, 64), "reaches outside"),
        ("layout", put(3, 1 << 60), "reaches outside"),
        ("layout", put([6, 7], [3, 1]), "cut off"),
        ("layout", put([6, 7], [2, 0]), "has 1 images and 1 results"),
        ("layout", put(9, 1 << 62), "cannot have an image"),
        ("layout", lambda x: x[:9], "cut off"),
        ("layout", lambda x: x[:4], "another version"),
        ("weights", lambda x: x[: len(x) // 2], "reaches outside"),
        ("program", lambda x: x[:-2], "reaches outside"),
        ("program", lambda x: np.where(x > 100, x + 10**6, x).astype(np.int32), "reaches outside"),
    ],
)
def test_damaged_files_are_refused(exported: tuple[Path, Path], name: str, change: Any, words: str) -> None:
    session = start(changed(exported, name, change), exported[1])
    (inputs,) = ENTRIES["resnet_bottleneck"].inputs(2)
    for _ in range(2):  # what is wrong stays wrong
        with pytest.raises(Exception, match=words):
            session.run(None, {"input0": inputs.numpy()})


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from dspfx.deploy import runtimes

    def fail() -> None:
        raise RuntimeBuildError("the native kernels need a C++ compiler")

    network = fused("resnet_bottleneck")
    monkeypatch.setattr(runtimes, "library", fail)
    with pytest.raises(RuntimeBuildError, match="C\\+\\+ compiler"):
        build("onnxruntime-native", network, ENTRIES["resnet_bottleneck"].inputs(2))
