"""plan_prune: the budget is met as closely as one structure allows, energies decide, counts are arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dspfx.config import Budget, GateConfig
from dspfx.errors import BudgetError
from dspfx.graph.analyse import analyse
from dspfx.graph.traced import TracedModule
from dspfx.learner import GroupLearner
from dspfx.method.importance import Fisher, group_energy, resolve
from dspfx.modules import GatedConv2d
from dspfx.passes.plan_prune import Search, plan_prune
from dspfx.pipeline import lower, prepare, prune
from dspfx.plans import PrunePlan
from tests.zoo import ZOO

NAMES = ("resnet_projection", "resnet_padded", "inverted_residual", "dense_block", "inception", "shuffle_unit", "unet")


def prepared(name: str, groups: int = 2) -> TracedModule:
    return prepare(ZOO[name].build(), ZOO[name].inputs(), GateConfig(groups=groups))


def count(gm: TracedModule, plan: PrunePlan, size: tuple[int, int] = (16, 16)) -> tuple[float, float]:
    """(FLOPs, parameters) left, by running the network and looking at the masks of `plan` and at dead channels."""
    kept = {layer.name: sum(len(g.filters) * len(g.channels) for g in layer.groups) for layer in plan.layers}
    flops = [0, 0]
    params = [0, 0]

    def measure(name: str, conv: nn.Conv2d | nn.Linear, out: Tensor) -> None:
        pairs = conv.weight.shape[0] * conv.weight.shape[1]
        each = conv.weight[0, 0].numel()
        positions = out[0, 0].numel() if isinstance(conv, nn.Conv2d) else 1
        left = kept.get(name, pairs)
        for total, amount in ((flops, each * positions), (params, each)):
            total[0] += left * amount
            total[1] += pairs * amount

    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: measure(name, m, out))
        for name, module in gm.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    with torch.no_grad():
        gm.eval()(*ZOO["plain"].inputs(1, *size))
    for hook in hooks:
        hook.remove()
    return flops[0] / flops[1], params[0] / params[1]


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_met_closely(name: str) -> None:
    for fraction in (0.8, 0.6):
        plan = prune(prepared(name), Budget(flops=fraction))
        assert fraction - 0.08 < plan.flops_left <= fraction
        assert 0 < plan.beta < 1


def test_fractions_are_those_counted_in_the_running_network() -> None:
    """Ungated layers of this network keep all their pairs: nothing they read dies."""
    gm = prepared("resnet_projection")
    for m in gm.modules():
        if isinstance(m, GatedConv2d):
            m.gate_logits.copy_(torch.eye(2)[torch.arange(m.out_channels) % 2].T)
    plan = plan_prune(gm, analyse(gm), Budget(flops=0.97), resolve("l2", False))
    flops, params = count(gm, plan)
    assert plan.flops_left == pytest.approx(flops, abs=1e-12)
    assert plan.params_left == pytest.approx(params, abs=1e-12)
    gated = sum(layer.macs_left for layer in plan.layers) / sum(layer.macs for layer in plan.layers)
    assert plan.gated_flops_left == pytest.approx(gated, abs=1e-12)


def test_several_fractions_hold_at_once() -> None:
    alone = prune(prepared("resnet_projection"), Budget(flops=0.7))
    both = prune(prepared("resnet_projection"), Budget(flops=0.7, params=0.4))
    assert both.flops_left <= 0.7
    assert both.params_left <= 0.4 < alone.params_left


def test_the_whole_network_is_no_pruning() -> None:
    gm = prepared("plain")
    before = {key: value.clone() for key, value in gm.state_dict().items()}
    plan = prune(gm, Budget(flops=1.0))
    assert (plan.flops_left, plan.params_left, plan.beta) == (1.0, 1.0, 0.0)
    weights = [key for key in before if not key.endswith(GatedConv2d.GATE_KEYS)]
    assert all(torch.equal(gm.state_dict()[key], before[key]) for key in weights)


def test_the_least_energy_goes_first_whatever_its_name() -> None:
    def favours_the_first_half(weight: Tensor) -> Tensor:
        energy = torch.full(weight.shape[:2], 1e-6)
        energy[:, : weight.shape[1] // 2] = 1.0
        return energy

    gm = prepared("conv_options", groups=1)
    plan = prune(gm, Budget(flops=0.65), favours_the_first_half)
    dropped = 0
    for layer in plan.layers:
        kept = {c for group in layer.groups for c in group.channels}
        half = set(range(layer.in_channels // 2))
        assert half <= kept or kept <= half or not half - kept
        dropped += layer.in_channels - len(kept)
    assert dropped > 0


def test_learned_groups_are_the_argmax_of_the_logits() -> None:
    gm = prepared("plain")
    generator = torch.Generator().manual_seed(0)
    gates = {name: m for name, m in gm.named_modules() if isinstance(m, GatedConv2d)}
    for gate in gates.values():
        gate.gate_logits.normal_(generator=generator)
    plan = prune(gm, Budget(flops=0.7))
    for layer in plan.layers:
        learned = gates[layer.name].gate_logits.argmax(0)
        for g, group in enumerate(layer.groups):
            assert all(int(learned[o]) == g for o in group.filters)


def test_every_prefix_drops_no_less_and_keeps_a_channel_a_group() -> None:
    gm = prepared("resnet_projection")
    search = Search(gm, analyse(gm), resolve("l2", False))
    before = 2.0
    for dropped in range(0, search.total + 1, max(1, search.total // 12)):
        kept = search.keep(dropped)
        assert kept.flops <= before
        before = kept.flops
        for read in kept.reads.values():
            filled = read.row[read.row >= 0].unique()
            assert bool(read.keep[filled].any(1).all())


@pytest.mark.parametrize("name", NAMES)
def test_the_floor_that_is_named_can_be_reached(name: str) -> None:
    gm = prepared(name)
    with pytest.raises(BudgetError) as caught:
        prune(gm, Budget(flops=1e-6))
    floor = float(str(caught.value).split("leaves ")[1].split(" ")[0]) + 5e-5
    assert prune(gm, Budget(flops=floor)).flops_left <= floor


def test_pruning_decides_the_same_each_time() -> None:
    assert prune(prepared("unet"), Budget(flops=0.5)) == prune(prepared("unet"), Budget(flops=0.5))


class PinnedStream(nn.Module):
    """A residual stream that an unknown operation pins and padding widens: parts of it are zero from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.b(torch.relu(self.a(x)))
        return nn.functional.pad(x.cumsum(2), (0, 0, 0, 0, 2, 2))


def test_channels_that_are_constant_from_the_start_do_not_count_as_cut_off() -> None:
    gm = prepare(PinnedStream(), torch.zeros(2, 3, 8, 8), GateConfig(groups=2))
    search = Search(gm, analyse(gm), resolve("l2", False))
    assert search.keep(0).is_connected
    assert search.keep(search.total).is_connected
    plan = prune(gm, Budget(flops=0.5))
    assert 0.4 < plan.flops_left <= 0.5


def test_groups_of_a_grouped_convolution_go_whole() -> None:
    torch.manual_seed(0)
    before, after = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
    grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), before, nn.ReLU(), grouped, nn.ReLU(), after)
    with torch.no_grad():
        before.weight[4:8] *= 0.01
        after.weight[:, 4:8] *= 0.01
    gm = prepare(model, torch.zeros(1, 3, 8, 8), GateConfig(groups=2))
    plan = prune(gm, Budget(flops=0.8))
    small = lower(gm)
    left = small.get_submodule("4")
    assert (left.in_channels, left.out_channels, left.groups) == (12, 12, 3)
    assert plan.flops_left <= 0.8
    for layer in plan.layers:
        kept = {c for group in layer.groups for c in group.channels}
        if layer.name == "6":
            assert kept == set(range(4)) | set(range(8, 16))


def test_filters_before_a_norm_over_channels_are_scored_one_by_one() -> None:
    """A reader that drops a channel does not free its filter there: the norm's statistics need it."""
    torch.manual_seed(0)
    body = nn.Conv2d(8, 8, 1)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), body, nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        body.weight[5] *= 0.01
    gm = prepare(model, torch.zeros(1, 3, 8, 8), GateConfig(groups=1))
    plan = plan_prune(gm, analyse(gm), Budget(flops=0.9), resolve("l2", False))
    (layer,) = (layer for layer in plan.layers if layer.name == "1")
    assert 5 not in {o for group in layer.groups for o in group.filters}


def test_a_pinned_filter_does_not_keep_its_neighbours() -> None:
    class Half(nn.Module):
        """Four of eight filters are an output, the others are read by an ungated convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.tail = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, other = self.body(self.stem(x)).chunk(2, 1)
            return one, self.tail(other)

    torch.manual_seed(0)
    model = Half()
    with torch.no_grad():
        model.body.weight[[1, 6]] = 0.001
    gm = prepare(model, torch.zeros(1, 3, 8, 8), GateConfig(groups=1, skip=("tail",)))
    plan = prune(gm, Budget(flops=0.9))
    (layer,) = plan.layers
    alive = {o for group in layer.groups for o in group.filters}
    assert alive >= {0, 1, 2, 3}
    assert 6 not in alive


def test_what_an_unknown_operation_made_is_read_channel_by_channel() -> None:
    """All its channels are held, and a reader still drops those that it needs least."""

    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.tail = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.body(self.stem(x).cumsum(1)))

    torch.manual_seed(0)
    gm = prepare(Sorted(), torch.zeros(1, 3, 8, 8), GateConfig(groups=2))
    plan = prune(gm, Budget(flops=0.7))
    (body,) = (layer for layer in plan.layers if layer.name == "body")
    assert body.macs_left < body.macs
    assert any(0 < len(group.channels) < 8 for group in body.groups)


@pytest.mark.parametrize("counted", ["flops", "params"])
def test_what_learning_found_goes_by_its_loss_for_the_work_it_saves(counted: str) -> None:
    """Layers of 64 and of 16 positions: a brute-force list of all group channels in their order of price, the dearest
    three of each group's 24 at last."""
    wide = [nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1), nn.MaxPool2d(2)]
    model = nn.Sequential(*wide, nn.Conv2d(24, 24, 1), nn.Conv2d(24, 4, 1))
    gm = prepare(model, torch.zeros(2, 3, 8, 8), GateConfig(groups=2))
    generator = torch.Generator().manual_seed(0)
    prices: dict[tuple[str, int, int], tuple[bool, float]] = {}
    for name, positions, kernel in (("1", 64, 9), ("3", 16, 1), ("4", 16, 1)):
        gate = gm.get_submodule(name)
        assert isinstance(gate, GatedConv2d)
        gate.gate_logits[0, 0::2] = gate.gate_logits[1, 1::2] = 1
        worth = torch.rand(gate.filters, gate.channels, generator=generator)
        group = gate.gate_logits.argmax(0)
        gate.gate_fisher.copy_(group_energy(worth, group, 2))
        gate.gate_filter_fisher.copy_(worth.sum(1))
        cost = positions * kernel if counted == "flops" else kernel
        for g in range(2):
            size = int((group == g).sum())
            row = (gate.gate_fisher[g].double() / (size * cost)).tolist()
            dear = sorted(row)[-3]  # a tenth
            prices |= {(name, g, c): (price >= dear, price) for c, price in enumerate(row) if price < max(row)}
    expected = sorted(prices, key=lambda key: prices[key])
    search = Search(gm, analyse(gm), Fisher(), counts_params=counted == "params")
    found, before = [], search.rows(0)
    for dropped in range(1, search.total + 1):
        after = search.rows(dropped)
        gone = {name: (before[name].keep & ~after[name].keep).nonzero().tolist() for name in after}
        found += [(name, *where) for name, places in gone.items() for where in places]
        before = after
    assert found == expected


@pytest.mark.parametrize("groups", [1, 2])
def test_pruning_after_learning_goes_by_what_was_found_whatever_the_groups(groups: int) -> None:
    """Of one layer's channels those that were worth least go, also where there was only one group to learn."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    gm = prepare(model, torch.zeros(2, 3, 9, 9), GateConfig(groups=groups, skip=("4",)))
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    with GroupLearner(gm, optimizer, 3):
        for _ in range(3):
            optimizer.zero_grad()
            gm(torch.randn(2, 3, 9, 9)).square().mean().backward()
            optimizer.step()
    gate = gm.get_submodule("2")
    assert isinstance(gate, GatedConv2d)
    worth, group = gate.gate_fisher.clone(), gate.gate_logits.argmax(0)
    gate.weight.data *= torch.rand(8)[:, None, None, None] * 10  # norms tell another story
    [layer] = prune(gm, Budget(flops=0.8)).layers
    price = worth / torch.bincount(group, minlength=groups).clamp(min=1)[:, None]
    kept = torch.zeros(groups, 8, dtype=torch.bool)
    for g, found in enumerate(layer.groups):
        kept[g, list(found.channels)] = True
        assert all(int(group[o]) == g for o in found.filters)
    best = torch.zeros_like(kept).scatter_(1, price.argmax(1, keepdim=True), True)
    assert (~kept).any()
    assert price[~kept].max() <= price[kept & ~best].min()


def test_pruning_uses_what_learning_found_unless_told_otherwise() -> None:
    def plan(weighed: bool, importance: str) -> PrunePlan:
        gm = prepared("plain")
        generator = torch.Generator().manual_seed(0)
        for gate in gm.modules():
            if isinstance(gate, GatedConv2d):
                gate.gate_logits.normal_(generator=generator)
                if weighed:
                    gate.gate_fisher.uniform_(generator=generator)
                    gate.gate_filter_fisher.uniform_(generator=generator)
        return prune(gm, Budget(flops=0.6), importance)

    assert plan(False, "auto") == plan(False, "l2")
    assert plan(True, "auto") == plan(True, "fisher")
    assert plan(True, "auto") != plan(True, "l2")
