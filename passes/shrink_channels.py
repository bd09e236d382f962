"""Afterwards every layer holds the channels that a LowerPlan keeps, in the plan's order, and no others.

conv1 [16, 3] -> bn [16] -> conv2 [32, 16]      becomes      conv1 [9, 3] -> bn [9] -> conv2 [32, 9]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from dspfx.errors import MismatchError
from dspfx.graph.channels import ChannelGraph, Step
from dspfx.graph.reorder import check_order, reordered
from dspfx.graph.simulate import Outcome, simulate
from dspfx.graph.trace import has_effect
from dspfx.graph.traced import Model, TracedModule, parts_of
from dspfx.modules import replace_module
from dspfx.norms import SparseNorm
from dspfx.plans import LowerPlan


def shrink_channels(model: Model, channels: ChannelGraph, plan: LowerPlan) -> Model:
    """Selects in weights, biases and statistics of `model`, in place, and rewrites the literal sizes that follow.

    Every layer with channels to lose is a module (passes/lift_layers.py). Raises MismatchError where the graph would
    not mean the same.
    """
    removed = removed_wires(channels, plan)
    stands = standing(channels, plan)
    outcomes = _outcomes(model, channels, removed, stands)
    order = channels.root if stands is None else stands
    _check_reads(channels, plan, removed, order)
    for part, outcome in outcomes.items():
        for node, repair in outcome.repairs.items():
            _rewrite(part, node, *repair)
        part.graph.eliminate_dead_code(is_impure_node=has_effect)  # what a selection of channels has replaced
    cuts = _Cuts()
    done: set[str] = set()
    for step in channels.steps:
        if step.kind == "param":
            cuts.cut(model, step.path, {step.axis: kept_in_order(step.out, channels, removed, order)})
            owner = model.get_submodule(step.path.rpartition(".")[0])
            if isinstance(owner, nn.PReLU):
                owner.num_parameters = owner.weight.numel()
        elif step.layer is not None and step.name not in done:
            done.add(step.name)
            out, source = (kept_in_order(v, channels, removed, order) for v in (step.out, step.ins[0]))
            _cut_layer(model, step, cuts, out, source)
    for part in outcomes:
        part.recompile()
    return model


def _outcomes(
    model: Model, channels: ChannelGraph, removed: Tensor, stands: Tensor | None
) -> dict[TracedModule, Outcome]:
    """What the removal and the order do to each graph; MismatchError where one would not mean the same."""
    outcomes = {part: simulate(part, channels, part.graph, removed) for part in parts_of(model).values()}
    for part, outcome in outcomes.items():
        broken = outcome.broken
        if not broken and stands is not None:
            broken = check_order(part, channels, part.graph, removed, outcome, stands)
        if broken:
            node, reason = broken[0]
            raise _mismatch(f"at {node}, {reason}")
    return outcomes


def _check_reads(channels: ChannelGraph, plan: LowerPlan, removed: Tensor, order: Tensor) -> None:
    """MismatchError where the groups of a layer would count other channels than those that it will read."""
    counted = {layer.name: layer.channels for layer in plan.layers if layer.groups}
    for step in channels.steps:
        if step.kind == "conv" and step.name in counted:
            found = tuple(kept_in_order(step.ins[0], channels, removed, order).tolist())
            if found != counted[step.name]:
                raise _mismatch(f"{step.name} reads channels in another order than it says")


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


def standing(channels: ChannelGraph, plan: LowerPlan) -> Tensor | None:
    """int64 [wires]: the class that stands, by the plan, where each wire's class stood; None where all stay.

    Raises MismatchError where two layers of one class disagree.
    """
    filters = {layer.name: torch.tensor(layer.filters, dtype=torch.int64) for layer in plan.layers}
    pairs = [
        (
            step.name,
            channels.root[step.out[filters[step.name].sort().values]],
            channels.root[step.out[filters[step.name]]],
        )
        for step in channels.steps
        if step.name in filters
    ]
    if all(torch.equal(old, new) for _, old, new in pairs):
        return None
    stands = torch.arange(channels.num_wires)
    for _, old, new in pairs:
        stands[old] = new
    for name, old, new in pairs:
        if not torch.equal(stands[old], new):
            raise _mismatch(f"the filters of {name} stand in another order than those they equal")
    return stands[channels.root]


def kept_in_order(wires: Tensor, channels: ChannelGraph, removed: Tensor, stands: Tensor) -> Tensor:
    """Which of the wires [n] are left, in the order in which they stand."""
    kept = (~removed[wires]).nonzero().flatten()
    order = None if stands is channels.root else reordered(wires[kept], channels.root, stands)
    return kept if order is None else kept[order]


def _mismatch(what: str) -> MismatchError:
    return MismatchError(f"the lower plan does not fit this network: {what}. Plan it anew.")


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
