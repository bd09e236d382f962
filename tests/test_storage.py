"""save and load: bit-identical round trips over the zoo, and errors that name file, values and remedy."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dspfx
from dspfx.errors import BudgetError, ModelError, StorageError
from dspfx.graph.ops import RULES
from dspfx.graph.traced import TracedModule
from dspfx.modules import GatedConv2d, GroupConv2d
from dspfx.plans import Group
from tests.zoo import ZOO, ZooEntry


class Small(nn.Module):
    """Two convolutions, a norm and a head of a given width."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.head = nn.Conv2d(width, 6, 3, padding=1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(F.relu(self.norm(self.conv1(x)))).mean((2, 3)))


class Tied(nn.Module):
    """One weight in two layers, one layer under two names, and one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.third.weight = self.second.weight
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.third(F.relu(self.second(self.second(F.relu(self.first(x)))))) + self.again(x)


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(width: int = 8) -> TracedModule:
    gm = dspfx.prepare(Small(width), IMAGES, dspfx.GateConfig(groups=2))
    dspfx.prune(gm, dspfx.Budget(flops=0.6))
    return gm


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return pytree.tree_leaves(model(*inputs))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit: the same types, shapes and values."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def rewrite(path: Path, **changes: str | None) -> None:
    """Changes the metadata of a file; None removes a key."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    texts = metadata(path) | changes
    save_file(tensors, path, {key: text for key, text in texts.items() if text is not None})


def fails(message: str) -> Any:
    return pytest.raises(StorageError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)
def test_every_network_comes_back_bit_for_bit(entry: ZooEntry, tmp_path: Path) -> None:
    gm = dspfx.prepare(entry.build(), entry.inputs())
    with suppress(BudgetError, ModelError):  # nothing in it can be pruned that far: stored as it is
        dspfx.prune(gm, dspfx.Budget(flops=0.6))
    dspfx.save(gm, tmp_path / "gated")
    again = dspfx.load(tmp_path / "gated", entry.build())
    assert again.meta["gate_plan"] == gm.meta["gate_plan"]
    assert list(again.state_dict()) == list(gm.state_dict())
    assert_equal(list(again.state_dict().values()), list(gm.state_dict().values()))
    assert_equal(outputs(again.eval(), entry.inputs(3)), outputs(gm.eval(), entry.inputs(3)))

    small = dspfx.lower(gm)
    dspfx.save(small, tmp_path / "lowered")
    loaded = dspfx.load(tmp_path / "lowered")
    assert loaded.meta["lower_plan"] == small.meta["lower_plan"]
    assert [n.name for n in loaded.graph.nodes] == [n.name for n in small.graph.nodes]
    assert [repr(m) for m in loaded.children()] == [repr(m) for m in small.children()]
    assert set(loaded.state_dict()) == set(small.state_dict())
    for batch in (1, 5):
        assert_equal(outputs(loaded, entry.inputs(batch)), outputs(small, entry.inputs(batch)))


@pytest.mark.parametrize(
    "build",
    [
        torchvision.models.squeezenet1_0,
        pytest.param(torchvision.models.shufflenet_v2_x1_0, marks=pytest.mark.slow),
        pytest.param(torchvision.models.mobilenet_v3_small, marks=pytest.mark.slow),
        pytest.param(torchvision.models.regnet_y_400mf, marks=pytest.mark.slow),
        pytest.param(torchvision.models.densenet121, marks=pytest.mark.slow),
        pytest.param(torchvision.models.googlenet, marks=pytest.mark.slow),
        pytest.param(torchvision.models.convnext_tiny, marks=pytest.mark.slow),
        pytest.param(torchvision.models.efficientnet_b0, marks=pytest.mark.slow),
        pytest.param(torchvision.models.vgg16_bn, marks=pytest.mark.slow),
        pytest.param(torchvision.models.swin_t, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_torchvision_networks_come_back_bit_for_bit(build: Callable[..., nn.Module], tmp_path: Path) -> None:
    images = torch.randn(2, 3, 64, 64)
    small = dspfx.lower(build(weights=None).eval(), images, tune=None)
    dspfx.save(small, tmp_path / "lowered")
    assert_equal(outputs(dspfx.load(tmp_path / "lowered"), (images,)), outputs(small, (images,)))


def test_branches_unfolded_norms_and_training_come_back(tmp_path: Path) -> None:
    gm = prepared(16)
    small = dspfx.lower(gm, fold=False)
    branch = GroupConv2d.from_conv(small.conv2, small.meta["lower_plan"].layers[1].groups or _halves(small.conv2))
    small.add_module("conv2", branch)
    dspfx.save(small, tmp_path / "a")
    loaded = dspfx.load(tmp_path / "a")
    assert isinstance(loaded.conv2, GroupConv2d)
    assert not loaded.training
    assert not any(m.training for m in loaded.modules())
    assert_equal(outputs(loaded.train(), (IMAGES,)), outputs(small.train(), (IMAGES,)))
    assert int(loaded.norm.num_batches_tracked) == int(small.norm.num_batches_tracked) > 0


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_filters_of_branches_that_read_nothing_come_back(bias: float, tmp_path: Path) -> None:
    small = dspfx.lower(prepared(16), fold=False)
    conv = nn.Conv2d(small.conv2.in_channels, small.conv2.out_channels, 3, padding=1)
    with torch.no_grad():
        conv.weight[::3] = 0
        assert conv.bias is not None
        conv.bias[::3] = bias
    groups = tuple(Group(tuple(o for o in g.filters if o % 3), g.channels) for g in _halves(conv))
    small.add_module("conv2", GroupConv2d.from_conv(conv.eval(), groups))
    dspfx.save(small, tmp_path / "a")
    loaded = dspfx.load(tmp_path / "a")
    assert isinstance(loaded.conv2, GroupConv2d)
    assert (loaded.conv2.rest, loaded.conv2.rest_bias is None) == (tuple(range(0, conv.out_channels, 3)), bias == 0)
    assert_equal(outputs(loaded, (IMAGES,)), outputs(small, (IMAGES,)))


def _halves(conv: Any) -> Any:
    filters, channels = range(conv.out_channels), range(conv.in_channels)
    return (Group(tuple(filters[::2]), tuple(channels)), Group(tuple(filters[1::2]), tuple(channels[::2])))


def test_inputs_and_node_values_come_back(tmp_path: Path) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor, scales: dict[str, Tensor], *, power: float = 1.0) -> Tensor:
            return self.conv(x) * scales["first"] * power

    inputs = dspfx.Inputs(IMAGES, {"first": torch.ones(1)}, power=2.0)
    small = dspfx.lower(Keywords(), inputs, tune=None)
    dspfx.save(small, tmp_path / "a")
    loaded = dspfx.load(tmp_path / "a")
    assert loaded.meta["inputs"].kwargs == {"power": 2.0}
    image, scales = loaded.meta["inputs"].args
    assert (image.shape, image.dtype, image.device.type) == (IMAGES.shape, torch.float32, "meta")
    assert scales["first"].shape == (1,)
    assert [tuple(n.meta["val"].shape) for n in loaded.graph.nodes if n.op == "call_module"] == [(2, 4, 8, 8)]
    found = loaded(IMAGES, {"first": torch.ones(1)}, power=2.0)
    assert torch.equal(found, small(IMAGES, {"first": torch.ones(1)}, power=2.0))


def test_a_prepared_network_loads_into_a_model_of_another_type(tmp_path: Path) -> None:
    gm = prepared()
    dspfx.save(gm, tmp_path / "a")
    again = dspfx.load(tmp_path / "a", Small().double())
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    assert torch.equal(again.conv1.weight.float(), gm.conv1.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_of_tensors_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    small = dspfx.lower(prepared()).to(dtype)
    dspfx.save(small, tmp_path / "a")
    loaded = dspfx.load(tmp_path / "a")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_equal(outputs(loaded, (IMAGES.to(dtype),)), outputs(small, (IMAGES.to(dtype),)))


def test_frozen_parameters_and_channels_last_are_kept(tmp_path: Path) -> None:
    small = dspfx.lower(prepared()).to(memory_format=torch.channels_last)
    small.head.weight.requires_grad_(False)
    dspfx.save(small, tmp_path / "a")
    loaded = dspfx.load(tmp_path / "a")
    assert [n for n, p in loaded.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert loaded.conv1.weight.stride() == small.conv1.weight.stride() != small.conv1.weight.contiguous().stride()


def test_shared_tensors_are_stored_once_and_come_back_shared(tmp_path: Path) -> None:
    gm = dspfx.prepare(Tied(), IMAGES)
    dspfx.save(gm, tmp_path / "gated")
    assert "second.weight" in json.loads(metadata(tmp_path / "gated")["shared"]).values()
    again = dspfx.load(tmp_path / "gated", Tied())
    assert again.third.weight is again.second.weight
    assert again.again is again.first
    small = dspfx.lower(gm)
    small.third.weight = small.second.weight  # lowering slices every layer by itself
    dspfx.save(small, tmp_path / "lowered")
    with safe_open(tmp_path / "lowered", framework="pt") as file:
        assert "third.weight" not in file.keys()  # noqa: SIM118
    loaded = dspfx.load(tmp_path / "lowered")
    assert loaded.third.weight is loaded.second.weight
    assert_equal(outputs(loaded, (IMAGES,)), outputs(small, (IMAGES,)))


def test_pruned_stays_pruned_after_loading(tmp_path: Path) -> None:
    gm = prepared()
    dspfx.save(gm, tmp_path / "a")
    again = dspfx.load(tmp_path / "a", Small()).train()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    dead = {name: m.weight == 0 for name, m in again.named_modules() if isinstance(m, GatedConv2d)}
    for _ in range(2):
        optimizer.zero_grad()
        again(IMAGES).square().sum().backward()
        optimizer.step()
    for name, mask in dead.items():
        weight = again.get_parameter(f"{name}.weight")
        assert bool(mask.any())
        assert torch.equal(weight == 0, mask)


def test_nothing_given_is_changed(tmp_path: Path) -> None:
    gm = prepared().train()
    before, mode = copy.deepcopy(gm.state_dict()), torch.get_rng_state()
    dspfx.save(gm, tmp_path / "a")
    assert gm.training
    assert_equal(list(gm.state_dict().values()), list(before.values()))
    model = Small().eval()
    state, mode = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    again = dspfx.load(tmp_path / "a", model)
    assert type(model.conv1) is nn.Conv2d
    assert not again.training  # the mode of the model, not of the one saved
    assert_equal(list(model.state_dict().values()), list(state.values()))
    dspfx.save(dspfx.lower(gm), tmp_path / "b")
    dspfx.load(tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), mode)


def test_saving_replaces_a_file_or_leaves_nothing_behind(tmp_path: Path) -> None:
    small = dspfx.lower(prepared())
    dspfx.save(small, tmp_path / "a")
    dspfx.save(small, tmp_path / "a")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "missing" / "a", tmp_path / "folder"):
        with pytest.raises(StorageError, match=rf"^{re.escape(str(path))} cannot be written \(.*\); give a file in a "):
            dspfx.save(small, path)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == ["a", "folder"]


def test_only_networks_of_dspfx_are_saved(tmp_path: Path) -> None:
    with fails("Small is neither prepared nor lowered; save what dspfx.prepare or dspfx.lower returned."):
        dspfx.save(Small(), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


class Erfinv(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.special.erfinv(x))


class Odd(nn.Module):
    """A user's own layer, traced as one where a rule is registered for it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Mine(nn.Conv2d):
    """A convolution of the user's own class that computes what torch's does."""


class Versioned(nn.Sequential):
    """Refuses a state_dict that does not say of which version it is."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError("another version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.fixture
def odd_rule() -> Iterator[None]:
    dspfx.register_rule(Odd, "elementwise")
    yield
    del RULES[Odd]


@pytest.mark.usefixtures("odd_rule")
def test_parts_without_a_stored_form_are_named(tmp_path: Path) -> None:
    instead = "Store this network with torch.export, or save the prepared one (dspfx.save before dspfx.lower) instead."
    with fails(
        "Node special_erfinv (call_function) calls torch._C._special.special_erfinv(), which is not among the storable "
        f"functions. {instead}"
    ):
        dspfx.save(dspfx.lower(Erfinv(), IMAGES, tune=None), tmp_path / "a")
    with fails(f"1 is a tests.test_storage.Odd, which is not among the storable layers. {instead}"):
        dspfx.save(dspfx.lower(nn.Sequential(nn.Conv2d(3, 8, 3), Odd()), IMAGES, tune=None), tmp_path / "a")
    small = dspfx.lower(Small(), IMAGES, tune=None)
    small.head.register_forward_hook(lambda module, args, result: result)
    with fails(
        f"head is a torch.nn.modules.linear.Linear with hooks, which is not among the storable layers. {instead}"
    ):
        dspfx.save(small, tmp_path / "a")
    small = dspfx.lower(Small(), IMAGES, tune=None)
    small.conv2.padding_mode = "reflect"
    small.conv2.extra_repr = lambda: "altered"
    with fails(f"conv2 is not what Conv2d's arguments make of it. {instead}"):
        dspfx.save(small, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_subclass_that_computes_what_torchs_does_is_stored_as_torchs(tmp_path: Path) -> None:
    network = nn.Sequential(Mine(3, 8, 3, padding=1, bias=False), nn.ReLU(), Mine(8, 4, 1))
    small = dspfx.lower(network, IMAGES, tune=None)
    dspfx.save(small, tmp_path / "a")
    again = dspfx.load(tmp_path / "a")
    assert [type(layer) for layer in again.children()] == [nn.Conv2d, nn.ReLU, nn.Conv2d]
    assert_equal(outputs(again, (IMAGES,)), outputs(small, (IMAGES,)))


def test_versions_of_the_models_modules_are_those_of_the_instance(tmp_path: Path) -> None:
    gm = dspfx.prepare(Versioned(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)), IMAGES)
    dspfx.save(gm, tmp_path / "a")
    again = dspfx.load(tmp_path / "a", Versioned(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)))
    assert_equal(list(again.state_dict().values()), list(gm.state_dict().values()))


class Backwards(nn.Module):
    """Calls its layers in another order than it has them."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Conv2d(8, 4, 1), nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def test_layers_keep_their_order(tmp_path: Path) -> None:
    small = dspfx.lower(Backwards(), IMAGES, tune=None)
    dspfx.save(small, tmp_path / "a")
    names = [name for name, _ in dspfx.load(tmp_path / "a").named_modules()]
    assert names == [name for name, _ in small.named_modules()]


def test_a_prepared_network_names_the_class_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "a"
    dspfx.save(prepared(), path)
    with fails(
        f"{path} holds a prepared tests.test_storage.Small, which needs an instance of that class: "
        f"dspfx.load('{path}', model=Small(...))."
    ):
        dspfx.load(path)


def test_a_wrong_model_is_named_by_its_first_difference(tmp_path: Path) -> None:
    path = tmp_path / "a"
    dspfx.save(prepared(), path)
    remedy = "Give an instance of tests.test_storage.Small built with the arguments it had when it was prepared."
    model = Small(12)
    before = copy.deepcopy(model.state_dict())
    with fails(
        f"{path} does not fit this Small: at conv1.weight the file has shape (8, 3, 3, 3), the model shape "
        f"(12, 3, 3, 3). {remedy}"
    ):
        dspfx.load(path, model)
    assert_equal(list(model.state_dict().values()), list(before.values()))
    with fails(
        f"{path} does not fit this Tied: at first.weight the file has no such tensor, the model shape (6, 3, 1, 1). "
        f"{remedy}"
    ):
        dspfx.load(path, Tied())
    headless = Small()
    headless.head = nn.Linear(6, 4, bias=False)
    with fails(
        f"{path} does not fit this Small: at head.bias the file has shape (4,), the model no such tensor. {remedy}"
    ):
        dspfx.load(path, headless)
    with fails(f"the model given for {path} is prepared already; give a fresh instance of tests.test_storage.Small."):
        dspfx.load(path, prepared())


def test_a_lowered_network_refuses_a_model(tmp_path: Path) -> None:
    path = tmp_path / "a"
    dspfx.save(dspfx.lower(prepared()), path)
    with fails(f"{path} holds a lowered network, which needs no model: dspfx.load('{path}')."):
        dspfx.load(path, Small())


def test_files_of_other_origin_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with fails(f"{path} does not exist; give a file that dspfx.save wrote."):
        dspfx.load(path)
    part = (
        rf"^{re.escape(str(path))} is no safetensors file, or a part of one \(.*\); give a file that dspfx.save wrote, "
    )
    for content in (b"", b"not a network", b"\xff" * 64, b"PK\x03\x04" + bytes(64)):
        path.write_bytes(content)
        with pytest.raises(StorageError, match=part):
            dspfx.load(path)
    with pytest.raises(StorageError, match=rf"^{re.escape(str(tmp_path))} is no safetensors file, or a part of one \("):
        dspfx.load(tmp_path)
    save_file({"x": torch.ones(1)}, path)
    with fails(f"{path} is a safetensors file without a network of dspfx; dspfx.save writes those."):
        dspfx.load(path)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "cut"
    dspfx.save(dspfx.lower(prepared()), whole)
    content = whole.read_bytes()
    for length in (1, 7, 8, 100, len(content) // 4, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(StorageError, match=rf"^{re.escape(str(path))} is no safetensors file, or a part of one \("):
            dspfx.load(path)


def test_newer_versions_and_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    dspfx.save(dspfx.lower(prepared()), path)
    rewrite(path, dspfx="3")
    with fails(
        f"{path} was written in format 3 by a newer dspfx, this one reads up to format 2; upgrade dspfx: pip install "
        "--upgrade dspfx."
    ):
        dspfx.load(path)
    rewrite(path, dspfx="1", kind="frozen")
    with fails(f"{path} is damaged: it holds a 'frozen', which is neither gated nor lowered."):
        dspfx.load(path)
    rewrite(path, kind="gated")
    with fails(f"{path} is damaged, or was not written by dspfx.save: 'gate_plan' is not in its metadata."):
        dspfx.load(path, Small())
    dspfx.save(prepared(), path)
    rewrite(path, kind="lowered")
    with fails(f"{path} is damaged, or was not written by dspfx.save: 'network' is not in its metadata."):
        dspfx.load(path)


def test_gates_outside_their_groups_are_refused(tmp_path: Path) -> None:
    path, gm = tmp_path / "a", prepared()
    gm.conv2.gate_group.fill_(7)
    dspfx.save(gm, path)
    with fails(f"{path} is damaged: conv2 puts filters into groups 7 to 7 of 2."):
        dspfx.load(path, Small())
