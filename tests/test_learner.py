"""GroupLearner: one step against the formulas, any optimizer and loop, resuming bit for bit, and every refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dspfx import learner as learner_module
from dspfx.config import GateConfig
from dspfx.errors import ConfigError, DspfxError, MismatchError, ModelError, StorageError
from dspfx.graph.traced import network_meta, set_network_meta
from dspfx.learner import GroupLearner
from dspfx.method.clustering import cluster_filters
from dspfx.modules import GatedConv2d, GatedLayer
from dspfx.plans import GatePlan, GateSpec

Mode = Literal["fused", "exact"]
GATED = ("a", "b", "c")
ELEMENTS = {"a": 8 * 64, "b": 8 * 64, "c": 8 * 16}


class Net(nn.Module):
    """stem -> a -> b (+ residual) -> c (strided, 1x1, biased) -> head, with BN, dropout and three gates."""

    a: GatedConv2d
    b: GatedConv2d
    c: GatedConv2d

    def __init__(self, config: GateConfig | None = None) -> None:
        super().__init__()
        config = GateConfig(groups=4) if config is None else config
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        convs = {
            "a": nn.Conv2d(8, 8, 3, padding=1, bias=False),
            "b": nn.Conv2d(8, 8, 3, padding=1, bias=False),
            "c": nn.Conv2d(8, 16, 1, stride=2),
        }
        self.bn = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(16, 4)
        specs = []
        for name, conv in convs.items():
            setattr(self, name, GatedLayer.gate(conv, config.groups))
            specs.append(GateSpec(name, config.groups, conv.out_channels, 8, ELEMENTS[name], 0))
        set_network_meta(self, {"gate_plan": GatePlan(config, tuple(specs), ())})

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.bn(self.b(F.relu(self.a(x))))
        return self.head(self.dropout(F.relu(self.c(x)).mean(dim=(2, 3))))


def build(seed: int = 0, config: GateConfig | None = None) -> Net:
    torch.manual_seed(seed)
    return Net(config)


def data(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 8, 8, generator=generator).to(dtype)
    return x, torch.randint(4, (6,), generator=generator)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=0.01)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.01)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, learner: GroupLearner, seeds: range) -> None:
    for seed in seeds:
        x, y = data(seed)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if learner.mode == "exact":
            assert learner.step(lambda x=x, y=y: F.cross_entropy(net(x), y))  # type: ignore[misc]


@pytest.mark.parametrize("mode", ["fused", "exact"])
def test_it_finds_what_group_channels_and_filters_are_worth(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running mean of squared <W, g>, by autograd at the weights that the formulas see, filter by filter."""
    monkeypatch.setattr(learner_module, "WEIGHED_EVERY", 1)
    net = build().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    expected: dict[str, tuple[Tensor, ...]] = {}
    with GroupLearner(net, optimizer, 10, strength=0.0, mode=mode, lr=0.1) as learner:
        for step in range(3):
            x, y = data(step, torch.float64)
            torch.manual_seed(step)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            weights = {name: layer.weight.detach().clone() for name, layer in gated(net).items()}
            gradients = {name: net.get_parameter(f"{name}.weight").grad.clone() for name in weights}  # type: ignore[union-attr]
            if mode == "exact":
                torch.manual_seed(100 + step)
                parameters = [layer.weight for layer in gated(net).values()]
                statistics = net.bn.state_dict()
                statistics = {key: value.clone() for key, value in statistics.items()}
                found = torch.autograd.grad(F.cross_entropy(net(x), y), parameters)
                net.bn.load_state_dict(statistics)
                gradients = dict(zip(gated(net), found, strict=True))
                torch.manual_seed(100 + step)
                learner.step(lambda x=x, y=y: F.cross_entropy(net(x), y))  # type: ignore[misc]
            for name, layer in gated(net).items():
                squares = (weights[name] * gradients[name]).sum((2, 3)).square()
                group = layer.gate_logits.argmax(0)
                channels = torch.stack([squares[group == g].sum(0) for g in range(4)])
                now = (channels, squares.sum(1))
                expected[name] = tuple(
                    old.lerp(new, 1 / (step + 1)) for old, new in zip(expected.get(name, now), now, strict=True)
                )
    for name, layer in gated(net).items():
        torch.testing.assert_close(layer.gate_fisher, expected[name][0], rtol=1e-10, atol=0)
        torch.testing.assert_close(layer.gate_filter_fisher, expected[name][1], rtol=1e-10, atol=0)


def gated(net: Net) -> dict[str, GatedConv2d]:
    return {"a": net.a, "b": net.b, "c": net.c}


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor], keys: Any = None) -> bool:
    return all(torch.equal(left[key], right[key]) for key in (left if keys is None else keys))


# One step against the formulas ---------------------------------------------------------------------------------------


def paper_penalty(p: Tensor, weight: Tensor, name: str) -> Tensor:
    """R of a layer of `Net` as the paper writes it; the median layer has 512 input elements."""
    groups, filters = p.shape
    scale = math.sqrt(ELEMENTS[name] / 512) * weight.shape[2] * (groups / filters) ** 1.5
    squares = p.pow(2) @ weight.pow(2).sum(dim=(2, 3))
    norms = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)  # autograd's NaN at 0 replaced by 0
    return scale * (p.sqrt().sum(dim=1).pow(2) * norms.sum(dim=1)).sum()


def first_samples(logits: dict[str, Tensor]) -> dict[str, Tensor]:
    """P of the first step with seed 0, differentiable; layers of equal shape draw together: a and b, then c."""
    generator = torch.Generator().manual_seed(0)
    samples: dict[str, Tensor] = {}
    for names in (("a", "b"), ("c",)):
        noise = torch.empty(len(names), *logits[names[0]].shape, dtype=torch.float64)
        noise = noise.exponential_(generator=generator).log().neg()
        samples |= {
            name: torch.softmax((logits[name] + gumbel) / 0.5, dim=0) for name, gumbel in zip(names, noise, strict=True)
        }
    return samples


def reference_hypergradient(net: Net, lr: float, strength: float, mode: Mode) -> dict[str, Tensor]:
    """dJ/dA by autograd for a plain float64 net that has just made its optimizer step and still has its gradients."""
    logits = {name: torch.zeros_like(conv.gate_logits, requires_grad=True) for name, conv in gated(net).items()}
    objective = torch.zeros((), dtype=torch.float64)
    adapted: dict[str, Tensor] = {}
    for name, p in first_samples(logits).items():
        weight = gated(net)[name].weight
        base = weight.detach().clone().requires_grad_()
        value = paper_penalty(p, base, name)
        (slope,) = torch.autograd.grad(value, base, create_graph=True)
        if mode == "fused":
            assert weight.grad is not None
            v = weight.grad + (strength * slope).detach()
            objective = objective + strength * (value - lr * (slope * v).sum())
        else:
            adapted[name + ".weight"] = base.detach() - lr * strength * slope
            objective = objective + strength * paper_penalty(p, adapted[name + ".weight"], name)
    if mode == "exact":
        x, y = data(0, torch.float64)
        objective = objective + F.cross_entropy(torch.func.functional_call(net, adapted, (x,)), y)
    return dict(zip(logits, torch.autograd.grad(objective, list(logits.values())), strict=True))


@pytest.mark.parametrize("mode", ["fused", "exact"])
def test_first_step_equals_the_formulas_by_autograd(mode: Mode) -> None:
    nets = [build().double() for _ in range(2)]
    x, y = data(0, torch.float64)
    strength = 0.02
    for net in nets:
        net.dropout.p = 0.0
        optimizer = sgd(net)
        learner = (
            GroupLearner(net, optimizer, 4, strength=strength, mode=mode, start="zeros") if net is nets[0] else None
        )
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if learner is not None and mode == "exact":
            assert learner.step(lambda: F.cross_entropy(nets[0](x), y))
        if learner is not None:
            state = learner.state_dict()["layers"]
    ours, plain = nets
    ramped = strength / 4
    hyper = reference_hypergradient(plain, 0.1, ramped, mode)
    for name in GATED:
        assert torch.allclose(state[name]["exp_avg"] / 0.1, hyper[name], rtol=1e-9, atol=1e-16)
        leaf = torch.zeros_like(hyper[name]).requires_grad_()
        leaf.grad = hyper[name]
        torch.optim.Adam([leaf], lr=1e-3).step()
        logits = gated(ours)[name].gate_logits
        assert torch.allclose(logits, leaf.detach(), rtol=1e-6, atol=1e-12)
        hard = F.one_hot(logits.argmax(dim=0), 4).T.double()
        weight = gated(plain)[name].weight.detach().requires_grad_()
        (slope,) = torch.autograd.grad(paper_penalty(hard, weight, name), weight)
        assert torch.allclose(gated(ours)[name].weight, weight - 0.1 * ramped * slope, rtol=1e-10, atol=1e-14)


def test_logits_follow_torch_adam_over_many_steps() -> None:
    net = build().double()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 4, strength=0.02, start="zeros")
    copies = {name: torch.zeros_like(conv.gate_logits, requires_grad=True) for name, conv in gated(net).items()}
    reference = torch.optim.Adam(copies.values(), lr=1e-3)
    previous = {name: torch.zeros_like(value) for name, value in copies.items()}
    for seed in range(5):
        x, y = data(seed, torch.float64)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        for name, leaf in copies.items():
            average = learner.state_dict()["layers"][name]["exp_avg"]
            leaf.grad = (average - 0.9 * previous[name]) / 0.1  # the hypergradient of this step
            previous[name] = average
        reference.step()
    for name, leaf in copies.items():
        assert torch.allclose(gated(net)[name].gate_logits, leaf.detach(), rtol=1e-9, atol=1e-12)


def test_the_penalty_ramps_up_over_total_steps_and_then_stays() -> None:
    shrunk = []
    for steps in (1, 2, 3, 5):
        net = build().double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        learner = GroupLearner(net, optimizer, total_steps=3, strength=1e-4)
        for step in range(steps):
            optimizer.zero_grad()
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
            before = net.a.weight.detach().clone()
            optimizer.step()
            # With the hard groups of this step, W - W_before is -lr * lambda * ramp * dR/dW.
            hard = F.one_hot(net.a.gate_logits.argmax(dim=0), 4).T.double()
            leaf = before.clone().requires_grad_()
            (slope,) = torch.autograd.grad(paper_penalty(hard, leaf, "a"), leaf)
            ramp = float(((before - net.a.weight.detach()) * slope).sum() / (0.1 * 1e-4 * slope.pow(2).sum()))
            assert ramp == pytest.approx(min(1.0, (step + 1) / 3), rel=1e-6)
        shrunk.append(learner.steps)
    assert shrunk == [1, 2, 3, 5]


def test_auto_strength_is_540_over_the_parameters() -> None:
    net = build()
    assert GroupLearner(net, sgd(net), 3).strength == 540 / sum(p.numel() for p in net.parameters())


def test_the_cost_params_ignores_the_input_size() -> None:
    nets = {cost: build(config=GateConfig(cost=cost)).double() for cost in ("flops", "params")}
    moved = {}
    for cost, net in nets.items():
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        GroupLearner(net, optimizer, 1, strength=1e-3)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        before = {name: conv.weight.detach().clone() for name, conv in gated(net).items()}
        optimizer.step()
        moved[cost] = {name: float((conv.weight.detach() - before[name]).norm()) for name, conv in gated(net).items()}
    assert moved["flops"]["a"] == pytest.approx(moved["params"]["a"], rel=1e-6)
    assert moved["flops"]["c"] == pytest.approx(moved["params"]["c"] * math.sqrt(1 / 4), rel=1e-6)


# What the loop sees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fused", "exact"])
@pytest.mark.parametrize("make", [sgd, adam, adamw])
def test_only_gated_weights_differ_from_a_plain_step(
    make: Callable[[nn.Module], torch.optim.Optimizer], mode: Mode
) -> None:
    plain, ours = build(), build()
    x, y = data()
    after: list[Any] = []
    for net in (plain, ours):
        optimizer = make(net)
        learner = GroupLearner(net, optimizer, 1, mode=mode) if net is ours else None
        torch.manual_seed(7)
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if learner is not None and mode == "exact":
            learner.step(lambda: F.cross_entropy(ours(x), y))
        after.append((torch.get_rng_state(), [p.grad for p in net.parameters()], optimizer.state_dict()["state"]))
    assert torch.equal(after[0][0], after[1][0])  # dropout of the second pass drew from a copy of the generator
    assert all(torch.equal(a, b) for a, b in zip(after[0][1], after[1][1], strict=True))
    for key, state in after[0][2].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[1][2][key][k])) for k, v in state.items())
    changed = {key for key, value in snapshot(plain).items() if not torch.equal(value, ours.state_dict()[key])}
    own = ("weight", "gate_logits", "gate_fisher", "gate_filter_fisher")
    assert changed == {f"{name}.{key}" for name in GATED for key in own}


def test_the_second_pass_sees_the_adapted_filters_and_restores_everything() -> None:
    net = build()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 1, strength=0.1, mode="exact")
    x, y = data()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    before, seen = snapshot(net), []

    def closure() -> Tensor:
        seen.append(snapshot(net))
        torch.rand(3)
        return F.cross_entropy(net(x), y)

    generator = torch.get_rng_state()
    learner.step(closure)
    assert len(seen) == 1
    moved = {key for key, value in before.items() if not torch.equal(value, seen[0][key])}
    assert moved == {f"{name}.weight" for name in GATED}
    assert torch.equal(torch.get_rng_state(), generator)
    kept = [key for key in before if key.partition(".")[0] not in GATED]
    assert "bn.running_mean" in kept
    assert same(before, snapshot(net), kept)


def test_a_closure_that_fails_leaves_the_network_as_it_was() -> None:
    net = build()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 1, strength=0.1, mode="exact")
    x, y = data()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    before, generator = snapshot(net), torch.get_rng_state()

    def closure() -> Tensor:
        net(x)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        learner.step(closure)
    assert same(before, snapshot(net))
    assert torch.equal(torch.get_rng_state(), generator)
    train(net, optimizer, learner, range(1))  # and the loop goes on


def test_a_replaced_buffer_comes_back_as_the_same_tensor() -> None:
    net = build()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 1, mode="exact")
    x, y = data()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    buffer, value = net.bn.get_buffer("running_mean"), snapshot(net)["bn.running_mean"]

    def closure() -> Tensor:
        net.bn.running_mean = torch.ones(8)
        return F.cross_entropy(net(x), y)

    learner.step(closure)
    assert net.bn.running_mean is buffer
    assert torch.equal(buffer, value)


@pytest.mark.parametrize("mode", ["fused", "exact"])
def test_the_global_generator_is_never_touched(mode: Mode) -> None:
    net = build()
    net.dropout.p = 0.0
    optimizer = sgd(net)
    before = torch.get_rng_state()
    train(net, optimizer, GroupLearner(net, optimizer, 3, mode=mode), range(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_choose_the_noise() -> None:
    logits = []
    for seed in (0, 0, 1):
        net = build()
        optimizer = sgd(net)
        torch.manual_seed(5)
        train(net, optimizer, GroupLearner(net, optimizer, 3, seed=seed), range(3))
        logits.append(net.a.gate_logits.clone())
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_frozen_unused_and_foreign_weights_are_left_alone() -> None:
    net = build()
    net.b.weight.requires_grad_(False)
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 1)
    before = snapshot(net)
    net.c.forward = lambda input: F.pad(input[:, :, ::2, ::2], (0, 0, 0, 0, 0, 8))  # type: ignore[method-assign]
    x, y = data()
    optimizer.zero_grad()
    F.cross_entropy(net(x), y).backward()
    assert net.c.weight.grad is None
    optimizer.step()
    after = snapshot(net)
    assert learner.steps == 1
    for name in ("b", "c"):
        assert same(before, after, [f"{name}.weight", f"{name}.gate_logits"])
    assert not torch.equal(before["a.gate_logits"], after["a.gate_logits"])


def test_each_parameter_group_uses_its_own_current_lr() -> None:
    net = build().double()
    groups: list[dict[str, Any]] = [{"params": [net.a.weight], "lr": 0.0}, {"params": [net.b.weight], "lr": 0.5}]
    groups.append({"params": [net.c.weight]})
    optimizer = torch.optim.SGD(groups, lr=torch.tensor(0.25))
    GroupLearner(net, optimizer, 1, strength=1e-4)
    optimizer.param_groups[1]["lr"] = 0.125  # as a scheduler does
    for conv in gated(net).values():
        conv.weight.grad = torch.zeros_like(conv.weight)
    before = {name: conv.weight.detach().clone() for name, conv in gated(net).items()}
    optimizer.step()
    for name, lr in {"a": 0.0, "b": 0.125, "c": 0.25}.items():
        conv = gated(net)[name]
        hard = F.one_hot(conv.gate_logits.argmax(dim=0), 4).T.double()
        leaf = before[name].clone().requires_grad_()
        (slope,) = torch.autograd.grad(paper_penalty(hard, leaf, name), leaf)
        assert torch.allclose(conv.weight, leaf - lr * 1e-4 * slope, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mode", ["fused", "exact"])
def test_gradients_that_accumulate_make_one_step(mode: Mode) -> None:
    net = build()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 4, mode=mode)
    for seed in range(4):
        x, y = data(seed)
        (F.cross_entropy(net(x), y) / 2).backward()
        if seed % 2:
            optimizer.step()
            if mode == "exact":
                assert learner.step(lambda x=x, y=y: F.cross_entropy(net(x), y))  # type: ignore[misc]
            optimizer.zero_grad(set_to_none=True)
        elif mode == "exact":
            assert not learner.step(lambda: torch.zeros(()))
    assert learner.steps == 2


def test_zero_grad_before_the_exact_step_does_no_harm() -> None:
    results = []
    for early in (False, True):
        net = build()
        net.dropout.p = 0.0
        optimizer = sgd(net)
        learner = GroupLearner(net, optimizer, 4, mode="exact")
        x, y = data()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if early:
            optimizer.zero_grad(set_to_none=True)
        learner.step(lambda x=x, y=y, net=net: F.cross_entropy(net(x), y))  # type: ignore[misc]
        results.append(snapshot(net))
    assert same(*results)


def test_pruned_weights_stay_zero() -> None:
    net = build()
    net.a.gate_group.copy_(torch.arange(8) % 4)
    net.a.gate_group[3] = -1
    net.a.gate_keep.copy_(torch.rand(4, 8) < 0.6)
    mask = net.a.gate_mask()[:, :, None, None]
    with torch.no_grad():
        net.a.weight.mul_(mask)
        net.c.weight.zero_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    GroupLearner(net, optimizer, 1, strength=0.1)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = net.a.weight.detach().clone()
    optimizer.step()
    assert int((~mask).sum()) > 0
    assert (net.a.weight[(~mask).expand_as(net.a.weight)] == 0).all()
    assert (net.c.weight == 0).all()
    assert not torch.equal(net.a.weight, before)


# Mixed precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fused", "exact"])
def test_bf16_autocast(mode: Mode) -> None:
    net = build()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 2, strength=0.05, mode=mode)
    x, y = data()
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        if mode == "exact":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                learner.step(lambda: F.cross_entropy(net(x), y))
    assert learner.steps == 2
    assert net.a.gate_logits.dtype == torch.float32
    assert net.a.is_learned


def test_an_enclosing_autocast_does_not_serve_the_second_pass_stale_weights() -> None:
    net = build()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 1, strength=1.0, mode="exact")
    x, y = data()
    net.eval()
    outputs = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        torch.clear_autocast_cache()
        outputs.append(net(x).detach())

        def closure() -> Tensor:
            outputs.append(net(x))
            return F.cross_entropy(outputs[-1], y)

        learner.step(closure)
        outputs.append(net(x).detach())
        torch.clear_autocast_cache()
        outputs.append(net(x).detach())
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[2], outputs[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_keep_float32_logits(dtype: torch.dtype) -> None:
    net = build().to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    GroupLearner(net, optimizer, 1, strength=0.1)
    before = net.a.weight.detach().clone()
    for p in net.parameters():
        p.grad = 1e-3 * torch.randn_like(p)
    optimizer.step()
    assert net.a.gate_logits.dtype == torch.float32
    assert net.a.weight.dtype == dtype
    assert net.a.is_learned
    assert not torch.equal(net.a.weight, before)


SCALED = [
    pytest.param(lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), id="sgd"),
    pytest.param(lambda net: torch.optim.Adam(net.parameters(), lr=0.01), id="adam"),
    pytest.param(lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True), id="sgd-fused"),
    pytest.param(lambda net: torch.optim.Adam(net.parameters(), lr=0.01, fused=True), id="adam-fused"),
    pytest.param(lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, fused=True), id="adamw-fused"),
]


@pytest.mark.parametrize("mode", ["fused", "exact"])
@pytest.mark.parametrize("make", SCALED)
def test_gradscaler_gives_the_same_groups_as_no_scaler(
    make: Callable[[nn.Module], torch.optim.Optimizer], mode: Mode
) -> None:
    averages = []
    for scaled in (False, True):
        net = build()
        net.dropout.p = 0.0
        optimizer = make(net)
        learner = GroupLearner(net, optimizer, 1, strength=0.01, mode=mode)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        x, y = data()
        scaler.scale(F.cross_entropy(net(x), y)).backward()
        scaler.step(optimizer)
        if mode == "exact":
            assert learner.step(lambda x=x, y=y, net=net: F.cross_entropy(net(x), y))  # type: ignore[misc]
        scaler.update()
        averages.append(learner.state_dict()["layers"]["a"]["exp_avg"])
    assert torch.allclose(averages[0], averages[1], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("mode", ["fused", "exact"])
@pytest.mark.parametrize("make", SCALED)
def test_a_step_that_gradscaler_skips_is_no_step(
    make: Callable[[nn.Module], torch.optim.Optimizer], mode: Mode
) -> None:
    net = build()
    optimizer = make(net)
    learner = GroupLearner(net, optimizer, 1, mode=mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = data()
    scaler.scale(F.cross_entropy(net(x), y)).backward()
    assert net.stem.weight.grad is not None
    net.stem.weight.grad[0, 0, 0, 0] = torch.inf
    before = snapshot(net)
    scaler.step(optimizer)
    if mode == "exact":
        assert not learner.step(lambda: F.cross_entropy(net(x), y))
    scaler.update()
    assert same(before, snapshot(net))
    assert learner.steps == 0


# Saving and resuming -------------------------------------------------------------------------------------------------


def run(
    make: Callable[[nn.Module], torch.optim.Optimizer], mode: Mode, path: Path | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Six steps, the last three in fresh objects if a path is given."""
    net = build()
    optimizer = make(net)
    learner = GroupLearner(net, optimizer, 5, mode=mode)
    torch.manual_seed(3)
    train(net, optimizer, learner, range(3))
    if path is not None:
        parts = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "learner": learner.state_dict()}
        torch.save({**parts, "rng": torch.get_rng_state()}, path)
        saved = torch.load(path, weights_only=True)
        net = build(seed=9)
        optimizer = make(net)
        learner = GroupLearner(net, optimizer, 5, mode=mode, seed=9)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        learner.load_state_dict(saved["learner"])
        torch.set_rng_state(saved["rng"])
    train(net, optimizer, learner, range(3, 6))
    return snapshot(net), learner.state_dict()


@pytest.mark.parametrize("mode", ["fused", "exact"])
@pytest.mark.parametrize("make", [sgd, adam])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    make: Callable[[nn.Module], torch.optim.Optimizer], mode: Mode, tmp_path: Path
) -> None:
    straight, state = run(make, mode, None)
    resumed, resumed_state = run(make, mode, tmp_path / "checkpoint.pt")
    assert same(straight, resumed)
    assert state["steps"] == resumed_state["steps"] == 6
    assert torch.equal(state["generator"], resumed_state["generator"])
    for name in GATED:
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(resumed_state["layers"][name][k]))
            for k, v in state["layers"][name].items()
        )


def test_a_state_is_a_copy_that_later_steps_do_not_change() -> None:
    net = build()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 5)
    train(net, optimizer, learner, range(1))
    state = learner.state_dict()
    kept = state["layers"]["a"]["exp_avg"].clone()
    train(net, optimizer, learner, range(1, 2))
    assert torch.equal(state["layers"]["a"]["exp_avg"], kept)
    assert state["steps"] == 1


def changed_state(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    net = build()
    state = GroupLearner(net, sgd(net), 5).state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda s: s.update(version=3),
            StorageError,
            "The GroupLearner state has version 3, this dspfx reads up to 2; load it with the dspfx that wrote it.",
        ),
        (
            lambda s: s["layers"].update(z=s["layers"].pop("b")),
            MismatchError,
            "The GroupLearner state has 3 layers, the network 3; 'b' is only in the network. Load the state of the "
            "same prepared network.",
        ),
        (
            lambda s: s["layers"].update(z=s["layers"]["b"]),
            MismatchError,
            "The GroupLearner state has 4 layers, the network 3; 'z' is only in the state. Load the state of the same "
            "prepared network.",
        ),
        (
            lambda s: s["layers"]["b"].update(exp_avg=torch.zeros(2, 8)),
            MismatchError,
            "The GroupLearner state of 'b' has shape (2, 8) (groups, filters), the network (4, 8); prepare the network "
            "with the same GateConfig.",
        ),
    ],
)
def test_a_foreign_state_is_refused_and_changes_nothing(
    change: Callable[[dict[str, Any]], Any], error: type[DspfxError], message: str
) -> None:
    net = build()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 5)
    train(net, optimizer, learner, range(1))
    before = learner.state_dict()
    with pytest.raises(error) as caught:
        learner.load_state_dict(changed_state(change))
    assert str(caught.value) == message
    assert learner.steps == 1
    assert torch.equal(learner.state_dict()["generator"], before["generator"])
    assert torch.equal(learner.state_dict()["layers"]["a"]["exp_avg"], before["layers"]["a"]["exp_avg"])


# The rest of the interface -------------------------------------------------------------------------------------------


def test_short_runs_start_from_clusters_and_nothing_learned_is_overwritten() -> None:
    net = build()
    learned = gated(net)
    first, *others = learned.values()
    first.gate_logits[1] = 0.25
    before = first.gate_logits.clone()
    GroupLearner(net, sgd(net), 5)
    assert torch.equal(first.gate_logits, before)
    for conv in others:
        energy = conv.weight.detach().square().sum((2, 3))
        clusters = cluster_filters(energy, conv.gate_groups)
        assert torch.equal(conv.gate_logits.argmax(0), clusters)
        assert conv.gate_logits.unique().tolist() == [0.0, 0.5]


def test_stats() -> None:
    net = build()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 5, start="zeros")
    start = learner.stats()
    assert start["steps"] == 0
    assert start["hypergradient"] == 0
    assert start["entropy"] == pytest.approx(math.log(4))
    hard = torch.tensor([1.0, 0.0, 0.0, 0.0])[:, None]
    expected = sum(
        paper_penalty(hard.expand(4, c.out_channels), c.weight.detach(), name) for name, c in gated(net).items()
    )
    assert start["penalty"] == pytest.approx(float(expected), rel=1e-5)
    assert start["sparsity"] == 0
    first = next(iter(gated(net).values()))
    kept = first.weight.detach().clone()
    with torch.no_grad():
        first.weight[:, 0] *= 1e-3
    channels = sum(conv.in_channels for conv in gated(net).values())  # all filters are in the first group
    assert learner.stats()["sparsity"] == pytest.approx(1 / channels)
    with torch.no_grad():
        first.weight.copy_(kept)
    train(net, optimizer, learner, range(2))
    stats = learner.stats()
    assert stats["steps"] == 2
    assert stats["hypergradient"] > 0
    assert stats["entropy"] < start["entropy"]


def test_close_takes_the_hooks_off() -> None:
    net = build()
    optimizer = sgd(net)
    with GroupLearner(net, optimizer, 5) as learner:
        train(net, optimizer, learner, range(1))
    train(net, optimizer, learner, range(1, 2))
    assert learner.steps == 1
    learner.close()  # twice is once
    exact = GroupLearner(net, optimizer, 5, mode="exact")
    exact.close()
    with pytest.raises(ModelError) as caught:
        exact.step(lambda: torch.zeros(()))
    assert str(caught.value) == "GroupLearner.step(closure) was called after close(); construct a new learner."


def test_the_gates_of_a_network_that_moved_are_followed() -> None:
    net = build()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 5)
    net.a.gate_logits = net.a.gate_logits.clone()  # what net.to(device) does to buffers
    train(net, optimizer, learner, range(1))
    assert net.a.is_learned


def test_ranks_average_the_second_gradient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        averages = []
        for ranks in (1, 2):
            net = build()
            net.dropout.p = 0.0
            optimizer = sgd(net)
            learner = GroupLearner(net, optimizer, 1, mode="exact")
            # Another rank with the same batch: summed twice, divided by two.
            monkeypatch.setattr(dist, "get_world_size", lambda ranks=ranks: ranks)
            monkeypatch.setattr(dist, "all_reduce", lambda tensor, ranks=ranks: tensor.mul_(ranks))
            train(net, optimizer, learner, range(1))
            averages.append(learner.state_dict()["layers"]["a"]["exp_avg"])
        assert torch.equal(*averages)
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fused", "exact"])
def test_a_gpu_draws_the_same_samples_and_keeps_its_generator(mode: Mode) -> None:
    averages = []
    for device in ("cpu", "cuda"):
        net = build().double().to(device)
        net.dropout.p = 0.0
        optimizer = sgd(net)
        learner = GroupLearner(net, optimizer, 1, mode=mode)
        x, y = (tensor.to(device) for tensor in data(0, torch.float64))
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        generator = torch.cuda.get_rng_state()
        if mode == "exact":
            learner.step(lambda x=x, y=y, net=net: F.dropout(F.cross_entropy(net(x), y), 0.0))  # type: ignore[misc]
        assert torch.equal(torch.cuda.get_rng_state(), generator)
        averages.append(learner.state_dict()["layers"]["a"]["exp_avg"].cpu())
    first, second = averages
    assert torch.allclose(first, second, rtol=1e-6, atol=1e-12)


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"total_steps": 0},
            "GroupLearner got total_steps=0; give the number of optimizer steps of the run, at least 1.",
        ),
        (
            {"total_steps": 2.5},
            "GroupLearner got total_steps=2.5; give the number of optimizer steps of the run, at least 1.",
        ),
        ({"mode": "second"}, "GroupLearner got mode='second'; give 'fused' or 'exact'."),
        ({"strength": -1.0}, "GroupLearner got strength=-1.0; give 'auto' or a number of at least 0."),
        ({"strength": "much"}, "GroupLearner got strength='much'; give 'auto' or a number of at least 0."),
        ({"lr": 0.0}, "GroupLearner got lr=0.0; give a positive number (the paper uses 1e-3)."),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    net = build()
    with pytest.raises(ConfigError) as caught:
        GroupLearner(net, sgd(net), **{"total_steps": 5, **arguments})
    assert str(caught.value) == message


def test_a_network_without_gates_is_refused() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ModelError) as caught:
        GroupLearner(plain, sgd(plain), 5)
    assert str(caught.value) == (
        "GroupLearner found no gate plan in this Sequential; call dspfx.prepare first and pass the network "
        "that it returns (print(dspfx.coverage(gm)) says what was gated)."
    )


def test_gates_that_the_plan_does_not_list_are_refused() -> None:
    net = build()
    plan = network_meta(net)["gate_plan"]
    set_network_meta(net, {"gate_plan": GatePlan(GateConfig(), plan.layers[:2], ())})
    with pytest.raises(MismatchError) as caught:
        GroupLearner(net, sgd(net), 5)
    assert str(caught.value) == (
        "The gated layer 'c' is not in the network's gate plan, which lists 2 layers; prepare the network anew."
    )


def test_an_optimizer_of_other_weights_is_refused() -> None:
    net = build()
    optimizer = torch.optim.SGD([net.head.weight, net.a.weight], lr=0.1)
    with pytest.raises(MismatchError) as caught:
        GroupLearner(net, optimizer, 5)
    assert str(caught.value) == (
        "The optimizer does not own 'b.weight' (2 of 3 trainable weights are missing); build it from the parameters of "
        "this very network (what dspfx.prepare returned is another one than the model), or freeze those weights with "
        "requires_grad_(False)."
    )


def test_an_optimizer_that_maximizes_is_refused() -> None:
    net = build()
    with pytest.raises(ConfigError) as caught:
        GroupLearner(net, torch.optim.SGD(net.parameters(), lr=0.1, maximize=True), 5)
    assert str(caught.value) == "The optimizer has maximize=True, and a loss is minimised here: negate it instead."


@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_nan_names_the_layer_and_changes_no_gate(what: str) -> None:
    net = build()
    for name in ("a", "c"):
        gated(net)[name].weight.grad = torch.zeros_like(gated(net)[name].weight)
    # At lr 0 the step itself leaves weights alone; infinity * 0 would not, so b's gradient comes after the step.
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: setattr(net.b.weight, "grad", gradient))
    learner = GroupLearner(net, optimizer, 5)
    gradient = torch.zeros_like(net.b.weight)
    with torch.no_grad():
        (net.b.weight if what == "weight" else gradient)[0, 0, 0, 0] = torch.nan
    before = snapshot(net)
    with pytest.raises(ModelError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        f"The {what} of 'b' holds NaN or infinity; the logits and weights were not touched by GroupLearner in this "
        "step. Lower the learning rate, or use a GradScaler with float16."
    )
    assert all(torch.equal(before[key].nan_to_num(), value.nan_to_num()) for key, value in snapshot(net).items())
    assert learner.steps == 0


def test_step_belongs_to_the_exact_mode() -> None:
    net = build()
    learner = GroupLearner(net, sgd(net), 5)
    with pytest.raises(ModelError) as caught:
        learner.step(lambda: torch.zeros(()))
    assert str(caught.value) == (
        "GroupLearner.step(closure) was called with mode='fused', which steps by itself inside optimizer.step(). "
        "Remove the call, or construct the learner with mode='exact'."
    )


def test_the_exact_mode_needs_its_step() -> None:
    net = build()
    optimizer = sgd(net)
    GroupLearner(net, optimizer, 5, mode="exact")
    x, y = data()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    before = snapshot(net)
    with pytest.raises(ModelError) as caught:
        optimizer.step()
    assert str(caught.value) == (
        "GroupLearner with mode='exact' saw a second optimizer.step() without learner.step(closure) between. Call "
        "learner.step(closure) after every optimizer.step(), or construct the learner with mode='fused'."
    )
    assert same(before, snapshot(net))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (lambda: None, "a NoneType"),
        (lambda: torch.zeros(2, requires_grad=True), "a tensor of shape (2,) with a gradient"),
        (lambda: torch.zeros(()), "a tensor of shape () without a gradient"),
    ],
)
def test_a_closure_has_to_return_the_loss(answer: Callable[[], Any], found: str) -> None:
    net = build()
    optimizer = sgd(net)
    learner = GroupLearner(net, optimizer, 5, mode="exact")
    x, y = data()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    before = snapshot(net)
    with pytest.raises(ConfigError) as caught:
        learner.step(answer)
    assert str(caught.value) == (
        f"The closure given to GroupLearner.step returned {found}; return the scalar loss of a forward pass, with "
        "gradients enabled and without calling backward()."
    )
    assert same(before, snapshot(net))
