"""Runtimes: equal to eager at every batch, whatever the nesting; rejected networks and absent runtimes by message."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.deploy import runtimes
from dspfx.deploy.agree import disagreement
from dspfx.deploy.onnx import Nesting, write_onnx
from dspfx.deploy.runtimes import RUNTIMES, TOLERANCE, build, describe_runtime
from dspfx.errors import ConfigError, InputError, MismatchError, RuntimeBuildError
from dspfx.graph.tracer import expect
from dspfx.modules import GroupConv2d
from dspfx.norms import SparseNorm
from dspfx.pipeline import prepare
from tests.compare import fingerprint, forced, pruned, unchanged
from tests.zoo import OTHERS, ZOO

ENTRIES = ZOO | OTHERS
EXPORTED = ("onnxruntime", "openvino")
IMAGES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
# Groups in branches; norms that count channels that are gone; flags that follow the mode; guards; nested inputs and
# outputs; channels that are reordered. All others are behind the marker "slow".
NETWORKS = (
    *("resnet_bottleneck", "group_norm", "stochastic_depth", "shape_branch", "siamese", "named_inputs"),
    *("dict_output", "shuffle_unit"),
)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="inductor needs a C++ compiler"
)


@cache
def small(name: str) -> nn.Module:
    """A pruned network of the zoo, lowered with every split that can be made, in float32."""
    network: nn.Module = forced(pruned(ENTRIES[name])).float()
    return network


def check_equal(built: nn.Module, network: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        expected = network(*inputs)
    found = built(*inputs)
    assert type(found) is type(expected)
    assert disagreement(found, expected)[0] <= TOLERANCE
    assert not any(x.requires_grad for x in pytree.tree_leaves(found) if isinstance(x, Tensor))


class Calls(nn.Module):
    """A convolution, then what the test's function makes of its output and of the input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.function = function

    def forward(self, x: Tensor, *rest: Any) -> Any:
        return self.function(self.conv(x), x, *rest)


@pytest.mark.parametrize("runtime", EXPORTED)
@pytest.mark.parametrize("name", NETWORKS)
def test_exported_networks_equal_eager_at_every_batch(name: str, runtime: str) -> None:
    network, entry = small(name), ENTRIES[name]
    before = fingerprint(network)
    built = build(runtime, network, entry.inputs(2))
    for batch in (1, 2, 5):
        check_equal(built, network, *entry.inputs(batch, seed=batch))
    assert unchanged(before, fingerprint(network))


def test_the_networks_hold_what_is_hard_to_export() -> None:
    assert any(isinstance(m, GroupConv2d) for m in small("resnet_bottleneck").modules())
    assert any(isinstance(m, SparseNorm) for m in small("group_norm").modules())
    assert any(node.target is expect for node in small("shape_branch").graph.nodes)  # type: ignore[union-attr]


def test_branches_on_ranges_export_as_slices(tmp_path: Path) -> None:
    """Filters and channels of two groups lie scattered: the file has a slice a branch, and gathers nothing."""
    middle = nn.Conv2d(8, 6, 3)
    with torch.no_grad():
        middle.weight[::2, [1, 3, 5]] = 0
        middle.weight[1::2, [0, 2, 4]] = 0
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    lowered = forced(prepare(network, IMAGES))
    assert isinstance(lowered.get_submodule("2"), GroupConv2d)
    check_equal(build("onnxruntime", lowered, IMAGES), network, IMAGES)
    file = tmp_path / "network.onnx"
    write_onnx(lowered, Nesting(lowered, Inputs(IMAGES), any_batch=True), file)
    kinds = [node.op_type for node in importlib.import_module("onnx").load(file).graph.node]
    assert "Gather" not in kinds
    assert kinds.count("Slice") == 2
    assert kinds.count("Concat") == 1


@pytest.mark.slow
@pytest.mark.parametrize("runtime", EXPORTED)
@pytest.mark.parametrize("name", ENTRIES)
def test_every_network_equals_eager(name: str, runtime: str) -> None:
    network, entry = small(name), ENTRIES[name]
    built = build(runtime, network, entry.inputs(2))
    for batch in (1, 2, 5):
        check_equal(built, network, *entry.inputs(batch, seed=batch))


@needs_compiler
@pytest.mark.parametrize("name", ["single_conv", *(pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS)])
def test_compiled_networks_equal_eager(name: str) -> None:
    network, entry = small(name), ENTRIES[name]
    before = fingerprint(network)
    built = build("inductor", network, entry.inputs(2))
    for batch in (2, 1):
        check_equal(built, network, *entry.inputs(batch, seed=batch))
    assert unchanged(before, fingerprint(network))


def test_eager_is_a_copy_in_eval_mode() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5))
    built = build("eager", network, IMAGES).train()
    expected = network.eval()(IMAGES).detach()
    assert torch.equal(built(IMAGES), expected)
    with torch.no_grad():
        network[0].weight.zero_()  # type: ignore[operator]
    assert torch.equal(built(IMAGES), expected)


def test_a_prepared_network_in_training_is_built_in_eval_mode() -> None:
    entry = ZOO["dropouts"]
    network = prepare(entry.build(), entry.inputs())
    built = build("onnxruntime", network, entry.inputs())
    assert network.training
    check_equal(built, network.eval(), *entry.inputs())


@pytest.mark.parametrize("runtime", EXPORTED)
@pytest.mark.parametrize(
    "function",
    [
        lambda y, x: (y, y),
        lambda y, x: {"y": y, "x": x, "none": None, "words": ["yes", True]},
        lambda y, x: [y.flatten(2).argmax(2), y.mean((2, 3)) > 0],
        lambda y, x: y.log(),  # NaN below zero
    ],
    ids=["twice", "dict", "integers", "nan"],
)
def test_outputs_keep_their_nesting_and_kinds(function: Any, runtime: str) -> None:
    network = Calls(function).eval()
    built = build(runtime, network, IMAGES)
    check_equal(built, network, IMAGES)
    check_equal(built, network, IMAGES[:1])


@pytest.mark.parametrize("runtime", EXPORTED)
@pytest.mark.parametrize(("order", "axis"), [([1, 2, 3, 0], 1), ([3, 0, 1, 2], -3), ([2, 0, 2], 1)])
def test_reordered_channels_before_a_convolution(order: list[int], axis: int, runtime: str) -> None:
    after = nn.Conv2d(len(order), 3, 3)
    network = Calls(lambda y, x: after(y.index_select(axis, torch.tensor(order)).relu())).eval()
    check_equal(build(runtime, network, IMAGES), network, IMAGES)


@pytest.mark.parametrize("runtime", EXPORTED)
def test_built_from_one_image_it_takes_more(runtime: str) -> None:
    network = Calls(lambda y, x: y.mean((2, 3))).eval()
    built = build(runtime, network, IMAGES[:1])
    check_equal(built, network, IMAGES[:1])
    check_equal(built, network, torch.cat([IMAGES, IMAGES, IMAGES]))


def _takes_even(y: Tensor, x: Tensor) -> Tensor:
    return y if x.shape[0] % 2 == 0 else -y


def _takes_two_apart(y: Tensor, x: Tensor) -> Tensor:
    return -y if x.shape[0] == 2 else y


def _takes_few(y: Tensor, x: Tensor) -> Tensor:
    return y if x.shape[0] < 6 else -y


@pytest.mark.parametrize("runtime", EXPORTED)
@pytest.mark.parametrize("function", [_takes_even, _takes_two_apart, _takes_few])
def test_networks_that_branch_on_the_batch_take_that_of_the_example_only(function: Any, runtime: str) -> None:
    network, images = Calls(function).eval(), torch.cat([IMAGES, IMAGES])
    built = build(runtime, network, images)
    check_equal(built, network, images)
    message = (
        "this network was built for (float32[4, 3, 8, 8]) and is called with (float32[2, 3, 8, 8]); build it again "
        "with such inputs."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        built(IMAGES)


@pytest.mark.parametrize("runtime", EXPORTED)
def test_keywords_and_constants_are_part_of_what_is_built(runtime: str) -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor, *, scale: Tensor, negate: bool) -> Tensor:  # type: ignore[override]
            y = super().forward(x) * scale
            return -y if negate else y

    network, scale = Scaled(3, 4, 3).eval(), torch.tensor([2.0, 3.0, 4.0]).reshape(3, 1, 1)[:1]
    built = build(runtime, network, Inputs(IMAGES, scale=scale, negate=True))
    with torch.no_grad():
        expected = network(IMAGES[:1], scale=scale, negate=True)
    assert disagreement(built(IMAGES[:1], scale=scale, negate=True), expected)[0] <= TOLERANCE
    call = "float32[{}, 3, 8, 8], negate={}, scale=float32[1, 1, 1]"
    message = (
        f"this network was built for ({call.format('N', True)}) and is called with ({call.format(2, False)}); build it "
        f"again with such inputs."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        built(IMAGES, scale=scale, negate=False)
    message = (
        f"this network was built for ({call.format('N', True)}) and is called with (float32[2, 3, 8, 8]); build it "
        f"again with such inputs."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        built(IMAGES)


@pytest.mark.parametrize("runtime", EXPORTED)
def test_nothing_is_printed_and_no_file_stays(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    network = Calls(lambda y, x: torch.special.bessel_j0(y) if y.shape[2] < 4 else y).eval()
    built = build(runtime, network, IMAGES)
    with pytest.raises(RuntimeBuildError):
        build(runtime, network, IMAGES[:, :, :5, :5])
    check_equal(built, network, IMAGES)
    assert list(tmp_path.iterdir()) == []
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize("runtime", EXPORTED)
@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda y, x: torch.special.bessel_j0(y), "DispatchError: No ONNX function found for .*bessel_j0.*"),
        (lambda y, x: y if y.sum() > 0 else -y, "GuardOnDataDependentSymNode: Could not guard on .+"),
        (lambda y, x: (y, y.shape[0]), "RuntimeBuildError: it returns a int; only tensors can be returned"),
    ],
    ids=["unknown operation", "branch on values", "returns a number"],
)
def test_rejected_networks_say_why_in_the_last_line(function: Any, why: str, runtime: str) -> None:
    message = re.escape(
        f"{runtime} cannot run this Calls; use another runtime ('eager' runs everything), or change in the model what "
        f"the reason names:\n"
    )
    with pytest.raises(RuntimeBuildError, match=f"^{message}{why}$"):
        build(runtime, Calls(function), IMAGES)


def test_other_numbers_than_eager_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    start = runtimes.start_onnxruntime

    def wrong(*args: Any) -> Any:
        engine = start(*args)
        return lambda arrays: [x * 1.001 for x in engine(arrays)]

    changed = runtimes.Runtime(lambda *args: runtimes._from_onnx(wrong, *args), TOLERANCE, any_batch=True)
    monkeypatch.setitem(RUNTIMES, "onnxruntime", changed)
    message = (
        "this Conv2d on onnxruntime differs from eager mode by 1.0e-03 of the largest value of output 0, and 2.0e-05 "
        "is allowed; use another runtime, or give example inputs like real ones."
    )
    with pytest.raises(MismatchError, match=f"^{re.escape(message)}$"):
        build("onnxruntime", nn.Conv2d(3, 4, 3), IMAGES)


def test_unknown_runtimes_are_refused() -> None:
    message = (
        "runtime is 'onnx', which dspfx does not know; give one of 'eager', 'inductor', 'onnxruntime', "
        "'onnxruntime-native', 'openvino', 'tensorrt'."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build("onnx", nn.ReLU(), IMAGES)


@pytest.mark.parametrize(
    ("runtime", "package", "extra"),
    [("onnxruntime", "onnxruntime", "onnx"), ("openvino", "openvino", "openvino"), ("openvino", "onnx", "openvino")],
)
def test_runtimes_that_are_not_installed_name_the_extra(
    runtime: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = importlib.import_module

    def absent(name: str) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name)

    monkeypatch.setattr(runtimes.importlib, "import_module", absent)
    message = (
        f"the runtime '{runtime}' needs the package {package}, which cannot be imported (No module named "
        f"'{package}'); run: pip install \"dspfx[{extra}]\""
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build(runtime, nn.ReLU(), IMAGES)


def test_too_few_threads_and_other_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^threads is 0; give at least 1\.$"):
        build("eager", nn.ReLU(), IMAGES, threads=0)
    message = "openvino runs on cpu here, and the network is on meta; move it and the inputs with .to('cpu')."
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        build("openvino", nn.Conv2d(3, 4, 3, device="meta"), IMAGES)


def test_threads_come_back_after_a_build_and_a_call() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []

    def note(y: Tensor, x: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return y

    network = Calls(note)
    built = build("eager", network, IMAGES, threads=before + 1)
    built(IMAGES)
    assert seen[-1] == before + 1
    assert torch.get_num_threads() == before


def test_runtimes_are_described_with_their_versions() -> None:
    assert [describe_runtime(name) for name in ("eager", "inductor")] == ["eager", "inductor"]
    for name in EXPORTED:
        assert re.fullmatch(rf"{name} \d+\.\d+\.\d+", describe_runtime(name))


def test_openvino_leaves_the_process_able_to_take_signals() -> None:
    """Two networks, dropped in the order in which they were made, and then the end of a child with a handler for it."""
    program = (
        "import faulthandler, signal, subprocess, sys, torch\n"
        "from dspfx.deploy.runtimes import build\n"
        "faulthandler.enable()\n"  # a stack for signal handlers, as test runners and training programs have it
        "signal.signal(signal.SIGCHLD, lambda *arguments: None)\n"
        "network, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 8, 8)\n"
        "one, two = (build('openvino', network, x) for _ in range(2))\n"
        "del one\n"
        "del two\n"
        "memory = [bytearray(20000) for _ in range(1000)]\n"
        "subprocess.run([sys.executable, '-c', 'pass'])\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("runtime", EXPORTED)
def test_large_weights_are_there_at_every_batch(runtime: str) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 10)).eval()  # 6 MB
    built = build(runtime, network, torch.zeros(1, 3, 32, 32))
    for batch in (1, 2, 5):
        check_equal(built, network, torch.randn(batch, 3, 32, 32))
