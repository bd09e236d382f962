"""ShapeTracer: what stays symbolic, what is guarded, what is refused, node by node."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.errors import InputError, TraceError
from dspfx.graph.trace import trace
from dspfx.graph.tracer import expect
from tests.compare import run, same


class Runs(nn.Module):
    """One convolution and what `after` does with its output."""

    def __init__(self, after: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("grid", torch.arange(4.0).view(1, 4, 1, 1))
        self.after = after

    def forward(self, x: Tensor) -> Any:
        return self.after(self, self.conv(x))


def loop(m: nn.Module, x: Tensor) -> Tensor:
    for part in x.split(2, 1):
        x = x + part.sum()
    return x


def unpacked(m: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h * w).mean(-1)


def ranked(m: nn.Module, x: Tensor) -> Tensor:
    assert x.dim() == 4
    return x.flatten(1) if x.ndim == 4 else x


def sized(m: nn.Module, x: Tensor) -> Tensor:
    return F.interpolate(x, size=(x.shape[2] * 2, x.size(3) // 2))


def zeros(m: nn.Module, x: Tensor) -> Tensor:
    return x + torch.zeros(x.shape[0], 1, x.shape[2], 1, dtype=x.dtype, device=x.device)


def like(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x), x.new_zeros(x.shape)], 1)


def arange(m: nn.Module, x: Tensor) -> Tensor:
    return x * torch.arange(x.shape[-1]) + torch.linspace(0, 1, steps=x.shape[-1])


def buffered(m: Any, x: Tensor) -> Tensor:
    return x * m.grid


def listed(m: nn.Module, x: Tensor) -> list[Tensor]:
    return [x[:, i] for i in range(3)]


def product(m: nn.Module, x: Tensor) -> Tensor:
    return x / (x.shape[2] * x.shape[3]) ** 0.5


SYMBOLIC = (loop, unpacked, ranked, sized, zeros, like, arange, buffered, listed, product)


@pytest.mark.parametrize("after", SYMBOLIC, ids=lambda f: f.__name__)
def test_sizes_stay_symbolic(after: Callable[..., Any]) -> None:
    model = Runs(after)
    gm = trace(model, torch.zeros(2, 3, 8, 8))
    assert not any(n.target is expect for n in gm.graph.nodes)
    for shape in ((1, 3, 8, 8), (5, 3, 6, 10)):
        inputs = (torch.randn(shape),)
        assert same(run(gm, inputs), run(model, inputs))


def tall(m: nn.Module, x: Tensor) -> Tensor:
    return x * 2 if x.shape[2] > x.shape[3] else x


def repeated(m: nn.Module, x: Tensor) -> Tensor:
    for _ in range(x.shape[2]):
        x = x + 1
    return x


def exact(m: nn.Module, x: Tensor) -> Tensor:
    return x * math.sqrt(int(x.shape[3]))


GUARDED = [
    (tall, (2, 3, 4, 6), (2, 3, 6, 4), "conv.shape[2] > conv.shape[3] in the model", "False", "True"),
    (repeated, (2, 3, 9, 8), (2, 3, 7, 8), "conv.shape[2] in the model", "8", "7"),
    (exact, (2, 3, 9, 8), (2, 3, 8, 9), "conv.shape[3] in the model", "8", "9"),
]


@pytest.mark.parametrize(("after", "fits", "differs", "text", "traced", "met"), GUARDED, ids=["if", "range", "int"])
def test_what_python_looks_at_is_guarded(
    after: Callable[..., Any],
    fits: tuple[int, ...],
    differs: tuple[int, ...],
    text: str,
    traced: str,
    met: str,
) -> None:
    model = Runs(after)
    gm = trace(model, torch.zeros(2, 3, 8, 8))
    assert sum(n.target is expect for n in gm.graph.nodes) == 1
    if after is not repeated:
        assert same(run(gm, (torch.ones(fits),)), run(model, (torch.ones(fits),)))
    with pytest.raises(InputError) as caught:
        gm(torch.zeros(differs))
    assert str(caught.value) == (
        f"{text} was {traced} with the traced example inputs and is {met} now; the model branches on it in Python, so "
        "this network holds only the traced branch. Give inputs of the traced kind, or prepare the model again with "
        "such example inputs."
    )


def values(m: nn.Module, x: Tensor) -> Tensor:
    return x if x.max() > 0 else -x


def numbers(m: nn.Module, x: Tensor) -> Tensor:
    return x * int(x.sum())


def counted(m: nn.Module, x: Tensor) -> Tensor:
    return x + len(x[x > 0])


@pytest.mark.parametrize("after", [values, numbers, counted], ids=lambda f: f.__name__)
def test_values_are_refused(after: Callable[..., Any]) -> None:
    with pytest.raises(TraceError, match=r"^Runs cannot be traced at .*test_tracer\.py:\d+ \(return x .*\): "):
        trace(Runs(after), torch.zeros(2, 3, 8, 8))


class OwnConv(nn.Conv2d):
    """A subclass outside torch.nn is a leaf all the same."""


def test_layers_are_leaves_by_type() -> None:
    model = nn.Sequential(OwnConv(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    gm = trace(model, torch.zeros(2, 3, 4, 4))
    assert [(n.op, str(n.target)) for n in gm.graph.nodes] == [
        ("placeholder", "input"),
        ("call_module", "0"),
        ("call_module", "1.0"),
        ("call_module", "1.1"),
        ("output", "output"),
    ]
    shapes = [tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.op != "output"]
    assert shapes == [(2, 3, 4, 4)] + [(2, 4, 4, 4)] * 3
