"""Strided convolutions as sums over positions: their inputs are split into phases, of which each is read densely.

Conv(stride 2) of x      ->      Phases (0, 0), (0, 1), (1, 0), (1, 1) of x, and taps that read these, shifted
"""

from __future__ import annotations

from typing import NamedTuple

from dspfx.kernels.chain import Chain, Conv, Layer, Pair, Shape


class Phase(NamedTuple):
    """Every stride-th row and column of a value, from (row, column) on: another value."""

    x: int
    y: int
    stride: Pair
    row: int
    column: int


class Tap(NamedTuple):
    """What an element of a kernel reads: a value, shifted."""

    value: int
    dy: int
    dx: int


class Split:
    """A chain's layers with the phases before their readers.

    Attributes:
        layers: in the chain's order.
        taps: of every convolution, in the order of its kernel's elements.
        shapes: of all values, phases included.
        empty: phases that an image is too small to have: zeros that are never written.
    """

    def __init__(self, chain: Chain, inputs: tuple[Shape, ...]) -> None:
        self.shapes = chain.shapes(inputs)
        self.layers: list[Layer | Phase] = []
        self.taps: dict[Layer, list[Tap]] = {}
        self.empty: set[int] = set()
        known: dict[tuple[int, Pair, int, int], int] = {}
        for layer in chain.layers:
            if isinstance(layer, Conv):
                elements = [(ky, kx) for ky in range(layer.kernel[0]) for kx in range(layer.kernel[1])]
                self.taps[layer] = [self._tap(layer, element, known) for element in elements]
            self.layers.append(layer)

    def _tap(self, layer: Conv, element: Pair, known: dict[tuple[int, Pair, int, int], int]) -> Tap:
        (dy, row), (dx, column) = (
            divmod(k * d - p, s)
            for k, d, p, s in zip(element, layer.dilation, layer.padding, layer.stride, strict=True)
        )
        key = (layer.x, layer.stride, row, column)
        if layer.stride == (1, 1):
            known[key] = layer.x
        if key not in known:
            known[key] = self._phase(*key)
        return Tap(known[key], dy, dx)

    def _phase(self, x: int, stride: Pair, row: int, column: int) -> int:
        channels, rows, columns = self.shapes[x]
        y = max(self.shapes) + 1
        sizes = -(-(rows - row) // stride[0]), -(-(columns - column) // stride[1])
        if min(sizes) < 1:
            self.empty.add(y)
        self.shapes[y] = (channels, max(sizes[0], 1), max(sizes[1], 1))
        self.layers.append(Phase(x, y, stride, row, column))
        return y
