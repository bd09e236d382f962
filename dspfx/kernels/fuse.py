"""A chain with fewer layers: additions and activations become part of the layers before them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dspfx.kernels.chain import Chain, Conv, Layer, Linear, Map, reads


def fused(chain: Chain) -> Chain:
    """The same chain with additions and activations inside of the layers before them, where only they read these."""
    uses: dict[int, int] = {}
    for value in (*chain.outputs, *(v for layer in chain.layers for v in reads(layer))):
        uses[value] = uses.get(value, 0) + 1
    maker: dict[int, int] = {}
    layers: list[Layer | None] = []

    def inner(value: int) -> Any:
        """The layer that makes a value nobody else reads, without an activation."""
        layer = layers[maker[value]] if value in maker and uses[value] == 1 else None
        return layer if isinstance(layer, (Conv, Map, Linear)) and layer.activation == "none" else None

    def absorb(layer: Layer, value: int) -> Layer:
        layers[maker.pop(value)] = None
        return layer

    for layer in chain.layers:
        if isinstance(layer, Map) and layer.second is not None:
            values = sorted({layer.x, layer.second}, key=lambda v: maker.get(v, -1))
            for value in reversed(values if len(values) == 2 else ()):
                before, other = inner(value), layer.x + layer.second - value
                if isinstance(before, Conv) and before.residual is None:
                    layer = absorb(replace(before, y=layer.y, residual=other, activation=layer.activation), value)
                    break
        if isinstance(layer, Map) and layer.second is None and _is_identity(layer) and (before := inner(layer.x)):
            layer = absorb(replace(before, y=layer.y, activation=layer.activation), layer.x)
        maker[layer.y] = len(layers)
        layers.append(layer)
    return replace(chain, layers=tuple(layer for layer in layers if layer is not None))


def _is_identity(layer: Map) -> bool:
    return bool((layer.scale == 1).all() and (layer.shift == 0).all())
