"""What users combine the learner with, each against the same run without it: compilation, formats, precision, steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dspfx
from dspfx.errors import ConfigError, ModelError
from dspfx.modules import GatedLayer
from tests.integrations import loops

# Compiling and memory formats ----------------------------------------------------------------------------------------


def run(net: Any, gm: Any, make: loops.Make = loops.sgd, convert: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    """Trains `gm` through `net`, a wrapper of it; returns the learner."""
    optimizer = make(gm)
    learner = dspfx.GroupLearner(gm, optimizer, loops.STEPS)
    net.train()
    for step in range(loops.STEPS):
        x, y = loops.batch(step)
        optimizer.zero_grad()
        F.cross_entropy(net(convert(x)), y).backward()
        optimizer.step()
    return learner


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network_learns_the_same(in_place: bool) -> None:
    reference, gm = loops.prepared(), loops.prepared()
    state = loops.plain(reference)
    if in_place:
        gm.compile(backend="aot_eager", fullgraph=True)
    net = gm if in_place else torch.compile(gm, backend="aot_eager", fullgraph=True)
    learner = run(net, gm)
    loops.assert_same(reference, gm)
    loops.assert_same_state(state, learner.state_dict())


@pytest.mark.slow
def test_a_compiled_optimizer_step_still_learns() -> None:
    reference, gm = loops.prepared(), loops.prepared()
    optimizer = loops.sgd(gm)
    learner = dspfx.GroupLearner(gm, optimizer, loops.STEPS)

    @torch.compile(backend="eager")
    def step() -> None:
        optimizer.step()

    for seed in range(2):
        x, y = loops.batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(gm(x), y).backward()
        step()
    assert learner.steps == 2
    loops.plain(reference, steps=2, total_steps=loops.STEPS)
    loops.assert_close(reference, gm, 1e-6)


def test_the_compiled_wrapper_is_not_what_the_learner_takes() -> None:
    gm = loops.prepared()
    with pytest.raises(ModelError, match="found no gate plan in this OptimizedModule"):
        dspfx.GroupLearner(cast(nn.Module, torch.compile(gm, backend="eager")), loops.sgd(gm), 4)


@pytest.mark.parametrize("mode", ["fused", "exact"])
def test_channels_last_learns_the_same(mode: Any) -> None:
    states = []
    nets = [loops.prepared().double() for _ in range(2)]
    for gm, layout in zip(nets, (torch.contiguous_format, torch.channels_last), strict=True):
        gm.to(memory_format=layout)
        optimizer = loops.sgd(gm)
        learner = dspfx.GroupLearner(gm, optimizer, loops.STEPS, mode=mode)
        gm.train()
        for step in range(loops.STEPS):
            x, y = loops.batch(step)
            x = x.double().to(memory_format=layout)
            optimizer.zero_grad()
            F.cross_entropy(gm(x), y).backward()
            optimizer.step()
            if mode == "exact":
                learner.step(lambda x=x, y=y, gm=gm: F.cross_entropy(gm(x), y))  # type: ignore[misc]
        states.append(learner.stats())
    assert nets[1].c.weight.is_contiguous(memory_format=torch.channels_last)
    loops.assert_close(nets[0], nets[1], 1e-9)
    assert states[0]["penalty"] == pytest.approx(states[1]["penalty"], rel=1e-9)
    x, gm = loops.batch(9)[0], nets[1].float().eval()
    dspfx.prune(gm, dspfx.Budget(flops=0.4))
    expected = gm(x).detach()
    assert torch.allclose(dspfx.lower(gm, tune=None)(x), expected, atol=1e-5 * float(expected.abs().max()))


class Wrapped(nn.Module):
    """A prepared backbone under activation checkpointing, a head of the user's."""

    def __init__(self, backbone: nn.Module, reentrant: bool | None) -> None:
        super().__init__()
        self.backbone, self.reentrant = backbone, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.backbone(x)
        return checkpoint(self.backbone, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_learns_the_same(reentrant: bool) -> None:
    reference, gm = loops.prepared(), loops.prepared()
    state = run(Wrapped(reference, None), reference).state_dict()
    learner = run(Wrapped(gm, reentrant), gm)
    loops.assert_same_state(state, learner.state_dict())
    for key, value in reference.state_dict().items():
        if "running" not in key and "num_batches" not in key:  # torch's own: statistics count the second pass, too
            assert torch.equal(value, gm.state_dict()[key]), key


def test_a_checkpoint_inside_the_model_is_traced_through() -> None:
    """The numbers are the model's; the memory is not saved, which docs/training.md says."""

    class Model(loops.Tiny):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.a, x, use_reentrant=False)
            return self.head(F.relu(self.c(F.relu(self.bn(x)))).mean((2, 3)))

    x, y = loops.batch(0)
    model = Model()
    gm = dspfx.prepare(model, x)
    for net in (model, gm):
        F.cross_entropy(net.train()(x), y).backward()
    theirs, ours = dict(model.named_parameters()), dict(gm.named_parameters())
    assert all(torch.equal(p.grad, ours[k].grad) for k, p in theirs.items() if p.grad is not None)


# Mixed precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_float16_learns_on_the_steps_that_happen_and_on_no_other(fused: bool) -> None:
    """Too large a scale at first: the loop skips steps. The reference makes only the others, at their scales."""

    def make(gm: nn.Module) -> torch.optim.Optimizer:
        # Not SGD: where its first step is skipped, torch's fused one takes memory never written for its momentum.
        return torch.optim.AdamW(gm.parameters(), lr=0.01, fused=fused)

    def step(gm: Any, optimizer: Any, scaler: torch.amp.GradScaler, seed: int) -> None:
        x, y = loops.batch(seed)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            output = gm(x)
        scaler.scale(F.cross_entropy(output.float(), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(gm.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    gm, reference = loops.prepared(), loops.prepared()
    gm.bn.track_running_stats = reference.bn.track_running_stats = False  # which skipped steps move as well
    optimizer, scaler = make(gm), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    learner = dspfx.GroupLearner(gm, optimizer, 8)
    made = []
    for seed in range(8):
        scale = scaler.get_scale()
        step(gm, optimizer, scaler, seed)
        if scaler.get_scale() == scale:
            made.append((seed, scale))
    assert 0 < len(made) == learner.steps < 8
    optimizer = make(reference)
    again = dspfx.GroupLearner(reference, optimizer, 8)
    for seed, scale in made:
        step(reference, optimizer, torch.amp.GradScaler("cpu", init_scale=scale), seed)
    loops.assert_same(reference, gm)
    loops.assert_same_state(again.state_dict(), learner.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_cast_under_a_learner_keeps_its_logits_and_goes_on(dtype: torch.dtype) -> None:
    """As evaluation in half precision does, and Lightning's "bf16-true" after a checkpoint was loaded."""
    gm = loops.prepared()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    learner = dspfx.GroupLearner(gm, optimizer, 3)

    def step(seed: int) -> None:
        x, y = loops.batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(gm(x.to(gm.head.weight.dtype)).float(), y).backward()
        optimizer.step()

    step(0)
    before = gm.c.gate_logits.clone()
    gm.to(dtype)
    assert gm.c.weight.dtype == dtype
    assert torch.equal(gm.c.gate_logits, before)
    step(1)
    assert learner.steps == 2
    moved = (gm.c.gate_logits - before).abs().max()
    assert 1e-4 < float(moved) < 3e-3  # one step of Adam, none of it rounded away
    assert torch.equal(gm.float().c.gate_logits, gm.c.gate_logits)
    assert gm.double().c.gate_logits.dtype == torch.float64
    assert copy.deepcopy(gm).half().c.gate_logits.dtype == torch.float64


# Ways to step --------------------------------------------------------------------------------------------------------


def test_a_closure_given_to_the_optimizer_learns_the_same() -> None:
    reference, gm = loops.prepared(), loops.prepared()
    state = loops.plain(reference)
    optimizer = loops.sgd(gm)
    learner = dspfx.GroupLearner(gm, optimizer, loops.STEPS)
    for seed in range(loops.STEPS):
        x, y = loops.batch(seed)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(gm(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    loops.assert_same(reference, gm)
    loops.assert_same_state(state, learner.state_dict())


class Still(torch.optim.Optimizer):
    """Its step changes nothing: what differs afterwards is the learner's doing."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


@contextmanager
def learning_alone(gm: nn.Module, optimizer: Any, lr: float) -> Iterator[Callable[[], None]]:
    """A learner that steps only when told, on the gradients that lie there."""
    still = Still(gm.parameters(), lr)
    with dspfx.GroupLearner(gm, still, loops.STEPS):
        yield still.step


def test_lbfgs_learns_once_a_step_from_its_last_gradient() -> None:
    nets = [loops.prepared(), loops.prepared()]
    steps = []
    for gm in nets:
        optimizer = torch.optim.LBFGS(gm.parameters(), lr=0.1, max_iter=3)
        learner = dspfx.GroupLearner(gm, optimizer, loops.STEPS) if gm is nets[0] else None
        with learning_alone(gm, optimizer, 0.1) if learner is None else _nothing() as learn:
            for seed in range(2):
                x, y = loops.batch(seed)

                def closure(x: Tensor = x, y: Tensor = y, gm: Any = gm, optimizer: Any = optimizer) -> Tensor:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(gm(x), y)
                    loss.backward()
                    return loss

                optimizer.step(closure)
                learn()
        steps.append(learner.steps if learner else 2)
    assert steps == [2, 2]
    loops.assert_same(*nets)


@contextmanager
def _nothing() -> Iterator[Callable[[], None]]:
    yield lambda: None


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation as it is mostly written: a wrapper stepped by two methods, or with a closure."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.detach().clone()
                    p.add_(p.grad * group["rho"] / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "old" in self.state[p]:
                    p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad(set_to_none=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


@pytest.mark.parametrize("by_closure", [False, True])
@pytest.mark.parametrize("pruned", [False, True])
def test_sam_learns_once_a_step_from_the_gradient_it_descends(by_closure: bool, pruned: bool) -> None:
    nets = [loops.prepared(), loops.prepared()]
    for gm in nets:
        if pruned:
            dspfx.prune(gm, dspfx.Budget(flops=0.5))
        optimizer = Sam(gm.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        if gm is nets[0]:
            learner = dspfx.GroupLearner(gm, optimizer, loops.STEPS)
        else:  # the same, hooked to the optimizer inside
            dspfx.GroupLearner(gm, optimizer.base_optimizer, loops.STEPS)
        for seed in range(3):
            x, y = loops.batch(seed)

            def backward(x: Tensor = x, y: Tensor = y, gm: Any = gm) -> None:
                F.cross_entropy(gm(x), y).backward()

            backward()
            if by_closure:
                optimizer.step(backward)
            else:
                optimizer.first_step()
                backward()
                optimizer.second_step()
    assert learner.steps == 3
    loops.assert_same(*nets)
    if pruned:
        gates = [m for m in nets[0].modules() if isinstance(m, GatedLayer) and m.is_pruned]
        assert gates
        assert not any(bool((gate.weight * gate.dropped()).any()) for gate in gates)


FAST: dict[str, loops.Make] = {
    "sgd-foreach": lambda gm: torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda gm: torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9, fused=True),
    "adamw-foreach": lambda gm: torch.optim.AdamW(gm.parameters(), lr=0.01, foreach=True),
    "adamw-fused": lambda gm: torch.optim.AdamW(gm.parameters(), lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", FAST)
def test_foreach_and_fused_optimizers_learn_what_plain_ones_do_and_keep_zeros(name: str) -> None:
    def slow(gm: nn.Module) -> torch.optim.Optimizer:
        if name.startswith("sgd"):
            return torch.optim.SGD(gm.parameters(), lr=0.1, momentum=0.9, foreach=False)
        return torch.optim.AdamW(gm.parameters(), lr=0.01, foreach=False)

    nets = [loops.prepared().double(), loops.prepared().double()]
    for gm, make in zip(nets, (FAST[name], slow), strict=True):
        optimizer = make(gm)
        dspfx.GroupLearner(gm, optimizer, 6)
        gm.train()
        for seed in range(6):
            if seed == 3:
                dspfx.prune(gm, dspfx.Budget(flops=0.5))
            x, y = loops.batch(seed)
            optimizer.zero_grad()
            F.cross_entropy(gm(x.double()), y).backward()
            optimizer.step()
        gates = [m for m in gm.modules() if isinstance(m, GatedLayer) and m.is_pruned]
        assert gates
        assert not any(bool((gate.weight * gate.dropped()).any()) for gate in gates)
    loops.assert_close(nets[0], nets[1], 1e-9)


# Parameters that come and go -----------------------------------------------------------------------------------------


def test_a_layer_frozen_midway_stops_and_one_thawed_goes_on() -> None:
    gm = loops.prepared()
    optimizer = loops.sgd(gm)
    learner = dspfx.GroupLearner(gm, optimizer, loops.STEPS)
    moved = []
    for seed, frozen in enumerate((False, True, True, False)):
        gm.c.requires_grad_(not frozen)
        before = loops.tensors(gm)
        x, y = loops.batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
        after = loops.tensors(gm)
        moved.append(
            {k for k in ("b.gate_logits", "c.weight", "c.gate_logits") if not torch.equal(before[k], after[k])}
        )
    both = {"b.gate_logits", "c.weight", "c.gate_logits"}
    assert moved == [both, {"b.gate_logits"}, {"b.gate_logits"}, both]
    assert learner.steps == 4
    assert [learner.state_dict()["layers"][name]["steps"] for name in ("b", "c")] == [4, 2]


def test_a_parameter_group_added_later_learns_from_then_on() -> None:
    """As finetuning callbacks do: frozen at first, then thawed and given to the optimizer."""
    gm = loops.prepared()
    gm.c.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in gm.parameters() if p.requires_grad], lr=0.1)
    learner = dspfx.GroupLearner(gm, optimizer, loops.STEPS)
    for seed in range(loops.STEPS):
        if seed == 2:
            gm.c.requires_grad_(True)
            optimizer.add_param_group({"params": list(gm.c.parameters()), "lr": 0.01})
        x, y = loops.batch(seed)
        optimizer.zero_grad()
        F.cross_entropy(gm(x), y).backward()
        optimizer.step()
    assert [learner.state_dict()["layers"][name]["steps"] for name in ("b", "c")] == [4, 2]


@pytest.mark.parametrize("make", ["OneCycleLR", "CosineAnnealingLR", "SequentialLR"])
def test_schedules_of_several_groups_set_each_step_size(make: str) -> None:
    """Against weights that see no gradient: W changes by lr * lambda * dR/dW alone, in proportion to the lr."""

    def optimizer_of(gm: Any, scale: float) -> tuple[torch.optim.Optimizer, Any]:
        groups = [{"params": [gm.b.weight], "lr": 0.1 * scale}, {"params": [gm.c.weight], "lr": 0.02 * scale}]
        optimizer = torch.optim.SGD(groups)
        schedules = torch.optim.lr_scheduler
        if make == "OneCycleLR":
            return optimizer, schedules.OneCycleLR(
                optimizer, [0.1 * scale, 0.02 * scale], total_steps=4, cycle_momentum=False
            )
        cosine = schedules.CosineAnnealingLR(optimizer, 4)
        if make == "CosineAnnealingLR":
            return optimizer, cosine
        warm = schedules.LinearLR(optimizer, 0.5, total_iters=2)
        return optimizer, schedules.SequentialLR(optimizer, [warm, cosine], milestones=[2])

    moves = []
    for scale in (1.0, 0.5):
        gm = loops.prepared().double()
        optimizer, schedule = optimizer_of(gm, scale)
        dspfx.GroupLearner(gm, optimizer, 1, strength=1e-6)
        rows = []
        for _ in range(3):
            gm.b.weight.grad, gm.c.weight.grad = torch.zeros_like(gm.b.weight), torch.zeros_like(gm.c.weight)
            before = [gm.b.weight.detach().clone(), gm.c.weight.detach().clone()]
            sizes = [float(group["lr"]) for group in optimizer.param_groups]
            optimizer.step()
            schedule.step()
            after = [gm.b.weight.detach(), gm.c.weight.detach()]
            rows.append([float((a - b).norm()) / lr for a, b, lr in zip(after, before, sizes, strict=True)])
        moves.append(rows)
    slopes = torch.tensor(moves)
    assert bool((slopes > 0).all())
    assert torch.allclose(slopes[0], slopes[1], rtol=1e-3)


# Refusals ------------------------------------------------------------------------------------------------------------


class Unhooked(torch.optim.Optimizer):
    """Never calls torch's __init__, and keeps nothing inside."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params), "lr": 0.1}]


def test_an_optimizer_whose_steps_cannot_be_seen_is_refused() -> None:
    gm = loops.prepared()
    with pytest.raises(ConfigError) as caught:
        dspfx.GroupLearner(gm, Unhooked(gm.parameters()), 4)
    assert str(caught.value) == (
        "The steps of Unhooked cannot be seen: its class never called torch.optim.Optimizer.__init__, which makes "
        "step() run hooks. Give the optimizer that it wraps."
    )


def test_what_is_no_optimizer_is_refused() -> None:
    gm = loops.prepared()
    with pytest.raises(ConfigError) as caught:
        dspfx.GroupLearner(gm, [loops.sgd(gm)], 4)  # type: ignore[arg-type]
    assert str(caught.value) == "list is no optimizer that could be followed; give a torch.optim.Optimizer."


def test_an_optimizer_without_a_learning_rate_is_refused() -> None:
    gm = loops.prepared()
    optimizer = loops.sgd(gm)
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(ConfigError) as caught:
        dspfx.GroupLearner(gm, optimizer, 4)
    assert str(caught.value) == (
        "A parameter group of SGD has no learning rate (lr is None), and weights are changed in steps of that size; "
        "give the optimizer one."
    )


def test_an_optimizer_wrapped_around_other_parameters_is_not_looked_into() -> None:
    gm, other = loops.prepared(), nn.Linear(2, 2)
    optimizer = loops.sgd(gm)
    optimizer.base_optimizer = loops.sgd(other)  # type: ignore[attr-defined]
    learner = dspfx.GroupLearner(gm, optimizer, 4)
    x, y = loops.batch(0)
    F.cross_entropy(gm(x), y).backward()
    optimizer.step()
    assert learner.steps == 1
