"""Afterwards every planned layer is a `GatedLayer` of the same name over the same parameters.

conv1 (Conv2d) -> conv1 (GatedConv2d)      the graphs themselves are unchanged, and so are outputs and gradients
"""

from __future__ import annotations

from torch import nn

from dspfx.errors import MismatchError
from dspfx.graph.traced import Model, network_meta, parts_of
from dspfx.modules import GATED, GatedLayer, replace_module
from dspfx.plans import GatePlan


def insert_gates(model: Model, plan: GatePlan) -> Model:
    """Replaces the planned layers in place and notes its share of the plan in each traced part's `meta["gate_plan"]`.

    Raises MismatchError, before anything is changed, where the plan does not fit the model.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    found: dict[str, nn.Module] = dict(model.named_modules())
    gates: dict[str, GatedLayer] = {}
    for spec in plan.layers:
        module = found.get(spec.name)
        if not isinstance(module, tuple(GATED)) or isinstance(module, GatedLayer):
            raise MismatchError(
                f"the gate plan names {spec.name}, and the model has {type(module).__name__} there; plan and model "
                f"must come from the same architecture, not yet prepared."
            )
        assert module is not None
        gate = gates[spec.name] = GatedLayer.gate(module, spec.groups)
        if (gate.filters, gate.channels) != (spec.out_channels, spec.in_channels):
            raise MismatchError(
                f"the gate plan has {spec.out_channels} x {spec.in_channels} filters x channels for {spec.name}, the "
                f"model {gate.filters} x {gate.channels}; use the architecture the plan was made for."
            )
    for name, gate in gates.items():
        for alias in names[found[name]]:  # a module registered under several names stays one module
            replace_module(model, alias, gate)
    for prefix, part in parts_of(model).items():
        part.meta["gate_plan"] = plan.within(prefix)
    network_meta(model)["gate_plan"] = plan
    return model
