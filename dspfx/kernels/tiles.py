"""How a convolution's filters are put into tiles: filters that are computed together from the same input channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dspfx.kernels.chain import Floats

Mask = np.ndarray[Any, np.dtype[np.bool_]]
MOST_GROUPS = 64  # beyond, the zeros have no structure worth finding
OVERHEAD = 1.0  # of a tile, in filters: its loads of the input


@dataclass(frozen=True)
class Tile:
    """Filters that read the same channels."""

    filters: tuple[int, ...]
    channels: tuple[int, ...]


def conv_tiles(weight: Floats, groups: int, most: int) -> list[Tile]:
    """The tiles of a weight [O, C / groups, kh, kw], group by group, with the channels of the whole input."""
    filters, channels = len(weight) // groups, weight.shape[1]
    tiles = []
    for g in range(groups):
        for tile in tiles_of((weight[g * filters : (g + 1) * filters] != 0).any((2, 3)), most):
            moved = tuple(o + g * filters for o in tile.filters), tuple(c + g * channels for c in tile.channels)
            tiles.append(Tile(*moved))
    return tiles


def tiles_of(pairs: Mask, most: int) -> list[Tile]:
    """Tiles of at most `most` filters that compute every pair of bool [O, C].

    Filters with equal rows are a group; groups are merged where one tile over the channels of both is cheaper. A filter
    that reads nothing is in a tile without channels.
    """
    rows, number = np.unique(pairs, axis=0, return_inverse=True)
    number = number.reshape(-1)  # numpy 2.0 returns another shape
    groups = [(np.flatnonzero(number == i), row) for i, row in enumerate(rows)]
    if len(groups) > MOST_GROUPS:
        groups = [(np.arange(len(pairs)), pairs.any(0))]
    groups = _merged(groups, most)
    tiles = []
    for filters, channels in groups:
        count = -(-len(filters) // most)
        for part in np.array_split(filters, count):  # of nearly equal size
            tiles.append(Tile(tuple(part.tolist()), tuple(np.flatnonzero(channels).tolist())))
    return tiles


def _merged(groups: list[tuple[Any, Mask]], most: int) -> list[tuple[Any, Mask]]:
    """The groups after the merges that save the most, one after another."""
    groups = list(groups)
    while len(groups) > 1:
        rows = np.stack([row for _, row in groups]).astype(np.int64)
        sizes = np.array([len(filters) for filters, _ in groups])
        widths = rows.sum(1)
        unions = widths[:, None] + widths[None] - rows @ rows.T
        alone = widths * (sizes + OVERHEAD * -(-sizes // most))
        both = sizes[:, None] + sizes[None]
        saved = alone[:, None] + alone[None] - unions * (both + OVERHEAD * -(-both // most))
        np.fill_diagonal(saved, -1)
        a, b = np.unravel_index(int(saved.argmax()), saved.shape)
        if saved[a, b] <= 0:
            return groups
        first, second = groups[a], groups[b]
        groups = [group for i, group in enumerate(groups) if i not in (a, b)]
        groups.append((np.sort(np.concatenate([first[0], second[0]])), first[1] | second[1]))
    return groups
