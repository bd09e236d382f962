"""Coverage: shares written as arithmetic, and every pin with its reason."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dspfx
from dspfx.config import GateConfig
from dspfx.coverage import Coverage, Pinned, coverage
from dspfx.errors import ModelError
from dspfx.graph.ops import RULES
from tests.zoo import ZOO


class Chain(nn.Module):
    """stem -> body -> [an operation] -> depthwise -> head, on 4x4 pixels."""

    def __init__(self, held: bool = False) -> None:
        super().__init__()
        self.held = held
        self.stem = nn.Conv2d(3, 8, 1)
        self.body = nn.Conv2d(8, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.stem(x)))
        x = self.depthwise(x.cumsum(1) if self.held else x)
        return self.head(x.mean((2, 3)))


PIXELS = 4 * 4
STEM, BODY, DEPTHWISE, HEAD = 8 * 3 * PIXELS, 16 * 8 * 9 * PIXELS, 16 * 9 * PIXELS, 5 * 16
TOTAL = STEM + BODY + DEPTHWISE + HEAD


def covered(model: nn.Module, skip: tuple[str, ...] = ()) -> Coverage:
    return coverage(dspfx.prepare(model, torch.zeros(2, 3, 4, 4), GateConfig(skip=skip)))


def test_all_of_a_chain_can_go_but_its_outputs() -> None:
    found = covered(Chain())
    assert [spec.name for spec in found.plan.layers] == ["body"]
    assert [layer.name for layer in found.plan.skipped] == ["stem", "depthwise", "head"]
    assert all(layer.reason for layer in found.plan.skipped)
    assert found.gated == pytest.approx(BODY / TOTAL)
    assert found.prunable == 1.0
    assert found.pins == (Pinned("it is an output of the model", 5, ("output",)),)
    assert found.inputs == ((2, 3, 4, 4),)


def test_an_unknown_operation_holds_the_channels_on_both_its_sides() -> None:
    found = covered(Chain(held=True))
    # The depthwise convolution and the head read only what cumsum holds; the head's outputs stay as well.
    assert found.prunable == pytest.approx((STEM + BODY) / TOTAL)
    unknown, output = found.pins
    assert (unknown.reason, unknown.filters) == ("no rule knows what .cumsum() does to channels", 32)
    assert unknown.nodes == ("cumsum",)
    assert len(unknown.where) == 1
    assert re.fullmatch(
        r"test_coverage\.py:\d+: x = self\.depthwise\(x\.cumsum\(1\) if self\.held else x\)", unknown.where[0]
    )
    assert 'dspfx.register_rule("cumsum", ' in unknown.remedy
    assert output == Pinned("it is an output of the model", 5, ("output",))
    assert found.convs_prunable == pytest.approx((STEM + BODY) / (TOTAL - HEAD))


def test_a_layer_without_a_gate_still_loses_what_nothing_pins() -> None:
    found = covered(Chain(), ("body",))
    assert found.plan.layers == ()
    assert found.gated == 0.0
    assert found.prunable == 1.0


def test_a_single_convolution_is_covered_by_nothing() -> None:
    found = covered(nn.Sequential(nn.Conv2d(3, 8, 3)))
    assert (found.plan.layers, found.gated, found.prunable) == ((), 0.0, 0.0)
    assert str(found).splitlines()[-5] == (
        "0 of 1 layers are gated; they make 0.0% of the multiply-adds, and 0.0% can be pruned (traced with an input "
        "of 2x3x4x4)"
    )


def test_it_prints_layers_shares_and_pins() -> None:
    lines = str(covered(Chain(held=True))).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert f"1 of 4 layers are gated; they make {BODY / TOTAL:.1%} of the multiply-adds" in lines[-10]
    assert re.fullmatch(r" +32  no rule knows what .cumsum\(\) does to channels  cumsum", lines[-6])
    assert lines[-3] == "no rule knows what .cumsum() does to channels:"
    assert lines[-2].startswith("    test_coverage.py:")
    assert 'dspfx.register_rule("cumsum", "elementwise")' in lines[-1]


def test_the_remedy_frees_what_it_says() -> None:
    (pin, _) = covered(Chain(held=True)).pins
    (call,) = re.findall(r'dspfx\.register_rule\("cumsum", "elementwise"\)', pin.remedy)
    rules = dict(RULES)
    try:
        exec(call.replace("elementwise", "channelwise"), {"dspfx": dspfx})
        assert covered(Chain(held=True)).prunable == 1.0
    finally:
        RULES.clear()
        RULES.update(rules)


@pytest.mark.parametrize("name", ZOO)
def test_shares_are_shares_and_json_keeps_them(name: str) -> None:
    found = coverage(dspfx.prepare(ZOO[name].build(), ZOO[name].inputs()))
    assert 0 <= found.gated <= found.prunable <= 1
    assert Coverage.from_json(found.to_json()) == found
    assert all(pin.filters > 0 and pin.nodes for pin in found.pins)


def test_the_network_is_left_as_it_was() -> None:
    gm = dspfx.prepare(ZOO["auxiliary_tuple"].build(), ZOO["auxiliary_tuple"].inputs())
    before, modes = copy.deepcopy(gm.state_dict()), [module.training for module in gm.modules()]
    code = gm.code
    coverage(gm)
    assert [module.training for module in gm.modules()] == modes
    assert gm.code == code
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())


def test_a_pruned_network_is_still_covered() -> None:
    gm = dspfx.prepare(Chain(), torch.zeros(2, 3, 4, 4))
    before = coverage(gm)
    dspfx.prune(gm, dspfx.Budget(flops=0.5))
    assert coverage(gm) == before


def test_other_networks_are_refused() -> None:
    gm = dspfx.prepare(Chain(), torch.zeros(2, 3, 4, 4))
    for model in (Chain(), dspfx.lower(gm)):
        message = f"{type(model).__name__} is not a prepared network; call gm = dspfx.prepare(model) first."
        with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
            coverage(model)
