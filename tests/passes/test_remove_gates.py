"""remove_gates: plain convolutions of the same names, dropped weights zero, outputs equal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dspfx.modules import GatedConv2d
from dspfx.passes.remove_gates import remove_gates
from tests.compare import pruned, run, same
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ["resnet_projection", "shared_conv", "conv_options", "auxiliary_tuple"])
def test_no_gate_is_left_and_nothing_else_changes(name: str) -> None:
    gm = pruned(ZOO[name])
    gates = {n: (m, m.gate_mask()) for n, m in gm.named_modules() if isinstance(m, GatedConv2d)}
    inputs = ZOO[name].inputs(3, dtype=torch.float64)
    expected = run(gm.eval(), inputs)
    keys = [key for key in gm.state_dict() if not key.endswith(GatedConv2d.GATE_KEYS)]
    nodes = [n.name for n in gm.graph.nodes]
    assert remove_gates(gm) is gm
    assert not any(isinstance(m, GatedConv2d) for m in gm.modules())
    assert same(run(gm, inputs), expected)
    assert list(gm.state_dict()) == keys
    assert [n.name for n in gm.graph.nodes] == nodes
    assert not {"gate_plan", "masks"} & set(gm.meta)
    for key, (gate, mask) in gates.items():
        plain = gm.get_submodule(key)
        assert type(plain) is nn.Conv2d
        assert plain.weight is gate.weight
        assert plain.training == gate.training
        for option in ("stride", "padding", "dilation", "padding_mode", "kernel_size"):
            assert getattr(plain, option) == getattr(gate, option)
        assert not bool(plain.weight[~mask].any())


def test_weights_that_came_back_are_dropped_again() -> None:
    gm = pruned(ZOO["vgg_flatten"])
    gate = next(m for m in gm.modules() if isinstance(m, GatedConv2d))
    gate.gate_group[2] = -1
    with torch.no_grad():
        gate.weight.fill_(1.0)
        assert gate.bias is not None
        gate.bias.fill_(1.0)
    mask, weight, bias = gate.gate_mask(), gate.weight, gate.bias
    remove_gates(gm)
    assert torch.equal((weight != 0).flatten(2).any(2), mask)
    assert torch.equal(bias != 0, gate.gate_group >= 0)
