"""Moves written in Python become one operation each, equal at every batch and size; what is not one stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dspfx.graph.inputs import propagate
from dspfx.graph.parts import trace_parts
from dspfx.graph.traced import TracedModule, settle_eval
from dspfx.passes.simplify_moves import simplify_moves


class Net(nn.Module):
    def __init__(self, move: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.move = move

    def forward(self, x: Tensor) -> Tensor:
        return self.move(self, self.conv(x))


def shuffled(net: Net, x: Tensor) -> Tensor:
    batch, channels, height, width = x.size()
    return (
        x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous().view(batch, channels, height, width)
    )


MOVES: dict[str, tuple[Callable[[Net, Tensor], Tensor], list[object]]] = {
    "flattened": (lambda net, x: x.view(x.size(0), -1), [torch.flatten]),
    "flattened by shape": (lambda net, x: x.reshape(x.shape[0], -1), [torch.flatten]),
    "shuffled": (shuffled, [F.channel_shuffle]),
    "chunked": (lambda net, x: x.chunk(2, 1)[1].relu(), ["getitem", "relu"]),
    "split": (lambda net, x: x.split([3, 5], dim=1)[0].relu(), ["getitem", "relu"]),
    "dropped": (lambda net, x: F.dropout(x, 0.5, net.training), []),
    "stochastic": (lambda net, x: torchvision.ops.stochastic_depth(x, 0.5, "row", net.training), []),
    "rows": (lambda net, x: x.view(x.size(0) * 8, -1), ["size", "mul", "view"]),
    "turned": (lambda net, x: x.view(x.size(0), 2, 4, *x.shape[2:]).transpose(1, 3).sum(), ["stays"]),
}


def traced(net: Net) -> TracedModule:
    part = settle_eval(trace_parts(net, torch.randn(2, 3, 6, 6)))
    propagate(part, part.meta["inputs"])
    assert isinstance(part, TracedModule)
    return part


def called(part: TracedModule) -> list[object]:
    nodes = [n for n in part.graph.nodes if n.op in ("call_function", "call_method")]
    return [getattr(n.target, "__name__", n.target) for n in nodes]


@pytest.mark.parametrize("name", MOVES)
def test_moves_become_one_operation(name: str) -> None:
    move, expected = MOVES[name]
    net = Net(move).eval()
    part = traced(net)
    before = called(part)
    simplify_moves(part)
    part.graph.lint()
    assert called(part) == (before if expected == ["stays"] else [getattr(e, "__name__", e) for e in expected])
    for batch, size in ((2, 6), (5, 6), (1, 6)):
        x = torch.randn(batch, 3, size, size)
        assert torch.equal(part(x), net(x))


def test_a_dropout_that_is_always_on_stays() -> None:
    part = traced(Net(lambda net, x: F.dropout(x, 0.5)))
    simplify_moves(part)
    assert called(part) == ["dropout"]


def test_what_changes_something_in_place_stays_without_users() -> None:
    def move(net: Net, x: Tensor) -> Tensor:
        flat = x.view(x.size(0), -1)
        x += 1
        return flat

    net = Net(move).eval()
    part = traced(net)
    simplify_moves(part)
    x = torch.randn(2, 3, 6, 6)
    assert called(part) == ["flatten", "iadd"]
    assert torch.equal(part(x), net(x))
