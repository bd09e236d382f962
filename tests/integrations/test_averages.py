"""Averages of a prepared network: pruned with it, never lowered to something else, and no brake on training."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import dspfx
from dspfx.errors import MismatchError, ModelError
from dspfx.integrations.averaging import follow
from dspfx.modules import GatedLayer
from dspfx.passes import apply_masks
from tests.integrations import loops
from tests.nets.untraceable import Refiner


def ema_v2(gm: nn.Module) -> Any:
    from timm.utils import ModelEmaV2

    return ModelEmaV2(gm, decay=0.9)


def ema_v3(gm: nn.Module) -> Any:
    from timm.utils import ModelEmaV3

    return ModelEmaV3(gm, decay=0.9)


def swa(gm: nn.Module) -> Any:
    return AveragedModel(gm)


def torch_ema(gm: nn.Module) -> Any:
    return AveragedModel(gm, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)


AVERAGES = pytest.mark.parametrize("make", [ema_v2, ema_v3, swa, torch_ema])


def update(average: Any, gm: nn.Module) -> None:
    (average.update_parameters if isinstance(average, AveragedModel) else average.update)(gm)


def tune(gm: nn.Module, average: Any, steps: int) -> None:
    optimizer = loops.sgd(gm)
    gm.train()
    for step in range(steps):
        x, y = loops.batch(step)
        optimizer.zero_grad()
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
        update(average, gm)


def gates(module: nn.Module) -> dict[str, GatedLayer]:
    return {name: m for name, m in module.named_modules() if isinstance(m, GatedLayer)}


def pruned() -> Any:
    gm = loops.prepared()
    loops.plain(gm)
    dspfx.prune(gm, dspfx.Budget(flops=0.4))
    return gm


@AVERAGES
def test_an_average_made_before_pruning_follows_it(make: Any) -> None:
    if make in (ema_v2, ema_v3):
        pytest.importorskip("timm", reason="needs timm: the extra dspfx[integrations]")
    gm = loops.prepared()
    average, reference = make(gm), make(gm)
    tune(gm, average, 2)
    reference.load_state_dict(average.state_dict())
    dspfx.prune(gm, dspfx.Budget(flops=0.4))
    follow(average, gm)
    before = loops.tensors(gm)
    tune(gm, average, 3)
    assert any(not torch.equal(before[key], value) for key, value in gm.state_dict().items())
    follow(average, gm)
    for name, gate in gates(gm).items():
        theirs = gates(average)[f"module.{name}"]
        assert torch.equal(gate.gate_group, theirs.gate_group)
        assert torch.equal(gate.gate_keep, theirs.gate_keep)
        dropped = gate.dropped().expand_as(gate.weight)
        assert bool(dropped.any())
        assert not bool(theirs.weight[dropped].any())
    x, _ = loops.batch(9)
    with torch.no_grad():
        expected = average.module.eval()(x)
        small = dspfx.lower(average.module, tune=None)
        assert torch.allclose(small(x), expected, atol=1e-5 * float(expected.abs().max()))
    sizes = [sum(p.numel() for p in net.parameters()) for net in (small, dspfx.lower(gm, tune=None), gm)]
    assert sizes[0] == sizes[1] < sizes[2]


@AVERAGES
def test_what_remains_is_averaged_as_without_us(make: Any) -> None:
    """Kept weights and all other tensors are the average's own; only what was pruned is written."""
    if make in (ema_v2, ema_v3):
        pytest.importorskip("timm", reason="needs timm: the extra dspfx[integrations]")
    gm = loops.prepared()
    average = make(gm)
    tune(gm, average, 2)
    alone = copy.deepcopy(average)
    dspfx.prune(gm, dspfx.Budget(flops=0.4))
    follow(average, gm)
    update(average, gm)
    update(alone, gm)
    ours, theirs = average.module.state_dict(), alone.module.state_dict()
    written = 0
    for key, value in theirs.items():
        if key.endswith(GatedLayer.GATE_KEYS):
            continue
        zero = gm.state_dict()[key] == 0
        same = ours[key] == value
        assert bool((same | zero).all()), key
        written += int((~same).sum())
    assert written > 0


def test_an_average_that_was_not_told_is_refused_rather_than_lowered_to_another_network() -> None:
    gm = loops.prepared()
    average = swa(gm)
    tune(gm, average, 2)
    dspfx.prune(gm, dspfx.Budget(flops=0.4))
    tune(gm, average, 2)
    name, gate = next((n, g) for n, g in gates(average.module).items() if g.is_pruned)
    back = int(gate.weight[gate.dropped().expand_as(gate.weight)].count_nonzero())
    with pytest.raises(ModelError) as caught:
        dspfx.lower(average.module, tune=None)
    assert str(caught.value) == (
        f"{name}.weight holds {back} values that are not zero where its gate has pruned, so a lowered network would "
        "not be equal to it. It is an average (EMA, SWA) of networks, was given other weights, or was trained by an "
        "optimizer without torch's step hooks: call dspfx.integrations.averaging.follow(average, network), or "
        "follow(network, network), which makes them zero."
    )


@pytest.mark.parametrize("make", [ema_v2, torch_ema])
def test_averages_of_whole_numbers_round_groups_and_are_mended(make: Any) -> None:
    if make is ema_v2:
        pytest.importorskip("timm", reason="needs timm: the extra dspfx[integrations]")
    gm = pruned()
    average = make(gm)
    for _ in range(5):
        update(average, gm)
    rounded = [
        name for name, gate in gates(gm).items() if (gate.gate_group != gates(average.module)[name].gate_group).any()
    ]
    assert rounded  # 0.9 * 3 + 0.1 * 3 is a little less than 3
    with pytest.raises(ModelError, match=re.escape("values that are not zero where its gate has pruned")):
        dspfx.lower(average.module, tune=None)
    follow(average, gm)
    for name, gate in gates(gm).items():
        assert torch.equal(gate.gate_group, gates(average.module)[name].gate_group)
    x, _ = loops.batch(9)
    with torch.no_grad():
        expected, found = gm.eval()(x), dspfx.lower(average.module, tune=None)(x)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_a_plain_mean_of_buffers_fails_in_torch_on_any_boolean_one() -> None:
    """docs/training.md says so: AveragedModel(use_buffers=True) without avg_fn."""
    gm = loops.prepared()
    average = AveragedModel(gm, use_buffers=True)
    average.update_parameters(gm)
    with pytest.raises(RuntimeError, match="two bool tensors is not supported"):
        average.update_parameters(gm)


def test_networks_that_are_not_prepared_alike_do_not_follow() -> None:
    gm = pruned()
    other = dspfx.prepare(loops.Tiny(), loops.batch(0)[0], dspfx.GateConfig(groups=2))
    before = loops.tensors(other)
    with pytest.raises(MismatchError) as caught:
        follow(other, gm)
    assert str(caught.value) == (
        "The gate of b has 2 groups, 8 x 8 in the average and 4 groups, 8 x 8 in the network; average a copy of the "
        "prepared network itself."
    )
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
    with pytest.raises(ModelError, match="holds no prepared network"):
        follow(loops.Tiny(), gm)


def test_steps_do_not_analyse_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gates are copied at every update; masks of a network that this optimizer does not own are not needed."""
    gm = pruned()
    average = swa(gm)
    tune(gm, average, 1)
    calls: list[Any] = []
    monkeypatch.setattr(apply_masks, "find_masks", lambda *_: calls.append(1))
    tune(gm, average, 2)
    assert calls == []


def test_a_network_prepared_in_parts_is_followed_in_all_of_them() -> None:
    images = torch.randn(2, 3, 16, 16)
    gm = dspfx.prepare(Refiner(), images, dspfx.GateConfig(groups=2))
    average = swa(gm)
    dspfx.prune(gm, dspfx.Budget(flops=0.5))
    follow(average, gm)
    ours, theirs = gates(gm), gates(average.module)
    parts = {name.split(".")[0] for name, gate in ours.items() if gate.is_pruned}
    assert parts == {"stem", "body", "head"}
    for name, gate in ours.items():
        assert torch.equal(gate.weight, theirs[name].weight)
    assert torch.equal(gm.eval()(images), average.module.eval()(images))


def test_gates_that_are_written_anew_with_what_they_hold_are_not_analysed(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP broadcasts buffers before every forward pass; averages swapped in for validation are copied."""
    gm = pruned()
    find, calls = apply_masks.find_masks, []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return find(*arguments)

    monkeypatch.setattr(apply_masks, "find_masks", counted)
    optimizer = loops.sgd(gm)
    gate = next(g for g in gates(gm).values() if g.is_pruned)
    for step in range(3):
        gate.gate_group.copy_(gate.gate_group.clone())
        if step == 2:
            gate.gate_group[:2] = -1
        x, y = loops.batch(step)
        optimizer.zero_grad()
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
        assert len(calls) == (step == 2)
    assert not bool(gate.weight[:2].any())


def test_update_bn_measures_a_pruned_network_as_any_other() -> None:
    gm = pruned()
    average = swa(gm)
    tune(gm, average, 2)
    follow(average, gm)
    plain = dspfx.lower(average.module, tune=None, fold=False)
    images = [loops.batch(seed)[0] for seed in range(3)]
    reference = copy.deepcopy(average.module)
    update_bn(images, average)
    reference.bn.reset_running_stats()
    reference.bn.momentum = None
    reference.train()
    with torch.no_grad():
        for x in images:
            reference(x)
        assert torch.equal(average.module.bn.running_var, reference.bn.running_var)
        assert average.module.bn.momentum == 0.1
        x, _ = loops.batch(9)
        expected = average.module.eval()(x)
        assert not torch.allclose(plain(x), expected)
        small = dspfx.lower(average.module, tune=None)
        assert torch.allclose(small(x), expected, atol=1e-5 * float(expected.abs().max()))
