"""What the compressed file is made of: zstd frames of known size, byte planes, packed bits; integers throughout.

Nothing here trusts a number that a file claims: a frame is decompressed only once its claimed size is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

from dspfx.errors import StorageError

Bytes = NDArray[np.uint8]
_SLOW = 1 << 20  # contents up to so many bytes are searched for repetitions thoroughly
_THOROUGH = 19
_WINDOW = 1 << 23
_TRITS = (np.arange(243)[:, None] // 3 ** np.arange(5) % 3).astype(np.uint8)


def compress(parts: Sequence[bytes]) -> bytes:
    """The smallest zstd frame found whose content is the parts, one behind the other.

    Parts are of different kinds (signs, indices, exponents): as blocks of their own each gets a Huffman table of its
    own, which pays unless they are tiny.
    """
    size = sum(map(len, parts))
    ways = [_symbols_only(size)]
    if size <= _SLOW:
        ways.append(zstandard.ZstdCompressionParameters.from_level(_THOROUGH, source_size=max(size, 1)))
    frames = [_frame(cut, size, way) for way in ways for cut in (parts, [b"".join(parts)])]
    return min(frames, key=len)


def _symbols_only(size: int) -> zstandard.ZstdCompressionParameters:
    """Parameters that all but leave out the search for repetitions: weights have none, and short ones cost more."""
    return zstandard.ZstdCompressionParameters(
        window_log=min(max(size.bit_length(), 10), 20),
        hash_log=12,
        chain_log=6,
        search_log=1,
        min_match=7,
        strategy=zstandard.STRATEGY_FAST,
    )


def _frame(parts: Sequence[bytes], size: int, way: zstandard.ZstdCompressionParameters) -> bytes:
    coder = zstandard.ZstdCompressor(compression_params=way).compressobj(size=size)
    found = [coder.compress(part) + coder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK) for part in parts if part]
    return b"".join(found) + coder.flush()


def content_size(frame: bytes) -> int:
    """What the frame says it decompresses to; StorageError where it does not say."""
    try:
        size = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise StorageError(f"a stream is no zstd frame ({error})") from error
    if size < 0:
        raise StorageError("a stream is a zstd frame that does not state its size")
    return size


def decompress(frame: bytes, most: int, least: int = 0) -> bytes:
    """The content of a frame that claims between `least` and `most` bytes; no more memory than that is asked for."""
    size = content_size(frame)
    if not least <= size <= most:
        allowed = f"{most}" if least == most else f"{least} to {most}"
        raise StorageError(f"a stream claims {size} bytes where its tensors allow {allowed}")
    try:
        coder = zstandard.ZstdDecompressor(max_window_size=_WINDOW)  # whole frames are decompressed without one
        content = coder.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise StorageError(f"a stream does not decompress ({error})") from error
    if len(content) != size:
        raise StorageError(f"a stream claims {size} bytes and holds {len(content)}")
    return content


class Cursor:
    """Takes a content apart from front to back."""

    def __init__(self, content: bytes) -> None:
        self._bytes: Bytes = np.frombuffer(content, np.uint8)
        self._at = 0

    def take(self, number: int, what: str) -> Bytes:
        """The next bytes; StorageError where there are not as many."""
        found = self._bytes[self._at : self._at + number]
        if len(found) != number:
            raise StorageError(f"its {what} take {number} bytes, of which {len(found)} are there")
        self._at += number
        return found

    def number(self, kind: str, what: str) -> int | float:
        """The next number of a numpy type such as "<u4"."""
        return np.frombuffer(self.take(np.dtype(kind).itemsize, what), kind)[0].item()

    def end(self) -> None:
        """StorageError unless everything was taken."""
        if self._at != len(self._bytes):
            raise StorageError(f"{len(self._bytes) - self._at} bytes are left over in a stream")


def to_planes(words: NDArray[np.unsignedinteger], rotate: bool) -> list[bytes]:
    """The words' bytes, the most significant ones of all words first.

    Rotated left by one bit, a float's exponent fills whole bytes: these are what entropy coding gains from.
    """
    if rotate:
        words = np.bitwise_or(words << 1, words >> words.dtype.itemsize * 8 - 1)
    columns = words.astype(words.dtype.newbyteorder(">")).view(np.uint8).reshape(len(words), words.dtype.itemsize)
    return [plane.tobytes() for plane in columns.T]


def from_planes(planes: Bytes, number: int, itemsize: int, rotate: bool) -> NDArray[np.unsignedinteger]:
    """Undoes `to_planes`."""
    columns = np.empty((number, itemsize), np.uint8)
    columns[:] = planes.reshape(itemsize, number)[::-1].T
    words: NDArray[np.unsignedinteger] = columns.reshape(-1).view(f"<u{itemsize}").astype(f"u{itemsize}", copy=False)
    if rotate:
        low = words << itemsize * 8 - 1
        words >>= 1
        words |= low
    return words


def pack(indices: Bytes, per_byte: int) -> bytes:
    """Indices below 2 ** (8 / per_byte), so many a byte, the first in its lowest bits."""
    if per_byte == 1:
        return indices.tobytes()
    padded = np.pad(indices, (0, -len(indices) % per_byte)).reshape(-1, per_byte)
    return np.bitwise_or.reduce(padded << _shifts(per_byte), axis=1, dtype=np.uint8).tobytes()


def unpack(packed: Bytes, number: int, per_byte: int) -> Bytes:
    """Undoes `pack`; StorageError where bits behind the last index are set."""
    if per_byte == 1:
        return packed
    if per_byte == 8:
        wide = np.unpackbits(packed, bitorder="little")
    else:
        wide = ((packed[:, None] >> _shifts(per_byte)) & np.uint8(2 ** (8 // per_byte) - 1)).reshape(-1)
    return _cut(wide, number)


def pack_trits(classes: Bytes) -> bytes:
    """Numbers 0, 1, 2, five a byte, the first counting one."""
    padded = np.pad(classes, (0, -len(classes) % 5)).reshape(-1, 5)
    return (padded * np.array([1, 3, 9, 27, 81], np.uint8)).sum(1, dtype=np.uint8).tobytes()


def unpack_trits(packed: Bytes, number: int) -> Bytes:
    """Undoes `pack_trits`."""
    if packed.size and packed.max() > 242:
        raise StorageError(f"five classes are the byte {packed.max()}, where the largest is 242")
    return _cut(_TRITS[packed].reshape(-1), number)


def packed_size(number: int, per_byte: int) -> int:
    """Bytes that hold `number` of them."""
    return -(-number // per_byte)


def _shifts(per_byte: int) -> Bytes:
    return np.arange(0, 8, 8 // per_byte, dtype=np.uint8)


def _cut(wide: Bytes, number: int) -> Bytes:
    if wide[number:].any():
        raise StorageError("bits behind the last entry of a map are set")
    return wide[:number]
