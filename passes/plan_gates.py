"""Decides which convolutions get a gate, with how many groups, and says why the others get none."""

from __future__ import annotations

from dataclasses import replace

from torch import fx, nn

from dspfx.config import GateConfig
from dspfx.errors import ConfigError, ModelError
from dspfx.graph.channels import ChannelGraph, Step
from dspfx.graph.cost import LayerCost, layer_costs
from dspfx.graph.layers import layer_of
from dspfx.graph.parts import why_untraced
from dspfx.graph.traced import TracedModule, all_graphs, is_traced_in_parts, network_meta, parts_of
from dspfx.modules import GATED
from dspfx.plans import GatePlan, GateSpec, Skipped

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
UNKNOWN_LAYER = (
    "it mixes positions instead of channels, its weight is computed, or hooks or a parametrization make it more than "
    "a layer"
)


def plan_gates(model: nn.Module, channels: ChannelGraph, config: GateConfig) -> GatePlan:
    """A GatePlan for every convolution and linear layer of `model`; groups are clamped to what a layer can hold.

    Raises ModelError where the model has no such layer, ConfigError where `config` names an unknown one.
    """
    costs = layer_costs(model)
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, LAYERS)]
    layers += [name for name in costs if name not in layers]
    if not layers:
        owner = getattr(model, "meta", {}).get("user_class", type(model))
        raise ModelError(
            f"{owner.__name__} has no convolution and no linear layer among its modules: there is nothing to prune."
        )
    unknown = [name for name in config.skip if name not in layers]
    if unknown:
        raise ConfigError(f"GateConfig.skip names {unknown[0]!r}; the model's layers are {', '.join(layers)}.")
    steps = {step.name: step for step in reversed(channels.steps) if step.kind in ("conv", "depthwise")}
    first = _reads_the_input(model, channels)
    gated: list[GateSpec] = []
    skipped: list[Skipped] = []
    for name in [*costs, *(n for n in layers if n not in costs)]:
        module, cost = modules.get(name), costs.get(name)
        reason = _reason(module, name, cost, steps.get(name), name in first, config)
        if reason or cost is None:
            layer = steps[name].layer if name in steps else None
            kind = layer.kind if layer else type(module).__name__ if module else "function"
            skipped.append(Skipped(name, kind, reason, cost.macs if cost else 0))
            continue
        holds = min(cost.out_channels, cost.in_channels)
        groups = min(config.groups, holds)
        gated.append(GateSpec(name, groups, cost.out_channels, cost.in_channels, cost.input_elements, cost.macs))
    return _explained(model, GatePlan(config, tuple(gated), tuple(skipped)))


def _reason(
    module: nn.Module | None, name: str, cost: LayerCost | None, step: Step | None, is_first: bool, config: GateConfig
) -> str:
    """Why a layer gets no gate; empty where it gets one."""
    if cost is None:
        return "it does not run in eval mode"
    if isinstance(module, nn.Linear) and not config.linear:
        return "linear layers are gated only with GateConfig(linear=True)"
    if step is not None and step.kind == "depthwise":
        return "it is a depthwise convolution: its filters live and die with their channels"
    if step is not None and step.layer is not None and step.layer.groups > 1:
        return f"it is a grouped convolution (groups={step.layer.groups}): its groups live and die whole"
    if is_first:
        return "it reads the model's input"
    if name in config.skip:
        return "GateConfig.skip names it"
    if step is None or step.layer is None:
        return UNKNOWN_LAYER
    if not isinstance(module, tuple(GATED)) or step.layer.weight != f"{name}.weight":
        return "its weight is a bare parameter, not that of a layer module"
    return ""


def _explained(gm: nn.Module, plan: GatePlan) -> GatePlan:
    """The plan with what it cannot know of layers that lie in no traced part: why, and their multiply-adds."""
    if not is_traced_in_parts(gm):
        return plan
    inside = {f"{name}.{layer}" for name, part in parts_of(gm).items() for layer, _ in part.named_modules()}
    macs = network_meta(gm)["macs"]
    return replace(
        plan,
        skipped=tuple(
            s if s.name in inside else replace(s, reason=why_untraced(gm, s.name), macs=macs.get(s.name, s.macs))
            for s in plan.skipped
        ),
    )


def _reads_the_input(model: nn.Module, channels: ChannelGraph) -> set[str]:
    """Layers whose input is, but for elementwise arithmetic and pooling, the model's own input."""
    found: set[str] = set()
    for graph in all_graphs(model) if isinstance(model, TracedModule) else []:
        inputs: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op == "placeholder":
                inputs.add(node)
            if not any(source in inputs for source in node.all_input_nodes):
                continue
            layer = layer_of(model, node)
            if layer is not None and layer.family in ("conv", "linear"):
                found.add(layer.name)
            elif all(source in inputs or not _makes_channels(source) for source in node.all_input_nodes):
                inputs.add(node)
    return found


def _makes_channels(node: fx.Node) -> bool:
    return node.op != "get_attr" and hasattr(node.meta.get("val"), "shape")
