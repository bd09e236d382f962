"""Afterwards no batch norm in eval mode directly follows the only call of a convolution or linear layer.

conv -> bn -> relu      becomes      conv (scaled weights, shifted bias) -> relu
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from dspfx.graph.layers import BATCH_NORMS, has_hooks, is_plain
from dspfx.graph.traced import Model, TracedModule, parts_of
from dspfx.modules import replace_module

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_batchnorm(model: Model) -> Model:
    """Folds in place; `model` is in eval mode and stays there (its norms' statistics are gone)."""
    for part in parts_of(model).values():
        _fold(part)
    return model


def _fold(gm: TracedModule) -> None:
    calls = Counter(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
    for node in list(gm.graph.nodes):
        if node.op != "call_module" or type(gm.get_submodule(str(node.target))) not in BATCH_NORMS:
            continue
        source = node.args[0] if node.args else None
        if source is None or source.op != "call_module" or len(source.users) != 1:
            continue
        norm: Any = gm.get_submodule(str(node.target))
        layer: Any = gm.get_submodule(str(source.target))
        is_called_once = calls[str(node.target)] == 1 and calls[str(source.target)] == 1
        if not is_called_once or norm.running_mean is None or has_hooks(norm):
            continue
        if is_plain(layer, _CONVS):
            fused: nn.Module = fuse_conv_bn_eval(layer, norm)
        elif is_plain(layer, (nn.Linear,)) and node.meta["val"].dim() == 2:
            fused = fuse_linear_bn_eval(layer, norm)
        else:
            continue
        replace_module(gm, str(source.target), fused)
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
        gm.delete_submodule(str(node.target))
    gm.recompile()
