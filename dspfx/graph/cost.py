"""Multiply-adds (fvcore's FLOPs) and weights of every convolution and linear layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from dspfx.graph.channels import module_of
from dspfx.graph.traced import TracedModule, eval_graph


@dataclass(frozen=True)
class LayerCost:
    """Costs of one layer at batch 1, summed over its calls in eval mode.

    Attributes:
        out_channels, in_channels: O, and the input channels that one filter reads.
        macs_per_pair: multiply-adds of one (filter, input channel) pair.
        params_per_pair: weights of one pair.
        input_elements: elements of the input activation of the first call.
        positions: output positions (height x width) of the first call.
    """

    out_channels: int
    in_channels: int
    macs_per_pair: int
    params_per_pair: int
    input_elements: int
    positions: int

    @property
    def macs(self) -> int:
        return self.out_channels * self.in_channels * self.macs_per_pair

    @property
    def params(self) -> int:
        return self.out_channels * self.in_channels * self.params_per_pair


def layer_costs(gm: TracedModule) -> dict[str, LayerCost]:
    """Costs by qualified name, in execution order; layers that eval mode never calls are absent."""
    costs: dict[str, LayerCost] = {}
    for node in eval_graph(gm).nodes:
        if node.op != "call_module" or not isinstance(node.meta.get("val"), Tensor):
            continue
        module = module_of(gm, node)
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        out, source = node.meta["val"], node.all_input_nodes[0].meta["val"]
        weight = module.weight
        is_transposed = getattr(module, "transposed", False)
        channels = weight.shape[1] * (weight.shape[0] if is_transposed else 1)
        filters = 1 if is_transposed else weight.shape[0]
        kernel = math.prod(weight.shape[2:])
        grid = source if is_transposed else out
        axis = 1 if weight.dim() > 2 else grid.dim() - 1
        positions = grid.numel() // (grid.shape[0] * grid.shape[axis])
        name = str(node.target)
        before = costs[name].macs_per_pair if name in costs else 0
        first = costs.get(name)
        costs[name] = LayerCost(
            out_channels=filters,
            in_channels=channels,
            macs_per_pair=before + kernel * positions,
            params_per_pair=kernel,
            input_elements=first.input_elements if first else source.numel() // source.shape[0],
            positions=first.positions if first else positions,
        )
    return costs
