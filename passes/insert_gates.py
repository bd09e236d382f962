"""Afterwards every planned convolution is a `GatedConv2d` of the same name over the same parameters.

conv1 (Conv2d) -> conv1 (GatedConv2d)      the graph itself is unchanged, and so are outputs and gradients
"""

from __future__ import annotations

from torch import nn

from dspfx.errors import MismatchError
from dspfx.graph.traced import TracedModule
from dspfx.modules import GatedConv2d, replace_module
from dspfx.plans import GatePlan


def insert_gates(gm: TracedModule, plan: GatePlan) -> TracedModule:
    """Replaces the planned convolutions in place and notes the plan in `gm.meta["gate_plan"]`.

    Raises MismatchError, before anything is changed, where the plan does not fit the module.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in gm.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    found = dict(gm.named_modules())
    for spec in plan.layers:
        module = found.get(spec.name)
        if not isinstance(module, nn.Conv2d) or isinstance(module, GatedConv2d):
            raise MismatchError(
                f"the gate plan names {spec.name}, and the model has {type(module).__name__} there; plan and model "
                f"must come from the same architecture, not yet prepared."
            )
        if (module.out_channels, module.in_channels) != (spec.out_channels, spec.in_channels):
            raise MismatchError(
                f"the gate plan has {spec.out_channels} x {spec.in_channels} filters x channels for {spec.name}, the "
                f"model {module.out_channels} x {module.in_channels}; use the architecture the plan was made for."
            )
    for spec in plan.layers:
        conv = found[spec.name]
        assert isinstance(conv, nn.Conv2d)
        gated = GatedConv2d.from_conv(conv, spec.groups)
        for alias in names[conv]:  # a module registered under several names stays one module
            replace_module(gm, alias, gated)
    gm.meta["gate_plan"] = plan
    return gm
