"""The compressed file around its streams: a safetensors header, an index of what each stream holds, a checksum.

length of the header | header | index: one zstd frame of JSON | data: one zstd frame a stream, in the index's order
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

from dspfx.errors import StorageError
from dspfx.method.blocks import Tiling
from dspfx.storage.streams import compress, decompress
from dspfx.storage.values import expect, look_up, short
from dspfx.storage.words import KINDS, Kind

FORMAT = "dspfx.compressed"
VERSION = 1
MOST_INDEX = 1 << 20  # bytes; beside what the names of a model's own tensors take
PLAIN, HALF, FREE = "plain", "half", "free"
_MOST_HEADER = 4096
_BLANK = b"0" * 64
_CODING = re.compile(r"(planes|gemm) ([1-9]\d{0,8})x([1-9]\d{0,8})", re.ASCII)


@dataclass(frozen=True)
class Stream:
    """One frame of the file, and the tensors that it holds.

    Attributes:
        coding: "plain" and "half" (float16) hold any number of tensors, "free", "planes AxB" and "gemm AxB" one weight.
        kind: of the elements of all of them.
        tensors: name -> shape.
        size: bytes on disk.
    """

    coding: str
    kind: Kind
    tensors: dict[str, tuple[int, ...]]
    size: int

    @property
    def tiling(self) -> Tiling | None:
        """How its weight falls into blocks, if it does."""
        found = _CODING.fullmatch(self.coding)
        if found is None:
            return None
        (shape,) = self.tensors.values()
        return Tiling(shape, (int(found[2]), int(found[3])), found[1])


@dataclass(frozen=True)
class Index:
    """All streams in the file's order, the tensors that are others under a second name, and where the data begins."""

    streams: tuple[Stream, ...]
    shared: dict[str, str]
    start: int = 0

    @property
    def tensors(self) -> dict[str, tuple[Kind, tuple[int, ...]]]:
        """Name -> element type and shape, of every tensor, under every name."""
        own = {name: (s.kind, shape) for s in self.streams for name, shape in s.tensors.items()}
        return own | {name: own[first] for name, first in self.shared.items()}


def coding_of(tiling: Tiling | None) -> str:
    """What the index calls a weight that falls into these blocks."""
    return FREE if tiling is None else f"{tiling.layout} {tiling.block[0]}x{tiling.block[1]}"


def write_file(path: Path, index: Index, frames: list[bytes]) -> int:
    """Writes the file, whole or not at all; its bytes on disk."""
    content = {
        "streams": [[s.coding, s.kind.name, len(s.tensors), s.size] for s in index.streams],
        "names": [name for s in index.streams for name in s.tensors],
        "shapes": [shape for s in index.streams for shape in s.tensors.values()],
        "shared": index.shared,
    }
    packed = compress([json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()])
    pieces = [_header(len(packed), sum(map(len, frames))), packed, *frames]
    summed = hashlib.sha256()
    for piece in pieces:
        summed.update(piece)
    pieces[0] = pieces[0].replace(_BLANK, summed.hexdigest().encode())
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error}); give a file in a folder that can be.") from error
    finally:
        part.unlink(missing_ok=True)
    return sum(map(len, pieces))


@contextmanager
def damaged(path: Path, where: str = "") -> Iterator[None]:
    """What makes no sense in the file becomes an error that names the file, the place and the remedy."""
    try:
        yield
    except (StorageError, ValueError, RecursionError) as error:
        raise StorageError(
            f"{path} is damaged, or was not written by dspfx.write_compressed: {where}{str(error).rstrip('.')}; copy "
            "it again, or write it again."
        ) from error


def read_header(path: Path, file: IO[bytes]) -> tuple[bytes, dict[str, Any]]:
    """The header, and its JSON, of a version that this reader knows."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    header = file.read(min(length, _MOST_HEADER))
    if FORMAT.encode() not in header:
        raise StorageError(
            f"{path} is no file of dspfx.write_compressed, or ends within its first {_MOST_HEADER} bytes; one that "
            "dspfx.save wrote is read with dspfx.load."
        )
    with damaged(path):
        if len(header) != length:
            raise StorageError(f"its header claims {length} bytes of at most {_MOST_HEADER}, and has {len(header)}")
        entries = expect(json.loads(header), dict, "its header")
        metadata = expect(entries.get("__metadata__"), dict, "its metadata")
        version = expect(metadata.get("version"), str, "its version")
        if metadata.get("format") != FORMAT or not re.fullmatch("[1-9][0-9]{0,8}", version):
            raise StorageError(f"its format is {short(metadata.get('format'))}, version {short(version)}")
    if int(version) > VERSION:
        raise StorageError(
            f"{path} was written in version {version} of the compressed format by a newer dspfx, this one reads up to "
            f"version {VERSION}; upgrade dspfx: pip install --upgrade dspfx."
        )
    return header, entries


def read_index(file: IO[bytes], header: bytes, entries: dict[str, Any], most: int) -> Index:
    """The index of a file behind its header, once the checksum is right; one of more than `most` bytes is refused."""
    first, last = _bounds(entries)
    start, size = 8 + len(header), os.fstat(file.fileno()).st_size
    if size != start + last:
        raise StorageError(f"it has {size} bytes where its header says {start + last}")
    digest = expect(entries["__metadata__"].get("sha256"), str, "its checksum", 64)
    if (found := _checksum(file, header, digest)) != digest:
        raise StorageError(f"its checksum is {found}, its header says {digest}")
    if first > most:
        raise StorageError(f"its index takes {first} bytes where its tensors allow {most}")
    file.seek(start)
    data = expect(json.loads(decompress(file.read(first), most)), dict, "its index")
    return _index(data, start + first, last - first)


def _header(index: int, data: int) -> bytes:
    entries = {
        "__metadata__": {"format": FORMAT, "version": str(VERSION), "sha256": _BLANK.decode()},
        "index": {"dtype": "U8", "shape": [index], "data_offsets": [0, index]},
        "data": {"dtype": "U8", "shape": [data], "data_offsets": [index, index + data]},
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bounds(entries: dict[str, Any]) -> tuple[int, int]:
    """Where index and data end, counted from the header's end."""
    if set(entries) != {"__metadata__", "index", "data"}:
        raise StorageError(f"its tensors are {short(sorted(set(entries) - {'__metadata__'}))}, not data and index")
    ends, begin = [], 0
    for name in ("index", "data"):
        entry = expect(entries[name], dict, f"the tensor {name}")
        end = expect(entry.get("data_offsets"), list, f"where {name} lies", 2)[1]
        if not _is_count(end) or entry != {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}:
            raise StorageError(f"the tensor {name} is {short(entry)}, which begins at {begin}")
        ends.append(end)
        begin = end
    return ends[0], ends[1]


def _checksum(file: IO[bytes], header: bytes, digest: str) -> str:
    """sha256 of the file, the checksum's own digits counted as zeros; the file is read in pieces."""
    if header.count(digest.encode()) != 1:
        raise StorageError(f"its checksum is {short(digest)}")
    summed = hashlib.sha256(len(header).to_bytes(8, "little") + header.replace(digest.encode(), _BLANK))
    file.seek(8 + len(header))
    while piece := file.read(1 << 18):
        summed.update(piece)
    return summed.hexdigest()


def _index(data: dict[str, Any], start: int, size: int) -> Index:
    rows, names, shapes, shared = (
        expect(data.get(key), kind, f"the index's {key}")
        for key, kind in (("streams", list), ("names", list), ("shapes", list), ("shared", dict))
    )
    known = {name for name in names if isinstance(name, str)}
    if not len(known) == len(names) == len(shapes):
        raise StorageError(f"it has {len(names)} names, {len(known)} different ones, and {len(shapes)} shapes")
    streams, at = [], 0
    for row in rows:
        coding, kind, count, taken = expect(row, list, "a stream of the index", 4)
        if not (_is_count(count) and _is_count(taken) and isinstance(coding, str)) or not 1 <= count <= len(names) - at:
            raise StorageError(f"a stream of its index is {short(row)}, with {len(names) - at} tensors left")
        tensors = dict(zip(names[at : at + count], map(_shape, shapes[at : at + count]), strict=True))
        streams.append(Stream(coding, look_up(KINDS, kind, "an element type"), tensors, taken))
        _check_coding(streams[-1])
        at += count
    total = sum(s.size for s in streams)
    if at != len(names) or total != size:
        raise StorageError(f"its streams hold {at} of {len(names)} tensors, in {total} of {size} bytes")
    for name, first in shared.items():
        if name in known or not isinstance(first, str) or first not in known:
            raise StorageError(f"{short(name)} cannot be the same as {short(first)}")
    return Index(tuple(streams), shared, start)


def _shape(shape: Any) -> tuple[int, ...]:
    if not all(_is_count(n) for n in expect(shape, list, "a shape")) or len(shape) > 32 or math.prod(shape) >= 1 << 40:
        raise StorageError(f"a tensor's shape is {short(shape)}")
    return tuple(shape)


def _check_coding(stream: Stream) -> None:
    """StorageError unless that kind of stream can hold these tensors."""
    if stream.coding == PLAIN or (stream.coding == HALF and stream.kind.halves):
        return
    shapes = list(stream.tensors.values())
    weight = len(shapes) == 1 and len(shapes[0]) >= 2 and all(shapes[0])
    known = stream.coding == FREE or _CODING.fullmatch(stream.coding)
    if not known or not weight or not stream.kind.is_weight:
        what = f"{short(stream.coding)}, {stream.kind.name}"
        raise StorageError(f"its streams do not hold {short(list(stream.tensors))} of shape {short(shapes)} as {what}")
    if (tiling := stream.tiling) is not None:
        (a, b), (_, rows, columns) = tiling.block, tiling.planes
        if a > rows or b > columns:
            raise StorageError(f"its blocks of {a}x{b} do not fit {rows}x{columns} weights")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def offsets(index: Index) -> list[int]:
    """Where each stream begins in the file."""
    return list(accumulate((s.size for s in index.streams), initial=index.start))[:-1]
