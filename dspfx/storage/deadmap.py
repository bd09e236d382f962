"""Which weights of a layer are dead, as bytes: pairs of filter and input channel by distinct rows, or single weights.

Filters of one group lose the same input channels, so there are as many distinct rows as groups, however many filters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspfx.errors import StorageError
from dspfx.storage.streams import Cursor, pack, packed_size, unpack

ALL_LIVE, PAIRS, WEIGHTS = range(3)


def encode_map(kind: int, dead: NDArray[np.bool_], shape: tuple[int, ...]) -> list[bytes]:
    """The map's parts, the first of which begins with its kind."""
    if kind == ALL_LIVE:
        return [bytes([ALL_LIVE])]
    if kind == WEIGHTS:
        return [bytes([WEIGHTS]), pack(dead.view(np.uint8), 8)]
    rows, row_of = _distinct(dead, shape)
    width = _width(len(rows))
    head = bytes([PAIRS]) + np.array(len(rows), "<u4").tobytes()
    packed = b"".join(pack(row, 8) for row in rows.astype(np.uint8))
    return [head + packed, row_of.astype(f"<u{width}").tobytes()]


def decode_map(cursor: Cursor, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """bool [weights]: which are dead. Undoes `encode_map`."""
    kind, weights = cursor.number("u1", "kind of map"), math.prod(shape)
    if kind == ALL_LIVE:
        return np.zeros(weights, bool)
    if kind == WEIGHTS:
        return unpack(cursor.take(packed_size(weights, 8), "map"), weights, 8).view(bool)
    if kind != PAIRS:
        raise StorageError(f"its map of dead weights is of kind {kind}, which does not exist")
    filters, channels = shape[:2]
    number = int(cursor.number("<u4", "map"))
    if not 1 <= number <= filters:
        raise StorageError(f"its map has {number} distinct rows for {filters} filters")
    packed = cursor.take(number * packed_size(channels, 8), "map").reshape(number, -1)
    rows = np.unpackbits(packed, axis=1, bitorder="little")
    if rows[:, channels:].any():
        raise StorageError("bits behind the last entry of a map are set")
    width = _width(number)
    row_of = cursor.take(filters * width, "map").view(f"<u{width}")
    if row_of.max() >= number:
        raise StorageError(f"a filter has row {row_of.max()} of a map of {number}")
    return np.repeat(rows[row_of, :channels].reshape(-1), math.prod(shape[2:])).view(bool)


def map_bits(kind: int, dead: NDArray[np.bool_], shape: tuple[int, ...]) -> float:
    """What the map costs, roughly."""
    if kind == ALL_LIVE:
        return 8.0
    if kind == PAIRS:
        rows, _ = _distinct(dead, shape)
        return 40.0 + len(rows) * shape[1] + shape[0] * math.log2(max(len(rows), 1))
    share = float(dead.mean())
    return 8.0 - dead.size * sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def _distinct(dead: NDArray[np.bool_], shape: tuple[int, ...]) -> tuple[NDArray[np.bool_], NDArray[Any]]:
    """The distinct rows [rows, C] and the row of each filter [O]; a pair is dead where its first weight is."""
    pairs = dead.reshape(*shape[:2], -1)[:, :, 0]
    rows, row_of = np.unique(pairs, axis=0, return_inverse=True)
    return rows, row_of.reshape(-1)


def _width(rows: int) -> int:
    """Bytes of a row's number."""
    return 1 if rows <= 2**8 else 2 if rows <= 2**16 else 4
