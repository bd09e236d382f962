"""Shares of the convolutions' multiply-adds alone, from what `dspfx.coverage` reports of all layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from dspfx.coverage import Coverage, _prunable_pairs
from dspfx.graph.analyse import analyse
from dspfx.graph.traced import eval_graph, parts_of

CONVS = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


def conv_shares(gm: nn.Module, report: Coverage) -> dict[str, float | None]:
    """conv_gated and conv_prunable, as `Coverage.gated` and `.prunable` over convolutions; None without any."""
    pairs = _prunable_pairs(analyse(gm))
    modules = dict(gm.named_modules())
    calls = {
        f"{prefix}.{node.name}" if prefix else node.name
        for prefix, part in parts_of(gm).items()
        for node in eval_graph(part).nodes
        if node.target in CONVS
    }

    def is_conv(name: str, kind: str = "") -> bool:
        is_module = isinstance(modules.get(name), nn.modules.conv._ConvNd)
        return is_module or name in calls or kind.startswith("F.conv")

    gated = sum(spec.macs for spec in report.plan.layers if is_conv(spec.name))
    skipped = [layer for layer in report.plan.skipped if is_conv(layer.name, layer.kind)]
    total = gated + sum(layer.macs for layer in skipped)
    freed = sum(layer.macs * pairs.get(layer.name, 0.0) for layer in skipped)
    shares = {"conv_gated": float(gated), "conv_prunable": gated + freed}
    return {key: value / total if total else None for key, value in shares.items()}
