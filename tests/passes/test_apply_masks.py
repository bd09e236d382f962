"""Pruned stays pruned: through optimizers, averages, checkpoints, copies and further pruning, exactly zero."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dspfx.config import Budget, GateConfig
from dspfx.errors import MismatchError
from dspfx.graph.analyse import analyse
from dspfx.graph.traced import TracedModule
from dspfx.modules import GatedConv2d
from dspfx.passes.apply_masks import apply_masks, find_masks
from dspfx.pipeline import lower, prepare, prune
from tests.compare import error, leaves, run, same
from tests.zoo import ZOO

NAMES = ("resnet_padded", "inverted_residual", "squeeze_excite", "dense_block", "auxiliary_tuple", "shared_conv")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}


def prepared(name: str = "resnet_padded") -> TracedModule:
    return prepare(ZOO[name].build(), ZOO[name].inputs(), GateConfig(groups=2))


def train(gm: nn.Module, optimizer: torch.optim.Optimizer, name: str = "resnet_padded", steps: int = 3) -> None:
    gm.train()
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        outputs = leaves(gm(*ZOO[name].inputs(4, seed=step)))
        torch.stack([(out - 1).square().mean() for out in outputs]).sum().backward()
        optimizer.step()


def zeros(gm: TracedModule) -> dict[str, Tensor]:
    """Parameter name -> what the gates drop, bool in the parameter's shape."""
    found = {}
    for name, dead in find_masks(gm, analyse(gm)).items():
        found[name] = dead.expand_as(gm.get_parameter(name)).clone()
    return found


def check_zeros(model: nn.Module, dead: dict[str, Tensor], prefix: str = "") -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in dead.items():
        assert bool((parameters[prefix + name][mask] == 0).all()), name


def check_state(gm: TracedModule, optimizer: torch.optim.Optimizer, dead: dict[str, Tensor]) -> None:
    buffers = 0
    for name, mask in dead.items():
        parameter = gm.get_parameter(name)
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                assert bool((value[mask] == 0).all()), name
                buffers += 1
    assert buffers or not optimizer.state


def test_what_is_masked_is_what_the_plan_drops() -> None:
    """The masks against a loop over the plan: weights out of every group, biases and norms of dead filters."""
    gm = prepared()
    plan = prune(gm, Budget(flops=0.4))
    dead = zeros(gm)
    assert dead
    died = 0
    for layer in plan.layers:
        kept = torch.zeros(layer.out_channels, layer.in_channels, dtype=torch.bool)
        for group in layer.groups:
            for o in group.filters:
                for c in group.channels:
                    kept[o, c] = True
        weight = gm.get_parameter(f"{layer.name}.weight")
        assert torch.equal((weight != 0).flatten(2).any(2), kept)
        norm = f"{layer.name.rpartition('.')[0]}.{int(layer.name.rpartition('.')[2]) + 1}"
        for o in (~kept.any(1)).nonzero().flatten().tolist():
            assert gm.get_parameter(f"{norm}.weight")[o] == 0
            assert gm.get_parameter(f"{norm}.bias")[o] == 0
            died += 1
        alive = kept.any(1)
        assert bool((gm.get_parameter(f"{norm}.weight")[alive] != 0).all())
    assert died > 0


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_keeps_zeros(kind: str, made: str) -> None:
    gm = prepared()
    optimizer = OPTIMIZERS[kind](gm.parameters())
    if made == "before":
        train(gm, optimizer, steps=2)  # momentum that would move what is pruned next
    prune(gm, Budget(flops=0.5))
    if made == "after":
        optimizer = OPTIMIZERS[kind](gm.parameters())
    dead = zeros(gm)
    alive = {name: gm.get_parameter(name).detach().clone() for name in dead}
    train(gm, optimizer)
    check_zeros(gm, dead)
    check_state(gm, optimizer, dead)
    assert any(not torch.equal(alive[name][~dead[name]], gm.get_parameter(name)[~dead[name]]) for name in dead)


@pytest.mark.parametrize("name", NAMES)
def test_masked_equals_lowered_after_training(name: str) -> None:
    gm = prepared(name)
    prune(gm, Budget(flops=0.5))
    dead = zeros(gm)
    optimizer = OPTIMIZERS["sgd"](gm.parameters())
    train(gm, optimizer, name)
    check_zeros(gm, dead)
    gm.eval()
    small = lower(gm)
    inputs = ZOO[name].inputs(5)
    assert error(run(gm, inputs), run(small, inputs)) <= 1e-5
    assert small.meta["lower_plan"].flops_run < 0.95


def test_an_average_made_before_pruning_follows_by_apply_masks() -> None:
    gm = prepared()
    optimizer = OPTIMIZERS["sgd"](gm.parameters())
    average = AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(gm)
    plan = prune(gm, Budget(flops=0.5))
    dead = zeros(gm)
    assert isinstance(average.module, TracedModule)
    apply_masks(average.module, plan)
    check_zeros(average, dead, "module.")
    for _ in range(3):
        train(gm, optimizer, steps=1)
        average.update_parameters(gm)
        check_zeros(average, dead, "module.")


def test_an_average_made_after_pruning_needs_nothing() -> None:
    gm = prepared()
    prune(gm, Budget(flops=0.5))
    dead = zeros(gm)
    optimizer = OPTIMIZERS["adam"](gm.parameters())
    average = AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        train(gm, optimizer, steps=1)
        average.update_parameters(gm)
    check_zeros(average, dead, "module.")
    assert same(run(average.eval(), ZOO["resnet_padded"].inputs()), run(average.module, ZOO["resnet_padded"].inputs()))


def test_a_checkpoint_carries_its_masks() -> None:
    gm = prepared()
    prune(gm, Budget(flops=0.5))
    dead = zeros(gm)
    fresh = prepared()
    optimizer = OPTIMIZERS["sgd"](fresh.parameters())
    train(fresh, optimizer)
    fresh.load_state_dict(gm.state_dict())
    train(fresh, optimizer)
    check_zeros(fresh, dead)
    check_state(fresh, optimizer, dead)


def test_pruning_again_only_removes_more() -> None:
    gm = prepared()
    optimizer = OPTIMIZERS["sgd"](gm.parameters())
    before: dict[str, Tensor] = {}
    groups: dict[str, Tensor] = {}
    for flops in (0.7, 0.5, 0.3):
        plan = prune(gm, Budget(flops=flops))
        assert plan.flops_left <= flops
        dead = zeros(gm)
        for name, mask in before.items():
            assert bool(dead[name][mask].all())
        assert sum(int(m.sum()) for m in dead.values()) > sum(int(m.sum()) for m in before.values())
        for name, module in gm.named_modules():
            if isinstance(module, GatedConv2d):
                stayed = module.gate_group >= 0
                assert torch.equal(module.gate_group[stayed], groups.get(name, module.gate_group)[stayed])
                groups[name] = module.gate_group.clone()
        train(gm, optimizer, steps=1)
        check_zeros(gm, dead)
        before = dead


def test_pruning_to_a_larger_budget_changes_nothing() -> None:
    gm = prepared()
    prune(gm, Budget(flops=0.5))
    state = copy.deepcopy(gm.state_dict())
    prune(gm, Budget(flops=0.9))
    assert all(torch.equal(value, state[key]) for key, value in gm.state_dict().items())


def test_copies_stay_masked_and_apart() -> None:
    gm = prepared()
    prune(gm, Budget(flops=0.6))
    dead = zeros(gm)
    twin = copy.deepcopy(gm)
    prune(gm, Budget(flops=0.3))
    assert {name: int(m.sum()) for name, m in zeros(twin).items()} == {n: int(m.sum()) for n, m in dead.items()}
    train(twin, OPTIMIZERS["adamw"](twin.parameters()))
    check_zeros(twin, dead)
    more = zeros(gm)
    assert any(bool((twin.get_parameter(name)[mask] != 0).any()) for name, mask in more.items())


def test_another_networks_optimizer_leaves_this_one_alone() -> None:
    gm, other = prepared(), nn.Linear(3, 2)
    prune(gm, Budget(flops=0.5))
    dead = zeros(gm)
    name, mask = next(iter(dead.items()))
    with torch.no_grad():
        gm.get_parameter(name)[mask] = 1.0
    optimizer = OPTIMIZERS["sgd"](other.parameters())
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert bool((gm.get_parameter(name)[mask] == 1).all())


def test_a_plan_of_another_network_is_refused_before_anything_changes() -> None:
    plan = prune(prepared(), Budget(flops=0.5))
    gm = prepare(ZOO["resnet_padded"].build(), ZOO["resnet_padded"].inputs(), GateConfig(groups=3))
    state = copy.deepcopy(gm.state_dict())
    message = re.escape(
        "the prune plan has 16 x 16 in 2 groups for 1.body.0, the model (16, 16, 3); prepare the model as when the "
        "plan was made."
    )
    with pytest.raises(MismatchError, match=f"^{message}$"):
        apply_masks(gm, plan)
    assert all(torch.equal(value, state[key]) for key, value in gm.state_dict().items())
