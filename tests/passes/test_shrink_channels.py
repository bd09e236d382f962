"""shrink_channels: every layer loses its dead channels, and literal sizes are rewritten with them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.errors import MismatchError
from dspfx.graph.analyse import analyse
from dspfx.graph.trace import trace
from dspfx.graph.traced import TracedModule, eval_only
from dspfx.passes.plan_lower import plan_lower
from dspfx.passes.shrink_channels import shrink_channels
from dspfx.pipeline import lower
from dspfx.plans import LowerPlan
from tests.compare import error, run


def conv(inputs: int, outputs: int, dead: list[int], stride: int = 1) -> nn.Conv2d:
    """A convolution some of whose filters are all zero."""
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1)
    with torch.no_grad():
        layer.weight[dead] = 0
        assert layer.bias is not None
        layer.bias[dead] = 0
    return layer


class Moving(nn.Module):
    """conv -> moved channels -> conv; channels 1, 2 and 5 of 8 are dead."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8, [1, 2, 5]), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.move(F.relu(self.a(x))))

    def move(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Padded(Moving):
    """A padded shortcut: channel 3 of the sum, and padding 0, 1 and 12, are dead on both sides."""

    def __init__(self) -> None:
        super().__init__(14)
        self.c = conv(3, 14, [0, 1, 3, 12], stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.pad(F.relu(self.a(x))[:, :, ::2, ::2], (0, 0, 0, 0, 2, 4)) + self.c(x))


class Chunked(Moving):
    def move(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat([b, a], 1)


class Split(Moving):
    def move(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(x, [3, 3, 2], dim=1)
        return torch.cat([c, b, a], 1)


class EvenSplit(Moving):
    def move(self, x: Tensor) -> Tensor:
        return torch.cat(x.split(4, 1)[::-1], 1)


class Sliced(Moving):
    def __init__(self) -> None:
        super().__init__(10)

    def move(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :4], x[:, 2:-2], x[:, 6:]], 1)


class Stepped(Moving):
    """A stride over channels: no literal can follow, so the channels are selected by number."""

    def move(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, ::2], x[:, 1::2]], 1)


class Viewed(Moving):
    """A literal channel count in a view is rewritten."""

    def move(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], 8, -1).unflatten(2, x.shape[2:])


class Held(Moving):
    """Groups of four are read by what is no movement: all eight stay."""

    def move(self, x: Tensor) -> Tensor:
        return F.relu(x.unflatten(1, (2, 4))).flatten(1, 2)


class Computed(Moving):
    """The channel count is read from the tensor: it follows by itself."""

    def move(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return x.view(batch, channels, height * width).view(batch, channels, height, width)


# model -> (channels that a makes, the literals of the rewritten calls)
CASES: dict[type[Moving], tuple[int, list[Any]]] = {
    Padded: (7, [[0, 0, 0, 0, 0, 3]]),
    Chunked: (5, [[2, 3]]),
    Split: (5, [[1, 2, 2]]),
    EvenSplit: (5, [[2, 3]]),
    Sliced: (5, [slice(0, 2), slice(1, 3), slice(3, 5)]),
    Stepped: (5, []),
    Viewed: (5, []),
    Held: (8, []),
    Computed: (5, []),
}


def literals(gm: TracedModule) -> list[Any]:
    found: list[Any] = []
    for node in gm.graph.nodes:
        if node.target in (F.pad, torch.split, torch.chunk) or node.target in ("split", "chunk"):
            found.append(list(node.args[1]) if isinstance(node.args[1], (list, tuple)) else node.args[1])
        elif node.op == "call_function" and node.name.startswith("getitem") and isinstance(node.args[1], tuple):
            found += [i for i in node.args[1][1:2] if isinstance(i, slice) and i != slice(None)]
    return found


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_literal_sizes_follow_or_hold(kind: type[Moving]) -> None:
    model = kind().double().eval()
    inputs = (torch.randn(2, 3, 6, 6, dtype=torch.float64),)
    small = lower(model, inputs, tune=None)
    width, expected = CASES[kind]
    assert small.get_parameter("a.weight").shape[0] == width
    if expected:
        assert literals(small) == expected
    for size in ((2, 6, 6), (5, 8, 10)):
        inputs = (torch.randn(size[0], 3, *size[1:], dtype=torch.float64),)
        assert error(run(model, inputs), run(small, inputs)) < 1e-13


def planned(model: nn.Module, *inputs: Tensor) -> tuple[TracedModule, Any, LowerPlan]:
    gm = eval_only(trace(model, inputs))
    channels = analyse(gm)
    return gm, channels, plan_lower(gm, channels)


def test_every_kind_of_layer_is_sliced() -> None:
    model = nn.Sequential(
        *[conv(3, 8, [0, 7]), nn.BatchNorm2d(8), nn.ReLU()],
        *[nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False), nn.AdaptiveAvgPool2d(2), nn.Flatten()],
        *[nn.Linear(64, 5)],
    )
    model.get_parameter("1.bias").data[[0, 7]] = 0
    gm, channels, plan = planned(model, torch.zeros(1, 3, 6, 6))
    nodes = len(gm.graph.nodes)
    assert shrink_channels(gm, channels, plan) is gm
    assert len(gm.graph.nodes) == nodes
    shapes = {name: tuple(value.shape) for name, value in gm.state_dict().items() if value.dim()}
    assert shapes == {
        "0.weight": (6, 3, 3, 3),
        "0.bias": (6,),
        **{f"1.{key}": (6,) for key in ("weight", "bias", "running_mean", "running_var")},
        "3.weight": (12, 1, 3, 3),
        "6.weight": (5, 48),
        "6.bias": (5,),
    }
    first, norm, depthwise, linear = (gm.get_submodule(name) for name in ("0", "1", "3", "6"))
    assert isinstance(first, nn.Conv2d)
    assert isinstance(depthwise, nn.Conv2d)
    assert (first.out_channels, first.in_channels) == (6, 3)
    assert (depthwise.out_channels, depthwise.in_channels, depthwise.groups) == (12, 6, 6)
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(linear, nn.Linear)
    assert (norm.num_features, linear.in_features, linear.out_features) == (6, 48, 5)


def test_frozen_parameters_stay_frozen_and_the_model_its_own() -> None:
    model = nn.Sequential(conv(3, 8, [0]), nn.Conv2d(8, 2, 1))
    model[0].weight.requires_grad_(False)
    small = lower(model, torch.zeros(1, 3, 6, 6), tune=None)
    assert {name: p.requires_grad for name, p in small.named_parameters()} == {
        "0.weight": False,
        **dict.fromkeys(("0.bias", "1.weight", "1.bias"), True),
    }
    assert model.get_parameter("0.weight").shape[0] == 8


def test_a_plan_that_cuts_what_a_literal_holds_is_refused() -> None:
    gm, channels, plan = planned(Held(), torch.zeros(1, 3, 6, 6))
    first, second = plan.layers
    wrong = LowerPlan((dataclasses.replace(first, filters=(0, 3)), second))
    message = re.escape(
        "the lower plan does not fit this network: at unflatten, a size written into the model fixes the number of "
        "channels here. Plan it anew."
    )
    with pytest.raises(MismatchError, match=f"^{message}$"):
        shrink_channels(gm, channels, wrong)
