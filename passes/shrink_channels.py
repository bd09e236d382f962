"""Afterwards the channels that a LowerPlan does not keep are gone from every layer that carries them.

conv1 [16, 3] -> bn [16] -> conv2 [32, 16]      becomes      conv1 [9, 3] -> bn [9] -> conv2 [32, 9]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import MismatchError
from dspfx.graph.channels import ChannelGraph
from dspfx.graph.simulate import simulate
from dspfx.graph.traced import TracedModule
from dspfx.plans import LowerPlan


def shrink_channels(gm: TracedModule, channels: ChannelGraph, plan: LowerPlan) -> TracedModule:
    """Slices weights, biases and statistics of `gm` in place and rewrites the literal sizes that follow."""
    removed = removed_wires(channels, plan)
    outcome = simulate(gm, channels, gm.graph, removed)
    if outcome.broken:
        node, reason = outcome.broken[0]
        raise MismatchError(f"the lower plan does not fit this network: at {node}, {reason}. Plan it anew.")
    for node, (target, args, kwargs) in outcome.repairs.items():
        node.op, node.target, node.args, node.kwargs = "call_function", target, args, kwargs
    done: set[str] = set()
    for step in channels.steps:
        if step.kind == "map" or step.module in done:
            continue
        done.add(step.module)
        module = gm.get_submodule(step.module)
        out, source = _kept(step.out, removed), _kept(step.ins[0], removed)
        if step.kind == "norm":
            _slice_norm(module, out)
        elif step.kind == "depthwise":
            _slice_depthwise(module, out)
        else:
            _slice_layer(module, out, source)
    gm.recompile()
    return gm


def removed_wires(channels: ChannelGraph, plan: LowerPlan) -> Tensor:
    """bool [wires]: the classes of which the plan leaves out a filter."""
    kept = {layer.name: torch.tensor(layer.filters, dtype=torch.int64) for layer in plan.layers}
    gone = torch.zeros(channels.num_wires, dtype=torch.bool)
    for step in channels.steps:
        if step.module in kept:
            dropped = torch.ones(len(step.out), dtype=torch.bool)
            dropped[kept[step.module]] = False
            gone[channels.root[step.out[dropped]]] = True
    return gone[channels.root]


def _kept(wires: Tensor, removed: Tensor) -> Tensor:
    return (~removed[wires]).nonzero().flatten()


def _take(owner: nn.Module, name: str, axis: int, index: Tensor) -> None:
    value: Any = getattr(owner, name)
    if value is None:
        return
    index = index.to(value.device)
    if isinstance(value, nn.Parameter):
        sliced = nn.Parameter(value.detach().index_select(axis, index), requires_grad=value.requires_grad)
        setattr(owner, name, sliced)
    else:
        setattr(owner, name, value.index_select(axis, index))


def _slice_norm(module: Any, kept: Tensor) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        _take(module, name, 0, kept)
    module.num_features = len(kept)


def _slice_depthwise(module: Any, kept: Tensor) -> None:
    multiplier = module.out_channels // module.groups
    _take(module, "weight", 0, kept)
    _take(module, "bias", 0, kept)
    module.out_channels = len(kept)
    module.in_channels = module.groups = len(kept) // multiplier


def _slice_layer(module: Any, out: Tensor, source: Tensor) -> None:
    _take(module, "weight", 0, out)
    _take(module, "weight", 1, source)
    _take(module, "bias", 0, out)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = len(out), len(source)
    else:
        module.out_channels, module.in_channels = len(out), len(source)
