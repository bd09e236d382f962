"""A state_dict as streams: each weight in the smallest of the forms it may take, everything else together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from torch import Tensor

from dspfx.config import BlockConfig
from dspfx.errors import StorageError
from dspfx.method.blocks import Tiling
from dspfx.method.levels import Sample, slope_for
from dspfx.storage.blockcode import Counts, Cut, cut_weight, decode_weight, encode_weight
from dspfx.storage.envelope import HALF, KINDS, PLAIN, Stream, coding_of
from dspfx.storage.report import CompressedRow
from dspfx.storage.streams import compress, to_planes
from dspfx.storage.words import Kind, Precision, to_floats, to_words

_SHAPES = ((4, 4), (1, 4), (4, 1), (8, 8), (16, 1), (1, 16))
_LAYOUTS = ("planes", "gemm")
_LARGE = 1 << 16  # bytes from which a tensor gets a stream of its own
_BY_DTYPE = {kind.dtype: kind for kind in KINDS.values()}


@dataclass
class Compressed:
    """The streams and frames so far, what they took in memory, and what to report of them."""

    streams: list[Stream] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    rows: list[CompressedRow] = field(default_factory=list)
    dense_bytes: int = 0

    def add(self, stream: Stream, frame: bytes, row: CompressedRow) -> None:
        self.streams.append(stream)
        self.frames.append(frame)
        self.rows.append(row)
        self.dense_bytes += row.dense_bytes


def compress_state(
    state: dict[str, Tensor],
    weights: set[str],
    exact: set[str],
    blocks: BlockConfig | None,
    precision: Precision,
    halve_rest: bool,
) -> Compressed:
    """Streams of all tensors: `weights` by blocks, those in `exact` plain, the small ones together by element type."""
    found = Compressed()
    together: dict[tuple[Kind, bool], dict[str, Tensor]] = {}
    cuts: dict[str, Cut] = {}
    for name, value in state.items():
        kind, shape = _BY_DTYPE[value.dtype], tuple(value.shape)
        if name in weights - exact and kind.is_weight and value.dim() >= 2 and value.numel():
            with _naming(name):
                cuts[name] = cut_weight(to_words(value), shape, kind, _tilings(shape, blocks), precision)
    precision = _priced(precision, [s for name, cut in cuts.items() for s in cut.samples(_BY_DTYPE[state[name].dtype])])
    for name, value in state.items():
        kind = _BY_DTYPE[value.dtype]
        if name in cuts:
            with _naming(name):
                _add_weight(found, name, value, kind, cuts.pop(name), precision)
            continue
        halve = halve_rest and name not in exact and kind.halves and _fits_half(value, kind)
        if value.nbytes >= _LARGE:
            _add_plain(found, {name: value}, kind, halve)
        else:
            together.setdefault((kind, halve), {})[name] = value
    for (kind, halve), tensors in together.items():
        _add_plain(found, tensors, kind, halve)
    return found


def _tilings(shape: tuple[int, ...], blocks: BlockConfig | None) -> list[Tiling]:
    """The tilings to try, each once; a block is never larger than the weight."""
    asked = [(blocks.shape, blocks.layout)] if blocks else product(_SHAPES, _LAYOUTS)
    found: dict[object, Tiling] = {}
    for (a, b), layout in asked:
        _, rows, columns = Tiling(shape, (1, 1), layout).planes
        tiling = Tiling(shape, (min(a, rows), min(b, columns)), layout)
        same = tiling.planes if len(shape) > 2 and np.prod(shape[2:]) > 1 else ()
        found.setdefault((tiling.block, same), tiling)
    return list(found.values())


def _priced(precision: Precision, samples: list[Sample]) -> Precision:
    """With the price of a bit at which all these values take as many as they may."""
    if precision.bits is None or not samples:
        return precision
    return replace(precision, slope=slope_for(samples, precision.bits))


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except StorageError as reason:
        raise StorageError(f"{name}: {reason}, or name its layer in BlockConfig.skip.") from reason


def _add_weight(found: Compressed, name: str, value: Tensor, kind: Kind, cut: Cut, precision: Precision) -> None:
    words, shape = to_words(value), tuple(value.shape)
    tiling, parts, counts = encode_weight(cut, shape, kind, precision)
    coding, frame = coding_of(tiling), compress(parts)
    read = decode_weight(b"".join(parts), shape, kind, tiling)
    error = 0.0 if np.array_equal(read, words) else _distance(to_floats(words, kind), to_floats(read, kind))
    assert not precision.exact or np.array_equal(read, words)
    told: Counts | None = counts
    if precision.exact and (tiling is None or counts.free * 2 > sum((counts.free, counts.unified, counts.pruned))):
        plain = compress(to_planes(words, rotate=True))
        if len(plain) <= len(frame):
            coding, frame, told = PLAIN, plain, None
    row = CompressedRow(name, shape, coding, told, value.nbytes, len(frame), error)
    found.add(Stream(coding, kind, {name: shape}, len(frame)), frame, row)


def _add_plain(found: Compressed, tensors: dict[str, Tensor], kind: Kind, halve: bool) -> None:
    words = np.concatenate([to_words(value) for value in tensors.values()])
    error = 0.0
    if halve:
        values = to_floats(words, kind)
        halves = values.astype(np.float16)
        error = _distance(values, halves.astype(np.float64))
        words = halves.view(np.uint16)
    frame = compress(to_planes(words, kind.is_float))
    coding, (name, *more) = HALF if halve else PLAIN, tensors
    shape = tuple(tensors[name].shape) if not more else ()
    called = f"{len(tensors)} tensors of {kind.name}" if more else name
    row = CompressedRow(called, shape, coding, None, sum(v.nbytes for v in tensors.values()), len(frame), error)
    shapes = {n: tuple(v.shape) for n, v in tensors.items()}
    found.add(Stream(coding, kind, shapes, len(frame)), frame, row)


def _fits_half(value: Tensor, kind: Kind) -> bool:
    """True where float16 rounds every value as it rounds its normal numbers, by at most 2 ** -11 of it."""
    values = to_floats(to_words(value), kind)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool((np.abs(values.astype(np.float16) - values) <= np.abs(values) * 2.0**-11).all())


def _distance(written: np.ndarray, read: np.ndarray) -> float:
    """||written - read|| / ||written||."""
    length = float(np.linalg.norm(written))
    return float(np.linalg.norm(written - read)) / length if length else 0.0
