"""plan_gates: every layer is listed once, gated or with its reason, with counts written as arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
from torch import Tensor, nn

from dspfx.config import GateConfig
from dspfx.graph.traced import TracedModule
from dspfx.passes.plan_gates import UNKNOWN_LAYER
from dspfx.pipeline import prepare
from dspfx.plans import GatePlan, GateSpec
from tests.zoo import ZOO


class Odd(nn.Conv2d):
    """A convolution with a forward of its own, which is traced into."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Everything(nn.Module):
    """One layer for each reason there is."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.gated = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 12, 1, groups=3)
        self.odd = Odd(12, 12, 1)
        self.normed = parametrizations.weight_norm(nn.Conv2d(12, 12, 1))
        self.hooked = nn.Conv2d(12, 12, 1)
        self.hooked.register_forward_hook(lambda module, args, out: out + 1)
        self.chosen = nn.Conv2d(12, 12, 1)
        self.lost = nn.Conv2d(12, 6, 1)
        self.auxiliary = nn.Conv2d(6, 4, 1)
        self.unused = nn.Conv2d(6, 4, 1)
        self.linear = nn.Linear(6, 5)
        self.bare = nn.Parameter(torch.randn(12, 12, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.grouped(self.depthwise(self.gated(self.first(x))))
        x = self.chosen(self.hooked(self.normed(self.odd(x))))
        x = F.conv2d(x, self.bare)
        x = self.lost(x.transpose(1, 3).contiguous().view(x.shape).clone())
        out = self.linear(x.mean((2, 3)))
        return (out, self.auxiliary(x)) if self.training else (out,)


def plan_of(gm: TracedModule) -> GatePlan:
    return gm.meta["gate_plan"]


def test_every_layer_is_listed_with_its_reason() -> None:
    plan = plan_of(prepare(Everything(), torch.zeros(2, 3, 24, 24), GateConfig(groups=2, skip=("chosen",))))
    pixels = 12 * 12
    assert plan.layers == (
        GateSpec("gated", 2, 12, 8, 8 * 24 * 24, 12 * 8 * 9 * pixels),
        GateSpec("odd", 2, 12, 12, 12 * pixels, 12 * 12 * pixels),
    )
    assert {s.name: s.reason for s in plan.skipped} == {
        "first": "it reads the model's input",
        "depthwise": "it is a depthwise convolution: its filters live and die with their channels",
        "grouped": "it is a grouped convolution (groups=3): its groups live and die whole",
        "normed": UNKNOWN_LAYER,
        "hooked": UNKNOWN_LAYER,
        "lost": UNKNOWN_LAYER,
        "bare": "its weight is a bare parameter, not that of a layer module",
        "chosen": "GateConfig.skip names it",
        "auxiliary": "it does not run in eval mode",
        "unused": "it does not run in eval mode",
        "linear": "linear layers are gated only with GateConfig(linear=True)",
    }
    macs = {s.name: s.macs for s in plan.skipped}
    assert macs["first"] == 8 * 3 * 9 * 24 * 24
    assert macs["depthwise"] == 12 * 9 * pixels
    assert macs["grouped"] == 12 * 4 * pixels
    assert macs["linear"] == 5 * 6
    assert macs["auxiliary"] == 0


@pytest.mark.parametrize("name", ["broadcast_sum", "pixel_mixer", "super_resolution"])
def test_groups_are_clamped_to_what_a_layer_holds(name: str) -> None:
    plan = plan_of(prepare(ZOO[name].build(), ZOO[name].inputs(), GateConfig(groups=8)))
    assert plan.layers
    assert all(spec.groups == min(8, spec.out_channels, spec.in_channels) for spec in plan.layers)


def test_the_counts_are_at_batch_one_whatever_the_example() -> None:
    plans = [plan_of(prepare(ZOO["unet"].build(), ZOO["unet"].inputs(batch))) for batch in (1, 4)]
    assert plans[0] == plans[1]
