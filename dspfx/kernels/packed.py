"""The weights of a chain in one array, as native.cpp reads them."""

from __future__ import annotations

import numpy as np

from dspfx.kernels.chain import Chain, Conv, Floats, Layer, Linear, Map
from dspfx.kernels.tiles import Tile, conv_tiles


class Packed:
    """The weights of a chain as the tiles want them, the same for all sizes of images."""

    def __init__(self, chain: Chain, most_filters: int) -> None:
        self.parts: list[Floats] = []
        self.floats = 0
        self.tiles: dict[Layer, list[tuple[Tile, int, int]]] = {}  # with the places of the weights and of the biases
        self.places: dict[Layer, tuple[int, ...]] = {}
        for layer in chain.layers:
            if isinstance(layer, Conv):
                self.tiles[layer] = [
                    self._pack(layer, tile) for tile in conv_tiles(layer.weight, layer.groups, most_filters)
                ]
            elif isinstance(layer, Map):
                pairs = np.stack([layer.scale, layer.shift], 1)
                start = self._add(pairs)
                self.places[layer] = tuple(start + 2 * i for i in range(len(pairs)))
            elif isinstance(layer, Linear):
                self.places[layer] = (self._add(layer.weight), self._add(layer.bias))
        self.array: Floats = np.concatenate([*self.parts, np.zeros(1, np.float32)])
        self.parts = []

    def _pack(self, layer: Conv, tile: Tile) -> tuple[Tile, int, int]:
        filters, channels = np.array(tile.filters), np.array(tile.channels, dtype=np.int64)
        local = channels - filters[0] // (len(layer.weight) // layer.groups) * layer.weight.shape[1]
        block = layer.weight[filters[:, None], local[None]]  # [F, K, kh, kw]
        return tile, self._add(block.reshape(len(filters), -1).T), self._add(layer.bias[filters])

    def _add(self, array: Floats) -> int:
        place = self.floats
        self.parts.append(np.ascontiguousarray(array, dtype=np.float32).reshape(-1))
        self.floats += self.parts[-1].size
        return place
