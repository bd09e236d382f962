"""KernelConv2d: what its branches compute in float64, in one operation, wherever a kernel is; branches elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dspfx
from dspfx import forms, kernel_conv, pipeline
from dspfx.deploy.costs import CostTable
from dspfx.errors import ConfigError
from dspfx.forms import FormCase
from dspfx.graph.traced import network_meta
from dspfx.kernel_conv import KernelConv2d
from dspfx.kernels.library import library_or_none
from dspfx.plans import Group
from dspfx.storage import load, save
from tests.compare import error, forced
from tests.zoo import ZOO

ROUNDING = 3e-6
GROUPS = (Group((0, 3), (0, 1, 4)), Group((5,), (2,)))  # filters 1, 2 and 4 read nothing
needs_kernels = pytest.mark.skipif(library_or_none() is None, reason="no compiler: the native kernels are not there")


def module(seed: int = 0, bias: bool = True, **given: Any) -> KernelConv2d:
    torch.manual_seed(seed)
    options: dict[str, Any] = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "bias": bias} | given
    conv = nn.Conv2d(5, 6, 3, **options)
    keep = torch.zeros(6, 5, dtype=torch.bool)
    for group in GROUPS:
        for o in group.filters:
            keep[o, list(group.channels)] = True
    conv.weight.data *= keep[:, :, None, None]
    made = KernelConv2d.from_conv(conv, GROUPS).eval()
    assert isinstance(made, KernelConv2d)
    return made


def in_double(network: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = copy.deepcopy(network).double()(x.double())
    return found


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with each call of the kernel."""
    found: list[int] = []
    real = kernel_conv.group_conv2d

    def counted(*args: Any, **options: Any) -> Tensor:
        found.append(1)
        return real(*args, **options)

    monkeypatch.setattr(kernel_conv, "group_conv2d", counted)
    return found


IMAGES = torch.randn(2, 5, 9, 11, generator=torch.Generator().manual_seed(0))


@given(st.integers(0, 2**31), st.booleans())
def test_equals_its_branches_in_float64(seed: int, bias: bool) -> None:
    network = module(seed, bias)
    with torch.no_grad():
        assert error([in_double(network, IMAGES)], [network(IMAGES)]) <= ROUNDING


@needs_kernels
def test_the_kernel_runs_without_gradients_in_float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    network, count = module(), calls(monkeypatch)
    network(IMAGES)
    in_double(network, IMAGES)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        network(IMAGES)
    assert not count
    with torch.no_grad():
        network(IMAGES)
    network.requires_grad_(False)(IMAGES)
    assert len(count) == 2


def test_gradients_are_those_of_its_branches() -> None:
    network = module()
    x, exact = IMAGES.clone().requires_grad_(), IMAGES.double().requires_grad_()
    network(x).sum().backward()
    twin = copy.deepcopy(network).double()
    twin(exact).sum().backward()
    pairs = [(exact, x), *zip(twin.parameters(), network.parameters(), strict=True)]
    assert error([a.grad for a, _ in pairs], [b.grad for _, b in pairs]) <= ROUNDING  # type: ignore[misc]


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded", "moved"])
def test_changed_weights_are_packed_again(change: str) -> None:
    network = module()
    branch = network.branches[0]
    assert isinstance(branch, nn.Conv2d)
    with torch.no_grad():
        before = network(IMAGES)
        if change == "in place":
            branch.weight.mul_(2)
        elif change == "replaced":
            branch.weight = nn.Parameter(2 * branch.weight)
        elif change == "loaded":
            network.load_state_dict({k: 2 * v for k, v in network.state_dict().items()})
        else:
            network.double()
            branch.weight.mul_(2)
            network.float()
        after = network(IMAGES)
        assert error([in_double(network, IMAGES)], [after]) <= ROUNDING
        assert not torch.equal(before, after)


def test_copies_are_their_own() -> None:
    network = module()
    with torch.no_grad():
        before = network(IMAGES)
        twin = copy.deepcopy(network)
        assert torch.equal(twin(IMAGES), before)
        for p in twin.parameters():
            p.mul_(2)
        assert error([in_double(twin, IMAGES)], [twin(IMAGES)]) <= ROUNDING
        assert torch.equal(network(IMAGES), before)


@needs_kernels
def test_compiled_it_is_one_operation_that_sees_new_weights() -> None:
    network, graphs = module(), []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(network, backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(IMAGES), network(IMAGES))
        for p in network.parameters():
            p.mul_(2)
        assert torch.equal(compiled(IMAGES), network(IMAGES))
    (graph,) = graphs
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [torch.ops.dspfx.kernel_conv]


def test_exported_it_is_plain_convolutions() -> None:
    with torch.no_grad():
        program = torch.export.export(module(), (IMAGES,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert "aten.conv2d.default" in targets
    assert not any("dspfx" in target for target in targets)


@pytest.mark.parametrize("options", [{"stride": 1, "padding": "same"}, {"padding_mode": "circular"}])
def test_what_the_kernels_cannot_pad_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^KernelConv2d got padding=.*; the kernels pad with numbers of zeros"):
        module(**options)


@pytest.mark.parametrize("name", ["resnet_projection", "dense_block", "conv_options"])
def test_networks_of_it_equal_float64_and_come_back_from_files(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    torch.manual_seed(0)
    gm = dspfx.prepare(entry.build().eval(), entry.inputs(2), dspfx.GateConfig(groups=2))
    dspfx.prune(gm, dspfx.Budget(flops=0.6))
    small = forced(gm, "kernel")
    assert any(isinstance(m, KernelConv2d) for m in small.modules())
    save(small, tmp_path / "small.safetensors")
    loaded = load(tmp_path / "small.safetensors")
    (x,) = entry.inputs(3)
    with torch.no_grad():
        assert torch.equal(loaded(x), small(x))
        assert error([in_double(gm.eval(), x)], [small(x)]) <= 1e-5


def test_lower_chooses_it_layer_by_layer_where_the_clock_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here with the clock of one, and without the contest that would time it on this machine."""
    entry = ZOO["resnet_projection"]
    gm = dspfx.prepare(entry.build().eval(), entry.inputs(2), dspfx.GateConfig(groups=2))
    dspfx.prune(gm, dspfx.Budget(flops=0.5))
    monkeypatch.setattr(forms, "has_kernel", lambda device, dtype: True)
    gpu = forms.split_forms("eager", torch.device("cuda"), torch.float16)
    assert gpu == ("kernel", "grouped", "branches")
    assert forms.split_forms("eager", torch.device("cpu"), torch.float32) == ("grouped", "branches")
    assert forms.split_forms("tensorrt", torch.device("cuda"), torch.float16) == ("grouped", "branches")
    monkeypatch.setattr(pipeline, "split_forms", lambda *_: gpu)

    def clock(table: CostTable, case: FormCase) -> float:
        return {"dense": 10.0, "branches": 8.0, "grouped": 7.0, "kernel": 1.0}[case.form] + case.filters % 2

    monkeypatch.setattr(CostTable, "__call__", clock)
    plain = pipeline._plain(gm, None)
    fastest = min(pipeline._entrants(plain, "eager", 1, True), key=lambda e: e.expected_ms or 1e9)
    small = fastest.make()
    chosen = {layer.name: layer.form for layer in network_meta(small)["lower_plan"].layers}
    assert "kernel" in chosen.values()
    assert {"branches", "grouped"}.isdisjoint(chosen.values())
    assert {n for n, m in small.named_modules() if isinstance(m, KernelConv2d)} == {
        name for name, form in chosen.items() if form == "kernel"
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_it_equals_float64(dtype: torch.dtype) -> None:
    network = module().to("cuda", dtype)
    with torch.no_grad():
        x = IMAGES.to("cuda", dtype)
        exact = copy.deepcopy(network).double()(x.double())
        assert error([exact], [network(x)]) <= {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
