"""Tensors as words, unsigned integers of their elements' bits, and lists of words as bytes of a compressed file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspfx.errors import StorageError
from dspfx.method import levels
from dspfx.storage.streams import Bytes, Cursor, compress, from_planes, pack, packed_size, to_planes, unpack

Words = NDArray[np.unsignedinteger]
PLAIN, HALF, TABLE = range(3)  # how a list of words is written
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALL = 4096  # lists up to this length may be smaller exact than quantised
_GLANCE = 65536


@dataclass(frozen=True)
class Kind:
    """An element type: its name in the file, torch's, the bytes of a word, and whether a word is a float."""

    name: str
    dtype: torch.dtype
    size: int
    is_float: bool

    @property
    def sign(self) -> int:
        """The sign's bit in a float's word."""
        return 1 << self.size * 8 - 1

    @property
    def is_weight(self) -> bool:
        """True for what a weight in blocks may be made of."""
        return self.is_float and not self.dtype.is_complex

    @property
    def halves(self) -> bool:
        """True where float16 is an abbreviation."""
        return self.dtype in (torch.float32, torch.float64)


def _kinds() -> dict[str, Kind]:
    integers = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float8_e4m3fn float8_e5m2"
    floats = "float16 bfloat16 float32 float64"
    kinds = [Kind(n, getattr(torch, n), getattr(torch, n).itemsize, False) for n in integers.split()]
    kinds += [Kind(n, getattr(torch, n), getattr(torch, n).itemsize, True) for n in floats.split()]
    kinds += [Kind("complex64", torch.complex64, 4, True), Kind("complex128", torch.complex128, 8, True)]
    return {kind.name: kind for kind in kinds}


KINDS = _kinds()  # a complex number is two words, its real and its imaginary part


@dataclass(frozen=True)
class Precision:
    """What writing may change of a list of words: nothing, or to float16, or to few values of so many bits.

    Attributes:
        bits: a value's, about.
        half: float16.
        slope: of `method.levels`, at which all values of the network take these bits.
    """

    bits: float | None = None
    half: bool = False
    slope: float = 0.0

    @property
    def exact(self) -> bool:
        """True where reading gives every bit back."""
        return self.bits is None and not self.half


def to_words(tensor: Tensor) -> Words:
    """The elements' words, in the order of the tensor's indices."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    size = flat.element_size()
    return flat.view(_INTEGERS[size]).numpy().view(f"u{size}")


def to_tensor(words: Words, kind: Kind, shape: tuple[int, ...]) -> Tensor:
    """Undoes `to_words`; StorageError at a bool that is neither 0 nor 1."""
    if kind.dtype is torch.bool and words.size and words.max() > 1:
        raise StorageError(f"a bool is the byte {words.max()}")
    flat = torch.from_numpy(words.view(f"i{kind.size}" if kind.size > 1 else "u1"))
    if kind.dtype.is_complex:
        return torch.view_as_complex(flat.view(kind.dtype.to_real()).reshape(*shape, 2))
    return flat.view(kind.dtype).reshape(shape)


def to_floats(words: Words, kind: Kind) -> NDArray[np.float64]:
    """The words' values."""
    return to_tensor(words, kind, (len(words),)).double().numpy()


def from_floats(values: NDArray[np.floating], kind: Kind) -> Words:
    """The words of the nearest values of that kind, ties to even."""
    return to_words(torch.from_numpy(np.ascontiguousarray(values)).to(kind.dtype))


def encode_words(
    words: Words, kind: Kind, precision: Precision, weights: NDArray[np.float64] | None = None
) -> list[bytes]:
    """A head and the parts behind it: the smallest way to write the words that `precision` allows.

    Args:
        words: of floats; finite unless exact.
        weights: how much each word's error counts; given for magnitudes, which are positive and stay so.
    """
    ways = []
    if precision.exact or len(words) <= _SMALL:
        ways.append([bytes([PLAIN]), *to_planes(words, rotate=True)])
    if len(words) <= _GLANCE or len(np.unique(words[:_GLANCE])) <= 256:
        table, indices = np.unique(words, return_inverse=True)
        ways += _indexed(bytes([TABLE]), table, indices.astype(np.uint8), kind) if len(table) <= 256 else []
    if precision.half:
        ways.append([bytes([HALF]), *to_planes(_halves(words, kind, weights is not None), rotate=True)])
    if precision.bits is not None:
        ways += _quantised(words, kind, precision, weights)
    ways = ways or [[bytes([PLAIN]), *to_planes(words, rotate=True)]]
    return min(ways, key=lambda parts: len(compress(parts))) if len(ways) > 1 else ways[0]


def decode_words(cursor: Cursor, number: int, kind: Kind, what: str) -> Words:
    """The words that `encode_words` wrote, of which there are as many."""
    if not number:
        return np.zeros(0, f"u{kind.size}")
    way = cursor.number("u1", f"kind of {what}")
    if way == PLAIN:
        return from_planes(cursor.take(number * kind.size, what), number, kind.size, rotate=True)
    if way == HALF and kind.halves:
        halves = from_planes(cursor.take(number * 2, what), number, 2, rotate=True).view(np.float16)
        return halves.astype(f"f{kind.size}").view(f"u{kind.size}")
    if way != TABLE:
        raise StorageError(f"its {what} are of kind {way}, which {kind.name} does not have")
    size = int(cursor.number("u1", f"levels of {what}")) + 1
    table: Words = cursor.take(size * kind.size, f"levels of {what}").view(f"<u{kind.size}")
    per_byte = int(cursor.number("u1", f"packing of {what}"))
    if per_byte not in (1, 2, 4, 8):
        raise StorageError(f"its {what} are packed {per_byte} a byte")
    indices = unpack(cursor.take(packed_size(number, per_byte), what), number, per_byte)
    if indices.max() >= size:
        raise StorageError(f"one of its {what} is level {indices.max()} of {size}")
    return table.astype(f"u{kind.size}", copy=False)[indices]


def _indexed(head: bytes, table: Words, indices: Bytes, kind: Kind) -> list[list[bytes]]:
    """A table of words, and the indices in every packing that holds them."""
    head += bytes([len(table) - 1]) + table.astype(f"<u{kind.size}").tobytes()
    most = int(indices.max())
    fitting = [per_byte for per_byte in (1, 2, 4, 8) if most < 2 ** (8 // per_byte)]
    return [[head + bytes([per_byte]), pack(indices, per_byte)] for per_byte in {1, fitting[-1]}]


def _halves(words: Words, kind: Kind, positive: bool) -> Words:
    """The words of the nearest float16; StorageError where one is too large for it."""
    values = to_floats(words, kind)
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise StorageError(f"a weight is {np.abs(values).max()}, which float16 cannot hold; write exact values")
    return (np.maximum(halves, np.finfo(np.float16).smallest_subnormal) if positive else halves).view(np.uint16)


def _quantised(
    words: Words, kind: Kind, precision: Precision, weights: NDArray[np.float64] | None
) -> list[list[bytes]]:
    values = to_floats(words, kind)
    sample = levels.Sample(values, np.ones_like(values) if weights is None else weights)
    found, edges = levels.entropy_levels(sample, precision.slope)
    table, place = np.unique(from_floats(found, kind), return_inverse=True)  # neighbours may be one in this type
    if weights is not None and not table.all():
        return []  # so small that the element type has no such level
    return _indexed(bytes([TABLE]), table, place[np.searchsorted(edges, values)].astype(np.uint8), kind)
