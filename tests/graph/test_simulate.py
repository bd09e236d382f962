"""simulate: which removals a graph survives as it is, which need a literal rewritten, and which break it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dspfx.graph.analyse import analyse
from dspfx.graph.builder import Builder
from dspfx.graph.channels import ChannelGraph
from dspfx.graph.rules import apply_rule
from dspfx.graph.simulate import LITERAL, RAGGED, Outcome, pin_nodes, simulate
from dspfx.graph.trace import trace
from dspfx.graph.traced import TracedModule
from tests.zoo import ZOO


class Moves(nn.Module):
    """conv -> one movement, chosen by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.conv(x)
        n, c, h, w = x.shape
        moved: dict[str, Tensor | tuple[Tensor, ...]] = {
            "flatten": x.flatten(1),
            "computed": x.view(n, c, h * w),
            "literal": x.view(n, 6, h * w),
            "pairs": x.view(n, 2, 3, h, w),
            "unflatten": x.unflatten(1, (2, 3)),
            "shuffle": x.view(n, 2, 3, h, w).transpose(1, 2).reshape(n, 6, h, w),
            "mirror": x.view(n, 2, 3, h, w).transpose(1, 2).reshape(n, 6, h, w).flip(3),
            "chunk": x.chunk(3, 1),
            "split": x.split([1, 5], dim=1),
            "slice": x[:, 2:],
            "step": x[:, ::2],
            "pad": F.pad(x, (0, 0, 0, 0, 1, 2)),
            "roll": torch.roll(x, 2, 1),
            "permute": x.permute(0, 2, 3, 1),
        }
        return moved[self.kind]


def unpinned(kind: str) -> tuple[TracedModule, ChannelGraph, Tensor]:
    """The graph before anything is held by what breaks, and the convolution's wires."""
    gm = trace(Moves(kind), torch.zeros(2, 3, 4, 4))
    builder = Builder(gm)
    for node in gm.graph.nodes:
        builder.graph.values[node] = apply_rule(builder, node)
    channels = builder.finish()
    (step,) = (step for step in channels.steps if step.name == "conv")
    return gm, channels, step.out


def removing(kind: str, *gone: int) -> tuple[Outcome, TracedModule, ChannelGraph]:
    gm, channels, wires = unpinned(kind)
    removed = torch.zeros(channels.num_wires, dtype=torch.bool)
    removed[wires[list(gone)]] = True
    return simulate(gm, channels, gm.graph, removed[channels.root]), gm, channels


def broken(outcome: Outcome) -> list[str]:
    return [reason for _, reason in outcome.broken]


@pytest.mark.parametrize("kind", ["flatten", "computed", "permute"])
def test_what_follows_by_itself(kind: str) -> None:
    outcome, _, _ = removing(kind, 1, 4)
    assert broken(outcome) == []
    assert outcome.repairs == {}


@pytest.mark.parametrize(
    ("kind", "gone", "literal"),
    [
        ("chunk", (0, 1, 5), [0, 2, 1]),
        ("split", (0,), [0, 5]),
        ("split", (2, 3), [1, 3]),
        ("slice", (1,), slice(1, 5)),
        ("literal", (1,), 5),
    ],
)
def test_literals_that_are_rewritten(kind: str, gone: tuple[int, ...], literal: object) -> None:
    outcome, _, _ = removing(kind, *gone)
    assert broken(outcome) == []
    ((_, args, _),) = outcome.repairs.values()
    given = args[2] if isinstance(args[1], fx.Node) else args[1]
    assert (given[1] if isinstance(given, tuple) else given) == literal


def test_a_slice_that_still_fits_is_left() -> None:
    outcome, _, _ = removing("slice", 3)
    assert broken(outcome) == []
    assert all(args[1][1] == slice(2, 5) for _, args, _ in outcome.repairs.values())


@pytest.mark.parametrize(
    ("kind", "gone", "reason"),
    [("pairs", (1,), RAGGED), ("unflatten", (1, 4), LITERAL)],
)
def test_what_breaks_is_named_and_can_be_held(kind: str, gone: tuple[int, ...], reason: str) -> None:
    outcome, gm, channels = removing(kind, *gone)
    assert reason in broken(outcome)
    node: fx.Node = outcome.broken[0][0]
    pin_nodes(channels, outcome.broken)
    (step,) = (step for step in channels.steps if step.name == "conv")
    assert channels.pinned()[step.out[list(gone)]].all()
    # The class may be held by being an output already; then its first reason stays.
    assert node in set(gm.graph.nodes)


def test_rolling_needs_the_count_it_was_written_for() -> None:
    """Rolling six channels by two is another order than rolling five by two."""
    outcome = removing("roll", 5)[0]
    assert broken(outcome) == []
    ((target, args, _),) = outcome.repairs.values()
    assert (target, args[2].tolist()) == (torch.index_select, [4, 0, 1, 2, 3])
    assert broken(removing("roll", 3)[0]) == []  # 0 1 2 4 5 -> 4 5 0 1 2 is right all the same


def test_a_chain_that_permutes_channels_becomes_a_selection() -> None:
    """0 3 1 4 2 5 without 1 is 0 3 4 2 5, which are places 0 2 3 1 4 of what is left."""
    outcome, _, _ = removing("shuffle", 1)
    assert broken(outcome) == []
    ((node, (target, args, _)),) = outcome.repairs.items()
    assert (node.target, target, args[0].name, args[1]) == ("reshape", torch.index_select, "conv", 1)
    assert args[2].tolist() == [0, 2, 3, 1, 4]
    outcome, _, _ = removing("step", 1)
    ((target, args, _),) = [repair for repair in outcome.repairs.values() if repair[0] is torch.index_select]
    assert args[2].tolist() == [0, 1, 3]


def test_a_chain_that_moves_pixels_too_is_no_selection_of_its_source() -> None:
    """The flip stays; the shuffle before it is what becomes a selection."""
    outcome, _, _ = removing("mirror", 1)
    assert broken(outcome) == []
    assert [node.target for node in outcome.repairs] == ["reshape"]


@pytest.mark.parametrize("name", ZOO)
def test_any_removal_of_unpinned_channels_survives_or_is_noticed(name: str) -> None:
    gm = trace(ZOO[name].build(), ZOO[name].inputs())
    channels = analyse(gm)
    generator = torch.Generator().manual_seed(5)
    for graph in gm.meta.get("graphs", {"one": gm.graph}).values():
        nothing = simulate(gm, channels, graph, torch.zeros(channels.num_wires, dtype=torch.bool))
        assert (nothing.broken, nothing.repairs) == ([], {})
        for share in (0.1, 0.5, 0.9):
            chosen = (torch.rand(channels.num_wires, generator=generator) < share)[channels.root]
            while found := simulate(gm, channels, graph, chosen & ~channels.pinned()).broken:
                before = int(channels.pinned().sum())
                pin_nodes(channels, found)
                assert int(channels.pinned().sum()) > before  # it ends


class Stacked(nn.Module):
    """Two layers stacked, one of them picked out again: what breaks lies before what is broken."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.tail = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = F.relu(self.b(x))
        picked = torch.stack((y, x), 1)[:, 0]
        return self.tail(torch.stack([picked, y], 1).flatten(1, 2).mean((2, 3)))


def test_what_breaks_before_a_broken_chain_is_held_too() -> None:
    channels = analyse(trace(Stacked(), torch.zeros(2, 3, 4, 4)))
    steps = {step.name: step for step in channels.steps if step.kind == "conv"}
    assert channels.pinned()[steps["a"].out].all()
    assert channels.pinned()[steps["b"].out].all()
