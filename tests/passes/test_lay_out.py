"""lay_out: ranges where they can be had, through whatever moves channels, and the same function."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.errors import MismatchError
from dspfx.graph.analyse import analyse
from dspfx.graph.trace import trace
from dspfx.graph.traced import eval_only
from dspfx.modules import GroupConv2d
from dspfx.norms import SparseNorm
from dspfx.passes.choose_form import BY_RULE, LowerOptions
from dspfx.passes.lay_out import lay_out
from dspfx.passes.plan_lower import plan_lower
from dspfx.passes.shrink_channels import shrink_channels
from dspfx.pipeline import prepare
from dspfx.plans import Group, LowerPlan
from tests.compare import error, forced, run

SPLIT = LowerOptions(1, lambda case: 1.0 if case.form == "branches" else 2.0)


def split(inputs: int, outputs: int, *reads: list[int], stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution whose filters i, i + n, ... read the channels `reads[i]` of n; dense without any."""
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
    with torch.no_grad():
        for i, channels in enumerate(reads):
            mask = torch.ones(inputs, dtype=torch.bool)
            mask[channels] = False
            conv.weight[i :: len(reads), mask] = 0
    return conv


EVEN_ODD = ([0, 2, 4, 6, 7], [1, 3, 5, 6])


class Read(nn.Module):
    """conv a -> `middle` -> conv b, in two groups whose channels lie scattered -> conv c."""

    def __init__(self, width: int = 8, reads: tuple[list[int], ...] = EVEN_ODD) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), split(width, 6, *reads), nn.Conv2d(6, 4, 1)

    def middle(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.b(self.middle(F.relu(self.a(x))))))


class Depthwise(Read):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(self.depthwise(x))


class Multiplied(Read):
    """Each channel has two filters of the depthwise convolution."""

    def __init__(self) -> None:
        super().__init__(16, ([0, 1, 4, 5, 10, 11], [2, 3, 6, 7, 8, 9, 12, 13, 14, 15]))
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)

    def middle(self, x: Tensor) -> Tensor:
        return self.depthwise(x)


class Squeezed(Read):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.act = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1), nn.PReLU(8)
        nn.init.uniform_(self.act.weight)

    def middle(self, x: Tensor) -> Tensor:
        return self.act(x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))) - 0.5)


class Residual(Read):
    """Two convolutions and a shortcut share one stream, which two more layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.e = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.a(x))
        x = F.relu(x + self.d(x))
        return self.c(F.relu(self.b(x))) + self.e(x)


class Joined(Read):
    """Two tensors side by side; a branch reads the end of one and the start of the other."""

    def __init__(self) -> None:
        super().__init__(16, ([0, 2, 4, 9, 11, 13], [1, 3, 5, 6, 7, 8, 10, 12, 14, 15]))
        self.other = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.b(torch.cat([self.a(x), F.relu(self.other(x))], 1))))


class Chunked(Read):
    """The halves change places and are flipped in one way each: no channel may leave its half."""

    def __init__(self) -> None:
        super().__init__(8, ([0, 2, 5], [1, 3, 4, 6, 7]))

    def middle(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.cat([right.flip(3), left.flip(2)], 1)


class Gated(Read):
    """Halves multiplied: channels i and i + 4 belong together."""

    def __init__(self) -> None:
        super().__init__(4, ([0, 2], [1, 3]))

    def middle(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return left * torch.sigmoid(right)


class Shuffled(Read):
    def middle(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return x.view(n, 2, 4, h, w).transpose(1, 2).reshape(n, 8, h, w)


class PixelShuffled(Read):
    """Four channels become one: their order carries positions, and the reader's are tied to all four."""

    def __init__(self) -> None:
        super().__init__(2, ([0], [1]))

    def middle(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(x, 2)


class Flattened(Read):
    """What the branches make is flattened for a linear layer: its columns follow."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6 * 9, 5)

    def forward(self, x: Tensor) -> Any:
        return self.linear(F.adaptive_avg_pool2d(F.relu(self.b(self.a(x))), 3).flatten(1))


class Twice(Read):
    """A layer that reads what it makes: its filters in order and one of its ranges are more than two ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.again = split(8, 8, *EVEN_ODD)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.again(F.relu(self.again(x))))


class Normed(Read):
    """A norm of two groups of channels: none may leave its group."""

    def __init__(self, reads: tuple[list[int], ...] = ([0, 2], [1, 3, 4, 5, 6, 7])) -> None:
        super().__init__(8, reads)
        self.norm = nn.GroupNorm(2, 8)
        nn.init.uniform_(self.norm.weight)
        nn.init.uniform_(self.norm.bias)

    def middle(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Thinned(Normed):
    """Channel 7 is zero before and after the norm and goes; what is left of the norm takes any order."""

    def __init__(self) -> None:
        super().__init__(([0, 2, 5], [1, 3, 4, 6, 7]))
        with torch.no_grad():
            for tensor in (self.a.weight, self.a.bias, self.norm.weight, self.norm.bias):
                assert tensor is not None
                tensor[7] = 0


class Returned(Read):
    """The channels are an output, too: they stay where they are."""

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return self.c(self.b(y)), y


# The model -> whether each of b's branches reads a range.
CASES: dict[type[Read], list[bool]] = {
    Read: [True, True],
    Depthwise: [True, True],
    Multiplied: [True, True],
    Squeezed: [True, True],
    Residual: [True, True],
    Joined: [False, True],
    Chunked: [False, True],
    Gated: [True, True],
    Shuffled: [True, True],
    PixelShuffled: [True, True],
    Flattened: [True, True],
    Twice: [True, False],
    Normed: [True, True],
    Thinned: [True, True],
    Returned: [False, False],
}


def check_equal(model: nn.Module, small: nn.Module) -> None:
    for batch, height, width in ((2, 6, 6), (3, 8, 10)):
        inputs = (torch.randn(batch, 3, height, width, dtype=torch.float64),)
        assert error(run(model, inputs), run(small, inputs)) < 1e-13


def lowered(model: nn.Module) -> Any:
    return forced(prepare(model, torch.zeros(2, 3, 6, 6, dtype=torch.float64)))


def branches_of(small: nn.Module, name: str = "b") -> GroupConv2d:
    found = small.get_submodule(name)
    assert isinstance(found, GroupConv2d)
    return found


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_branches_read_ranges_where_channels_may_move(kind: type[Read]) -> None:
    model = kind().double().eval()
    small = lowered(model)
    found = branches_of(small)
    assert [span is not None for span in found.slices] == CASES[kind]
    assert found.is_ordered
    check_equal(model, small)
    check_equal(model, forced(small))
    assert not any(n.target is torch.index_select for n in small.graph.nodes)
    assert LowerPlan.from_json(small.meta["lower_plan"].to_json()) == small.meta["lower_plan"]


def planned(model: nn.Module, options: LowerOptions = SPLIT) -> tuple[Any, Any, LowerPlan]:
    gm = eval_only(trace(model.double(), (torch.zeros(2, 3, 6, 6, dtype=torch.float64),)))
    channels = analyse(gm)
    return gm, channels, plan_lower(gm, channels, options)


def test_two_groups_stand_as_only_one_both_only_other() -> None:
    gm, channels, plan = planned(Read())
    laid = lay_out(gm, channels, plan)
    a, b, c = laid.layers
    assert a.filters == b.channels == (0, 2, 4, 7, 6, 1, 3, 5)
    assert b.filters == c.channels == (0, 2, 4, 1, 3, 5)
    assert b.groups == (Group((0, 1, 2), (0, 1, 2, 3, 4)), Group((3, 4, 5), (4, 5, 6, 7)))
    for before, after in zip(plan.layers, laid.layers, strict=True):
        same = {key: getattr(before, key) for key in ("filters", "channels", "groups")}
        assert replace(after, **same) == before
        assert sorted(after.filters) == list(before.filters)
    assert plan == plan_lower(gm, channels, SPLIT)
    assert laid == lay_out(gm, channels, plan)


def test_a_plan_without_branches_is_left() -> None:
    gm, channels, plan = planned(Read(), BY_RULE)
    assert lay_out(gm, channels, plan) is plan


def test_outputs_keep_their_place() -> None:
    gm, channels, plan = planned(Returned())
    a, b, c = lay_out(gm, channels, plan).layers
    assert a.filters == b.channels == tuple(range(8))
    assert b.filters == (0, 2, 4, 1, 3, 5)
    assert c.filters == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("reads", "ranges"),
    [
        (([0, 4, 2], [2, 6, 1], [1, 5, 7, 3]), 3),
        (([0, 4, 2, 3], [2, 6, 1], [1, 5, 7, 3]), 2),  # a circle
        (([0, 1, 2, 3, 4, 5, 6, 7], [1, 4, 6], [6, 2], [6, 7, 3]), 3),
    ],
)
def test_more_groups_get_as_many_ranges_as_there_can_be(reads: tuple[list[int], ...], ranges: int) -> None:
    model = Read(8, reads).double().eval()
    small = lowered(model)
    found = branches_of(small)
    assert sum(span is not None for span in found.slices) == ranges
    assert found.is_ordered
    check_equal(model, small)


class Stream(Read):
    """b adds to the stream that it reads; two of its filters read nothing, and their channels live on."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.b, self.c = split(8, 8, [0, 2, 4, 6, 7], [0, 2, 4, 6, 7], [1, 3, 5, 6], [1, 3, 5, 6]), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.b.weight[[0, 5]] = 0
            assert self.b.bias is not None
            self.b.bias[[0, 5]] = bias

    def forward(self, x: Tensor) -> Any:
        return self.c(F.relu(self.b(self.a(x))) + self.d(x))

    def d(self, x: Tensor) -> Tensor:
        return torch.cat([x, x, x[:, :2]], 1)


@pytest.mark.parametrize("bias", [0.0, 1.5])
def test_filters_that_read_nothing_stand_last(bias: float) -> None:
    class Free(Stream):
        def __init__(self) -> None:
            super().__init__(bias)
            self.e = nn.Conv2d(3, 8, 1)

        def d(self, x: Tensor) -> Tensor:
            return self.e(x)

    model = Free().double().eval()
    small = lowered(model)
    found = branches_of(small)
    assert (found.rest, found.rest_bias is None) == ((6, 7), bias == 0)
    assert found.is_ordered
    assert None not in found.slices
    layer = next(one for one in small.meta["lower_plan"].layers if one.name == "b")
    assert layer.filters[6:] == (0, 5)
    assert layer.macs_run == layer.macs_left == (2 * 5 + 4 * 4) * 9 * 6 * 6
    check_equal(model, small)
    held = Stream(bias).double().eval()  # added to what comes from the input: nothing may move
    small = lowered(held)
    assert branches_of(small).rest == (0, 5)
    assert not branches_of(small).is_ordered
    check_equal(held, small)


def test_a_norm_that_lost_a_channel_counts_by_number() -> None:
    small = lowered(Thinned().double().eval())
    norm = small.get_submodule("norm")
    assert isinstance(norm, SparseNorm)
    assert small.meta["lower_plan"].layers[0].filters == (0, 2, 5, 1, 3, 4, 6)
    assert norm.members == (0, 0, 1, 0, 0, 1, 1)


def refused(model: nn.Module, orders: dict[str, tuple[int, ...]], what: str) -> None:
    gm, channels, plan = planned(model, BY_RULE)
    layers = tuple(replace(one, filters=orders.get(one.name, one.filters)) for one in plan.layers)
    message = f"the lower plan does not fit this network: {what}. Plan it anew."
    with pytest.raises(MismatchError, match=f"^{re.escape(message)}$"):
        shrink_channels(gm, channels, LowerPlan(layers))


def test_orders_that_would_not_mean_the_same_are_refused() -> None:
    what = "the channels here would not stand in the order in which they are read"
    swapped = (4, 1, 2, 3, 0, 5, 6, 7)
    refused(Chunked(), {"a": swapped}, f"at b, {what}")  # both halves are flipped, but not alike
    refused(Normed(), {"a": swapped}, f"at norm, {what}")
    refused(Gated(), {"a": (1, 0, 2, 3, 4, 5, 6, 7)}, "the filters of a stand in another order than those they equal")
    refused(Residual(), {"d": swapped}, "the filters of a stand in another order than those they equal")
    refused(Returned(), {"a": swapped}, f"at a, {what}")


def test_channels_that_groups_do_not_count_are_refused() -> None:
    gm, channels, plan = planned(Read())
    a, b, c = lay_out(gm, channels, plan).layers
    wrong = LowerPlan((a, replace(b, channels=tuple(range(8))), c))
    message = "the lower plan does not fit this network: b reads channels in another order than it says. Plan it anew."
    with pytest.raises(MismatchError, match=f"^{re.escape(message)}$"):
        shrink_channels(gm, channels, wrong)
