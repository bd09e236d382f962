"""plan_lower and lower_convs: which form, which groups, slices where channels are consecutive, refused weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dspfx.graph.analyse import analyse
from dspfx.graph.trace import trace
from dspfx.graph.traced import TracedModule, eval_only
from dspfx.modules import GroupConv2d
from dspfx.passes.lower_convs import lower_convs
from dspfx.passes.plan_lower import plan_lower
from dspfx.pipeline import lower, prepare
from dspfx.plans import LoweredLayer, LowerPlan
from tests.compare import error, forced, run


def grouped(width: int, size: int, *, first: slice, second: slice) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """1x1 -> 3x3 whose even filters read `first` and odd ones `second` of the channels -> 1x1."""
    middle = nn.Conv2d(width, width, 3, padding=1)
    with torch.no_grad():
        for start, part in ((0, first), (1, second)):
            keep = torch.zeros(width, dtype=torch.bool)
            keep[part] = True
            middle.weight[start::2, ~keep] = 0
    model = nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(width, 2, 1))
    return model.double().eval(), (torch.randn(2, 3, size, size, dtype=torch.float64),)


def layer_of(gm: TracedModule, name: str) -> LoweredLayer:
    plan: LowerPlan = gm.meta["lower_plan"]
    return next(layer for layer in plan.layers if layer.name == name)


@pytest.mark.parametrize(
    ("width", "size", "second", "form"),
    [
        (256, 4, slice(128, 256), "branches"),
        (256, 14, slice(128, 256), "branches"),
        (256, 15, slice(128, 256), "dense"),  # too many positions
        (254, 4, slice(128, 254), "dense"),  # too narrow
        (256, 4, slice(0, 256), "branches"),  # three quarters of the pairs
        (256, 4, slice(None), "branches"),
    ],
)
def test_the_static_rule(width: int, size: int, second: slice, form: str) -> None:
    model, inputs = grouped(width, size, first=slice(0, 128), second=second)
    small = lower(model, inputs, tune=None)
    layer = layer_of(small, "2")
    assert layer.form == form
    assert isinstance(small.get_submodule("2"), GroupConv2d) == (form == "branches")
    assert error(run(model, inputs), run(small, inputs)) < 1e-13
    reads = 128 + len(range(*second.indices(width)))
    kept = width // 2 * reads * 9 * size * size
    assert (layer.macs, layer.macs_left) == (width * width * 9 * size * size, kept)
    assert layer.macs_run == (kept if form == "branches" else layer.macs)


def test_more_than_three_quarters_stay_dense() -> None:
    model, inputs = grouped(256, 4, first=slice(0, 132), second=slice(0, 256))
    assert layer_of(lower(model, inputs, tune=None), "2").form == "dense"


def test_consecutive_channels_are_slices() -> None:
    model, inputs = grouped(16, 4, first=slice(0, 10), second=slice(6, 16))
    branches = forced(prepare(model, inputs)).get_submodule("2")
    assert isinstance(branches, GroupConv2d)
    assert branches.slices == [(0, 10), (6, 16)]
    model, inputs = grouped(16, 4, first=slice(0, 16, 2), second=slice(5, 12))
    branches = forced(prepare(model, inputs)).get_submodule("2")
    assert isinstance(branches, GroupConv2d)
    # Channels 1, 3, 13 and 15 are gone; of the twelve that are left, both read 6 8 10 12, which stand between.
    assert branches.slices == [(0, 8), (5, 12)]
    assert branches.is_ordered


@pytest.mark.parametrize("bias", [0.0, 1.0])  # which passes the ReLU
def test_filters_that_read_nothing_are_in_no_group(bias: float) -> None:
    model, inputs = grouped(8, 4, first=slice(0, 3), second=slice(0, 4))
    with torch.no_grad():
        model.get_parameter("2.weight")[1] = 0
        model.get_parameter("2.bias")[1] = bias
    small = forced(prepare(model, inputs))
    layer = layer_of(small, "2")
    removed = int(bias == 0)
    assert [len(g.filters) for g in layer.groups] == [4, 3]
    assert len(layer.filters) == 8 - removed
    assert layer.macs_run == layer.macs_left == (4 * 3 + 3 * 4) * 9 * 4 * 4
    assert error(run(model, inputs), run(small, inputs)) < 1e-13


def test_a_shared_convolution_is_replaced_under_all_its_names() -> None:
    model, inputs = grouped(8, 4, first=slice(0, 4), second=slice(4, 8))
    assert isinstance(model, nn.Sequential)
    twice = nn.Sequential(*model[:4], model[2], *model[3:])
    small = forced(prepare(twice, inputs))
    split = [m for _, m in small.named_modules(remove_duplicate=False) if isinstance(m, GroupConv2d)]
    assert split
    assert len(set(split)) == 1
    assert error(run(twice, inputs), run(small, inputs)) < 1e-13


def test_width_multiples_are_kept_where_they_can_be() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 1), nn.ReLU(), nn.Conv2d(12, 5, 1))
    with torch.no_grad():
        for name, dead in (("0", 11), ("2", 11)):
            for key in ("weight", "bias"):
                model.get_parameter(f"{name}.{key}")[:dead] = 0
    widths = {}
    for multiple in (1, 4, 8):
        small = forced(prepare(model, torch.zeros(1, 3, 4, 4)), "dense", multiple)
        widths[multiple] = tuple(small.get_parameter(f"{name}.weight").shape[0] for name in "024")
    assert widths == {1: (5, 1, 5), 4: (8, 4, 5), 8: (8, 8, 5)}


def test_a_layer_keeps_one_channel_though_all_are_dead() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    nn.init.zeros_(model.get_parameter("0.weight"))
    nn.init.zeros_(model.get_parameter("0.bias"))
    small = lower(model, torch.zeros(1, 3, 4, 4), tune=None)
    assert small.get_parameter("0.weight").shape == (1, 3, 1, 1)
    inputs = (torch.randn(2, 3, 4, 4),)
    assert error(run(model, inputs), run(small, inputs)) < 1e-6


def test_dense_layers_are_left_alone() -> None:
    gm = eval_only(trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 4, 4)))
    before = dict(gm.named_modules())
    plan = plan_lower(gm, analyse(gm))
    assert lower_convs(gm, plan) is gm
    assert dict(gm.named_modules()) == before
    assert plan.flops_run == 1
