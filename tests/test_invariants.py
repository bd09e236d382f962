"""What holds for every network of the zoo: prepared = original, masked = lowered, twice = once, nothing touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dspfx.config import GateConfig
from dspfx.graph.traced import TracedModule, all_graphs
from dspfx.graph.tracer import expect
from dspfx.modules import GatedConv2d, GroupConv2d
from dspfx.pipeline import lower, prepare
from dspfx.plans import LowerPlan
from dspfx.selfcheck import TOLERANCE, selfcheck
from tests.compare import error, fingerprint, forced, gradients, pruned, run, same, unchanged
from tests.zoo import ZOO, ZooEntry

each_entry = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)


def accepts(model: nn.Module, inputs: tuple[Tensor, ...]) -> bool:
    """Whether a copy of the model runs: in training a batch norm needs more than one value a channel."""
    try:
        copy.deepcopy(model)(*inputs)
    except ValueError as refused:
        if "Expected more than 1 value per channel when training" not in str(refused):
            raise
        return False
    return True


def is_modal(model: nn.Module) -> bool:
    """True where training mode computes something else than eval mode does."""
    modal = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return any(isinstance(m, modal) for m in model.modules())


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def check_prepared(model: nn.Module, gm: TracedModule, entry: ZooEntry) -> None:
    """Outputs, gradients, running statistics and random numbers: bit for bit, at sizes the trace never saw."""
    for training in (True, False):
        model.train(training)
        gm.train(training)
        for batch, (height, width) in zip((1, 3, 5), 3 * entry.sizes()[::-1], strict=False):
            inputs = entry.inputs(batch, height, width, seed=batch)
            if training and batch == 1 and not accepts(model, inputs):
                continue
            assert same(run(gm, inputs), run(model, inputs))
            expected, found = gradients(model, inputs), gradients(gm, inputs)
            assert list(found) == list(expected)
            assert same(found.values(), expected.values())
    state = gm.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def check_loading(model: nn.Module, gm: TracedModule) -> None:
    """The original's state_dict loads strictly, and the gates keep their values."""
    state = {key: torch.rand_like(v) if v.is_floating_point() else v + 3 for key, v in model.state_dict().items()}
    gates = {key: value.clone() for key, value in gm.state_dict().items() if key not in state}
    assert all(key.endswith(GatedConv2d.GATE_KEYS) for key in gates)
    gm.load_state_dict(state, strict=True)
    found = gm.state_dict()
    assert list(found)
    assert all(torch.equal(found[key], value) for key, value in (state | gates).items())


def check_plan(gm: TracedModule, entry: ZooEntry) -> None:
    """Prepared at another batch and dtype: one plan, one graph; size arithmetic alone is never guarded."""
    other = pruned(entry)
    assert other.meta["gate_plan"].to_json() == gm.meta["gate_plan"].to_json()
    targets = [[str(n.target) for n in graph.nodes] for graph in all_graphs(gm)]
    assert [[str(n.target) for n in graph.nodes] for graph in all_graphs(other)] == targets
    guards = [n for graph in all_graphs(gm) for n in graph.nodes if n.target is expect]
    assert bool(guards) == entry.shape_branch


@each_entry
def test_prepared_equals_original_and_touches_nothing(entry: ZooEntry) -> None:
    model = entry.build()
    frozen = next(model.parameters()).requires_grad_(False)
    next(model.children(), model).eval()
    before = fingerprint(model)
    gm = prepare(model, entry.inputs(), GateConfig(groups=3))
    assert unchanged(before, fingerprint(model))
    modules = dict(gm.named_modules(remove_duplicate=False))
    assert all(modules[name].training == m.training for name, m in model.named_modules(remove_duplicate=False))
    owned = {id(t) for t in model.state_dict(keep_vars=True).values()}
    assert not owned & {id(t) for t in gm.state_dict(keep_vars=True).values()}
    assert {n: p.requires_grad for n, p in gm.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    frozen.requires_grad_(True)
    next(gm.parameters()).requires_grad_(True)
    check_prepared(model, gm, entry)
    check_loading(model, gm)
    check_plan(gm, entry)


@each_entry
def test_selfcheck_passes(entry: ZooEntry) -> None:
    model = entry.build()
    before = fingerprint(model)
    report = selfcheck(model, entry.inputs(), GateConfig(groups=3))
    assert unchanged(before, fingerprint(model))
    assert report.error <= TOLERANCE
    assert report.float_error <= 1e-5
    assert report.response > 1e-3
    assert report.batches == (1, 5)


@each_entry
@pytest.mark.parametrize("form", ["dense", "branches", "unfolded in fours"])
def test_masked_equals_lowered(entry: ZooEntry, form: str) -> None:
    gm = pruned(entry)
    before = fingerprint(gm)
    multiple = 4 if form == "unfolded in fours" else 1
    small: TracedModule = forced(gm, form, multiple, fold=multiple == 1)
    assert unchanged(before, fingerprint(gm))
    assert not small.training
    assert not any(isinstance(m, GatedConv2d) for m in small.modules())
    gm.eval()
    for batch, (height, width) in zip((1, 5, 2), entry.sizes() * 3, strict=False):
        inputs = entry.inputs(batch, height, width, dtype=torch.float64)
        assert error(run(gm, inputs), run(small, inputs)) <= TOLERANCE
    plan: LowerPlan = small.meta["lower_plan"]
    for layer in plan.layers:
        is_split = isinstance(small.get_submodule(layer.name), GroupConv2d)
        assert is_split == (layer.form == "branches")
        assert form == "branches" or not is_split
    if form == "unfolded in fours":
        check_training(gm, small, entry)
    if form == "dense":
        check_twice(small, entry)
        check_copies(gm, small, entry)


def check_training(gm: TracedModule, small: TracedModule, entry: ZooEntry) -> None:
    """The lowered network goes on training; where the modes agree, from the very function that was masked."""
    inputs = entry.inputs(5, dtype=torch.float64)
    gm.train()
    small.train()
    if not is_modal(gm) and not entry.has_rng:
        assert error(run(gm, inputs), run(small, inputs)) <= TOLERANCE
    found = [g for g in gradients(small, inputs).values() if g is not None]
    assert found
    assert all(g.isfinite().all() for g in found)


def check_twice(once: TracedModule, entry: ZooEntry) -> None:
    twice = lower(once)
    inputs = entry.inputs(3, dtype=torch.float64)
    assert error(run(once, inputs), run(twice, inputs)) <= 1e-14
    assert shapes(twice) == shapes(once)
    assert twice.meta["lower_plan"].flops_run == 1.0


def check_copies(gm: TracedModule, small: TracedModule, entry: ZooEntry) -> None:
    """Copies compute the same, and what happens to a copy stays there."""
    inputs = entry.inputs(3, dtype=torch.float64)
    for model in (gm, small):
        before: list[Any] = run(model, inputs)
        twin = copy.deepcopy(model)
        assert same(run(twin, inputs), before)
        with torch.no_grad():
            for tensor in twin.state_dict().values():
                tensor.zero_()
        twin.train()
        assert not model.training
        assert same(run(model, inputs), before)


@pytest.mark.parametrize("name", ["resnet_padded", "shuffle_unit", "inverted_residual", "unet"])
def test_lowered_networks_export_and_compile(name: str) -> None:
    entry = ZOO[name]
    small = lower(pruned(entry))
    (image,) = entry.inputs(2, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(small, (image,), dynamic_shapes=({0: batch},))
    (larger,) = entry.inputs(5, dtype=torch.float64)
    assert same(run(program.module(), (larger,)), run(small, (larger,)))
    compiled: Any = torch.compile(small, backend="eager", fullgraph=True)
    assert same(run(compiled, (larger,)), run(small, (larger,)))
