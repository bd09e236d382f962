"""What is changed in place: found, kept though nobody reads it, and seen under every name of the tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.graph.aliases import is_read_later, overwrites
from dspfx.graph.trace import trace
from dspfx.pipeline import lower
from tests.compare import error, run, same


class Net(nn.Module):
    """conv with three dead filters -> `how` -> conv that reads five of them; everything else is read by `side`."""

    count: Tensor

    def __init__(self, how: Callable[[Net, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.how = how
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.tail, self.side = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.identity, self.relu = nn.Identity(), nn.ReLU(inplace=True)
        self.register_buffer("count", torch.zeros(()))
        with torch.no_grad():
            self.body.weight[:3], self.body.bias[:3] = 0, 0  # type: ignore[index]
            self.tail.weight[:, :3] = 0

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.how(self, self.body(self.stem(x)))
        return self.tail(one) + self.side(other)


def relu_statement(net: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    F.relu(y, inplace=True)
    return y, y


def relu_by_position(net: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    F.relu(y, True)
    return y, y


def sum_into_a_part(net: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    part = y[:, :4]
    part += 1
    return y, y


def product_into_a_view(net: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    view = y.view(y.shape[0], 2, 4, *y.shape[2:])
    view *= 2
    return y, y


def quotient(net: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    name = y[None][0]
    y /= 0.5
    y = y.sub_(-2.0)
    return y, name


def items(net: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    y[:, :4] = 2
    y[:, 4:] *= 2
    return y, y


def a_view_made_before(net: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    view = y[:, :]
    y = y.sub_(-2.0)
    return y, view


def an_identity(net: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    other = net.identity(y)
    return other.sub_(-2.0), y


def a_cast_to_the_same_type(net: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    other = y.to(y.dtype)
    return other.sub_(-2.0), y


def dropout(net: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    other = F.dropout(y, 0.0, net.training)
    return other.sub_(-2.0), y


def buffers(net: Net, y: Tensor) -> tuple[Tensor, Tensor]:
    net.count += 1
    net.count = net.count + 2
    return y * net.count, y


WAYS = (
    *(relu_statement, relu_by_position, sum_into_a_part, product_into_a_view, quotient, items, a_view_made_before),
    *(an_identity, a_cast_to_the_same_type, dropout, buffers),
)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("training", [True, False])
def test_traced_equals_original(how: Callable[[Net, Tensor], tuple[Tensor, Tensor]], training: bool) -> None:
    model = Net(how).train(training)
    gm = trace(model, torch.zeros(2, 3, 6, 6))
    inputs = (torch.randn(3, 3, 8, 8),)
    for _ in range(2):  # buffers change from call to call
        assert same(run(gm, inputs), run(model, inputs))
    assert all(torch.equal(gm.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("how", WAYS)
def test_lowered_equals_original(how: Callable[[Net, Tensor], tuple[Tensor, Tensor]]) -> None:
    model = Net(how).double().eval()
    small = lower(model, torch.zeros(2, 3, 6, 6, dtype=torch.float64), tune=None)
    inputs = (torch.randn(3, 3, 8, 8, dtype=torch.float64),)
    assert error(run(model, inputs), run(small, inputs)) < 1e-13


class Halves(nn.Module):
    """The halves of a split share no element: changing one leaves the readers of the other alone."""

    def __init__(self, is_whole_read: bool) -> None:
        super().__init__()
        self.is_whole_read = is_whole_read

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x * 2
        a, b = x.chunk(2, 1)
        a = a.relu_()
        return (a, b, x) if self.is_whole_read else (a, b)


@pytest.mark.parametrize("is_whole_read", [True, False])
def test_parts_of_a_split(is_whole_read: bool) -> None:
    gm = trace(Halves(is_whole_read), torch.zeros(2, 4, 3, 3))
    (node,) = (n for n in gm.graph.nodes if n.target == "relu_")
    assert overwrites(gm, node)
    assert is_read_later(gm, node) == is_whole_read


def add_into(x: Tensor, y: Tensor) -> None:
    x.add_(y)


torch.fx.wrap("add_into")


class Wrapped(nn.Module):
    """A statement that calls what torch.fx does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.tail = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        add_into(y, x)
        return self.tail(y)


def test_a_wrapped_function_may_change_its_arguments() -> None:
    model = Wrapped().double().eval()
    with torch.no_grad():
        model.b.weight[2], model.b.bias[2] = 0, 0  # type: ignore[index]
        model.tail.weight[:, 2] = 0
    inputs = (torch.randn(2, 3, 5, 5, dtype=torch.float64),)
    assert same(run(trace(model, inputs), inputs), run(model, inputs))
    assert error(run(lower(model, inputs, tune=None), inputs), run(model, inputs)) < 1e-14
