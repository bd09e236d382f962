"""Decides which convolutions get a gate, with how many groups, and says why the others get none."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from dspfx.config import GateConfig
from dspfx.errors import ConfigError, ModelError
from dspfx.graph.channels import ChannelGraph
from dspfx.graph.cost import LayerCost, layer_costs
from dspfx.graph.rules import is_plain
from dspfx.graph.traced import TracedModule, all_graphs
from dspfx.plans import GatePlan, GateSpec, Skipped

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)

FUNCTIONAL = {F.conv1d, F.conv2d, F.conv3d, F.linear, torch.conv1d, torch.conv2d, torch.conv3d}


def plan_gates(gm: TracedModule, channels: ChannelGraph, config: GateConfig) -> GatePlan:
    """A GatePlan for every convolution and linear layer of `gm`; groups are clamped to what a layer can hold.

    Raises ModelError where the model has no such layer, ConfigError where `config` names an unknown layer or asks
    for more groups than the widest layer can hold.
    """
    layers = {name: module for name, module in gm.named_modules() if isinstance(module, LAYERS)}
    functional = any(n.target in FUNCTIONAL for graph in all_graphs(gm) for n in graph.nodes)
    if not layers and not functional:
        raise ModelError(
            f"{gm.meta['user_class'].__name__} has no convolution and no linear layer among its modules: "
            "there is nothing to prune."
        )
    unknown = [name for name in config.skip if name not in layers]
    if unknown:
        raise ConfigError(f"GateConfig.skip names {unknown[0]!r}; the model's layers are {', '.join(layers)}.")
    costs = layer_costs(gm)
    steps = {step.module: step for step in channels.steps if step.kind == "conv"}
    first = _reads_the_input(gm, channels)
    gated: list[GateSpec] = []
    skipped: list[Skipped] = []
    widest = 0
    for name in [*costs, *(n for n in layers if n not in costs)]:
        module, cost = layers[name], costs.get(name)
        reason = _reason(module, name, cost, name in steps, name in first, config)
        macs = cost.macs if cost else 0
        if reason or cost is None:
            skipped.append(Skipped(name, type(module).__name__, reason, macs))
            continue
        holds = min(cost.out_channels, cost.in_channels)
        widest = max(widest, holds)
        gated.append(
            GateSpec(name, min(config.groups, holds), cost.out_channels, cost.in_channels, cost.input_elements, macs)
        )
    if gated and config.groups > widest:
        raise ConfigError(
            f"GateConfig.groups is {config.groups}, and the widest gated layer holds {widest} (filters and input "
            f"channels); give at most {widest}."
        )
    return GatePlan(config, tuple(gated), tuple(skipped))


def _reason(
    module: nn.Module, name: str, cost: LayerCost | None, has_step: bool, is_first: bool, config: GateConfig
) -> str:
    """Why a layer gets no gate; empty where it gets one."""
    if cost is None:
        return "it does not run in eval mode"
    if not isinstance(module, nn.Conv2d):
        return "only Conv2d layers are gated"
    if module.groups == module.in_channels and module.groups > 1:
        return "it is a depthwise convolution: its filters live and die with their channels"
    if module.groups > 1:
        return f"it is a grouped convolution already (groups={module.groups})"
    if is_first:
        return "it reads the model's input"
    if name in config.skip:
        return "GateConfig.skip names it"
    if not is_plain(module, (nn.Conv2d,)):
        return "its forward, hooks or parametrization make it more than a convolution"
    if not has_step:
        return "the channels of its input could not be followed"
    return ""


def _reads_the_input(gm: TracedModule, channels: ChannelGraph) -> set[str]:
    """Layers whose input is, but for elementwise arithmetic and pooling, the model's own input."""
    inputs = {node for node in channels.values if node.op == "placeholder"}
    found: set[str] = set()
    for node in channels.values:
        if not any(source in inputs for source in node.all_input_nodes):
            continue
        is_layer = node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), LAYERS)
        if is_layer:
            found.add(str(node.target))
        elif all(source in inputs or not _makes_channels(source) for source in node.all_input_nodes):
            inputs.add(node)
    return found


def _makes_channels(node: fx.Node) -> bool:
    return node.op != "get_attr" and hasattr(node.meta.get("val"), "shape")
