"""What trained a network trains the lowered one on: stepped and lowered = lowered and stepped, state included."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import LBFGS, SGD, Adadelta, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop, Rprop
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dspfx
from dspfx import pipeline
from dspfx.config import Budget, GateConfig
from dspfx.errors import MismatchError, ModelError
from dspfx.graph.analyse import analyse
from dspfx.graph.traced import network_meta, traced_modules
from dspfx.grouped import PaddedGroupConv2d
from dspfx.modules import GroupConv2d
from dspfx.passes.apply_masks import find_masks
from tests.compare import error, forced, pruned, run
from tests.nets.untraceable import Refiner
from tests.zoo import OTHERS, ZOO, ZooEntry

Make = Callable[[Iterable[Any]], Optimizer]
# The gradient of a bias in front of a batch norm is rounding alone; a small eps would make steps of it.
OPTIMIZERS: dict[str, Make] = {
    "sgd": partial(SGD, lr=0.01, momentum=0.9, weight_decay=1e-2),
    "nesterov": partial(SGD, lr=0.01, momentum=0.9, nesterov=True),
    "adam": partial(Adam, lr=1e-3, eps=1e-5),
    "amsgrad": partial(AdamW, lr=1e-3, eps=1e-5, weight_decay=1e-2, amsgrad=True),
    "fused": partial(AdamW, lr=1e-3, eps=1e-5, fused=True),
    "rmsprop": partial(RMSprop, lr=1e-3, eps=1e-3, momentum=0.9),
    "adagrad": partial(Adagrad, lr=1e-2, eps=1e-5),
    "nadam": partial(NAdam, lr=1e-3, eps=1e-5),
    "rprop": partial(Rprop, lr=1e-3),
    "adadelta": partial(Adadelta, lr=1.0),
}
# Networks whose training outputs are other ones than those in evaluation, which alone are lowered.
AUXILIARY = {"auxiliary_tuple", "auxiliary_dict"}
STEPPED = {n: e for n, e in (ZOO | OTHERS).items() if not e.has_rng and n not in AUXILIARY and e.kind != "named"}
TIED = {"tied_convs", "tied_autoencoder"}  # weights that several layers share, until these are split
# Residuals, depthwise and grouped convolutions, concatenation, shuffles, shared layers, group and layer norms,
# transposed and functional layers, free parameters, linear layers that read pixels; each with an optimizer and a form.
QUICK = [
    ("resnet_padded", "sgd", "branches"),
    ("resnet_bottleneck", "nesterov", "grouped"),
    ("inverted_residual", "adam", "dense"),
    ("resnext", "amsgrad", "branches"),
    ("dense_block", "rmsprop", "branches"),
    ("channel_shuffle", "adagrad", "grouped"),
    ("shared_head", "adam", "branches"),
    ("group_norm", "sgd", "branches"),
    ("layer_norm", "fused", "dense"),
    ("transposed", "nadam", "dense"),
    ("functional_layers", "adam", "branches"),
    ("free_scales", "adadelta", "branches"),
    ("vgg_flatten", "rprop", "grouped"),
    ("activations", "sgd", "dense"),
]


def train(network: nn.Module, optimizer: Optimizer, entry: ZooEntry, steps: int, seed: int = 5) -> None:
    """Steps towards a random projection of the outputs, on batches that differ."""
    network.train()
    for step in range(seed, seed + steps):
        optimizer.zero_grad()
        outputs = run(network, entry.inputs(4, seed=step, dtype=torch.float64))
        generator = torch.Generator().manual_seed(step)
        loss: Any = 0.0
        for out in outputs:
            loss = loss + (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).mean()
        loss.backward()
        optimizer.step()


def lowered_alike(gm: nn.Module, small: nn.Module) -> Any:
    """`gm` lowered by the plan of `small`."""
    return pipeline._carried_out(pipeline._plain(gm, None), network_meta(small)["lower_plan"], fold=False)


def kept(gm: nn.Module, small: nn.Module) -> dict[str, Tensor]:
    """Name in `small` -> where it holds what pruning kept, found by lowering ones."""
    ones = copy.deepcopy(gm)
    masks = find_masks(gm, analyse(gm))
    with torch.no_grad():
        for name, parameter in ones.named_parameters():
            parameter.fill_(1.0)
            if name in masks:
                parameter.masked_fill_(masks[name], 0.0)
    return {name: p != 0 for name, p in lowered_alike(ones, small).named_parameters()}


def check_commutes(entry: ZooEntry, make: Make, form: str, tolerance: float = 1e-12) -> nn.Module:
    """Steps, lowers and steps again; the last step before lowering gives the same weights and the same state."""
    gm = pruned(entry)
    optimizer = make(gm.parameters())
    train(gm, optimizer, entry, 3)
    small: nn.Module = forced(gm, form, fold=False)
    moved = dspfx.remap_optimizer(optimizer, gm, small)
    assert type(moved) is type(optimizer)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    train(gm, optimizer, entry, 1, seed=9)
    train(small, moved, entry, 1, seed=9)
    expected, where = lowered_alike(gm, small), kept(gm, small)
    wanted, again = dict(expected.named_parameters()), dspfx.remap_optimizer(optimizer, gm, small)
    assert wanted.keys() == before.keys()
    trained = 0
    for name, parameter in small.named_parameters():
        assert parameter.shape == wanted[name].shape
        chosen = where[name]
        trained += int((parameter.detach() != before[name])[chosen].sum())
        assert torch.allclose(parameter[chosen], wanted[name][chosen], rtol=0, atol=tolerance), name
        for key, value in again.state[parameter].items():
            found = moved.state[parameter][key]
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                assert value.dtype == found.dtype
                assert value.stride() == parameter.stride()
                value, found = value[chosen], found[chosen]
            assert torch.allclose(torch.as_tensor(found), torch.as_tensor(value), rtol=0, atol=tolerance), (name, key)
    assert trained > 0
    return small


@pytest.mark.parametrize(("name", "optimizer", "form"), QUICK)
def test_a_step_commutes_with_lowering(name: str, optimizer: str, form: str) -> None:
    small = check_commutes(STEPPED[name], OPTIMIZERS[optimizer], form)
    kinds = {"branches": GroupConv2d, "grouped": PaddedGroupConv2d}
    if form in kinds and name not in ("vgg_flatten",):
        assert any(isinstance(m, kinds[form]) for m in small.modules())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "branches", "grouped"])
@pytest.mark.parametrize("name", STEPPED)
def test_a_step_commutes_with_lowering_everywhere(name: str, form: str) -> None:
    if name not in TIED or form == "dense":
        check_commutes(STEPPED[name], OPTIMIZERS["amsgrad"], form)
        return
    with pytest.raises(MismatchError, match=r"^\w+\.weight is one weight of several layers, and the lowered network"):
        check_commutes(STEPPED[name], OPTIMIZERS["amsgrad"], form)


def small_case(name: str = "resnet_padded") -> tuple[Any, Any]:
    gm = pruned(ZOO[name])
    return gm, forced(gm, "branches", fold=False)


def test_groups_names_and_what_is_not_the_networks_are_kept() -> None:
    gm, small = small_case()
    scale = nn.Parameter(torch.ones(2, dtype=torch.float64))  # of a loss
    named = dict(gm.named_parameters())
    slow = [(n, p) for n, p in named.items() if p.dim() > 1]
    fast = [(n, p) for n, p in named.items() if p.dim() <= 1] + [("scale", scale)]
    groups: list[dict[str, Any]] = [
        {"params": slow, "lr": 0.5, "betas": (0.5, 0.6)},
        {"params": fast},
        {"params": [("", nn.Parameter())]},
    ]
    optimizer = AdamW(groups, lr=0.25, weight_decay=0.125)
    CosineAnnealingLR(optimizer, 10)
    scale.grad = torch.ones_like(scale)
    train(gm, optimizer, ZOO["resnet_padded"], 2)
    before = copy.deepcopy(optimizer.state_dict())
    moved = dspfx.remap_optimizer(optimizer, gm, small)
    assert [g["lr"] for g in moved.param_groups] == [0.5, 0.25, 0.25]
    assert [g["initial_lr"] for g in moved.param_groups] == [0.5, 0.25, 0.25]
    assert [g["betas"] for g in moved.param_groups] == [(0.5, 0.6), (0.9, 0.999), (0.9, 0.999)]
    assert {g["weight_decay"] for g in moved.param_groups} == {0.125}
    names = [g["param_names"] for g in moved.param_groups]
    found = {n: p for g in moved.param_groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    assert all(found[n] is p for n, p in small.named_parameters())
    assert found["scale"] is scale
    assert all(p.dim() > 1 for p in moved.param_groups[0]["params"])
    assert len(names[0]) > len(slow)  # branches
    assert names[1][-1] == "scale"
    first = moved.state[small.get_parameter(names[0][0])]
    assert first["step"].item() == 2
    for group in moved.param_groups:  # a copy: the old optimizer is as it was
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    moved.step()
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][item]) for item, value in state.items())


def test_a_schedule_goes_on() -> None:
    gm, small = small_case()
    optimizer = SGD(gm.parameters(), lr=1.0, momentum=0.9)
    schedule, rates = CosineAnnealingLR(optimizer, 8), []
    for step in range(8):
        if step == 3:
            state, optimizer = schedule.state_dict(), dspfx.remap_optimizer(optimizer, gm, small)
            schedule = CosineAnnealingLR(optimizer, 8)
            schedule.load_state_dict(state)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    other = SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, expected = CosineAnnealingLR(other, 8), []
    for _ in range(8):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_before_any_step_there_is_no_state_and_training_starts() -> None:
    gm, small = small_case()
    moved = dspfx.remap_optimizer(SGD(gm.parameters(), lr=0.1, momentum=0.9), gm, small)
    assert not moved.state
    train(small, moved, ZOO["resnet_padded"], 1)
    assert len(moved.state) == len(list(small.parameters()))


def test_momentum_of_what_was_pruned_since_is_dropped() -> None:
    entry = ZOO["plain"]
    gm = dspfx.prepare(entry.build().double(), entry.inputs(3, dtype=torch.float64), GateConfig(groups=2))
    optimizer = SGD(gm.parameters(), lr=0.01, momentum=0.9)
    train(gm, optimizer, entry, 2)
    dspfx.prune(gm, Budget(flops=0.5))
    small = dspfx.lower(gm, fold=False, tune=None)
    moved, where = dspfx.remap_optimizer(optimizer, gm, small), kept(gm, small)
    dropped = 0
    for name, parameter in small.named_parameters():
        momentum = moved.state[parameter]["momentum_buffer"]
        dropped += int((~where[name]).sum())
        assert not momentum[~where[name]].any()
        assert momentum[where[name]].all()
    assert dropped > 0


def test_networks_in_parts() -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    gm = dspfx.prepare(Refiner().double(), images, GateConfig(groups=2))
    optimizer = Adam(gm.parameters(), lr=1e-3, eps=1e-5)

    def step(network: Any, stepped: Optimizer) -> None:
        stepped.zero_grad()
        network.train()(images).square().mean().backward()
        stepped.step()

    step(gm, optimizer)
    dspfx.prune(gm, Budget(flops=0.5))
    step(gm, optimizer)
    small = dspfx.lower(gm, fold=False, tune=None)
    moved = dspfx.remap_optimizer(optimizer, gm, small)
    step(gm, optimizer)
    step(small, moved)
    wanted, where = dict(lowered_alike(gm, small).named_parameters()), kept(gm, small)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in gm.parameters())
    for name, parameter in small.named_parameters():
        assert torch.allclose(parameter[where[name]], wanted[name][where[name]], rtol=0, atol=1e-12)


def test_factored_state_follows_where_its_means_do() -> None:
    """Of a convolution, rows and columns are those of its kernels; of a linear layer, they are channels."""
    gm = pruned(ZOO["super_resolution"])
    optimizer = Adafactor(gm.parameters(), lr=1e-3)
    train(gm, optimizer, ZOO["super_resolution"], 2)
    small = forced(gm, "dense", fold=False)
    moved = dspfx.remap_optimizer(optimizer, gm, small)
    smaller = 0
    for layer in network_meta(small)["lower_plan"].layers:
        old = optimizer.state[gm.get_parameter(f"{layer.name}.weight")]
        new = moved.state[small.get_parameter(f"{layer.name}.weight")]
        for key in ("row_var", "col_var"):
            assert torch.equal(new[key], old[key][list(layer.filters)][:, list(layer.channels)])
            smaller += new[key].numel() < old[key].numel()
        assert new["step"].item() == 2
    assert smaller > 0
    gm = pruned(ZOO["plain"])
    optimizer = Adafactor(gm.parameters(), lr=1e-3)
    train(gm, optimizer, ZOO["plain"], 1)
    message = (
        "Adafactor keeps 'row_var', a Tensor of shape (10, 1), for 3.2.weight, of shape (10, 32) and (10, 22) once "
        "lowered; it cannot be selected as the parameter was. Construct a new optimizer over the lowered network, or "
        "train with one that keeps state of the parameter's shape (SGD, Adam)."
    )
    with pytest.raises(MismatchError, match=re.escape(message)):
        dspfx.remap_optimizer(optimizer, gm, forced(gm, "dense", fold=False))


def refused(optimizer: Optimizer, gm: Any, small: Any, message: str, kind: type[Exception] = MismatchError) -> None:
    with pytest.raises(kind, match=rf"^{re.escape(message)}$"):
        dspfx.remap_optimizer(optimizer, gm, small)


def test_networks_that_do_not_belong_together_are_refused() -> None:
    gm, small = small_case("plain")
    optimizer = SGD(gm.parameters(), lr=0.1)
    folded = dspfx.lower(gm, tune=None)
    remedy = (
        "It was lowered with fold=True, which merges batch norms into convolutions, or from another network; call "
        "small = dspfx.lower(gm, fold=False)."
    )
    refused(
        optimizer,
        gm,
        folded,
        "the lowered network is not what its plan makes of Sequential: at 0.1.weight it has no such parameter, the "
        f"plan makes shape (15,). {remedy}",
    )
    refused(optimizer, gm, gm, "Sequential is not lowered; call small = dspfx.lower(gm, fold=False) first.", ModelError)
    message = "GraphModule is not prepared; give the network that dspfx.prepare returned, and that was lowered."
    refused(optimizer, small, small, message, ModelError)
    other, _ = small_case("plain")
    with pytest.raises(
        MismatchError, match=r"^The optimizer does not own 0\.0\.weight, 0\.1\.weight, .*\(\d+ of \d+\)"
    ):
        dspfx.remap_optimizer(optimizer, other, small)


def test_what_is_not_owned_is_named() -> None:
    gm, small = small_case("plain")
    for name, parameter in gm.named_parameters():
        parameter.requires_grad_(name.startswith(("2.", "3.")))
    small = forced(gm, "dense", fold=False)
    optimizer = SGD([p for n, p in gm.named_parameters() if n.startswith("2.")], lr=0.1)
    refused(
        optimizer,
        gm,
        small,
        "The optimizer does not own 3.2.weight, 3.2.bias, which the lowered network trains (2 of 5); give the "
        "optimizer of the network that was lowered, or freeze those with requires_grad_(False) before lowering.",
    )
    for name, parameter in gm.named_parameters():
        parameter.requires_grad_(name.startswith("2."))
    small = forced(gm, "dense", fold=False)
    owned = dspfx.remap_optimizer(optimizer, gm, small).param_groups[0]["params"]
    assert [id(p) for p in owned] == [id(p) for p in small.parameters() if p.requires_grad]


def test_state_that_is_not_by_parameter_is_refused() -> None:
    gm, small = small_case("plain")
    refused(
        LBFGS(gm.parameters()),
        gm,
        small,
        "LBFGS keeps _params, which is not state by parameter and cannot follow a lowered network; give the optimizer "
        "that it wraps, or construct a new one.",
    )


class Signed(SGD):
    """An optimizer of somebody's own, with a setting beside its groups."""

    def __init__(self, params: Any, power: float) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.power = power


def test_classes_of_ones_own_keep_their_settings() -> None:
    gm, small = small_case("plain")
    optimizer = Signed(gm.parameters(), 0.5)
    optimizer.register_step_post_hook(lambda *args: pytest.fail("a hook of the old optimizer"))
    moved = dspfx.remap_optimizer(optimizer, gm, small)
    assert isinstance(moved, Signed)
    assert moved.power == 0.5
    train(small, moved, ZOO["plain"], 1)
    assert moved.state_dict()["param_groups"][0]["momentum"] == 0.9


def test_weights_that_come_untied_are_refused() -> None:
    gm = pruned(OTHERS["tied_convs"])
    optimizer = SGD(gm.parameters(), lr=0.1)
    assert len(dspfx.remap_optimizer(optimizer, gm, forced(gm, "dense", fold=False)).param_groups[0]["params"]) == 15
    small = forced(gm, "branches", fold=False)
    refused(
        optimizer,
        gm,
        small,
        "first.weight is one weight of several layers, and the lowered network has it in first.branches.0.weight "
        "and second.branches.4.weight, which would drift apart in training. Untie it before dspfx.prepare, or "
        "construct a new optimizer over the lowered network.",
    )


def test_computed_weights_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), parametrizations.weight_norm(nn.Conv2d(8, 8, 3)))
    gm = dspfx.prepare(model, torch.randn(2, 3, 8, 8))
    small = dspfx.lower(gm, fold=False, tune=None)
    refused(
        SGD(gm.parameters(), lr=0.1),
        gm,
        small,
        "2.weight of the lowered network is computed from other parameters of the prepared one (a parametrization, or "
        "the model's own code), so no state can follow it. Remove parametrizations before dspfx.prepare, or construct "
        "a new optimizer.",
    )


def test_lowering_leaves_nothing_behind_that_a_step_would_meet() -> None:
    """The copy that was lowered shares layers with one that is only discarded, and has gates."""
    gm = pruned(ZOO["correlated"])
    entry, optimizer = ZOO["correlated"], SGD(gm.parameters(), lr=0.01)
    gc.disable()
    try:
        small = dspfx.lower(gm, fold=False, tune=None)
        dspfx.remap_optimizer(optimizer, gm, small)
        train(gm, optimizer, entry, 1)
    finally:
        gc.enable()
    networks = [n for n in traced_modules if "gate_plan" in n.meta and n.training]
    assert any(n is gm for n in networks)


@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        ("resnet_padded", "AveragedModel"),
        ("group_norm", "AveragedModel"),
        ("shared_conv", "AveragedModel"),
        ("plain", "ModelEmaV2"),
        ("plain", "ModelEmaV3"),
    ],
)
def test_an_average_follows(name: str, wrapper: str) -> None:
    """An average that began before pruning, and remembers what was pruned."""
    entry = ZOO[name]
    gm = dspfx.prepare(entry.build().double(), entry.inputs(3, dtype=torch.float64), GateConfig(groups=3))
    optimizer = SGD(gm.parameters(), lr=0.01, momentum=0.9)
    ema: Any = AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    if wrapper != "AveragedModel":
        ema = getattr(pytest.importorskip("timm.utils", reason="needs the extra zoo"), wrapper)(gm, decay=0.9)
    update = "update_parameters" if wrapper == "AveragedModel" else "update"
    train(gm, optimizer, entry, 2)
    getattr(ema, update)(gm)
    dspfx.prune(gm, Budget(flops=0.5))
    train(gm, optimizer, entry, 1)
    getattr(ema, update)(gm)
    small = forced(gm, "branches", fold=False)
    before = {key: value.clone() for key, value in ema.state_dict().items()}
    lowered = dspfx.remap_ema(ema, gm, small)
    assert type(lowered) is type(ema)
    assert all(torch.equal(value, ema.state_dict()[key]) for key, value in before.items())
    average = copy.deepcopy(ema.module)
    with torch.no_grad():
        for key, mask in find_masks(gm, analyse(gm)).items():
            average.get_parameter(key).masked_fill_(mask, 0)
    inputs = entry.inputs(4, dtype=torch.float64)
    assert error(run(average.eval(), inputs), run(lowered.module.eval(), inputs)) < 1e-12
    assert error(run(small.eval(), inputs), run(lowered.module.eval(), inputs)) > 1e-6
    moved = dspfx.remap_optimizer(optimizer, gm, small)
    train(small, moved, entry, 1)
    weights = {key: value.clone() for key, value in lowered.module.named_parameters()}
    getattr(lowered, update)(small)
    for key, value in small.named_parameters():
        assert torch.allclose(lowered.module.get_parameter(key), 0.9 * weights[key] + 0.1 * value, atol=1e-12)


def test_an_average_of_another_network_is_refused() -> None:
    gm, small = small_case("plain")
    ema = AveragedModel(nn.Linear(2, 2))
    message = (
        "AveragedModel.module is no copy of Sequential: at 0.0.weight it has no such tensor, the other shape "
        "(16, 3, 3, 3). Make the average of the network that dspfx.prepare returned."
    )
    with pytest.raises(MismatchError, match=re.escape(message)):
        dspfx.remap_ema(ema, gm, small)
