"""ChannelGraph: what is tied, what is pinned and why, against channel classes written by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.graph.analyse import analyse
from dspfx.graph.channels import ChannelGraph, Step
from dspfx.graph.simulate import COUNTED, LITERAL, RAGGED
from dspfx.graph.trace import trace
from tests.zoo import ZOO


def graph_of(model: nn.Module, size: int = 8) -> tuple[ChannelGraph, dict[str, Step]]:
    channels = analyse(trace(model, torch.zeros(2, 3, size, size)))
    return channels, {step.name: step for step in reversed(channels.steps) if step.name}


def classes(channels: ChannelGraph, wires: Tensor) -> list[int]:
    return channels.root[wires].tolist()


def reasons(channels: ChannelGraph, wires: Tensor) -> set[str]:
    return {channels.pins[root].reason for root in set(classes(channels, wires)) if root in channels.pins}


class Shortcut(nn.Module):
    """a + b, then the sum's readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.norm, self.tail = nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.tail(F.relu(self.norm(self.a(x)) + self.b(x)))


def test_a_sum_is_one_class_a_channel() -> None:
    channels, steps = graph_of(Shortcut())
    a, b, norm, tail = (
        classes(channels, w) for w in (steps["a"].out, steps["b"].out, steps["norm"].out, steps["tail"].ins[0])
    )
    assert a == b == norm == tail
    assert len(set(a)) == 6
    stem = classes(channels, steps["stem"].out)
    assert classes(channels, steps["a"].ins[0]) == classes(channels, steps["b"].ins[0]) == stem
    assert not set(stem) & set(a)
    assert reasons(channels, steps["tail"].out) == {"it is an output of the model"}
    assert reasons(channels, steps["stem"].ins[0]) == {"it is an input of the model"}
    assert not channels.pinned()[steps["a"].out].any()


class Shuffled(nn.Module):
    """Two halves interleaved, flipped, rolled: every place is computed by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.tail = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.tail(torch.roll(x.flip(1), 3, 1))


def test_moves_are_followed_to_the_last_place() -> None:
    channels, steps = graph_of(Shuffled())
    a, b = classes(channels, steps["a"].out), classes(channels, steps["b"].out)
    interleaved = [wire for pair in zip(a, b, strict=True) for wire in pair]
    flipped = interleaved[::-1]
    assert classes(channels, steps["tail"].ins[0]) == flipped[-3:] + flipped[:-3]


def test_a_flattened_map_repeats_each_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 16, 5))
    channels, steps = graph_of(model, 4)
    assert classes(channels, steps["2"].ins[0]) == [w for w in classes(channels, steps["0"].out) for _ in range(16)]


def test_depthwise_and_shared_layers_tie() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=4), nn.Conv2d(8, 2, 1))
    channels, steps = graph_of(model)
    stem = classes(channels, steps["0"].out)
    assert classes(channels, steps["1"].out) == [w for w in stem for _ in range(2)]
    channels, steps = graph_of(ZOO["shared_conv"].build(), 16)
    assert classes(channels, steps["shared"].ins[0]) == classes(channels, steps["shared"].out)


class Held(nn.Module):
    """stem -> what `how` does -> tail."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.tail = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)
        self.norm = nn.LocalResponseNorm(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.how == "unknown":
            x = torch.cumsum(x, 1)
        elif self.how == "module":
            x = self.norm(x)
        elif self.how == "ragged":
            x = F.relu(x.unflatten(1, (2, 3))).flatten(1, 2)
        elif self.how == "counted":
            x = x * (x.shape[1] + 1)
        elif self.how == "broadcast":
            x = x + self.tail(x)[:, :1]
        return self.tail(x)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("unknown", "no rule knows what cumsum() does to channels"),
        ("module", "no rule knows what LocalResponseNorm (norm) does to channels"),
        ("counted", COUNTED),
    ],
)
def test_what_holds_a_channel_is_said(how: str, reason: str) -> None:
    channels, steps = graph_of(Held(how))
    assert channels.pinned()[steps["stem"].out].all()
    assert reasons(channels, steps["stem"].out) == {reason}


def test_a_ragged_view_holds_its_channels() -> None:
    channels, steps = graph_of(Held("ragged"))
    assert channels.pinned()[steps["stem"].out].all()
    assert reasons(channels, steps["stem"].out) <= {LITERAL, RAGGED}


def test_a_broadcast_channel_is_pinned_and_not_tied() -> None:
    channels, steps = graph_of(ZOO["broadcast_sum"].build(), 16)
    assert reasons(channels, steps["attention"].out) == {"it is broadcast over other channels"}
    assert not channels.pinned()[steps["body.0"].out].any()


class Cropped(nn.Module):
    """Zero channels from padding: a class of their own, of value zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, 4, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(F.pad(self.stem(x), (0, 0, 0, 0, 1, 2)))


def test_padding_makes_zero_wires() -> None:
    channels, steps = graph_of(Cropped())
    wires = steps["tail"].ins[0]
    assert channels.zero[wires].tolist() == [True, False, False, False, False, True, True]
    assert classes(channels, wires[1:5]) == classes(channels, steps["stem"].out)


class Overwritten(nn.Module):
    """An in-place operation on a tensor that is read again."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late
        self.stem, self.tail = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = x.add_(1)
        return self.tail(y + x if self.late else y)


@pytest.mark.parametrize("late", [True, False])
def test_what_is_overwritten_and_read_again_is_held(late: bool) -> None:
    channels, steps = graph_of(Overwritten(late))
    assert channels.pinned()[steps["stem"].out].all() == late
    assert channels.tainted[steps["stem"].out].all() == late


def test_a_module_with_a_hook_is_no_longer_what_its_class_says() -> None:
    def shift(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out + 1

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    channels, steps = graph_of(model)
    assert reasons(channels, steps["0"].out) == set()
    model[1].register_forward_hook(shift)
    channels, steps = graph_of(model)
    assert reasons(channels, steps["0"].out) == {"no rule knows what BatchNorm2d (1) does to channels"}
