"""plan_latency under clocks of the test's own: targets are met and not overshot, by blocks, families and groups."""

from __future__ import annotations

import copy
import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dspfx.config import GateConfig
from dspfx.errors import BudgetError
from dspfx.forms import Clock, FormCase
from dspfx.graph.analyse import analyse
from dspfx.graph.traced import Network
from dspfx.method.importance import resolve
from dspfx.passes import plan_latency as module
from dspfx.passes.apply_masks import apply_masks
from dspfx.passes.choose_form import BY_RULE, LowerOptions
from dspfx.passes.plan_latency import plan_latency
from dspfx.passes.plan_lower import plan_lower
from dspfx.pipeline import _plain, lower, prepare
from dspfx.plans import PrunePlan
from tests.compare import error, run
from tests.zoo import OTHERS, ZOO

ENTRIES = ZOO | OTHERS
# A chain, flatten -> linear, GroupNorm, residual streams, depthwise, cat, shuffles, grouped, transposed, shared, 1d.
NETWORKS = (
    *("plain", "vgg_flatten", "group_norm", "resnet_bottleneck", "inverted_residual", "dense_block", "mobilenet_v2"),
    *("shuffle_unit", "shufflenet_v2", "resnext", "squeeze_excite", "transposed", "shared_conv", "causal_net"),
)
# Layers that are no modules have no time; a constant that pruning does not know; no gate at all; all channels pinned.
EXEMPT = (
    *("functional_layers", "tied_autoencoder", "affine", "single_conv", "raw_parameters", "mlp_mixer", "free_scales"),
)


def macs(case: FormCase) -> float:
    """Millions of multiply-adds; branches are out of the question."""
    if case.form == "branches":
        return 1e9
    sizes = case.shape[2:] if case.kind != "Linear" else case.shape[1:-1]
    if case.padding == "valid":
        sizes = tuple(n - d * (k - 1) for n, d, k in zip(sizes, case.dilation, case.kernel, strict=True))
    elif not isinstance(case.padding, str) and case.kind in ("Conv1d", "Conv2d", "Conv3d"):
        options = zip(sizes, case.padding, case.dilation, case.kernel, case.stride, strict=True)
        sizes = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in options)
    return 1e-6 * case.filters * case.channels / case.groups * math.prod(sizes) * math.prod(case.kernel)


def by_blocks(case: FormCase) -> float:
    """Whole blocks of eight are computed."""
    if case.form == "branches":
        return 1e9
    share = 1 if case.groups == 1 else case.channels / case.groups
    channels = -(-case.channels // 8) * 8 if case.groups == 1 else case.groups
    return share * macs(case.resized(-(-case.filters // 8) * 8, channels))


def prepared(name: str, groups: int = 3) -> Network:
    entry = ENTRIES[name]
    return prepare(entry.build().double(), entry.inputs(3, dtype=torch.float64), GateConfig(groups=groups))


def plan_of(gm: Network, target: float, clock: Clock = macs, block: int = 1) -> PrunePlan:
    return plan_latency(gm, analyse(gm), target, resolve("l2"), clock, block)


def masked(gm: Network, plan: PrunePlan) -> Network:
    apply_masks(gm, plan, analyse(gm))
    return gm


def ms_of(gm: Network, clock: Clock, dense: bool = False) -> float:
    """The clock over all layers of a network with zeros, once lowered without branches."""
    plain = _plain(gm, None)
    ms = plan_lower(plain, analyse(plain), LowerOptions(0 if dense else 1, clock, ())).ms
    assert ms is not None
    return ms


def chain(*widths: int) -> Network:
    """1x1 convolutions and ReLUs; the first has no gate, since it reads the input."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 1), nn.ReLU()]
    return prepare(nn.Sequential(*layers[:-1]).double(), torch.zeros(1, widths[0], 4, 4).double(), GateConfig(groups=2))


def kept(plan: PrunePlan) -> dict[str, set[tuple[int, int]]]:
    return {layer.name: {(o, c) for g in layer.groups for o in g.filters for c in g.channels} for layer in plan.layers}


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> list[PrunePlan]:
    """The plans that each step started from."""
    found: list[PrunePlan] = []
    take = module._State.take

    def noting(state: Any, step: Any) -> None:
        reads = {name: layer.reads for name, layer in state.layers.items() if layer.reads is not None}
        found.append(state.search.plan(state.search.count(copy.deepcopy(state.search.dense | reads))))
        take(state, step)

    monkeypatch.setattr(module._State, "take", noting)
    return found


@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(n, marks=pytest.mark.slow) for n in ENTRIES if n not in NETWORKS + EXEMPT)]
)
def test_a_clock_of_multiply_adds_is_met_by_the_first_step_that_can(name: str, before: list[PrunePlan]) -> None:
    gm, inputs = prepared(name), ENTRIES[name].inputs(2, dtype=torch.float64)
    dense = ms_of(gm, macs, dense=True)
    plan = plan_of(gm, 0.6)
    assert plan.flops_left <= 0.6 < before[-1].flops_left
    assert all(a.flops_left >= b.flops_left for a, b in zip(before, [*before[1:], plan], strict=True))
    masked(gm, plan)
    assert ms_of(gm, macs) / dense == pytest.approx(plan.flops_left, rel=1e-9)
    assert error(run(gm.eval(), inputs), run(lower(gm, tune=None), inputs)) < 1e-12


@pytest.mark.parametrize("name", ["plain", "resnet_padded", "inverted_residual", "dense_block"])
def test_a_clock_that_knows_whole_blocks_gets_whole_blocks(name: str) -> None:
    gm = prepared(name)
    dense = ms_of(gm, by_blocks, dense=True)
    masked(gm, plan_of(gm, 0.6, by_blocks, 8))
    assert ms_of(gm, by_blocks) <= 0.6 * dense
    plain = _plain(gm, None)
    lowered = plan_lower(plain, analyse(plain), LowerOptions(1, by_blocks, ()))
    widths = [len(layer.filters) for layer in lowered.layers[:-1] if layer.form == "dense"]
    whole = [m.weight.shape[0] for m in plain.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]
    assert sum(widths) < sum(whole)
    assert all(width % 8 == 0 or width in whole for width in widths)


def test_parts_of_a_block_go_where_they_buy_time() -> None:
    gm = chain(16, 8, 16)
    plan = plan_of(gm, 0.5, macs, 8)
    assert [len(g.channels) for g in plan.layers[0].groups if g.filters] == [4, 4]
    assert plan.flops_left == 0.5


def test_the_channels_of_least_energy_go() -> None:
    gm = chain(4, 16, 4)
    order = torch.randperm(16)
    with torch.no_grad():
        for i, o in enumerate(order.tolist()):
            gm.get_parameter("0.weight")[o] = gm.get_parameter("2.weight")[:, o] = 0.5 + i
    plan = plan_of(gm, 0.5)
    assert {group.channels for group in plan.layers[0].groups} == {tuple(sorted(order[8:].tolist()))}


def test_energies_are_the_users_own() -> None:
    def favours_the_last(weight: Tensor) -> Tensor:
        return torch.arange(1.0, 1 + weight.shape[1]).expand(weight.shape[:2]) ** 8

    gm = chain(8, 8, 8, 8)
    plan = plan_latency(gm, analyse(gm), 0.3, favours_the_last, macs, 1)
    groups = plan.layers[1].groups  # the other's channels have a share of the first layer's own energy, too
    alive = sorted({c for group in groups for c in group.channels})
    assert alive == list(range(8 - len(alive), 8))
    assert 0 < len(alive) < 8


def branches_by_width(case: FormCase) -> float:
    """Dense layers cost one, whatever is left of them; branches half of that share of their channels."""
    return 1.0 if case.form == "dense" else 0.5 * sum(b.channels for b in case.branches) / len(case.branches) / 32


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_lose_equally_many_channels_where_branches_are_cheap(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 1))
    gm = prepare(model.double(), torch.zeros(1, 32, 8, 8).double(), GateConfig(groups=groups))
    plan = plan_of(gm, 0.4, branches_by_width, 8)
    widths = [{len(g.channels) for g in layer.groups} for layer in plan.layers]
    assert all(len(found) == 1 and width in (2, 4, 8, 16, 24) for found in widths for width in found)
    expected = [0.5 / BY_RULE.margin * width / 32 for found in widths for width in found]
    assert (1 + sum(expected)) / 3 <= 0.4  # the first layer reads the input and has no groups
    # A dense layer would not be faster with fewer filters, and those of layer 2 died where layer 4 reads them not.
    assert sum(len(g.filters) for g in plan.layers[1].groups) == 32
    inputs = (torch.randn(2, 32, 8, 8, dtype=torch.float64),)
    assert error(run(masked(gm, plan).eval(), inputs), run(lower(gm, tune=None), inputs)) < 1e-12


def test_group_channels_of_least_energy_go_in_each_group() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)).double()
    with torch.no_grad():
        weight = torch.ones(8, 8)
        weight[:4, ::2] = weight[4:, :4] = 9.0
        model.get_parameter("2.weight").copy_(weight[:, :, None, None])
    gm = prepare(model, torch.zeros(1, 3, 4, 4).double(), GateConfig(groups=2))
    gm.get_submodule("2").gate_logits.copy_(torch.eye(2).repeat_interleave(4, 1))

    def clock(case: FormCase) -> float:
        return 1.0 if case.form == "dense" else max(b.channels for b in case.branches) / 16

    plan = plan_of(gm, 0.7, clock, 4)
    assert [(g.filters, g.channels) for g in plan.layers[0].groups] == [
        ((0, 1, 2, 3), (0, 2, 4, 6)),
        ((4, 5, 6, 7), (0, 1, 2, 3)),
    ]


def test_channels_between_layers_without_gates_stay() -> None:
    layers = [nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(16, 8, 1)).double()
    gm = prepare(model, torch.zeros(1, 8, 4, 4).double(), GateConfig(groups=2, skip=("0", "2")))
    weights = {name: gm.get_parameter(f"{name}.weight").detach().clone() for name in ("0", "2")}
    plan = plan_of(gm, 0.75)
    small = lower(masked(gm, plan), tune=None)
    found = [small.get_parameter(f"{name}.weight").shape[:2] for name in ("0", "2", "4", "6")]
    assert found[0] == (16, 8)  # made and read without a gate
    assert found[1][1] == 16
    assert found[2][1] == found[1][0] < 16  # read by a gated layer
    assert found[3][0] == 8
    assert {layer.name for layer in plan.layers} == {"4", "6"}
    assert all(torch.equal(gm.get_parameter(f"{name}.weight"), weight) for name, weight in weights.items())


def test_a_target_below_the_floor_is_refused_by_name() -> None:
    gm = chain(3, 8, 8, 4)
    floor = (3 * 1 + 1 * 1 + 1 * 4) / (3 * 8 + 8 * 8 + 8 * 4)
    message = (
        f"a latency of 0.010 is below what this network can reach: with the least that can be kept, its layers take "
        f"{floor:.3f} of their time. Raise the budget, or gate more layers."
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        plan_of(gm, 0.01)
    state = {key: value.clone() for key, value in gm.state_dict().items()}
    assert plan_of(gm, floor + 1e-9).flops_left == pytest.approx(floor)
    assert all(torch.equal(value, state[key]) for key, value in gm.state_dict().items())


def test_nothing_goes_for_the_whole_time() -> None:
    gm = prepared("plain")
    plan = plan_of(gm, 1.0)
    assert (plan.flops_left, plan.params_left, plan.beta, plan.latency_left) == (1.0, 1.0, 0.0, None)


@pytest.mark.parametrize("name", ["resnet_bottleneck", "mobilenet_v2"])
def test_a_pruned_network_only_loses_more(name: str) -> None:
    gm, inputs = prepared(name), ENTRIES[name].inputs(2, dtype=torch.float64)
    plans = [plan_of(gm, 1.0)]
    for target in (0.8, 0.8, 0.6):
        plans.append(plan_of(gm, target))
        masked(gm, plans[-1])
        assert plans[-1].flops_left <= target
    assert kept(plans[1]) == kept(plans[2])
    for more, less in itertools.pairwise(plans):
        assert all(kept(less)[layer] <= pairs for layer, pairs in kept(more).items())
    assert kept(plans[3]) != kept(plans[1])
    assert error(run(gm.eval(), inputs), run(lower(gm, tune=None), inputs)) < 1e-12


def test_the_same_network_gives_the_same_plan() -> None:
    gm = prepared("resnet_bottleneck")
    assert plan_of(gm, 0.6) == plan_of(copy.deepcopy(gm), 0.6)
