"""Afterwards no gate is left: every `GatedLayer` is the plain layer of the same name, its dropped weights zero.

conv1 (GatedConv2d) -> conv1 (Conv2d)
"""

from __future__ import annotations

import torch
from torch import nn

from dspfx.graph.traced import Model, network_meta, parts_of
from dspfx.modules import GatedLayer, replace_module


def remove_gates(model: Model) -> Model:
    """Replaces the gated layers in place; forgets the gate plan."""
    plain: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, GatedLayer):
            continue
        if module not in plain:
            plain[module] = _plain(module)
        replace_module(model, name, plain[module])
    for part in parts_of(model).values():
        part.meta.pop("gate_plan", None)
        part.meta.pop("masks", None)
    network_meta(model).pop("gate_plan", None)
    return model


def _plain(gate: GatedLayer) -> nn.Module:
    with torch.no_grad():
        gate.weight.masked_fill_(gate.dropped(), 0)
        if gate.bias is not None and gate.is_pruned:
            gate.bias.masked_fill_(gate.gate_group < 0, 0)
    return gate.ungated()
