"""ONNX files: what they compute, hold and weigh, and what stays behind where none can be made."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import dspfx
from dspfx.config import Inputs
from dspfx.deploy import export, exported
from dspfx.deploy.agree import disagreement
from dspfx.deploy.exported import TOLERANCES
from dspfx.deploy.onnx import OPSET, OPSET_BF16, Nesting
from dspfx.deploy.onnx_file import read_graph, read_metadata, start_file
from dspfx.deploy.tensorrt_ops import OPSETS, SUPPORTED, operations, refused
from dspfx.errors import ConfigError, DspfxError, InputError, MismatchError, ModelError, RuntimeBuildError, StorageError
from dspfx.graph.traced import network_meta
from tests.compare import fingerprint, forced, pruned, unchanged
from tests.zoo import OTHERS, ZOO

ENTRIES = ZOO | OTHERS
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
NETWORKS = (
    *("resnet_bottleneck", "group_norm", "shape_branch", "siamese", "named_inputs", "dict_output", "shuffle_unit"),
    "fourier_channels",
    "padded_average",
)
ORT = importlib.import_module("onnxruntime").__version__
KIND = f"onnx on onnxruntime {ORT}"


def small(name: str) -> nn.Module:
    """A pruned network of the zoo, lowered with every split that can be made, in float32."""
    network: nn.Module = forced(pruned(ENTRIES[name])).float()
    return network


def plain() -> nn.Module:
    """A network that traces, with channels to spare."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(8, 4)).eval()


def call(path: Path, *inputs: Any) -> Any:
    """What the file returns, called as its network is."""
    return start_file(path, Nesting.from_json(read_metadata(path)["dspfx.nesting"]))(*inputs)


@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(n, marks=pytest.mark.slow) for n in ENTRIES if n not in NETWORKS)]
)
def test_files_equal_the_network_and_need_only_what_tensorrt_has(name: str, tmp_path: Path) -> None:
    network, entry, path = small(name), ENTRIES[name], tmp_path / "small.onnx"
    before = fingerprint(network)
    found = dspfx.export_onnx(network, path, entry.inputs(2), verbose=False)
    assert unchanged(before, fingerprint(network))
    assert found.any_batch
    assert found.max_error <= found.tolerance == TOLERANCES["fp32"]
    for batch in (1, 5):
        inputs = entry.inputs(batch, seed=batch)
        with torch.no_grad():
            expected = network(*inputs)
        again = call(path, *inputs)
        assert type(again) is type(expected)
        assert disagreement(again, expected)[0] <= TOLERANCES["fp32"]
    model = read_graph(path)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert found.outside_tensorrt == refused(model) == ()
    assert set(operations(model)) <= SUPPORTED


def test_the_opsets_are_tensorrts() -> None:
    assert {OPSET, OPSET_BF16} <= set(OPSETS)
    assert {"Conv", "Gemm", "QuantizeLinear", "DequantizeLinear", "Gelu"} <= SUPPORTED
    assert not {"DFT", "QLinearConv", "ConvInteger", "SequenceAt", "Unique", "AffineGrid"} & SUPPORTED


@pytest.mark.parametrize(
    ("kind", "attributes", "outputs", "why"),
    [
        ("DFT", {}, 1, ("DFT",)),
        ("AveragePool", {"kernel_shape": [3]}, 1, ("AveragePool of 1 dimensions",)),
        ("AveragePool", {"kernel_shape": [3, 3], "dilations": [2, 1]}, 1, ("AveragePool with dilations",)),
        ("MaxPool", {"kernel_shape": [2, 2]}, 2, ("MaxPool with indices",)),
        ("MaxPool", {"kernel_shape": [2, 2]}, 1, ()),
        ("LayerNormalization", {}, 2, ("LayerNormalization with a mean",)),
        ("Resize", {"antialias": 1}, 1, ("Resize with antialiasing",)),
        ("ScatterND", {"reduction": "add"}, 1, ("ScatterND with a reduction",)),
        ("ScatterND", {"reduction": "none"}, 1, ()),
    ],
)
def test_restrictions_of_the_list_are_seen(kind: str, attributes: Any, outputs: int, why: tuple[str, ...]) -> None:
    helper = importlib.import_module("onnx").helper
    node = helper.make_node(kind, ["x"], [f"y{i}" for i in range(outputs)], **attributes)
    inner = helper.make_graph([node], "inner", [], [])
    for graph in (inner, helper.make_graph([helper.make_node("If", ["c"], ["z"], then_branch=inner)], "g", [], [])):
        assert refused(helper.make_model(graph)) == why
    other = helper.make_node("Conv", ["x", "w"], ["y"], domain="com.example")
    model = helper.make_model(helper.make_graph([other], "g", [], []))
    assert refused(model) == operations(model) == ("com.example.Conv",)


def test_the_file_says_what_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = dspfx.lower(plain(), IMAGES, tune=None)
    path = tmp_path / "small.onnx"
    found = dspfx.export_onnx(network, path)
    assert capsys.readouterr().out == f"{found}\n"
    text = (
        f"{path}: {KIND}, fp32, any batch (compared at 2, 1, 3), differs from PyTorch by {found.max_error:.1e} of the "
        f"output's scale, allowed 0.0001"
    )
    assert str(found) == text
    plan = network_meta(network)["lower_plan"].to_json()
    metadata = read_metadata(path)
    assert metadata == found.metadata
    assert metadata["dspfx.plan"] == hashlib.sha256(plan.encode()).hexdigest()
    expected = {"precision": "fp32", "compared": KIND, "tolerance": "1.000e-04", "batches": "2,1,3"}
    assert {key: metadata[f"dspfx.{key}"] for key in expected} == expected
    assert float(metadata["dspfx.max_error"]) == pytest.approx(found.max_error, rel=1e-3)
    assert metadata["dspfx.version"] == dspfx.__version__
    assert metadata["torch.version"] == torch.__version__
    graph = read_graph(path).graph
    assert ([x.name for x in graph.input], [x.name for x in graph.output]) == (["input0"], ["output0"])
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert str(Path.cwd()) not in path.read_bytes().decode("latin1")  # no line of the sources


def test_a_network_of_torch_has_no_plan_and_its_inputs_are_guessed(tmp_path: Path) -> None:
    network = plain().train()
    found = dspfx.export_onnx(network, tmp_path / "plain.onnx", verbose=False)
    assert network.training
    assert found.metadata["dspfx.plan"] == ""
    images = torch.linspace(-1, 1, 3 * 224 * 224).reshape(1, 3, 224, 224)
    assert disagreement(call(tmp_path / "plain.onnx", images), network.eval()(images).detach())[0] <= 1e-5


def test_one_image_as_example_does_for_every_batch(tmp_path: Path) -> None:
    found = dspfx.export_onnx(plain(), tmp_path / "one.onnx", IMAGES[:1], verbose=False)
    assert found.batches == (2, 1, 3)


@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_the_file_is_hardly_larger_than_the_weights(name: str, tmp_path: Path) -> None:
    network = dspfx.lower(torchvision.models.get_model(name, weights=None), torch.zeros(2, 3, 64, 64), tune=None)
    path = tmp_path / "network.onnx"
    dspfx.export_onnx(network, path, verbose=False)
    weights = sum(p.numel() for p in network.parameters())
    assert path.stat().st_size <= 1.02 * 4 * weights
    dspfx.export_onnx(network, path, precision="fp16", verbose=False)
    assert path.stat().st_size <= 1.02 * 2 * weights


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_keeps_float32_at_its_ends(precision: str, tmp_path: Path) -> None:
    network, path = plain(), tmp_path / "half.onnx"
    found = dspfx.export_onnx(network, path, IMAGES, precision=precision, verbose=False)
    assert 0 < found.max_error <= TOLERANCES[precision]
    types = importlib.import_module("onnx").TensorProto
    graph = read_graph(path).graph
    kind = types.FLOAT16 if precision == "fp16" else types.BFLOAT16
    assert {x.type.tensor_type.elem_type for x in (*graph.input, *graph.output)} == {types.FLOAT}
    assert {x.data_type for x in graph.initializer if x.data_type != types.INT64} == {kind}
    assert next(network.parameters()).dtype == torch.float32
    assert list(tmp_path.iterdir()) == [path]


def test_int8_is_symmetric_and_explicit(tmp_path: Path) -> None:
    network, path = plain(), tmp_path / "int8.onnx"
    batches = (IMAGES * scale for scale in (1.0, 0.5))
    found = dspfx.export_onnx(network, path, IMAGES, precision="int8", calibration=batches, verbose=False)
    assert 1e-4 < found.max_error <= TOLERANCES["int8"]
    assert found.outside_tensorrt == ()
    onnx = importlib.import_module("onnx")
    model = onnx.load(path)
    values = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
    makers = {y: node for node in model.graph.node for y in node.output}
    pairs = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    assert all(not values[node.input[2]].any() and values[node.input[2]].dtype == "int8" for node in pairs)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(layers) == 3
    for layer in layers:
        assert [makers[x].op_type for x in layer.input[:2]] == ["DequantizeLinear"] * 2
        assert layer.input[2] in values  # the bias, in float32
        assert values[makers[layer.input[1]].input[1]].shape == values[layer.input[2]].shape  # a scale a channel


def test_int8_needs_calibration_and_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    rest = "int8, and only int8, needs calibration=[images, ...], some hundred images like real ones."
    missing, given = (
        re.escape(f"precision is {p}; {rest}")
        for p in ("'int8' and calibration missing", "'fp16' and calibration given")
    )
    with pytest.raises(ConfigError, match=f"^{missing}$"):
        dspfx.export_onnx(plain(), path, IMAGES, precision="int8")
    with pytest.raises(ConfigError, match=f"^{given}$"):
        dspfx.export_onnx(plain(), path, IMAGES, precision="fp16", calibration=[IMAGES])
    with pytest.raises(ConfigError, match=r"^calibration holds no batch; give some hundred images"):
        dspfx.export_onnx(plain(), path, IMAGES, precision="int8", calibration=[])
    with pytest.raises(InputError, match=r"^this network was built for \(float32\[N, 3, 8, 8\]\)"):
        dspfx.export_onnx(plain(), path, IMAGES, precision="int8", calibration=[IMAGES[:, :, :5]])
    assert list(tmp_path.iterdir()) == []


def test_constant_indices_take_half_the_bytes(tmp_path: Path) -> None:
    order = torch.tensor([2, 0, 3, 1])
    network = Applied(lambda y: (y.index_select(1, order), y.index_select(2, torch.tensor([0, 0, -1]).abs())))
    found = dspfx.export_onnx(network, tmp_path / "gather.onnx", IMAGES, verbose=False)
    assert found.max_error <= 1e-6
    onnx = importlib.import_module("onnx")
    graph = onnx.load(tmp_path / "gather.onnx").graph
    values = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    indices = [values[node.input[1]] for node in graph.node if node.op_type == "Gather"]
    assert [(x.dtype.name, x.tolist()) for x in indices] == [("int32", [2, 0, 3, 1]), ("int32", [0, 0, 1])]


def test_too_much_for_one_file_becomes_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspfx.deploy.onnx.ONE_FILE", 100)
    network, path = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)).eval(), tmp_path / "large.onnx"
    found = dspfx.export_onnx(network, path, IMAGES, verbose=False)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert disagreement(call(path, IMAGES), network(IMAGES).detach())[0] <= 1e-5
    assert read_metadata(path) == found.metadata


def _looks_at_the_batch(x: Tensor) -> Tensor:
    return x if x.shape[0] % 2 == 0 else -x


class Applied(nn.Conv2d):
    """A convolution, and a function after it."""

    def __init__(self, function: Any) -> None:
        super().__init__(3, 4, 3)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(super().forward(x))


def test_a_graph_for_one_batch_says_so(tmp_path: Path) -> None:
    found = dspfx.export_onnx(Applied(_looks_at_the_batch), tmp_path / "even.onnx", IMAGES, verbose=False)
    assert found.batches == (2,)
    assert ", fp32, batch 2 only, differs " in str(found)
    with pytest.raises(InputError, match=r"^this network was built for \(float32\[2, 3, 8, 8\]\)"):
        call(tmp_path / "even.onnx", IMAGES[:1])


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file in the way, that has to be as it was after every error."""
    path = tmp_path / "old.onnx"
    path.write_bytes(b"old")
    yield path
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_gates_are_refused(old: Path) -> None:
    gm = dspfx.prepare(plain(), IMAGES)
    message = "Sequential still has gates (the first is 2); lower first: small = dspfx.lower(gm), and export that."
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        dspfx.export_onnx(gm, old)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda y: torch.special.bessel_j0(y), "DispatchError: No ONNX function found for .*bessel_j0.*"),
        (lambda y: y if y.sum() > 0 else -y, "GuardOnDataDependentSymNode: Could not guard on .+"),
        (lambda y: (y, 3), "RuntimeBuildError: it returns a int; only tensors can be returned"),
    ],
    ids=["unknown operation", "branch on values", "returns a number"],
)
def test_what_cannot_be_exported_says_why(
    function: Any, why: str, old: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    message = re.escape(f"this Applied cannot become {KIND}; change in the model what the reason names:\n")
    with pytest.raises(RuntimeBuildError, match=f"^{message}{why}$"):
        dspfx.export_onnx(Applied(function), old, IMAGES)
    assert tuple(capfd.readouterr()) == ("", "")


def test_other_numbers_are_refused(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> Any:
        engine = start_file(*args)
        return lambda *inputs: engine(*inputs) * 1.001

    monkeypatch.setattr(export, "start_file", wrong)
    message = (
        f"this Sequential as {KIND} differs from PyTorch by 1.0e-03 of the largest value of output 0, and 1.0e-04 is "
        f"allowed; give example inputs like real ones, a higher precision, or tolerance=... if that is good enough."
    )
    with pytest.raises(MismatchError, match=f"^{re.escape(message)}$"):
        dspfx.export_onnx(plain(), old, IMAGES)


def test_what_overflows_in_fp16_is_refused(old: Path) -> None:
    network = Applied(lambda y: (y * 1e5) / 1e5)
    with pytest.raises(MismatchError, match="differs from PyTorch by inf of the largest value of output 0: other valu"):
        dspfx.export_onnx(network, old, IMAGES, precision="fp16")


def test_settings_and_inputs_are_checked_first(old: Path) -> None:
    with pytest.raises(ConfigError, match=r"^precision is 'fp8'; give one of 'fp32', 'fp16', 'bf16', 'int8'\.$"):
        dspfx.export_onnx(plain(), old, IMAGES, precision="fp8")
    with pytest.raises(InputError, match="does not run on example inputs of shape"):
        dspfx.export_onnx(plain(), old, IMAGES[:, :2])


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.onnx").mkdir()
    for path, message in (
        (tmp_path / "small.bin", r"small\.bin is named as another kind of file; end it with \.onnx\.$"),
        (tmp_path / "folder.onnx", r"folder\.onnx is a folder; give a file in it\.$"),
        (
            tmp_path / "none" / "small.onnx",
            r"small\.onnx cannot be written \(.*\); give a file in a folder that can be\.$",
        ),
    ):
        with pytest.raises(StorageError, match=message):
            dspfx.export_onnx(plain(), path, IMAGES)
    assert [x.name for x in tmp_path.rglob("*")] == ["folder.onnx"]


def test_a_disk_that_fills_up_leaves_the_old_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    message = f"{old} cannot be written ([Errno 28] No space left on device); give a file in a folder that can be."
    with pytest.raises(StorageError, match=f"^{re.escape(message)}$"):
        dspfx.export_onnx(plain(), old, IMAGES, verbose=False)


def test_missing_packages_name_the_extra(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = importlib.import_module

    def absent(name: str) -> Any:
        if name == "onnxscript":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name)

    monkeypatch.setattr(exported.importlib, "import_module", absent)
    message = (
        "export_onnx needs the package onnxscript, which cannot be imported (No module named 'onnxscript'); run: pip "
        'install "dspfx[onnx]"'
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        dspfx.export_onnx(plain(), old, IMAGES)


def test_a_nesting_survives_json() -> None:
    entry = ZOO["dict_output"]
    inputs = Inputs(*entry.inputs(2), flag=True)

    class Flagged(nn.Module):
        def forward(self, x: Tensor, flag: bool) -> Any:
            return {"x": x, "more": [x.sum((1, 2, 3)), None, "word"]}

    nesting = Nesting(Flagged(), inputs, any_batch=True)
    again = Nesting.from_json(nesting.to_json())
    tensors = again.flatten_inputs(entry.inputs(5), {"flag": True})
    assert again.nest_outputs([tensors[0], tensors[0]]) == {"x": tensors[0], "more": [tensors[0], None, "word"]}
    with pytest.raises(DspfxError, match=r"^this network was built for "):
        again.flatten_inputs(entry.inputs(5), {"flag": False})


@pytest.mark.parametrize("pool", [nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AvgPool2d(3, padding=1), nn.AvgPool2d(4)])
@pytest.mark.parametrize("border", [1, 3])
def test_borders_before_a_pooling_may_be_wider_than_its_kernel(pool: nn.Module, border: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.Tanh(), nn.ZeroPad2d(border), pool, nn.Conv2d(8, 4, 1)
    found = dspfx.export_onnx(nn.Sequential(*layers).eval(), tmp_path / "x.onnx", IMAGES, verbose=False)
    assert found.max_error <= found.tolerance
