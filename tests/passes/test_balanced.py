"""GateConfig(balanced=True): groups of equal size that keep equal numbers of channels, and steps are never cut."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.config import Budget, GateConfig
from dspfx.errors import BudgetError, ConfigError
from dspfx.graph.analyse import analyse
from dspfx.graph.traced import TracedModule
from dspfx.grouped import PaddedGroupConv2d
from dspfx.method.balance import BLOCK, block_size
from dspfx.method.importance import resolve
from dspfx.modules import GatedLayer
from dspfx.passes.plan_prune import Search
from dspfx.pipeline import lower, prepare, prune
from dspfx.plans import GatePlan
from dspfx.selfcheck import TOLERANCE, selfcheck
from tests.compare import error, forced, run
from tests.nets.untraceable import Detector
from tests.zoo import ZOO, ZooEntry


class Residual(nn.Module):
    """A stem, two residual blocks of a given width and a head; only the blocks' filters are summed."""

    def __init__(self, width: int = 64, inner: int = 48) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 5)
        for i in (0, 1):
            self.add_module(f"a{i}", nn.Conv2d(width, inner, 3, padding=1))
            self.add_module(f"n{i}", nn.BatchNorm2d(inner))
            self.add_module(f"b{i}", nn.Conv2d(inner, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in ("0", "1"):
            y = torch.relu(getattr(self, f"n{i}")(getattr(self, f"a{i}")(x)))
            x = torch.relu(x + getattr(self, f"b{i}")(y))
        return self.head(x.mean((2, 3)))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared(groups: int = 4, learned: bool = True, model: nn.Module | None = None) -> TracedModule:
    torch.manual_seed(0)
    model = (model or Residual()).double()
    gm: Any = prepare(model, IMAGES.double(), GateConfig(groups=groups, balanced=True))
    for gate in gates(gm).values() if learned else ():
        gate.gate_logits.normal_()
        gate.gate_logits[0] += 1  # the first group is everybody's favourite
    return gm


def gates(gm: nn.Module) -> dict[str, GatedLayer]:
    return {name: m for name, m in gm.named_modules() if isinstance(m, GatedLayer)}


def search_of(gm: TracedModule) -> Search:
    return Search(gm, analyse(gm), resolve("l2"))


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5])
def test_after_every_step_all_groups_of_a_layer_are_equal(groups: int, learned: bool) -> None:
    gm = prepared(groups, learned)
    search = search_of(gm)
    assert search.is_balanced
    widths: dict[str, list[tuple[int, int]]] = {}
    for dropped in range(search.total + 1):
        for name, gate in gates(gm).items():
            read = search.rows(dropped)[name]
            channels, filters = read.keep.sum(1), torch.bincount(read.row[read.row >= 0], minlength=groups)
            assert len(set(channels.tolist())) == 1
            assert int(channels[0]) % BLOCK == 0
            longest = int(filters.max())
            assert int(filters.min()) >= longest - 1
            if longest < gate.filters // groups:
                assert longest % block_size(gate.filters // groups) == 0
                assert int(filters.min()) == longest
            widths.setdefault(name, []).append((int(channels[0]), longest))
    for name, gate in gates(gm).items():
        assert widths[name][0] == (gate.channels, -(-gate.filters // groups))
        assert widths[name][-1][0] == BLOCK
        free = widths[name][-1][1] < gate.filters // groups
        assert free == name.startswith("b")  # filters of the stream go by themselves, the others with their readers
    # One step takes one block of one layer.
    for before, after in zip(range(search.total), range(1, search.total + 1), strict=True):
        assert sum(row[before] != row[after] for row in widths.values()) == 1


def test_weaker_steps_go_first_and_beta_is_the_last_one_that_went() -> None:
    search = search_of(prepared())
    scores = [search.beta(dropped) for dropped in range(search.total + 1)]
    assert scores == sorted(scores)
    assert scores[0] == 0.0
    assert scores[-1] < 1.0


def test_the_groups_are_the_best_balanced_ones() -> None:
    gm = prepared()
    for layer in search_of(gm).layers:
        logits = gates(gm)[layer.name].gate_logits
        sizes = torch.bincount(layer.group).tolist()
        assert sizes == [len(layer.group) // 4] * 4
        favourites = torch.bincount(logits.argmax(0)).tolist()
        assert favourites != sizes
        balanced = logits.gather(0, layer.group[None]).sum()
        for seed in range(20):
            shuffle = torch.randperm(len(layer.group), generator=torch.Generator().manual_seed(seed))
            assert float(logits.gather(0, layer.group[shuffle][None]).sum()) < float(balanced)


def test_one_step_less_misses_the_budget() -> None:
    gm = prepared()
    search = search_of(gm)
    left = [search.keep(dropped).flops for dropped in range(search.total + 1)]
    assert left == sorted(left, reverse=True)
    for fraction in (0.8, 0.5, 0.3):
        plan = prune(prepared(), Budget(flops=fraction))
        assert plan.flops_left == max(flops for flops in left if flops <= fraction)


def test_the_floor_that_is_named_can_be_reached() -> None:
    message = "keeping one block of channels a group leaves "
    with pytest.raises(BudgetError, match=message) as caught:
        prune(prepared(), Budget(flops=1e-6))
    floor = float(str(caught.value).split("leaves ")[1].split(" ")[0]) + 5e-5
    assert prune(prepared(), Budget(flops=floor)).flops_left <= floor


def test_pruning_again_goes_on_from_the_same_groups() -> None:
    gm = prepared()
    first = prune(gm, Budget(flops=0.6))
    widths = [{len(g.channels) for g in layer.groups} for layer in first.layers]
    again = prune(gm, Budget(flops=0.4))
    assert again.flops_left <= 0.4
    for before, after in zip(first.layers, again.layers, strict=True):
        for old, new in zip(before.groups, after.groups, strict=True):
            assert set(new.filters) <= set(old.filters)
            assert set(new.channels) <= set(old.channels)
    same = prune(gm, Budget(flops=again.flops_left + 1e-9))
    assert [layer.groups for layer in same.layers] == [layer.groups for layer in again.layers]
    inputs = (IMAGES.double(),)
    assert error(run(gm.eval(), inputs), run(lower(gm), inputs)) <= TOLERANCE
    assert all(len(width) == 1 and width.pop() % BLOCK == 0 for width in widths)


def test_what_is_left_is_one_grouped_convolution_without_padding() -> None:
    gm = prepared(2, model=Residual(64, 64))
    prune(gm, Budget(flops=0.45))
    small = forced(gm, "grouped")
    last = small.get_submodule("b1")
    assert isinstance(last, PaddedGroupConv2d)
    assert last.conv.groups == 2
    width, idle = last.conv.weight.shape[1], (last.conv.weight == 0).flatten(1).all(1)
    assert width % BLOCK == 0
    assert last.conv.out_channels == 2 * 25
    assert idle.nonzero().flatten().tolist() == [24, 49]  # for filters that other convolutions of the sum have
    assert bool((last.conv.weight[~idle] != 0).all())
    inputs = (IMAGES.double(),)
    assert error(run(gm.eval(), inputs), run(small, inputs)) <= TOLERANCE


def test_layers_of_few_channels_go_in_smaller_blocks() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1),
        nn.ReLU(),
        nn.Conv2d(12, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 3, 1),
        nn.ReLU(),
        nn.Conv2d(3, 2, 1),
    )
    gm = prepared(2, model=model)
    search = search_of(gm)
    kept = {name: read.keep.sum(1).tolist() for name, read in search.rows(search.total).items() if name in gates(gm)}
    assert kept == {"2": [4, 4], "4": [2, 2], "6": [1, 1]}


def test_flattened_channels_are_counted_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).double()
    torch.manual_seed(0)
    gm: Any = prepare(model, IMAGES.double(), GateConfig(groups=2, linear=True, balanced=True))
    search = search_of(gm)
    assert search.total == 1
    keep = search.rows(1)["3"].keep.reshape(2, 16, 36)
    assert bool((keep.all(2) == keep.any(2)).all())
    assert keep.any(2).sum(1).tolist() == [8, 8]


def test_filters_that_an_output_reads_stay() -> None:
    class Half(nn.Module):
        """Half of the body's filters are an output, the others are read by an ungated convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body, self.tail = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 1), nn.Conv2d(16, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            one, other = self.body(self.stem(x)).chunk(2, 1)
            return one, self.tail(other)

    torch.manual_seed(0)
    gm: Any = prepare(Half(), IMAGES, GateConfig(groups=2, skip=("tail",), balanced=True))
    search = search_of(gm)
    row = search.rows(search.total)["body"].row
    assert bool((row[:16] >= 0).all())
    assert bool((row[16:] < 0).any())


def test_a_network_in_parts_is_balanced_too() -> None:
    torch.manual_seed(0)
    images = [torch.randn(3, 16, 16), torch.randn(3, 12, 20)]
    gm: Any = prepare(Detector(), images, GateConfig(groups=2, balanced=True))
    search = search_of(gm)
    assert search.is_balanced
    assert search.total
    for name, gate in gates(gm).items():
        widths = search.rows(search.total)[name].keep.sum(1).tolist()
        assert widths == [block_size(gate.channels)] * gate.gate_groups


@pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)
def test_masked_equals_lowered(entry: ZooEntry) -> None:
    report = selfcheck(entry.build(), entry.inputs(), GateConfig(groups=3, balanced=True))
    assert report.error <= TOLERANCE
    assert report.gated == 0 or report.flops_left < 1


def test_the_choice_travels_with_the_network(tmp_path: Path) -> None:
    gm = prepared()
    plan: GatePlan = gm.meta["gate_plan"]
    text = plan.to_json()
    assert plan.config.balanced
    assert GatePlan.from_json(text) == plan
    older = json.loads(text)
    del older["config"]["balanced"]  # as written before there was a choice
    assert not GatePlan.from_json(json.dumps(older)).config.balanced
    dspfx.save(gm, tmp_path / "a")
    again: Any = dspfx.load(tmp_path / "a", Residual().double())
    assert prune(again, Budget(flops=0.5)) == prune(gm, Budget(flops=0.5))
    assert not GateConfig().balanced


@pytest.mark.parametrize("value", [1, "yes", None])
def test_anything_but_a_bool_is_refused(value: Any) -> None:
    message = f"GateConfig.balanced is {value!r}; give True or False."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        GateConfig(balanced=value)
