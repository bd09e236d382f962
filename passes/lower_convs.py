"""Afterwards every convolution that a LowerPlan wants in branches is a `GroupConv2d` of the same name.

conv2 (Conv2d, mostly zeros) -> conv2 (GroupConv2d: select -> small convs -> cat -> reorder)
"""

from __future__ import annotations

from torch import nn

from dspfx.graph.traced import Model
from dspfx.modules import GroupConv2d, replace_module
from dspfx.plans import LowerPlan


def lower_convs(model: Model, plan: LowerPlan) -> Model:
    """Replaces in place, in a network already shrunk to the plan."""
    for layer in plan.layers:
        if layer.form != "branches":
            continue
        conv = model.get_submodule(layer.name)
        assert isinstance(conv, nn.Conv2d)
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module is conv:
                replace_module(model, name, GroupConv2d.from_conv(conv, layer.groups))
    return model
