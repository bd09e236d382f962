"""Afterwards the channels that a LowerPlan does not keep are gone from every layer that carries them.

conv1 [16, 3] -> bn [16] -> conv2 [32, 16]      becomes      conv1 [9, 3] -> bn [9] -> conv2 [32, 9]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from dspfx.errors import MismatchError
from dspfx.graph.channels import ChannelGraph, Step
from dspfx.graph.simulate import simulate
from dspfx.graph.trace import has_effect
from dspfx.graph.traced import Model, TracedModule, parts_of
from dspfx.modules import replace_module
from dspfx.norms import SparseNorm
from dspfx.plans import LowerPlan


def shrink_channels(model: Model, channels: ChannelGraph, plan: LowerPlan) -> Model:
    """Slices weights, biases and statistics of `model` in place and rewrites the literal sizes that follow.

    Every layer with channels to lose is a module (passes/lift_layers.py).
    """
    removed = removed_wires(channels, plan)
    outcomes = {part: simulate(part, channels, part.graph, removed) for part in parts_of(model).values()}
    for outcome in outcomes.values():
        if outcome.broken:
            node, reason = outcome.broken[0]
            raise MismatchError(f"the lower plan does not fit this network: at {node}, {reason}. Plan it anew.")
    for part, outcome in outcomes.items():
        for node, repair in outcome.repairs.items():
            _rewrite(part, node, *repair)
        part.graph.eliminate_dead_code(is_impure_node=has_effect)  # what a selection of channels has replaced
    cuts = _Cuts()
    done: set[str] = set()
    for step in channels.steps:
        if step.kind == "param":
            cuts.cut(model, step.path, {step.axis: _kept(step.out, removed)})
            owner = model.get_submodule(step.path.rpartition(".")[0])
            if isinstance(owner, nn.PReLU):
                owner.num_parameters = owner.weight.numel()
        elif step.layer is not None and step.name not in done:
            done.add(step.name)
            _cut_layer(model, step, cuts, _kept(step.out, removed), _kept(step.ins[0], removed))
    for part in outcomes:
        part.recompile()
    return model


def removed_wires(channels: ChannelGraph, plan: LowerPlan) -> Tensor:
    """bool [wires]: the classes of which the plan leaves out a filter."""
    kept = {layer.name: torch.tensor(layer.filters, dtype=torch.int64) for layer in plan.layers}
    gone = torch.zeros(channels.num_wires, dtype=torch.bool)
    for step in channels.steps:
        if step.name in kept:
            dropped = torch.ones(len(step.out), dtype=torch.bool)
            dropped[kept[step.name]] = False
            gone[channels.root[step.out[dropped]]] = True
    return gone[channels.root]


def _kept(wires: Tensor, removed: Tensor) -> Tensor:
    return (~removed[wires]).nonzero().flatten()


def _rewrite(gm: TracedModule, node: fx.Node, target: Any, args: Any, kwargs: Any) -> None:
    """The node computes `target` instead; a tensor among the arguments becomes a buffer."""
    values = []
    for value in args:
        if isinstance(value, Tensor):
            name = f"{node.name}_channels"
            while hasattr(gm, name):
                name += "_"
            gm.register_buffer(name, value.to(next(gm.parameters()).device))
            with gm.graph.inserting_before(node):
                value = gm.graph.get_attr(name)
        values.append(value)
    if target is not node.target:
        node.op, node.target = "call_function", target
    node.args, node.kwargs = tuple(values), kwargs


class _Cuts:
    """Slices stored tensors once each: what was shared stays shared."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[Tensor, Tensor]] = {}

    def cut(self, model: nn.Module, path: str, kept: dict[int, Tensor]) -> None:
        """Keeps the elements `kept[axis]` along each axis of the tensor at `path` ("" is none)."""
        if not path:
            return
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        value: Tensor = getattr(owner, name)
        if any(new is value for _, new in self.done.values()):
            return  # by another step that reads the same tensor, with the same channels
        if id(value) not in self.done:
            new = value.detach()
            for axis, index in kept.items():
                new = new.index_select(axis, index.to(value.device))
            if isinstance(value, nn.Parameter):
                new = nn.Parameter(new, requires_grad=value.requires_grad)
            self.done[id(value)] = value, new
        setattr(owner, name, self.done[id(value)][1])


def _cut_layer(model: nn.Module, step: Step, cuts: _Cuts, out: Tensor, source: Tensor) -> None:
    layer = step.layer
    assert layer is not None
    for path in (layer.bias, layer.mean, layer.var):
        cuts.cut(model, path, {0: out})
    if step.kind != "conv" or layer.groups > 1:
        cuts.cut(model, layer.weight, {0: source if layer.transposed else out})
    else:
        cuts.cut(model, layer.weight, {0: source, 1: out} if layer.transposed else {0: out, 1: source})
    if step.node.op != "call_module":  # a function that reads its tensors alone
        return
    module: Any = model.get_submodule(layer.name)
    if step.kind == "norm":
        module.num_features = len(out)
    elif step.kind == "coupled":
        if len(out) < len(step.out):
            replace_module(model, layer.name, SparseNorm.of(module, out.tolist(), step.blocks()))
    elif step.kind == "depthwise":
        multiplier = module.out_channels // module.groups
        module.out_channels = len(out)
        module.in_channels = module.groups = len(out) // multiplier
    elif layer.family == "linear":
        module.out_features, module.in_features = len(out), len(source)
    else:
        if layer.groups > 1:
            module.groups = layer.groups * len(out) // module.out_channels
        module.out_channels, module.in_channels = len(out), len(source)
