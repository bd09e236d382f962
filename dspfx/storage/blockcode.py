"""One weight as a content: which weights are dead, what each block is, and the magnitudes, signs and free weights.

    dead map | a class for each block with a living weight | |w| of each unified block | its signs | the free weights

A weight is dead where its bits are all zero and the map says so; the rest lives, in blocks of one of three classes:
pruned (all bits zero), unified (the same bits but for the sign), free. docs/format.md defines every byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dspfx.errors import StorageError
from dspfx.method.blocks import FREE, PRUNED, UNIFIED, Tiling
from dspfx.method.levels import Sample
from dspfx.storage.deadmap import ALL_LIVE, PAIRS, WEIGHTS, decode_map, encode_map, map_bits
from dspfx.storage.streams import Bytes, Cursor, pack, pack_trits, packed_size, unpack, unpack_trits
from dspfx.storage.words import Kind, Precision, Words, decode_words, encode_words, to_floats

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Counts:
    """What a weight is made of: blocks of each class (free counts one where there are no blocks), dead weights."""

    free: int
    unified: int
    pruned: int
    dead: int


@dataclass(frozen=True)
class Cut:
    """A way to cut a weight into blocks: their words, who lives, the class of each block, and an estimate of bits."""

    tiling: Tiling | None
    map_kind: int
    dead: Mask
    blocks: Words
    living: Mask
    classes: Bytes
    bits: float

    def magnitudes(self, kind: Kind) -> tuple[Words, NDArray[np.float64]]:
        """Of each unified block the word of |w|, and how many weights live there."""
        unified = self.classes == UNIFIED
        words = self.blocks[unified]
        if not len(words):
            return words.reshape(-1)[:0], np.zeros(0)
        return (words & ~words.dtype.type(kind.sign)).max(1), self.living[unified].sum(1).astype(np.float64)

    def free(self) -> Words:
        """The living weights of free blocks."""
        free = self.classes == FREE
        return self.blocks[free][self.living[free]]

    def samples(self, kind: Kind) -> list[Sample]:
        """The values of its lists, those that there are."""
        (magnitudes, weights), free = self.magnitudes(kind), self.free()
        found = [Sample(to_floats(magnitudes, kind), weights)] if len(magnitudes) else []
        return found + ([Sample.of(to_floats(free, kind))] if len(free) else [])


def cut_weight(
    words: Words, shape: tuple[int, ...], kind: Kind, tilings: Iterable[Tiling], precision: Precision
) -> Cut:
    """By the tiling that is estimated smallest, or by none; StorageError for what cannot be quantised."""
    if not precision.exact:
        words = np.where(words == kind.sign, words & 0, words)  # the negative zeros that multiplying by a mask leaves
        if not np.isfinite(to_floats(words, kind)).all():
            raise StorageError("a weight is not finite, so it cannot be quantised; leave out bits and values")
    return min(_cuts(words, shape, kind, list(tilings), precision), key=lambda found: found.bits)


def encode_weight(
    cut: Cut, shape: tuple[int, ...], kind: Kind, precision: Precision
) -> tuple[Tiling | None, list[bytes], Counts]:
    """The tiling, the parts of the content, and what the weight is made of."""
    return cut.tiling, _parts(cut, shape, kind, precision), _count(cut)


def decode_weight(content: bytes, shape: tuple[int, ...], kind: Kind, tiling: Tiling | None) -> Words:
    """Undoes `encode_weight`; StorageError where the content is none."""
    cursor = Cursor(content)
    dead = decode_map(cursor, shape)
    blocks, living = _cut(np.zeros(math.prod(shape), f"u{kind.size}"), dead, tiling)
    has_life = living.any(1)
    classes = np.full(len(blocks), PRUNED, np.uint8)
    number = int(has_life.sum())
    packed = cursor.take(packed_size(number, 5), "classes") if tiling else np.zeros(number, np.uint8)
    classes[has_life] = unpack_trits(packed, number) if tiling else FREE
    unified, free = classes == UNIFIED, classes == FREE
    magnitudes = decode_words(cursor, int(unified.sum()), kind, "magnitudes")
    if (magnitudes & kind.sign).any():
        raise StorageError("one of its magnitudes is negative")
    if magnitudes.size:
        of_block = living[unified]
        number = int(of_block.sum())
        signs = unpack(cursor.take(packed_size(number, 8), "signs"), number, 8)
        values = np.broadcast_to(magnitudes[:, None], of_block.shape)[of_block]
        values |= signs.astype(values.dtype) << kind.size * 8 - 1
        _put(blocks, unified, of_block, values)
    of_block = living if free.all() else living[free]
    number = len(of_block) * of_block.shape[1] if (whole := of_block.all()) else int(of_block.sum())
    values = decode_words(cursor, number, kind, "free weights")
    cursor.end()
    if whole and free.all():
        blocks = values.reshape(blocks.shape)
    elif number:
        _put(blocks, free, of_block, values)
    return blocks.reshape(-1) if tiling is None else _join(blocks, tiling, kind)


def most_bytes(shape: tuple[int, ...], kind: Kind) -> int:
    """No content of such a weight is longer, however it is written."""
    return 2 * kind.size * math.prod(shape) + 8 * shape[0] + 8192


def _put(blocks: Words, rows: Mask, cells: Mask, values: Words) -> None:
    """The values, into the cells of these rows."""
    if cells.all():
        blocks[rows] = values.reshape(cells.shape)
    else:
        some = np.zeros(cells.shape, blocks.dtype)
        some[cells] = values
        blocks[rows] = some


def _split(array: Words, tiling: Tiling) -> Words:
    size = array.dtype.itemsize
    signed = torch.from_numpy(array.view(f"i{size}") if size > 1 else array)
    return tiling.split(signed.reshape(tiling.shape)).numpy().view(array.dtype)


def _join(blocks: Words, tiling: Tiling, kind: Kind) -> Words:
    return tiling.join(torch.from_numpy(blocks.view(f"i{kind.size}"))).reshape(-1).numpy().view(blocks.dtype)


def _cut(words: Words, dead: Mask, tiling: Tiling | None) -> tuple[Words, Mask]:
    """[blocks, weights of a block], of the words and of who lives; one block where there is no tiling."""
    if tiling is None:
        return words.reshape(1, -1), ~dead.reshape(1, -1)
    return _split(words, tiling), _split((~dead).astype(np.uint8), tiling).view(bool)


def _cuts(
    words: Words, shape: tuple[int, ...], kind: Kind, tilings: list[Tiling], precision: Precision
) -> Iterable[Cut]:
    zero = words == 0
    pairs = np.broadcast_to(zero.reshape(*shape[:2], -1).all(2)[:, :, None], (*shape[:2], math.prod(shape[2:])))
    maps = {ALL_LIVE: np.zeros_like(zero), PAIRS: pairs.reshape(-1), WEIGHTS: zero}
    value_bits = _value_bits(words, kind, precision)
    for map_kind, dead in maps.items():
        if map_kind == ALL_LIVE or dead.any():
            cost = map_bits(map_kind, dead, shape)
            for tiling in (None, *tilings):
                yield _estimated(words, dead, kind, tiling, map_kind, cost, value_bits)


def _value_bits(words: Words, kind: Kind, precision: Precision) -> float:
    """What a value costs, roughly: entropy coding takes a few bits off the exponents of exact ones."""
    if precision.bits is not None:
        return precision.bits
    distinct = len(np.unique(words[:65536] & ~words.dtype.type(kind.sign)))
    exact = math.log2(distinct) + 1 if distinct <= 128 else (kind.size * 8 - 5)
    return min(exact, 12) if precision.half else exact


def _estimated(
    words: Words, dead: Mask, kind: Kind, tiling: Tiling | None, map_kind: int, bits: float, value_bits: float
) -> Cut:
    blocks, living = _cut(words, dead, tiling)
    if tiling is None:
        classes = np.full(1, FREE if living.any() else PRUNED, np.uint8)
        return Cut(None, map_kind, dead, blocks, living, classes, bits + living.sum() * value_bits)
    classes, alive = _classify(blocks, living, kind)
    number = np.bincount(classes[alive > 0], minlength=3)
    shares = number[number > 0] / max(number.sum(), 1)
    bits += number.sum() * min(1.6, -(shares * np.log2(shares)).sum() + 0.05)
    bits += number[UNIFIED] * value_bits + alive[classes == UNIFIED].sum() + alive[classes == FREE].sum() * value_bits
    return Cut(tiling, map_kind, dead, blocks, living, classes, bits)


def _classify(blocks: Words, living: Mask, kind: Kind) -> tuple[Bytes, NDArray[np.int64]]:
    """The class of each block, and its living weights. One living weight is free: a sign and |w| are no less."""
    magnitude = blocks & ~blocks.dtype.type(kind.sign)
    highest = magnitude.max(1)
    lowest = np.where(living, magnitude, blocks.dtype.type(kind.sign)).min(1)
    alive = living.sum(1)
    classes = np.full(len(blocks), FREE, np.uint8)
    classes[(lowest == highest) & (alive > 1)] = UNIFIED
    classes[~blocks.any(1)] = PRUNED
    return classes, alive


def _parts(found: Cut, shape: tuple[int, ...], kind: Kind, precision: Precision) -> list[bytes]:
    """The content, cut where one kind of number ends and another one begins."""
    parts = encode_map(found.map_kind, found.dead, shape)
    if found.tiling is not None:
        parts.append(pack_trits(found.classes[found.living.any(1)]))
    magnitudes, weights = found.magnitudes(kind)
    if len(magnitudes):
        unified = found.classes == UNIFIED
        head, *body = encode_words(magnitudes, kind, precision, weights)
        signs = (found.blocks[unified][found.living[unified]] >> kind.size * 8 - 1).astype(np.uint8)
        parts = [*parts[:-1], parts[-1] + head, *body, pack(signs, 8)]
    values = found.free()
    if len(values):
        head, *body = encode_words(values, kind, precision)
        parts = [*parts[:-1], parts[-1] + head, *body]
    return parts


def _count(found: Cut) -> Counts:
    number = np.bincount(found.classes, minlength=3)
    return Counts(int(number[FREE]), int(number[UNIFIED]), int(number[PRUNED]), int(found.dead.sum()))
