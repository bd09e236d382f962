"""Afterwards everything a PrunePlan drops is zero, and stays zero through every optimizer step.

conv -> bn      dead filters: conv.weight[o] = conv.bias[o] = bn.weight[o] = bn.bias[o] = 0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from dspfx import ranks
from dspfx.errors import MismatchError, ModelError
from dspfx.graph.analyse import analyse
from dspfx.graph.channels import ChannelGraph
from dspfx.graph.layers import attribute
from dspfx.graph.liveness import Reads, liveness
from dspfx.graph.traced import Model, TracedModule, parts_of, traced_modules
from dspfx.modules import GatedLayer
from dspfx.plans import PrunePlan


def apply_masks(model: Model, plan: PrunePlan, channels: ChannelGraph | None = None) -> Model:
    """Writes the plan into the gates of `model` and zeroes, in place, what it drops (also in a copy, such as an EMA).

    Raises MismatchError, before anything is changed, where the plan does not fit the model.
    """
    gated = {name: m for name, m in model.named_modules() if isinstance(m, GatedLayer)}
    for layer in plan.layers:
        gate = gated.get(layer.name)
        found = gate and (gate.filters, gate.channels, gate.gate_groups)
        if gate is None or found != (layer.out_channels, layer.in_channels, len(layer.groups)):
            raise MismatchError(
                f"the prune plan has {layer.out_channels} x {layer.in_channels} in {len(layer.groups)} groups for "
                f"{layer.name}, the model {found or 'no gate'}; prepare the model as when the plan was made."
            )
    for layer in plan.layers:
        gate = gated[layer.name]
        row = torch.full((layer.out_channels,), -1)
        keep = torch.zeros(len(layer.groups), layer.in_channels, dtype=torch.bool)
        for g, group in enumerate(layer.groups):
            row[list(group.filters)] = g
            keep[g, list(group.channels)] = True
        gate.gate_group.copy_(row)
        gate.gate_keep.copy_(keep)
    return mask_by_gates(model, channels)


def mask_by_gates(model: Model, channels: ChannelGraph | None = None) -> Model:
    """Zeroes, in place, what the gates of `model` drop, and what cannot matter without it."""
    with ranks.gathered(model):
        masks = find_masks(model, channels or analyse(model))
    for prefix, part in parts_of(model).items():
        start = f"{prefix}." if prefix else ""
        own = {name.removeprefix(start): mask for name, mask in masks.items() if name.startswith(start)}
        part.meta["masks"] = (_state(part), own, _structure(part))
        enforce_masks(part)
    return model


def check_dropped(model: nn.Module) -> None:
    """Raises ModelError where something that a gate dropped is not zero: it was written past the optimizers' hooks."""
    for name, gate in model.named_modules():
        if not isinstance(gate, GatedLayer) or not gate.is_pruned:
            continue
        back = int((gate.weight.detach() * gate.dropped()).count_nonzero())
        if back:
            raise ModelError(
                f"{name}.weight holds {back} values that are not zero where its gate has pruned, so a lowered network "
                "would not be equal to it. It is an average (EMA, SWA) of networks, was given other weights, or was "
                "trained by an optimizer without torch's step hooks: call dspfx.integrations.averaging.follow("
                "average, network), or follow(network, network), which makes them zero."
            )


def find_masks(model: nn.Module, channels: ChannelGraph) -> dict[str, Tensor]:
    """Tensor name -> bool mask (broadcastable to it) of what its gates, and liveness from them, make zero."""
    gated = {name: m for name, m in model.named_modules() if isinstance(m, GatedLayer)}
    reads: dict[str, Reads] = {}
    for step in channels.steps:
        if step.kind == "conv":
            gate = gated.get(step.name)
            if gate is not None and gate.is_pruned:
                reads[step.name] = Reads(gate.gate_keep.cpu(), gate.gate_group.cpu())
            else:
                reads[step.name] = Reads.whole(step)
    live = liveness(channels, reads)
    masks: dict[str, Tensor] = {}
    for name, gate in gated.items():
        if gate.is_pruned:
            masks[f"{name}.weight"] = gate.dropped().cpu()
    for step in channels.steps:
        if step.layer is None:
            continue
        # A conv's output is constant exactly where its filter is dead or reads nothing that varies.
        is_norm = step.kind in ("norm", "coupled")
        dead = live.values[step.ins[0]] == 0 if is_norm else ~live.values[step.out].isnan()
        gate = gated.get(step.name)
        if gate is not None:
            dead = dead | (gate.gate_group.cpu() < 0)
        for name in (step.layer.weight, step.layer.bias) if is_norm else (step.layer.bias,):
            if name:
                masks[name] = masks.get(name, torch.ones_like(dead)) & dead  # dead in every call
    return {name: dead for name, dead in masks.items() if bool(dead.any())}


def enforce_masks(gm: TracedModule, optimizer: Optimizer | None = None) -> None:
    """Zeroes the masked entries of the stored tensors of `gm`.

    With an optimizer: of the parameters that it owns, and of its state for them (momentum, second moments).
    """
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else None
    if owned is not None and not any(id(p) in owned for p in gm.parameters()):
        return  # an average of a network, say, whose gates are copied after every step: no need to look at them
    masks = _masks(gm)
    for name, dead in masks.items():
        parameter = attribute(gm, name)
        if owned is not None and id(parameter) not in owned:
            continue
        if type(dead) is Tensor and (dead.device != parameter.device or ranks.is_shard(parameter)):
            masks[name] = dead = ranks.shared_like(dead.expand(parameter.shape), parameter)
        with torch.no_grad():
            parameter.masked_fill_(dead, 0)
            for value in _state_of(optimizer, parameter):
                value.masked_fill_(dead, 0)


def _state_of(optimizer: Optimizer | None, parameter: nn.Parameter) -> list[Tensor]:
    state: dict[str, Any] = optimizer.state.get(parameter, {}) if optimizer else {}
    return [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]


def _state(gm: TracedModule) -> tuple[int, ...]:
    """Changes whenever somebody writes the gates (a plan, a checkpoint)."""
    gates = [m for m in gm.modules() if isinstance(m, GatedLayer)]
    return tuple(v for m in gates for v in (id(m.gate_keep), m.gate_keep._version, m.gate_group._version))


def _masks(gm: TracedModule) -> dict[str, Tensor]:
    """The masks of the gates as they are now; recomputed after a checkpoint was loaded."""
    state, masks, structure = gm.meta.get("masks", ((), {}, []))
    now = _state(gm)
    if state != now:
        found = _structure(gm)
        if not _equal(structure, found):
            pruned = any(m.is_pruned for m in gm.modules() if isinstance(m, GatedLayer))
            with ranks.gathered(gm):
                masks = find_masks(gm, analyse(gm)) if pruned else {}
        gm.meta["masks"] = (now, masks, found)
    return masks


def _structure(gm: TracedModule) -> list[Tensor]:
    """A copy of the gates."""
    gates = [m for m in gm.modules() if isinstance(m, GatedLayer)]
    return [value.clone() for gate in gates for value in (gate.gate_group, gate.gate_keep)]


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether gates that somebody wrote (DDP before every forward pass) hold what they held; waits for a GPU once."""
    if len(left) != len(right) or any(a.device != b.device for a, b in zip(left, right, strict=True)):
        return False
    differ = [(a != b).any() for a, b in zip(left, right, strict=True)]
    return not differ or not bool(torch.stack([d.to(differ[0].device) for d in differ]).any())


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for gm in list(traced_modules):
        if "gate_plan" in gm.meta:
            enforce_masks(gm, optimizer)


# Every torch optimizer reports its steps here, whoever made it and whenever: that is what keeps pruned weights pruned
# in a loop that is not ours.
register_optimizer_step_post_hook(_after_step)
