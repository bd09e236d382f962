"""Shares of the convolutions' multiply-adds alone, from what `dspfx.coverage` reports of all layers."""

from __future__ import annotations

from torch import nn

from dspfx.coverage import Coverage, _prunable_pairs
from dspfx.graph.analyse import analyse


def conv_shares(gm: nn.Module, model: nn.Module, report: Coverage) -> dict[str, float | None]:
    """conv_gated and conv_prunable, as `Coverage.gated` and `.prunable` over convolutions; None without any."""
    pairs = _prunable_pairs(analyse(gm))  # type: ignore[arg-type]
    is_conv = lambda name: isinstance(model.get_submodule(name), nn.modules.conv._ConvNd)  # noqa: E731
    gated = sum(spec.macs for spec in report.plan.layers if is_conv(spec.name))
    skipped = [layer for layer in report.plan.skipped if is_conv(layer.name)]
    total = gated + sum(layer.macs for layer in skipped)
    freed = sum(layer.macs * pairs.get(layer.name, 0.0) for layer in skipped)
    shares = {"conv_gated": float(gated), "conv_prunable": gated + freed}
    return {key: value / total if total else None for key, value in shares.items()}
