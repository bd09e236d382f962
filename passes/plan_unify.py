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
        ModelError: there is none, or a weight is not finite.
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
    for name, weight in kept.items():
        if not bool(weight.detach().isfinite().all()):
            raise ModelError(f"{name}.weight is not finite; load weights that are.")
    return kept


def plan_unify(weights: Mapping[str, Tensor], config: BlockConfig) -> UnifyPlan:
    """The plan whose carrying out moves the weights least: the Euclidean projection onto what `config` asks for."""
    tilings = {name: Tiling(tuple(w.shape), config.shape, config.layout) for name, w in weights.items()}
    blocks = {name: tiling.split(weights[name].detach()) for name, tiling in tilings.items()}
    costs = {name: distortions(x, x != 0) for name, x in blocks.items()}
    classes: dict[str, Tensor] = {}
    if config.scope == "network":
        sizes = [tiling.count for tiling in tilings.values()]
        pruned, unified = counts(sum(sizes), config.prune, config.unify)
        unify_cost, prune_cost = (torch.cat([cost[i].cpu() for cost in costs.values()]) for i in (0, 1))
        classes = dict(zip(tilings, select(unify_cost, prune_cost, unified, pruned).split(sizes), strict=True))
    else:
        for name, tiling in tilings.items():
            pruned, unified = counts(tiling.count, config.prune, config.unify)
            classes[name] = select(*costs[name], unified, pruned)
    layers = []
    for name, kind in classes.items():
        moved = (projected(blocks[name], blocks[name] != 0, kind) - blocks[name]).square().sum()
        layers.append(
            UnifiedLayer(
                name=name,
                shape=tilings[name].shape,
                classes=UnifiedLayer.encode(bytes(kind.tolist())),
                blocks=len(kind),
                unified=int((kind == UNIFIED).sum()),
                pruned=int((kind == PRUNED).sum()),
                distortion=float(moved / blocks[name].square().sum().clamp(min=1e-30)),
            )
        )
    return UnifyPlan(config, tuple(layers))
