"""Multiply-adds (fvcore's FLOPs) and weights of every convolution and linear layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Size, Tensor, fx, nn
from torch.utils import _pytree as pytree

from dspfx.graph.channels import module_of
from dspfx.graph.layers import FUNCTIONAL, arguments, attribute, layer_of
from dspfx.graph.traced import TracedModule, eval_graph, parts_of


@dataclass(frozen=True)
class LayerCost:
    """Costs of one layer at batch 1, summed over its calls in eval mode.

    Attributes:
        out_channels, in_channels: O, and the input channels that one filter reads.
        macs_per_pair: multiply-adds of one (filter, input channel) pair.
        params_per_pair: weights of one pair.
        input_elements: elements of the input activation of the first call.
        input_shapes: of each call's input, with the batch of the example inputs.
    """

    out_channels: int
    in_channels: int
    macs_per_pair: int
    params_per_pair: int
    input_elements: int
    input_shapes: tuple[tuple[int, ...], ...]

    @property
    def macs(self) -> int:
        return self.out_channels * self.in_channels * self.macs_per_pair

    @property
    def params(self) -> int:
        return self.out_channels * self.in_channels * self.params_per_pair


def layer_costs(model: nn.Module) -> dict[str, LayerCost]:
    """Costs by qualified name, in execution order; layers that eval mode never calls are absent."""
    costs: dict[str, LayerCost] = {}
    for prefix, part in parts_of(model).items():
        batch, work = _batch(part), part.meta.get("work", 1)  # a head runs once a level, a box head once a region
        for node in eval_graph(part).nodes:
            found = _weighted(part, node, f"{prefix}." if prefix else "")
            if found is None or not isinstance(node.meta.get("val"), Tensor):
                continue
            name, weight, groups, is_transposed = found
            out, source = node.meta["val"], _input(node).meta["val"]
            grid = source if is_transposed else out
            filters, channels = weight[:2] if not is_transposed else (weight[1] * groups, weight[0] // groups)
            positions = max(grid.numel() // (weight[0] * batch), 1)
            first = costs.get(name)
            costs[name] = LayerCost(
                out_channels=filters,
                in_channels=channels,
                macs_per_pair=(first.macs_per_pair if first else 0) + round(math.prod(weight[2:]) * positions * work),
                params_per_pair=math.prod(weight[2:]),
                input_elements=first.input_elements if first else max(source.numel() // batch, 1),
                input_shapes=(*(first.input_shapes if first else ()), tuple(source.shape)),
            )
    return costs


def _weighted(part: nn.Module, node: fx.Node, prefix: str) -> tuple[str, Size, int, bool] | None:
    """(name, the weight's shape, groups, transposed) of any convolution or linear layer, prunable or not."""
    layer = layer_of(part, node, prefix)
    if layer is not None:
        weight = attribute(part, layer.weight.removeprefix(prefix)) if layer.family in ("conv", "linear") else None
        return (layer.name, weight.shape, layer.groups, layer.transposed) if weight is not None else None
    if node.op == "call_module":
        module: Any = module_of(part, node)
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            groups, is_transposed = getattr(module, "groups", 1), getattr(module, "transposed", False)
            return prefix + str(node.target), module.weight.shape, groups, is_transposed
    elif node.target in FUNCTIONAL:
        given = arguments(node, FUNCTIONAL[node.target])
        weight = given.get("weight")
        value = weight.meta.get("val") if isinstance(weight, fx.Node) else None
        if isinstance(value, Tensor) and ("groups" in FUNCTIONAL[node.target] or node.target is F.linear):
            is_transposed = "output_padding" in FUNCTIONAL[node.target]
            return prefix + node.name, value.shape, int(given.get("groups", 1)), is_transposed
    return None


def _input(node: fx.Node) -> fx.Node:
    source: Any = arguments(node, ("input",))["input"]
    return source


def _batch(part: TracedModule) -> int:
    """Images in the example inputs: costs are given for one."""
    inputs = part.meta["inputs"]
    sizes = [x.shape[0] for x in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor) and x.dim()]
    return max(sizes[0], 1) if sizes else 1
