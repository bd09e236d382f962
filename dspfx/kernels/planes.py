"""Where the planes of a chain's values lie in the workspace.

A plane is laid out as native.cpp describes: `pitch` floats a row, the pixels first, then zeros; zero rows above and
below. Values between which positions are carried over (the input and the output of a convolution of stride 1, the
summands of an addition) share one geometry.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from dspfx.kernels.chain import Shape

LINE = 16  # floats of a cache line
PAGE = 1024  # floats; planes a multiple of this apart would compete for the same few lines of the cache


@dataclass
class Geometry:
    """The borders that the readers of some values need, and the sizes of the largest of them."""

    top: int = 0
    left: int = 0
    bottom: int = 0
    right: int = 0
    columns: int = 0

    @property
    def pitch(self) -> int:
        """Floats from a row to the next."""
        return self.columns + max(self.left, self.right)

    @property
    def front(self) -> int:
        """Floats before pixel (0, 0), which starts a cache line."""
        return -(-(self.top * self.pitch + self.left) // LINE) * LINE

    def floats(self, rows: int, lanes: int) -> int:
        """Of a plane of so many rows: a last vector may reach behind its border."""
        size = self.front + (rows + self.bottom) * self.pitch + self.right + lanes
        size = -(-size // LINE) * LINE
        return size + LINE if size % PAGE == 0 else size

    def absorb(self, other: Geometry) -> None:
        """Becomes the geometry of the other's values, too."""
        for name in ("top", "left", "bottom", "right", "columns"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


class Geometries:
    """Value -> Geometry, by union-find."""

    def __init__(self, shapes: dict[int, Shape]) -> None:
        self.parent = {value: value for value in shapes}
        self.known = {value: Geometry(columns=shape[-1]) for value, shape in shapes.items() if len(shape) == 3}

    def of(self, value: int) -> Geometry:
        """The geometry that a value shares."""
        return self.known[self._root(value)]

    def tie(self, a: int, b: int) -> None:
        """Both have one geometry from now on."""
        a, b = self._root(a), self._root(b)
        if a != b:
            self.parent[b] = a
            self.known[a].absorb(self.known.pop(b))

    def _root(self, value: int) -> int:
        while self.parent[value] != value:
            value = self.parent[value]
        return value


class Workspace:
    """Planes by their offsets; what is freed is given out again to values of the same layout, whose zeros it keeps."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.floats = 0
        self.free: dict[tuple[int, ...], list[int]] = defaultdict(list)

    def planes(self, geometry: Geometry, shape: Shape, fresh: bool = False) -> list[int]:
        """The places of pixel (0, 0) of new planes, one a channel of `shape`; `fresh` ones hold nothing but zeros."""
        spare = [] if fresh else self.free[self._key(geometry, shape)]
        reused = [spare.pop() for _ in range(min(len(spare), shape[0]))][::-1]
        size = geometry.floats(shape[1], self.lanes)
        return sorted(reused) + [self.take(size) + geometry.front for _ in range(shape[0] - len(reused))]

    def release(self, geometry: Geometry, shape: Shape, planes: list[int]) -> None:
        """These planes of a value of this shape are read no more."""
        self.free[self._key(geometry, shape)] += planes

    def take(self, floats: int) -> int:
        """The place of so many floats, for good."""
        place = self.floats
        self.floats += -(-floats // LINE) * LINE
        return place

    def _key(self, geometry: Geometry, shape: Shape) -> tuple[int, ...]:
        return (geometry.pitch, geometry.front, geometry.floats(shape[1], self.lanes), *shape[1:])
