"""Afterwards the blocks of a UnifyPlan are zero, or have one absolute value, to the last bit.

[[.3, -.1], [.2, .2]]  (unified)  ->  [[.2, -.2], [.2, .2]]          (pruned)  ->  [[0, 0], [0, 0]]
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dspfx.errors import MismatchError
from dspfx.method.blocks import Tiling, projected
from dspfx.passes.plan_unify import block_weights
from dspfx.plans import UnifyPlan


def classes_of(plan: UnifyPlan, weights: Mapping[str, Tensor]) -> dict[str, tuple[Tiling, Tensor]]:
    """By layer, how its weight falls into blocks, and the class of each; MismatchError where the plan does not fit."""
    found = {}
    for layer in plan.layers:
        weight = weights.get(layer.name)
        tiling = Tiling(layer.shape, plan.config.shape, plan.config.layout)
        if weight is None or tuple(weight.shape) != layer.shape or tiling.count != layer.blocks:
            raise MismatchError(
                f"the unify plan has {layer.blocks} blocks of a weight {layer.shape} for {layer.name}, the model "
                f"{tuple(weight.shape) if weight is not None else 'no such layer'}; give the network it was made for."
            )
        found[layer.name] = (tiling, torch.tensor(list(layer.kinds()), dtype=torch.uint8))
    return found


@torch.no_grad()
def unify_blocks(model: nn.Module, plan: UnifyPlan) -> nn.Module:
    """Carries the plan out on the model's weights, in place; before anything is changed, it is compared with them."""
    weights = block_weights(model)
    for name, (tiling, classes) in classes_of(plan, weights).items():
        blocks = tiling.split(weights[name])
        weights[name].copy_(tiling.join(projected(blocks, blocks != 0, classes)))
    return model
