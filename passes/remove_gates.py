"""Afterwards no gate is left: every `GatedConv2d` is a plain `nn.Conv2d` of the same name, its dropped weights zero.

conv1 (GatedConv2d) -> conv1 (Conv2d)
"""

from __future__ import annotations

import torch
from torch import nn

from dspfx.graph.traced import TracedModule
from dspfx.modules import GatedConv2d, replace_module


def remove_gates(gm: TracedModule) -> TracedModule:
    """Replaces the gated convolutions of `gm` in place; forgets the gate plan."""
    plain: dict[nn.Module, nn.Conv2d] = {}
    for name, module in list(gm.named_modules(remove_duplicate=False)):
        if not isinstance(module, GatedConv2d):
            continue
        if module not in plain:
            plain[module] = _plain(module)
        replace_module(gm, name, plain[module])
    gm.meta.pop("gate_plan", None)
    gm.meta.pop("masks", None)
    return gm


def _plain(gated: GatedConv2d) -> nn.Conv2d:
    conv = nn.Conv2d(
        gated.in_channels,
        gated.out_channels,
        gated.kernel_size,  # type: ignore[arg-type]
        stride=gated.stride,  # type: ignore[arg-type]
        padding=gated.padding,  # type: ignore[arg-type]
        dilation=gated.dilation,  # type: ignore[arg-type]
        bias=gated.bias is not None,
        padding_mode=gated.padding_mode,
        device="meta",
    )
    conv.weight, conv.bias = gated.weight, gated.bias
    with torch.no_grad():
        conv.weight.masked_fill_(~gated.gate_mask()[:, :, None, None], 0)
        if conv.bias is not None and gated.is_pruned:
            conv.bias.masked_fill_(gated.gate_group < 0, 0)
    return conv.train(gated.training)
