"""Unifier and unify: ADMM reaches known optima, what is alike stays so to the last bit, states resume."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dspfx
from dspfx.errors import ConfigError, MismatchError, ModelError, StorageError
from dspfx.method.blocks import FREE, PRUNED, UNIFIED, Tiling
from dspfx.passes.unify_blocks import unify_blocks
from dspfx.plans import UnifyPlan

CONFIG = dspfx.BlockConfig((4, 2), prune=0.25, unify=0.5)


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 10, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 5),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(6, 3, 8, 8, generator=generator), torch.randint(0, 5, (6,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def check_alike(model: nn.Module, plan: UnifyPlan) -> None:
    """Every block is what the plan says, bit by bit, by a loop."""
    modules = dict(model.named_modules())
    for layer in plan.layers:
        blocks = Tiling(layer.shape, plan.config.shape, plan.config.layout).split(modules[layer.name].weight.detach())
        for block, kind in zip(blocks, layer.kinds(), strict=True):
            living = block[block != 0].abs()
            assert kind != UNIFIED or len(set(living.tolist())) <= 1
            assert kind != PRUNED or not len(living)


@pytest.mark.parametrize("scope", ["layer", "network"])
@pytest.mark.parametrize("layout", ["planes", "gemm"])
def test_one_shot_meets_the_fractions(layout: Any, scope: Any) -> None:
    model = network()
    plan = dspfx.unify(model, dspfx.BlockConfig((4, 2), 0.25, 0.5, layout, scope))
    check_alike(model, plan)
    assert plan.pruned >= 0.25
    assert plan.unified >= 0.5 - (scope == "layer") * 0.01
    assert UnifyPlan.from_json(plan.to_json()) == plan
    assert [layer.name for layer in plan.layers] == ["0", "3", "4", "7"]
    assert "of all blocks of 4 x 2" in str(plan)
    again = network()
    unify_blocks(again, UnifyPlan.from_json(plan.to_json()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def quadratic(wanted: Tensor, curvature: Tensor) -> tuple[nn.Linear, Callable[[], Tensor]]:
    """A layer, and the loss 1/2 sum c (w - wanted)^2 of its weight."""
    layer = nn.Linear(wanted.shape[1], wanted.shape[0], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(wanted)
    return layer, lambda: (curvature * (layer.weight - wanted).square()).sum() / 2


def solve(layer: nn.Linear, loss: Callable[[], Tensor], config: dspfx.BlockConfig) -> Tensor:
    """ADMM, at last with a constant rho, projection, and training on; the weights that ADMM led to."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    with dspfx.Unifier(layer, optimizer, config, total_steps=2000, rho=1.0, every=5) as unifier:
        for step in range(6000):
            if step == 4000:
                led_to = layer.weight.detach().clone()
                unifier.project()
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return led_to


def test_admm_reaches_the_optimum_of_a_convex_problem() -> None:
    """All blocks unified, signs clear: the optimum of a block is the mean of |wanted| weighted by the curvature."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    wanted = torch.copysign(wanted.abs() + 0.5, wanted)
    curvature = torch.rand(8, 6, generator=generator, dtype=torch.float64) + 0.2
    layer, loss = quadratic(wanted, curvature)
    led_to = solve(layer, loss, dspfx.BlockConfig((2, 3), unify=1.0))
    tiling = Tiling((8, 6), (2, 3))
    heavy, blocks = tiling.split(curvature), tiling.split(wanted)
    optimum = (heavy * blocks.abs()).sum(1, keepdim=True) / heavy.sum(1, keepdim=True) * blocks.sign()
    assert float((led_to - tiling.join(optimum)).abs().max()) <= 1e-6
    assert float((layer.weight.detach() - tiling.join(optimum)).abs().max()) <= 1e-12


def test_admm_finds_which_blocks_to_prune() -> None:
    """Blocks of one weight each: what goes is what costs least by curvature, not what is smallest."""
    wanted = torch.tensor([[1.0, 0.9, 2.0, 1.5]], dtype=torch.float64)
    curvature = torch.tensor([[0.05, 1.5, 1.0, 1.2]], dtype=torch.float64)  # times wanted^2: 0.05, 1.2, 4, 2.7
    layer, loss = quadratic(wanted, curvature)
    led_to = solve(layer, loss, dspfx.BlockConfig((1, 1), prune=0.25, unify=0.0))
    expected = torch.tensor([[0.0, 0.9, 2.0, 1.5]], dtype=torch.float64)
    assert float((led_to - expected).abs().max()) <= 1e-6
    assert float((layer.weight.detach() - expected).abs().max()) <= 1e-12


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_weights_approach_their_projection_and_stay_alike(kind: str) -> None:
    model = network()
    make = {"sgd": lambda p: torch.optim.SGD(p, 0.05, 0.9), "adam": lambda p: torch.optim.AdamW(p, 1e-3)}[kind]
    optimizer = make(model.parameters())
    unifier = dspfx.Unifier(model, optimizer, CONFIG, total_steps=100)
    start = unifier.stats()["gap"]
    train(model, optimizer, 100)
    assert unifier.stats()["gap"] < 0.5 * start
    plan = unifier.project()
    check_alike(model, plan)
    before = copy.deepcopy(model.state_dict())
    signs = model[4].weight.detach().sign()
    train(model, optimizer, 5)
    check_alike(model, plan)
    assert not torch.equal(model[4].weight, before["4.weight"])  # and they do train
    moved = (model[4].weight.detach().sign() != signs) & (signs != 0) & (model[4].weight != 0)
    free = torch.tensor(list(plan.layers[2].kinds()))[:, None] == 0
    tiling = Tiling(plan.layers[2].shape, CONFIG.shape)
    assert not (moved & (tiling.join(free.expand(-1, 8).float()) == 0)).any()
    unifier.close()
    train(model, optimizer, 1)
    with pytest.raises(AssertionError):
        check_alike(model, plan)


def test_a_step_of_an_alike_block_is_the_gradient_of_its_one_value() -> None:
    """Against autograd on the shared value itself, of a block of n weights with a learning rate of 1/n."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 2, bias=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    unifier = dspfx.Unifier(layer, optimizer, dspfx.BlockConfig((2, 2), unify=1.0), 1)
    unifier.project()
    x, signs = torch.randn(5, 4, dtype=torch.float64), layer.weight.detach().sign()
    values = layer.weight.detach().abs()[:1, ::2].clone().requires_grad_()  # one a block
    (torch.tanh(x @ (signs * values.repeat_interleave(2, 1)).T)).square().sum().backward()
    torch.tanh(layer(x)).square().sum().backward()
    optimizer.step()
    assert values.grad is not None
    expected = signs * (values - 0.1 / 4 * values.grad).detach().clamp(min=0).repeat_interleave(2, 1)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-12, atol=1e-14)


def by_levels(plan: UnifyPlan, weights: dict[str, Tensor]) -> dict[str, list[list[tuple[int, float]]]]:
    """By layer, of its unified and of its free weights: (index, absolute value or value), by a loop."""
    found = {}
    for layer in plan.layers:
        tiling = Tiling(layer.shape, plan.config.shape, plan.config.layout)
        size = math.prod(plan.config.shape)
        kinds = torch.tensor(list(layer.kinds()))[:, None].expand(-1, size).float()
        flat, of = weights[layer.name].flatten().tolist(), tiling.join(kinds).flatten().tolist()
        unified = [(i, abs(w)) for i, (w, kind) in enumerate(zip(flat, of, strict=True)) if kind == UNIFIED and w]
        free = [(i, w) for i, (w, kind) in enumerate(zip(flat, of, strict=True)) if kind == FREE and w]
        found[layer.name] = [unified, free]
    return found


def layer_weights(model: nn.Module, plan: UnifyPlan) -> dict[str, Tensor]:
    modules = dict(model.named_modules())
    return {layer.name: modules[layer.name].weight.detach().clone() for layer in plan.layers}


def entropy(plan: UnifyPlan, weights: dict[str, Tensor]) -> float:
    """Bits a value, of unified blocks and free weights, each list coded by its own frequencies; by a loop."""
    bits, number = 0.0, 0
    for layer in plan.layers:
        tiling = Tiling(layer.shape, plan.config.shape, plan.config.layout)
        blocks, kinds = tiling.split(weights[layer.name]), layer.kinds()
        unified = [float(b.abs().max()) for b, kind in zip(blocks, kinds, strict=True) if kind == UNIFIED and b.any()]
        free = [w for b, kind in zip(blocks.tolist(), kinds, strict=True) if kind == FREE for w in b if w]
        for values in (unified, free):
            bits += sum(n * math.log2(len(values) / n) for n in Counter(values).values())
            number += len(values)
    return bits / number


@pytest.mark.parametrize("bits", [1, 2.5])
def test_few_values_train_as_the_means_of_their_weights(bits: float) -> None:
    """Against a loop over the weights, of what an optimizer without levels makes of them in one step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    with dspfx.Unifier(model, optimizer, CONFIG, total_steps=10) as unifier:
        train(model, optimizer, 10)
        plan = unifier.project(bits)
        check_alike(model, plan)
        before = layer_weights(model, plan)
        alone = copy.deepcopy(model)
        other = torch.optim.SGD(alone.parameters(), 0.05, momentum=0.9)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(alone, other, 1, seed=2)
        train(model, optimizer, 1, seed=2)
        check_alike(model, plan)
    assert entropy(plan, before) <= bits
    after, stepped = layer_weights(model, plan), layer_weights(alone, plan)
    for name, kinds in by_levels(plan, before).items():
        start, expected = before[name].flatten(), torch.zeros(before[name].numel(), dtype=torch.float64)
        for cells in kinds:
            for value in {value for _, value in cells}:
                mine = [i for i, other_value in cells if other_value == value]
                signs = start[mine].sign() if cells is kinds[0] else torch.ones(len(mine))
                mean = float((stepped[name].flatten()[mine] * signs).double().mean())
                expected[mine] = signs.double() * (max(mean, 0.0) if cells is kinds[0] else mean)
        torch.testing.assert_close(after[name].flatten().double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", [dspfx.BlockConfig((1, 1), 0, 0), dspfx.BlockConfig((2, 2), 0, 1)])
def test_all_free_and_all_unified_weights_have_few_values_too(config: dspfx.BlockConfig) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with dspfx.Unifier(model, optimizer, config, total_steps=1) as unifier:
        plan = unifier.project(2)
        train(model, optimizer, 2)
    assert entropy(plan, layer_weights(model, plan)) <= 2
    assert all(w.all() for w in layer_weights(model, plan).values())


def test_trained_levels_are_written_exactly_and_in_few_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    unifier = dspfx.Unifier(model, torch.optim.SGD(model.parameters(), 0.1), dspfx.BlockConfig((2, 2), 0.2, 0.5), 1)
    unifier.project(bits=3)
    report = dspfx.write_compressed(model, tmp_path / "small.safetensors", unifier.config)
    back = dspfx.read_compressed(tmp_path / "small.safetensors", copy.deepcopy(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    assert report.ratio > 12  # 0.5 signs + 0.5 / 4 * 3 + 0.3 * 3 + 1.5 / 4 of 32 bits is 15, and biases and tables


@pytest.mark.parametrize("bits", [None, 2])
def test_what_pruning_dropped_stays_zero_and_blocks_alike(bits: int | None) -> None:
    images = torch.randn(2, 3, 8, 8)
    gm = dspfx.prepare(network(), images, dspfx.GateConfig(groups=2))
    dspfx.prune(gm, dspfx.Budget(flops=0.5))
    zeros = {name: p == 0 for name, p in gm.named_parameters() if p.dim() > 1}
    optimizer = torch.optim.SGD(gm.parameters(), 0.05, momentum=0.9)
    with dspfx.Unifier(gm, optimizer, CONFIG, total_steps=20) as unifier:
        train(gm, optimizer, 20)
        plan = unifier.project(bits)
        train(gm, optimizer, 5)
    check_alike(gm, plan)
    for name, parameter in gm.named_parameters():
        assert name not in zeros or not parameter[zeros[name]].any()
    small = dspfx.lower(gm, fold=False)
    assert torch.allclose(small(images), gm.eval()(images), atol=1e-5)


def test_lowering_takes_out_what_pruned_blocks_leave_dead() -> None:
    """Blocks that are whole filters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten()).eval()
    plan = dspfx.unify(model, dspfx.BlockConfig((1, 27), prune=0.5, unify=0.0, layout="gemm", skip=("2",)))
    assert plan.layers[0].pruned == 4
    small = dspfx.lower(model, torch.zeros(2, 3, 8, 8), tune=None)
    first, second = (m for m in small.modules() if isinstance(m, nn.Conv2d))
    assert (first.out_channels, second.in_channels) == (4, 4)
    images = torch.randn(2, 3, 8, 8)
    assert torch.allclose(small(images), model(images), atol=1e-6)


@pytest.mark.parametrize(("is_projected", "bits"), [(False, None), (True, None), (True, 2)])
def test_a_resumed_run_is_the_uninterrupted_one(is_projected: bool, bits: int | None) -> None:
    def begin() -> tuple[Any, Any, Any]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return model, optimizer, dspfx.Unifier(model, optimizer, CONFIG, total_steps=20)

    model, optimizer, unifier = begin()
    train(model, optimizer, 11)
    if is_projected:
        unifier.project(bits)
        train(model, optimizer, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), unifier.state_dict()))
    train(model, optimizer, 10, seed=1)
    other, second, resumed = begin()
    for one, state in zip((other, second, resumed), saved, strict=True):
        one.load_state_dict(state)
    train(other, second, 10, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    if bits is None:  # as it was before there were levels
        resumed.load_state_dict({k: v for k, v in unifier.state_dict().items() if k != "levels"} | {"version": 1})
    if not is_projected:
        assert unifier.project() == resumed.project()
    assert unifier.stats() == resumed.stats()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skipped_does_nothing(fused: bool) -> None:
    """A fused optimizer's step() is called all the same."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, fused=fused)
    unifier = dspfx.Unifier(model, optimizer, CONFIG, total_steps=20)
    scaler = torch.amp.GradScaler("cpu")
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert unifier.steps == 0
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_frozen_weights_are_left_alone_until_the_projection() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    before = model[0].weight.clone()
    dspfx.Unifier(model, optimizer, CONFIG, total_steps=20)
    train(model, optimizer, 5)
    assert torch.equal(model[0].weight, before)


def test_ties_are_unified_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert [layer.name for layer in dspfx.unify(model, CONFIG).layers] == ["0"]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda m, o: dspfx.BlockConfig((0, 4)), ConfigError, "shape"),
        (lambda m, o: dspfx.BlockConfig(prune=0.6, unify=0.6), ConfigError, "sum"),
        (lambda m, o: dspfx.BlockConfig(layout="rows"), ConfigError, "layout"),  # type: ignore[arg-type]
        (lambda m, o: dspfx.BlockConfig(unify=1.5), ConfigError, "unify"),
        (lambda m, o: dspfx.unify(m, dspfx.BlockConfig(skip=("9",))), ConfigError, "'9'"),
        (lambda m, o: dspfx.unify(nn.ReLU(), CONFIG), ModelError, "no convolution"),
        (lambda m, o: dspfx.Unifier(m, o, CONFIG, 0), ConfigError, "total_steps"),
        (lambda m, o: dspfx.Unifier(m, o, CONFIG, 5, rho=-1.0), ConfigError, "rho"),
        (lambda m, o: dspfx.Unifier(m, o, CONFIG, 5, every=0), ConfigError, "every"),
        (lambda m, o: dspfx.Unifier(m, o, CONFIG, 5).project(0), ConfigError, "bits=0"),
        (lambda m, o: dspfx.Unifier(network(), o, CONFIG, 5), MismatchError, "'0.weight'"),
    ],
)
def test_bad_input_is_refused(make: Any, error: type[Exception], words: str) -> None:
    model = network()
    with pytest.raises(error, match=words):
        make(model, torch.optim.SGD(model.parameters(), 0.1))


def test_weights_that_are_not_finite_are_named_and_nothing_changes() -> None:
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"4\.weight"):
        dspfx.unify(model, CONFIG)
    assert all(before[key].equal(value) or key == "4.weight" for key, value in model.state_dict().items())
    model = network()
    unifier = dspfx.Unifier(model, torch.optim.SGD(model.parameters(), 0.1), CONFIG, 5)
    with torch.no_grad():
        model[4].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"4\.weight"):
        unifier.project()
    assert unifier.plan is None


def test_states_and_plans_of_other_networks_are_refused() -> None:
    model, other = network(), nn.Sequential(nn.Conv2d(3, 8, 3))
    plan = dspfx.unify(network(), CONFIG)
    with pytest.raises(MismatchError, match="no such layer"):
        unify_blocks(nn.Sequential(nn.ReLU()), plan)
    one, two = (dspfx.Unifier(m, torch.optim.SGD(m.parameters(), 0.1), CONFIG, 5) for m in (model, other))
    with pytest.raises(MismatchError, match="disagree about"):
        two.load_state_dict(one.state_dict())
    turned = dspfx.Unifier(
        model, torch.optim.SGD(model.parameters(), 0.1), dspfx.BlockConfig((2, 4), prune=0.25, unify=0.5), 5
    )
    with pytest.raises(MismatchError, match=r"shape=\(4, 2\).*shape=\(2, 4\)"):
        turned.load_state_dict(one.state_dict())
    with pytest.raises(StorageError, match="version 9"):
        one.load_state_dict(one.state_dict() | {"version": 9})
    text = plan.to_json().replace('"classes":"', '"classes":"AAAA')
    with pytest.raises(StorageError, match="blocks of 0"):
        unify_blocks(model, UnifyPlan.from_json(text))
    one.project()
    with pytest.raises(ModelError, match="called before"):
        one.project()
