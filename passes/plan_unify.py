"""Decides which blocks of a network's weights become zero, and which get one absolute value (MSWU, METHOD 5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dspfx.config import BlockConfig
from dspfx.errors import ConfigError, ModelError
from dspfx.method.blocks import PRUNED, UNIFIED, Tiling, counts, distortions, projected, select
from dspfx.plans import UnifiedLayer, UnifyPlan


def block_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """By layer, the weights of convolutions and linear layers, each once."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (_ConvNd, nn.Linear)) and isinstance(weight, nn.Parameter):
            found[name] = weight
    first = {id(weight): name for name, weight in reversed(found.items())}
    return {name: weight for name, weight in found.items() if first[id(weight)] == name}


def weights_to_unify(model: nn.Module, config: BlockConfig) -> dict[str, nn.Parameter]:
    """By layer, the weights that are to fall into blocks.

    Raises:
        ConfigError: a name in `config.skip` is no such layer.
        ModelError: there is none.
    """
    found = block_weights(model)
    unknown = [name for name in config.skip if name not in found]
    if unknown:
        raise ConfigError(
            f"BlockConfig.skip names {unknown[0]!r}, which is no convolution or linear layer of this "
            f"{type(model).__name__}; its layers are {', '.join(list(found)[:5])}, ..."
        )
    kept = {name: weight for name, weight in found.items() if name not in config.skip}
    if not kept:
        raise ModelError(f"{type(model).__name__} has no convolution or linear layer whose weight could be unified.")
    return kept


def choose_blocks(weights: Mapping[str, Tensor], config: BlockConfig) -> dict[str, tuple[Tiling, Tensor]]:
    """By layer, how its weight falls into blocks and the class of each; together they move the weights least.

    That is the Euclidean projection onto what `config` asks for. Raises ModelError where a weight is not finite.
    """
    for name, weight in weights.items():
        if not bool(weight.detach().isfinite().all()):
            raise ModelError(f"{name}.weight is not finite; load weights that are, or train with a smaller rate.")
    tilings = {name: Tiling(tuple(w.shape), config.shape, config.layout) for name, w in weights.items()}
    costs = {}
    for name, tiling in tilings.items():
        blocks = tiling.split(weights[name].detach())
        costs[name] = distortions(blocks, blocks != 0)
    if config.scope == "network":
        sizes = [tiling.count for tiling in tilings.values()]
        pruned, unified = counts(sum(sizes), config.prune, config.unify)
        unify_cost, prune_cost = (torch.cat([cost[i].cpu() for cost in costs.values()]) for i in (0, 1))
        classes = dict(zip(tilings, select(unify_cost, prune_cost, unified, pruned).split(sizes), strict=True))
    else:
        classes = {}
        for name, tiling in tilings.items():
            pruned, unified = counts(tiling.count, config.prune, config.unify)
            classes[name] = select(*costs[name], unified, pruned)
    return {name: (tiling, classes[name]) for name, tiling in tilings.items()}


def plan_unify(weights: Mapping[str, Tensor], config: BlockConfig) -> UnifyPlan:
    """What `choose_blocks` chose, as a plan."""
    layers = []
    for name, (tiling, kinds) in choose_blocks(weights, config).items():
        blocks = tiling.split(weights[name].detach())
        moved = (projected(blocks, blocks != 0, kinds) - blocks).square().sum()
        layers.append(
            UnifiedLayer(
                name=name,
                shape=tiling.shape,
                classes=UnifiedLayer.encode(bytes(kinds.tolist())),
                blocks=len(kinds),
                unified=int((kinds == UNIFIED).sum()),
                pruned=int((kinds == PRUNED).sum()),
                distortion=float(moved / blocks.square().sum().clamp(min=1e-30)),
            )
        )
    return UnifyPlan(config, tuple(layers))
