"""A chain as the program that native.cpp runs: one int32 array, and one array of weights.

    program [places of tiles, offsets and masks | steps | 0 0]      weights [tiles, biases, scales, linear layers]

The steps are structs of native.cpp, in whose order their fields are written here. Everything is checked before: what a
program refers to lies in its workspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspfx.errors import InputError
from dspfx.kernels.chain import (
    ACTIVATIONS,
    Cat,
    Chain,
    Conv,
    Flatten,
    Layer,
    Linear,
    Map,
    Mean,
    Pool,
    Scale,
    Select,
    Shape,
    reads,
)
from dspfx.kernels.packed import Packed
from dspfx.kernels.phases import Phase, Split
from dspfx.kernels.planes import Geometries, Workspace

CONV, COPY, MAP, POOL, MEAN, LINEAR, SCALE = range(1, 8)
WORK, INPUT, OUTPUT = 0, 1, 2  # spaces; those of the i-th input and output are 2 i more
CACHED = 1 << 17  # floats of input that the positions of one block read: half of a common second-level cache
LARGEST = (1 << 31) - (1 << 16)  # floats: their places are int32
SMALLEST_BLOCK = 128  # positions


@dataclass(frozen=True, eq=False)
class Program:
    """What native.cpp runs, for images of one size: `steps` from `first` on; its floats of workspace start as zeros.

    `macs` are the multiply-adds of the convolutions of one image.
    """

    steps: np.ndarray[Any, np.dtype[np.int32]]
    first: int
    floats: int
    macs: int
    outputs: tuple[Shape, ...]


class Builder:
    """Writes the program of a chain for inputs of given shapes (of one image)."""

    def __init__(self, chain: Chain, packed: Packed, inputs: tuple[Shape, ...], lanes: int) -> None:
        self.chain, self.packed, self.lanes = chain, packed, lanes
        split = Split(chain, inputs)
        self.shapes, self.layers, self.taps, self.empty = split.shapes, split.layers, split.taps, split.empty
        self.geometries = self._geometries()
        self.work = Workspace(lanes)
        self.planes: dict[int, list[int]] = {}
        self.data: list[np.ndarray[Any, Any]] = []
        self.length = 0
        self.masks: dict[tuple[int, ...], int] = {}
        self.steps: list[int] = []
        self.macs = 0
        self.far: list[int] = []  # where the steps of convolutions say whether what they read is far

    def build(self) -> Program:
        """The program."""
        last: dict[int, int] = {}  # where a plane is read last, by value
        for index, layer in enumerate(self.layers):
            for value in self._sources(layer):
                last[value] = index
        last |= dict.fromkeys(self.chain.outputs, len(self.layers))
        held: dict[int, int] = {}  # how many values a plane is part of
        for value in range(self.chain.inputs):
            self._take(value, held)
            self._input(value)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, Cat):
                self._share(layer.y, [p for x in layer.xs for p in self.planes[x]], held)
            elif isinstance(layer, Select):
                self._share(layer.y, [self.planes[layer.x][c] for c in layer.channels], held)
            else:
                over = self._overwritten(layer, index, last, held)
                if over is None:
                    self._take(layer.y, held)
                else:  # its planes become the result's: half the memory to go through
                    self._share(layer.y, self.planes[over], held)
                self._write(layer)
            for value in {layer.y, *self._sources(layer)}:
                if last.get(value, index) <= index:
                    self._drop(value, held)
        for place, value in enumerate(self.chain.outputs):
            self._output(place, value)
        is_far = self.work.floats + self.packed.floats > 2 * CACHED
        for place in self.far:
            self.steps[place] = is_far
        if max(self.work.floats, self.packed.floats) > LARGEST:
            raise InputError(f"a chain needs {4 * self.work.floats / 1e9:.1f} GB for an image; 8 GB is the most.")
        first = self.length
        steps = np.concatenate([*self.data, np.array([*self.steps, 0, 0], np.int32)]).astype(np.int32)
        floats = self.work.floats + 64 * self.lanes
        return Program(steps, first, floats, self.macs, tuple(self.shapes[value] for value in self.chain.outputs))

    def _overwritten(self, layer: Layer | Phase, index: int, last: dict[int, int], held: dict[int, int]) -> int | None:
        """A value that is read for the last time, and position by position: its result may take its place."""
        value = layer.residual if isinstance(layer, Conv) else layer.x if isinstance(layer, (Map, Scale)) else None
        if (
            value is None
            or len(self.shapes[value]) < 3
            or last[value] > index
            or any(held[p] > 1 for p in self.planes[value])
        ):
            return None
        is_read_elsewhere = isinstance(layer, Conv) and any(tap.value == value for tap in self.taps[layer])
        return None if is_read_elsewhere else value

    def _sources(self, layer: Layer | Phase) -> set[int]:
        if isinstance(layer, Phase):
            return {layer.x}
        if isinstance(layer, Conv):
            return {tap.value for tap in self.taps[layer]} | (set() if layer.residual is None else {layer.residual})
        return set(reads(layer))

    def _geometries(self) -> Geometries:
        found = Geometries(self.shapes)
        for layer in self.layers:
            if isinstance(layer, Scale):
                found.tie(layer.y, layer.x)
            for value in self._sources(layer) if isinstance(layer, (Conv, Map, Cat, Select)) else ():
                if len(self.shapes[value]) == 3:
                    found.tie(layer.y, value)
        for layer, taps in self.taps.items():
            _, rows, columns = self.shapes[layer.y]
            for tap in taps:
                geometry, (_, height, width) = found.of(tap.value), self.shapes[tap.value]
                geometry.top, geometry.left = max(geometry.top, -tap.dy), max(geometry.left, -tap.dx)
                geometry.bottom = max(geometry.bottom, rows + tap.dy - height)
                geometry.right = max(geometry.right, columns + tap.dx - width)
        return found

    def _take(self, value: int, held: dict[int, int]) -> None:
        shape = self.shapes[value]
        if len(shape) == 3:
            planes = self.work.planes(self.geometries.of(value), shape, fresh=value in self.empty)
            self._share(value, planes, held)
        else:
            self.planes[value] = [self.work.take(shape[0] + self.lanes)]

    def _share(self, value: int, planes: list[int], held: dict[int, int]) -> None:
        self.planes[value] = planes
        for plane in planes:
            held[plane] = held.get(plane, 0) + 1

    def _drop(self, value: int, held: dict[int, int]) -> None:
        if len(self.shapes[value]) < 3 or value in self.empty:
            return
        for plane in self.planes.pop(value):
            held[plane] -= 1
            if held[plane] == 0:
                self.work.release(self.geometries.of(value), self.shapes[value], [plane])

    def _step(self, op: int, *fields: int) -> None:
        self.steps += [op, len(fields) + 2, *fields]

    def _datum(self, values: Any) -> int:
        """The place of an array in the program."""
        array, place = np.asarray(values, dtype=np.int32).reshape(-1), self.length
        self.data.append(array)
        self.length += array.size
        return place

    def _positions(self, value: int) -> tuple[int, int]:
        """(from the first to the last pixel of a plane, the place of its mask)."""
        shape = self.shapes[value]
        rows, columns = shape[1:] if len(shape) == 3 else (1, shape[0])
        pitch = self.geometries.of(value).pitch if len(shape) == 3 else columns
        positions = (rows - 1) * pitch + columns
        key = (rows, columns, pitch)
        if key not in self.masks:
            place = np.arange(-(-positions // self.lanes) * self.lanes)
            self.masks[key] = self._datum(np.where((place % pitch < columns) & (place < positions), -1, 0))
        return positions, self.masks[key]

    def _copy(self, source: int, target: int, shape: Shape, rows: tuple[int, int, int], pairs: list[int]) -> None:
        """Rows of planes: `rows` are the steps of a row and of a column to read, and of a row to write."""
        self._step(COPY, source, target, shape[1], shape[2], *rows, len(pairs) // 2, *pairs)

    def _input(self, value: int) -> None:
        shape, space = self.shapes[value], INPUT + 2 * value
        if len(shape) == 1:
            self._copy(space, WORK, (1, 1, *shape), (shape[0], 1, shape[0]), [0, self.planes[value][0]])
            return
        channels, rows, columns = shape
        pairs = [place for c in range(channels) for place in (c * rows * columns, self.planes[value][c])]
        self._copy(space, WORK, shape, (columns, 1, self.geometries.of(value).pitch), pairs)

    def _output(self, place: int, value: int) -> None:
        shape, space = self.shapes[value], OUTPUT + 2 * place
        if len(shape) == 1:
            self._copy(WORK, space, (1, 1, *shape), (shape[0], 1, shape[0]), [self.planes[value][0], 0])
        else:
            self._copy(WORK, space, shape, *self._gathered(value, 0))

    def _gathered(self, value: int, start: int) -> tuple[tuple[int, int, int], list[int]]:
        """The steps and the pairs of a copy of all planes to places behind each other."""
        _, rows, columns = self.shapes[value]
        pairs = [p for c, plane in enumerate(self.planes[value]) for p in (plane, start + c * rows * columns)]
        return (self.geometries.of(value).pitch, 1, columns), pairs

    def _write(self, layer: Layer | Phase) -> None:
        planes, shapes = self.planes, self.shapes
        if isinstance(layer, Conv):
            self._conv(layer)
        elif isinstance(layer, Phase):
            if layer.y in self.empty:
                return
            pitch, (down, across) = self.geometries.of(layer.x).pitch, layer.stride
            start = layer.row * pitch + layer.column
            pairs = [p for a, b in zip(planes[layer.x], planes[layer.y], strict=True) for p in (a + start, b)]
            steps = (down * pitch, across, self.geometries.of(layer.y).pitch)
            self._copy(WORK, WORK, shapes[layer.y], steps, pairs)
        elif isinstance(layer, Map):
            second = layer.x if layer.second is None else layer.second
            rows = zip(planes[layer.x], planes[second], planes[layer.y], self.packed.places[layer], strict=True)
            fields = [place for row in rows for place in row]
            positions, mask = self._positions(layer.y)
            activation = ACTIVATIONS.index(layer.activation)
            self._step(MAP, positions, activation, mask, layer.second is not None, len(fields) // 4, *fields)
        elif isinstance(layer, Scale):
            rows3 = zip(planes[layer.x], planes[layer.factors], planes[layer.y], strict=True)
            fields = [place for row in rows3 for place in row]
            self._step(SCALE, *self._positions(layer.y), len(fields) // 3, *fields)
        elif isinstance(layer, Pool):
            pairs = [p for pair in zip(planes[layer.x], planes[layer.y], strict=True) for p in pair]
            sizes = [size for v in (layer.x, layer.y) for size in (*shapes[v][1:], self._pitch(v))]
            across = layer.stride[1]
            wide = max(shapes[layer.x][2] + 2 * layer.padding[1], shapes[layer.y][2] * across + layer.kernel[1])
            part = shapes[layer.y][2] + layer.kernel[1] // across + 2 * self.lanes
            each = wide + 2 * self.lanes + (across + 1) * part
            scratch = self.work.take(each * shapes[layer.x][0])
            windows = (*layer.kernel, *layer.stride, *layer.padding, layer.counts_pad, scratch, each, len(pairs) // 2)
            self._step(POOL, layer.is_max, *sizes, *windows, *pairs)
        elif isinstance(layer, Mean):
            pairs = [p for pair in zip(planes[layer.x], planes[layer.y], strict=True) for p in pair]
            positions = self._positions(layer.x)[0]
            self._step(MEAN, positions, shapes[layer.x][1] * shapes[layer.x][2], len(pairs) // 2, *pairs)
        elif isinstance(layer, Flatten):
            self._copy(WORK, WORK, shapes[layer.x], *self._gathered(layer.x, planes[layer.y][0]))
        elif isinstance(layer, Linear):
            filters, features = layer.weight.shape
            weight, bias = self.packed.places[layer]
            activation = ACTIVATIONS.index(layer.activation)
            self._step(LINEAR, features, filters, planes[layer.x][0], weight, bias, activation, planes[layer.y][0])

    def _pitch(self, value: int) -> int:
        return self.geometries.of(value).pitch

    def _conv(self, layer: Conv) -> None:
        tiles, taps = self.packed.tiles[layer], self.taps[layer]
        outputs = self.planes[layer.y]
        residuals = outputs if layer.residual is None else self.planes[layer.residual]
        pitch = self._pitch(layer.y)
        starts = np.array([self.planes[tap.value] for tap in taps]).T  # [C, taps]
        offsets = starts + np.array([tap.dy * pitch + tap.dx for tap in taps])
        places = []
        lists: dict[tuple[int, ...], int] = {}
        for tile, weights, bias in tiles:
            if tile.channels not in lists:
                lists[tile.channels] = self._datum(offsets[list(tile.channels)])
            filters = list(tile.filters)
            head = [len(filters), len(tile.channels) * len(taps), lists[tile.channels], weights, bias]
            self.macs += head[0] * head[1] * math.prod(self.shapes[layer.y][1:])
            places.append(self._datum([*head, *(outputs[o] for o in filters), *(residuals[o] for o in filters)]))
        positions, mask = self._positions(layer.y)
        phases = len({tap.value for tap in taps})
        read = max(phases * len({c for tile, _, _ in tiles for c in tile.channels}), 1)
        block = max(CACHED // read, SMALLEST_BLOCK) // self.lanes * self.lanes
        by_block = read * positions > sum(len(tile.filters) * len(tile.channels) for tile, _, _ in tiles) * len(taps)
        activation = ACTIVATIONS.index(layer.activation)
        self.far.append(len(self.steps) + 8)
        head = [positions, block, by_block, activation, mask, layer.residual is not None, False, len(places)]
        self._step(CONV, *head, *places)
