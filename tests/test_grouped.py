"""PaddedGroupConv2d is the masked convolution as one grouped convolution, selected and reordered only where needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import dspfx
from dspfx.deploy.runtimes import TOLERANCE, build
from dspfx.errors import ConfigError
from dspfx.graph.analyse import analyse
from dspfx.graph.trace import trace
from dspfx.graph.traced import TracedModule, eval_only
from dspfx.grouped import EMPTY, PaddedGroupConv2d, pad_groups
from dspfx.pipeline import lower
from dspfx.plans import Group
from dspfx.selfcheck import TOLERANCE as EXACT
from tests.compare import error, forced, gradients, pruned, run, same
from tests.test_modules import GROUPS, OPTIONS
from tests.zoo import ZOO, ZooEntry

APART = (Group((0, 1), (0, 1, 2)), Group((2, 3), (3, 4, 5)))  # nothing to select, nothing to reorder


def conv_of(groups: tuple[Group, ...], in_channels: int, out_channels: int, **options: Any) -> nn.Conv2d:
    """A convolution in float64 with zeros outside the groups."""
    torch.manual_seed(0)
    conv = nn.Conv2d(in_channels, out_channels, **({"kernel_size": 3, "padding": 1} | options)).double()
    mask = torch.zeros(out_channels, in_channels, 1, 1)
    for group in groups:
        for o in group.filters:
            mask[o, list(group.channels)] = 1
    with torch.no_grad():
        conv.weight *= mask
    return conv


def equal(conv: nn.Conv2d, grouped: PaddedGroupConv2d) -> bool:
    x = torch.randn(2, conv.in_channels, 9, 8, dtype=torch.float64)
    return error([conv(x)], [grouped(x)]) < 1e-13


def calls(grouped: nn.Module) -> list[str]:
    """The names of what runs, in order."""
    nodes = fx.Tracer().trace(grouped).nodes
    return [str(getattr(n.target, "__name__", n.target)) for n in nodes if n.op.startswith("call")]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_masked_convolution(options: dict[str, Any]) -> None:
    conv = conv_of(GROUPS, 6, 6, **options)
    state = torch.get_rng_state()
    grouped = PaddedGroupConv2d.from_conv(conv, GROUPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(conv, grouped)
    assert (grouped.in_channels, grouped.out_channels) == (6, 6)
    assert (grouped.conv.groups, grouped.conv.in_channels, grouped.conv.out_channels) == (3, 9, 9)
    assert calls(grouped) == ["index_select", "conv", "index_select"]
    assert set(grouped.state_dict()) == {f"conv.{key}" for key in conv.state_dict()}
    inputs = (torch.randn(2, 6, 9, 8, dtype=torch.float64),)
    ours, theirs = gradients(grouped, inputs)["input 0"], gradients(conv, inputs)["input 0"]
    assert ours is not None
    assert theirs is not None
    assert error([theirs], [ours]) < 1e-14


def test_groups_in_order_without_overlap_are_neither_selected_nor_reordered() -> None:
    conv = conv_of(APART, 6, 4)
    grouped = PaddedGroupConv2d.from_conv(conv.eval(), APART)
    assert equal(conv, grouped)
    assert calls(grouped) == ["conv"]
    assert grouped.conv.weight.shape == (4, 3, 3, 3)
    assert not grouped.training


@pytest.mark.parametrize(
    ("groups", "in_channels", "out_channels", "expected"),
    [
        # Channels of no group before, between and behind: a slice, or blocks that include them.
        ((Group((0, 1), (2, 3)), Group((2, 3), (4, 5))), 7, 4, ["getitem", "conv"]),
        ((Group((0, 1), (0, 1, 2, 3)), Group((2, 3), (6, 7, 8, 9))), 10, 4, ["conv"]),
        ((Group((0, 1), (0, 1)), Group((2, 3), (6, 7))), 10, 4, ["index_select", "conv"]),  # blocks of five cost more
        # A group that lacks a filter at the end or in the middle; a filter without a group, inside of a block.
        ((Group((0, 1), (0, 1)), Group((2,), (2, 3))), 4, 3, ["conv", "getitem"]),
        ((Group((0,), (0, 1)), Group((1, 2), (2, 3))), 4, 3, ["conv", "index_select"]),
        ((Group((0, 1, 2, 3), (0, 1)), Group((4, 6, 7), (2, 3))), 4, 8, ["conv"]),
        # A group that lacks a channel repeats one.
        ((Group((0, 1), (0, 1, 2)), Group((2, 3), (3, 4))), 5, 4, ["index_select", "conv"]),
        ((Group((0, 1, 2), (1, 3)),), 5, 3, ["index_select", "conv"]),
    ],
)
def test_only_what_stands_elsewhere_is_moved(
    groups: tuple[Group, ...], in_channels: int, out_channels: int, expected: list[str]
) -> None:
    conv = conv_of(groups, in_channels, out_channels)
    grouped = PaddedGroupConv2d.from_conv(conv, groups)
    assert calls(grouped) == expected
    assert equal(conv, grouped)


def test_what_is_missing_is_padded() -> None:
    groups = (Group((0, 1, 3), (0, 1, 2)), Group((2, 4), (5, 6)))
    padded = (Group((0, 1, 3), (0, 1, 2)), Group((2, 4, EMPTY), (5, 6, 5)))
    assert pad_groups(7, 5, groups) == padded
    assert pad_groups(7, 9, groups) == padded
    assert [g.filters for g in pad_groups(7, 9, (groups[0],))] == [(0, 1, 3, EMPTY)]
    assert pad_groups(7, 5, (*groups, Group((), (3,)))) == padded
    grouped = PaddedGroupConv2d.from_conv(conv_of(groups, 7, 5), groups)
    assert bool((grouped.conv.weight[5] == 0).all())  # the empty place
    assert bool((grouped.conv.weight[3:, 2] == 0).all())  # the repeated channel
    assert grouped.conv.bias is not None
    assert bool(grouped.conv.bias[5] == 0)


@pytest.mark.parametrize("bias", ["none", "equal", "different"])
@pytest.mark.parametrize("listed", [False, True])
def test_filters_that_read_nothing_are_their_bias(bias: str, listed: bool) -> None:
    groups = (Group((0, 2, 5), (0, 1)), Group((1, 7), (1, 2)))
    conv = conv_of(groups, 3, 8, bias=bias != "none")
    idle = [3, 4, 6]
    if conv.bias is not None and bias == "equal":
        with torch.no_grad():
            conv.bias[idle] = 0.25
    given = (groups[0], Group((1, 3, 4, 6, 7), (1, 2))) if listed else groups
    grouped = PaddedGroupConv2d.from_conv(conv, given)
    assert grouped.conv.out_channels == (8 if bias == "different" else 6)  # one place for all of them, if it can be
    assert equal(conv, grouped)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = torch.zeros(8, dtype=torch.float64) if conv.bias is None else conv.bias
    assert torch.equal(grouped(x)[:, idle], expected[idle][:, None, None].expand(2, 3, 5, 5))


def test_a_convolution_that_reads_nothing_is_its_bias() -> None:
    conv = conv_of((), 4, 4)
    for groups in ((Group((0, 1), (0,)), Group((2, 3), (1,))), (Group((1,), (2,)),)):
        assert equal(conv, PaddedGroupConv2d.from_conv(conv, groups))


def test_a_group_as_long_as_two_others_is_two() -> None:
    filters = torch.arange(64)
    groups = tuple(
        Group(tuple(filters[a:b].tolist()), tuple(range(4 * g, 4 * g + 4)))
        for g, (a, b) in enumerate(((0, 16), (16, 48), (48, 64)))
    )
    padded = pad_groups(12, 64, groups)
    assert [len(g.filters) for g in padded] == [16] * 4
    assert padded[1].channels == padded[2].channels
    conv = conv_of(groups, 12, 64)
    assert equal(conv, PaddedGroupConv2d.from_conv(conv, groups))
    uneven = (Group(tuple(range(13)), (0, 1)), Group(tuple(range(13, 29)), (1, 2)))
    assert [len(g.filters) for g in pad_groups(3, 29, uneven)] == [16, 16]  # eight groups more would save two filters


def test_frozen_weights_stay_frozen() -> None:
    conv = conv_of(APART, 6, 4)
    conv.weight.requires_grad_(False)
    grouped = PaddedGroupConv2d.from_conv(conv, APART)
    assert {n: p.requires_grad for n, p in grouped.named_parameters()} == {"conv.weight": False, "conv.bias": True}


def test_groups_that_do_not_fit_are_refused() -> None:
    cases: tuple[tuple[tuple[Group, ...], str], ...] = (
        (
            (Group((0, 1), (0,)), Group((2,), (1,))),
            "PaddedGroupConv2d needs groups of one size, with at least a filter and a channel; these are "
            "[(1, 1), (2, 1)] (filters, channels). Pad them with pad_groups.",
        ),
        (
            (),
            "PaddedGroupConv2d needs groups of one size, with at least a filter and a channel; these are [] (filters, "
            "channels). Pad them with pad_groups.",
        ),
        (
            (Group((0, 1), (0,)), Group((1, EMPTY), (1,))),
            "PaddedGroupConv2d needs each of its 3 filters in at most one group; the groups hold 3 filters from 0 to "
            "1, 2 different ones.",
        ),
        (
            (Group((0, 3), (0,)),),
            "PaddedGroupConv2d needs each of its 3 filters in at most one group; the groups hold 2 filters from 0 to "
            "3, 2 different ones.",
        ),
        (
            (Group((0, 1), (0,)),),
            "PaddedGroupConv2d needs an EMPTY place for its 1 filters in no group; pad the groups with pad_groups.",
        ),
        ((Group((0, 1, 2), (2,)),), "PaddedGroupConv2d reads channel 2; it has 2."),
    )
    for groups, message in cases:
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            PaddedGroupConv2d(2, 3, 1, groups)
    message = f"pad_groups needs groups that read at least one channel each; got {(Group((0,), ()),)}."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        pad_groups(2, 1, (Group((0,), ()),))
    message = "PaddedGroupConv2d.from_conv got groups without filter 2, which reads its input."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        PaddedGroupConv2d.from_conv(nn.Conv2d(4, 4, 1), APART[:1])
    message = "PaddedGroupConv2d is made from a dense convolution; this one has groups=2."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        PaddedGroupConv2d.from_conv(nn.Conv2d(4, 4, 1, groups=2), APART)


def lowered(entry: ZooEntry) -> tuple[TracedModule, TracedModule]:
    """(masked network, lowered with every possible convolution grouped), in float64."""
    gm = pruned(entry).eval()
    return gm, forced(gm, "grouped")


@pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)
def test_masked_equals_grouped_and_lowered_again(entry: ZooEntry) -> None:
    gm, small = lowered(entry)
    again = lower(small)
    for batch, (height, width) in zip((1, 5), entry.sizes() * 2, strict=False):
        inputs = entry.inputs(batch, height, width, dtype=torch.float64)
        expected = run(gm, inputs)
        assert error(expected, run(small, inputs)) <= EXACT
        assert error(expected, run(again, inputs)) <= EXACT


NETWORKS = ("resnet_bottleneck", "inverted_residual", "shuffle_unit", "dense_block")


@pytest.mark.parametrize("name", NETWORKS)
def test_files_hold_it(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]
    _, small = lowered(entry)
    count = sum(isinstance(m, PaddedGroupConv2d) for m in small.modules())
    assert count
    dspfx.save(small, tmp_path / "a")
    loaded = dspfx.load(tmp_path / "a")
    assert sum(isinstance(m, PaddedGroupConv2d) for m in loaded.modules()) == count
    inputs = entry.inputs(3, dtype=torch.float64)
    assert same(run(loaded, inputs), run(small, inputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_exports(name: str) -> None:
    entry = ZOO[name]
    _, small = lowered(entry)
    network = small.float()
    for runtime in ("onnxruntime", "openvino"):
        built = build(runtime, network, entry.inputs(2))
        for batch in (1, 5):
            inputs = entry.inputs(batch)
            assert error(run(network, inputs), run(built, inputs)) <= TOLERANCE


def test_one_grouped_convolution_is_exported(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs onnx (pip install 'dspfx[onnx]')")
    for groups, channels, operators in ((APART, 6, {"Conv"}), (GROUPS, 6, {"Gather", "Conv"})):
        count = sum(len(g.filters) for g in groups)
        grouped = PaddedGroupConv2d.from_conv(conv_of(groups, channels, count).float().eval(), groups)
        program = torch.onnx.export(grouped, (torch.randn(2, channels, 8, 8),), dynamo=True, verbose=False)
        assert program is not None
        program.save(tmp_path / "a.onnx")
        nodes = onnx.load(tmp_path / "a.onnx").graph.node
        assert {node.op_type for node in nodes} == operators
        (conv,) = (node for node in nodes if node.op_type == "Conv")
        assert next(a.i for a in conv.attribute if a.name == "group") == len(groups)


def test_channels_of_a_group_are_followed_through_it() -> None:
    """Read again as any model's, its grouped convolution's groups are what dies or lives."""

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(4, 2, 1)
            self.body = PaddedGroupConv2d.from_conv(conv_of(APART, 6, 4).float(), APART)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.stem(x)))

    model = Reader().eval()
    with torch.no_grad():
        model.head.weight[:, 2:] = 0  # nobody needs the second group
    x = torch.randn(2, 3, 8, 8)
    small = lower(model, x, tune=None)
    assert small.get_parameter("stem.weight").shape[0] == 3
    assert error(run(model, (x,)), run(small, (x,))) < 1e-5
    graph = analyse(eval_only(trace(model, x)))
    assert [step.layer.groups for step in graph.steps if step.layer and step.name == "body.conv"] == [2]
