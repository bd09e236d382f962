"""Afterwards everything a PrunePlan drops is zero, and stays zero through every optimizer step.

conv -> bn      dead filters: conv.weight[o] = conv.bias[o] = bn.weight[o] = bn.bias[o] = 0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from dspfx.errors import MismatchError
from dspfx.graph.analyse import analyse
from dspfx.graph.channels import ChannelGraph
from dspfx.graph.liveness import Reads, liveness
from dspfx.graph.traced import TracedModule, traced_modules
from dspfx.modules import GatedConv2d
from dspfx.plans import PrunePlan


def apply_masks(gm: TracedModule, plan: PrunePlan, channels: ChannelGraph | None = None) -> TracedModule:
    """Writes the plan into the gates of `gm` and zeroes, in place, what it drops (also in a copy, such as an EMA).

    Raises MismatchError, before anything is changed, where the plan does not fit the module.
    """
    gated = {name: m for name, m in gm.named_modules() if isinstance(m, GatedConv2d)}
    for layer in plan.layers:
        module = gated.get(layer.name)
        found = module and (module.out_channels, module.in_channels, module.gate_groups)
        if module is None or found != (layer.out_channels, layer.in_channels, len(layer.groups)):
            raise MismatchError(
                f"the prune plan has {layer.out_channels} x {layer.in_channels} in {len(layer.groups)} groups for "
                f"{layer.name}, the model {found or 'no gated convolution'}; prepare the model as when the plan was "
                f"made."
            )
    for layer in plan.layers:
        module = gated[layer.name]
        row = torch.full((layer.out_channels,), -1)
        keep = torch.zeros(len(layer.groups), layer.in_channels, dtype=torch.bool)
        for g, group in enumerate(layer.groups):
            row[list(group.filters)] = g
            keep[g, list(group.channels)] = True
        module.gate_group.copy_(row)
        module.gate_keep.copy_(keep)
    gm.meta["masks"] = (_state(gm), find_masks(gm, channels or analyse(gm)))
    enforce_masks(gm)
    return gm


def find_masks(gm: TracedModule, channels: ChannelGraph) -> dict[str, Tensor]:
    """Parameter name -> bool mask (broadcastable to it) of what its gates, and liveness from them, make zero."""
    gated = {name: m for name, m in gm.named_modules() if isinstance(m, GatedConv2d)}
    reads: dict[str, Reads] = {}
    for step in channels.steps:
        if step.kind == "conv":
            gate = gated.get(step.module)
            if gate is not None and gate.is_pruned:
                reads[step.module] = Reads(gate.gate_keep.cpu(), gate.gate_group.cpu())
            else:
                reads[step.module] = Reads.dense(len(step.out), len(step.ins[0]))
    live = liveness(channels, reads)
    masks: dict[str, Tensor] = {}
    for name, gate in gated.items():
        if gate.is_pruned:
            masks[f"{name}.weight"] = ~gate.gate_mask().cpu()[:, :, None, None]
    for step in channels.steps:
        if step.kind == "map":
            continue
        module = gm.get_submodule(step.module)
        # A conv's output is constant exactly where its filter is dead or reads nothing that varies.
        dead = live.values[step.ins[0]] == 0 if step.kind == "norm" else ~live.values[step.out].isnan()
        if isinstance(module, GatedConv2d):
            dead = dead | (module.gate_group.cpu() < 0)
        for key in ("weight", "bias") if step.kind == "norm" else ("bias",):
            if getattr(module, key, None) is not None:
                name = f"{step.module}.{key}"
                masks[name] = masks.get(name, torch.ones_like(dead)) & dead  # dead in every call
    return {name: dead for name, dead in masks.items() if bool(dead.any())}


def enforce_masks(gm: TracedModule, optimizer: Optimizer | None = None) -> None:
    """Zeroes the masked entries of the parameters of `gm`.

    With an optimizer: of the parameters that it owns, and of its state for them (momentum, second moments).
    """
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else None
    masks = _masks(gm)
    for name, dead in masks.items():
        parameter = gm.get_parameter(name)
        if owned is not None and id(parameter) not in owned:
            continue
        if dead.device != parameter.device:
            masks[name] = dead = dead.to(parameter.device)
        with torch.no_grad():
            parameter.masked_fill_(dead, 0)
            for value in _state_of(optimizer, parameter):
                value.masked_fill_(dead, 0)


def _state_of(optimizer: Optimizer | None, parameter: nn.Parameter) -> list[Tensor]:
    state: dict[str, Any] = optimizer.state.get(parameter, {}) if optimizer else {}
    return [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]


def _state(gm: TracedModule) -> tuple[int, ...]:
    """Changes whenever somebody writes the gates (a plan, a checkpoint)."""
    gates = [m for m in gm.modules() if isinstance(m, GatedConv2d)]
    return tuple(v for m in gates for v in (id(m.gate_keep), m.gate_keep._version, m.gate_group._version))


def _masks(gm: TracedModule) -> dict[str, Tensor]:
    """The masks of the gates as they are now; recomputed after a checkpoint was loaded."""
    state, masks = gm.meta.get("masks", ((), {}))
    now = _state(gm)
    if state != now:
        pruned = any(m.is_pruned for m in gm.modules() if isinstance(m, GatedConv2d))
        masks = find_masks(gm, analyse(gm)) if pruned else {}
        gm.meta["masks"] = (now, masks)
    return masks


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for gm in list(traced_modules):
        if "gate_plan" in gm.meta:
            enforce_masks(gm, optimizer)


# Every torch optimizer reports its steps here, whoever made it and whenever: that is what keeps pruned weights pruned
# in a loop that is not ours.
register_optimizer_step_post_hook(_after_step)
