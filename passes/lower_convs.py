"""Afterwards every convolution that a LowerPlan wants split stands in that form, under its name.

conv2 (Conv2d, mostly zeros) -> conv2 (GroupConv2d: select -> small convolutions -> cat -> reorder)
conv2 (Conv2d, mostly zeros) -> conv2 (PaddedGroupConv2d: select -> one convolution with groups -> reorder)
conv2 (Conv2d, mostly zeros) -> conv2 (KernelConv2d: one kernel that walks the groups' lists)
"""

from __future__ import annotations

from torch import nn

from dspfx.graph.traced import Model
from dspfx.grouped import PaddedGroupConv2d
from dspfx.kernel_conv import KernelConv2d
from dspfx.modules import GroupConv2d, replace_module
from dspfx.plans import LowerPlan

FORMS: dict[str, type[GroupConv2d] | type[PaddedGroupConv2d]] = {
    "branches": GroupConv2d,
    "grouped": PaddedGroupConv2d,
    "kernel": KernelConv2d,
}


def lower_convs(model: Model, plan: LowerPlan) -> Model:
    """Replaces in place, in a network already shrunk to the plan."""
    for layer in plan.layers:
        if layer.form not in FORMS:
            continue
        conv = model.get_submodule(layer.name)
        assert isinstance(conv, nn.Conv2d)
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module is conv:
                replace_module(model, name, FORMS[layer.form].from_conv(conv, layer.groups))
    return model
