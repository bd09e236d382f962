"""insert_gates: every planned convolution is gated under its names, nothing else changes, a wrong plan is refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from torch import Tensor, nn

from dspfx.config import GateConfig
from dspfx.errors import MismatchError
from dspfx.graph.analyse import analyse
from dspfx.graph.trace import trace
from dspfx.graph.traced import TracedModule
from dspfx.modules import GatedConv2d
from dspfx.passes.insert_gates import insert_gates
from dspfx.passes.plan_gates import plan_gates
from dspfx.plans import GatePlan
from tests.zoo import ZOO


def planned(model: nn.Module, size: int = 16) -> tuple[TracedModule, GatePlan]:
    gm = trace(model, torch.zeros(2, 3, size, size))
    return gm, plan_gates(gm, analyse(gm), GateConfig(groups=2))


class Twins(nn.Module):
    """One convolution under two names, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.stem(x)))


def test_planned_convolutions_are_gated_over_their_parameters() -> None:
    gm, plan = planned(ZOO["resnet_projection"].build())
    before = {spec.name: gm.get_submodule(spec.name) for spec in plan.layers}
    nodes = [n.name for n in gm.graph.nodes]
    assert insert_gates(gm, plan) is gm
    gates = {name: m for name, m in gm.named_modules() if isinstance(m, GatedConv2d)}
    assert list(gates) == [spec.name for spec in plan.layers]
    assert all(gates[name].weight is before[name].weight for name in gates)
    assert [n.name for n in gm.graph.nodes] == nodes
    assert gm.meta["gate_plan"] is plan


def test_a_module_of_two_names_stays_one() -> None:
    gm, plan = planned(Twins())
    assert [spec.name for spec in plan.layers] == ["first"]
    insert_gates(gm, plan)
    assert isinstance(gm.first, GatedConv2d)
    assert gm.second is gm.first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "9.body.0"},
            "the gate plan names 9.body.0, and the model has NoneType there; plan and model must come from the same "
            "architecture, not yet prepared.",
        ),
        (
            {"out_channels": 99},
            "the gate plan has 99 x 16 filters x channels for 1.body.0, the model 16 x 16; use the architecture the "
            "plan was made for.",
        ),
    ],
)
def test_a_plan_of_another_network_is_refused_before_anything_changes(change: dict[str, int], message: str) -> None:
    gm, plan = planned(ZOO["resnet_padded"].build())
    first, *rest = plan.layers
    wrong = dataclasses.replace(plan, layers=(*rest, dataclasses.replace(first, **change)))  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match=f"^{re.escape(message)}$"):
        insert_gates(gm, wrong)
    assert not any(isinstance(m, GatedConv2d) for m in gm.modules())
    assert "gate_plan" not in gm.meta
