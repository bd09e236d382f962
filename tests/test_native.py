"""Networks with native chains compute what they computed before, on the zoo and on random networks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, note
from torch import Tensor, fx, nn

from dspfx import pipeline
from dspfx.config import Budget, GateConfig
from dspfx.deploy.runtimes import TOLERANCE
from dspfx.errors import BudgetError, InputError, StorageError
from dspfx.graph.traced import network_meta
from dspfx.kernels import program
from dspfx.kernels.library import library_or_none
from dspfx.modules import GatedConv2d
from dspfx.native import NativeChain
from dspfx.passes.choose_form import LowerOptions
from dspfx.passes.fuse_native import fuse_native
from dspfx.profiler import profile
from dspfx.storage import load, save
from dspfx.storage.network import decode_network, encode_network
from tests.compare import error, forced, run
from tests.random_networks import SIZES, Program, programs
from tests.test_random_networks import images
from tests.zoo import ZOO, ZooEntry, enliven

pytestmark = pytest.mark.skipif(library_or_none() is None, reason="the native kernels need a C++ compiler")
NETWORKS = (
    "googlenet", "inception_v3", "resnet18", "resnet50", "resnext50_32x4d", "densenet121", "squeezenet1_0",
    "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x1_0", "efficientnet_b0", "efficientnet_v2_s", "mnasnet1_0",
    "regnet_x_400mf", "regnet_y_400mf",
)  # fmt: skip
# without a convolution of two dimensions and ordinary channels
UNFIT = {"dcgan_generator", "projected_latent", "time_series", "causal_net", "factorised_video"}
each_entry = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)


def thinned(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """`model` prepared and pruned with random groups, as far as it goes; one without gates as it is."""
    gm = pipeline.prepare(model, inputs, GateConfig(groups=3))
    generator = torch.Generator().manual_seed(3)
    gates = [m for m in gm.modules() if isinstance(m, GatedConv2d)]
    for gate in gates:
        gate.gate_logits.normal_(generator=generator)
    for share in (0.6, 0.8) if gates else ():
        try:
            pipeline.prune(gm, Budget(flops=share))
        except BudgetError:
            continue
        break
    return gm


def chains(network: nn.Module) -> list[NativeChain]:
    return [m for m in network.modules() if isinstance(m, NativeChain)]


def check_same(network: nn.Module, exact: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """In float32 as near to float64 as plain torch comes, or as any runtime has to."""
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        expected, found = run(exact, wide), run(network, inputs)
        plain = copy.deepcopy(exact).float()
        rounding = error(expected, run(plain, inputs))
    assert all(y.dtype == torch.float32 for y in found if y.is_floating_point())
    assert error(expected, found) <= max(TOLERANCE, 10 * rounding)


@each_entry
def test_native_network_equals_the_plain_one(entry: ZooEntry) -> None:
    gm = thinned(entry.build(), entry.inputs(3))
    plain = forced(gm, "dense")
    network = fuse_native(copy.deepcopy(plain))
    for batch, size in ((3, entry.sizes()[0]), (1, entry.sizes()[-1])):
        check_same(network, copy.deepcopy(plain).double(), entry.inputs(batch, *size, seed=batch))
    assert bool(chains(network)) == (entry.name not in UNFIT)


@given(programs())
def test_native_random_network_equals_the_plain_one(program: Program) -> None:
    note(program.source())
    plain = forced(thinned(program.build(), (images(2, SIZES[0]),)), "dense")
    network = fuse_native(copy.deepcopy(plain))
    for batch, size in ((3, SIZES[1]), (1, SIZES[0])):
        check_same(network, copy.deepcopy(plain).double(), (images(batch, size),))


def small_network() -> nn.Module:
    """A lowered network of one chain, with filters in two groups."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        for half in (0, 1):
            model.get_parameter("2.weight")[half::2, half::2] = 0
    network: nn.Module = fuse_native(forced(model.eval(), "dense"))
    return network


def plainly(network: nn.Module, x: Tensor) -> Tensor:
    """What the chain's plain layers compute in float64."""
    (chain,) = chains(network)
    found: Tensor = copy.deepcopy(chain.plain).double()(x.double())
    return found


IMAGE = torch.randn(2, 3, 9, 9)


def test_a_saved_network_is_native_again(tmp_path: Path) -> None:
    network = small_network()
    save(network, tmp_path / "small.safetensors")
    loaded = load(tmp_path / "small.safetensors")
    assert len(chains(loaded)) == 1
    plan = network_meta(loaded)["lower_plan"]
    assert plan == network_meta(network)["lower_plan"]
    assert {layer.form for layer in plan.layers} == {"native"}
    with torch.no_grad():
        assert torch.equal(loaded(IMAGE), network(IMAGE))


def test_a_chain_inside_of_a_chain_is_refused(tmp_path: Path) -> None:
    lowered = small_network()
    assert isinstance(lowered, fx.GraphModule)
    network = encode_network(lowered)
    (name, kind, options) = network["layers"][0]
    options["network"]["layers"].append([name, kind, options["network"]])
    with pytest.raises(StorageError, match=r"^a native chain is part of another one$"):
        decode_network(network)


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded", "moved"])
def test_changed_weights_are_packed_again(change: str) -> None:
    network = small_network()
    (chain,) = chains(network)
    with torch.no_grad():
        network(IMAGE)
        conv = chain.plain.get_submodule("0")
        assert isinstance(conv, nn.Conv2d)
        if change == "in place":
            conv.weight.mul_(2)
        elif change == "replaced":
            conv.weight = nn.Parameter(2 * conv.weight)
        elif change == "loaded":
            network.load_state_dict({k: 2 * v for k, v in network.state_dict().items()})
        else:
            network.double()
            conv.weight.mul_(2)
            network.float()
        assert error([plainly(network, IMAGE)], [network(IMAGE)]) <= TOLERANCE


def test_copies_have_weights_of_their_own() -> None:
    network = small_network()
    with torch.no_grad():
        before = network(IMAGE)
        twin = copy.deepcopy(network)
        for p in twin.parameters():
            p.mul_(2)
        assert torch.equal(network(IMAGE), before)
        assert error([plainly(twin, IMAGE)], [twin(IMAGE)]) <= TOLERANCE


def test_gradients_come_from_the_plain_layers() -> None:
    network = small_network()
    x = IMAGE.clone().requires_grad_()
    network(x).sum().backward()
    exact = IMAGE.double().requires_grad_()
    plainly(network, exact).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert error([exact.grad], [x.grad]) <= TOLERANCE
    assert all(not p.requires_grad for p in network.parameters())


def test_what_the_kernels_cannot_do_is_done_plainly() -> None:
    network = small_network()
    assert network.double()(IMAGE.double()).dtype == torch.float64
    network.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert network(IMAGE).dtype == torch.bfloat16
    assert network(IMAGE.to(memory_format=torch.channels_last)).shape == (2, 6)
    assert network(IMAGE[:0]).shape == (0, 6)


def test_what_no_network_takes_gets_torch_s_own_error() -> None:
    with torch.no_grad(), pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        small_network()(torch.randn(1, 3, 4, 4))


def test_what_fits_at_one_size_only_gets_torch_s_own_error_at_others() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, stride=2, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + nn.functional.max_pool2d(x, 2))

    network = fuse_native(forced_inputs(Net().eval(), (torch.randn(1, 3, 8, 8),)))
    assert len(chains(network)) == 1
    with torch.no_grad():
        assert network(torch.randn(1, 3, 12, 8)).shape == (1, 3, 6, 4)
        with pytest.raises(RuntimeError, match="The size of tensor a"):
            network(torch.randn(1, 3, 7, 8))


def test_images_that_need_too_large_a_workspace_are_computed_plainly() -> None:
    network, x = small_network(), torch.randn(1, 3, 9, 9)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "LARGEST", 1000)
        found = network(x)
        (chain,) = chains(network)
        assert torch.equal(found, chain.plain(x))
        with pytest.raises(InputError, match=r"^a chain needs 0\.0 GB for an image; 8 GB is the most\.$"):
            chain.engine([x])([x])


def test_inputs_of_several_batches_are_no_chain_s() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + y)

    network = fuse_native(forced_inputs(Net().eval(), (IMAGE, IMAGE)))
    assert len(chains(network)) == 1
    with torch.no_grad():
        one = network(IMAGE, IMAGE[:1].expand(2, -1, -1, -1))
        assert error([one], [network(IMAGE, IMAGE[:1])]) <= TOLERANCE


def forced_inputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """As `forced(model, "dense")`, for a model that does not take one image."""
    gm = pipeline._plain(model, inputs)
    return pipeline._carried_out(gm, pipeline._planned(gm, LowerOptions(1, splits=())), True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_and_exported() -> None:
    network = small_network()
    with torch.no_grad():
        expected = plainly(network, IMAGE)
        compiled = torch.compile(network, fullgraph=True)
        assert error([expected], [compiled(IMAGE)]) <= TOLERANCE
        exported = torch.export.export(network, (IMAGE,))
        assert not any("dspfx" in str(n.target) for n in exported.graph.nodes)
        assert error([expected], [exported.module()(IMAGE)]) <= TOLERANCE


def test_a_profile_counts_what_is_computed() -> None:
    network = small_network()
    found = {layer.name: layer.flops for layer in profile(network, IMAGE).layers}
    assert found["native.plain.0"] == 8 * 3 * 9 * 49
    assert found["native.plain.2"] == 6 * 8 * 9 * 25 // 2


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_networks_are_one_chain(name: str) -> None:
    options = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    size = 128
    enliven(model, (torch.randn(4, 3, size, size),))
    plain = forced(thinned(model, (torch.randn(2, 3, size, size),)), "dense")
    network = fuse_native(copy.deepcopy(plain))
    assert len(chains(network)) == 1 or name.startswith("shufflenet")  # whose pruned shuffles are selections
    for batch, larger in ((2, 0), (1, 32)):
        images_of_size = torch.randn(batch, 3, size + larger, size + larger)
        check_same(network, copy.deepcopy(plain).double(), (images_of_size,))
