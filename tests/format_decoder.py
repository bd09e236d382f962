"""A reader of compressed files written from docs/format.md alone: plain Python, no dspfx, slow, trusting."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import zstandard

SIZES = {
    **dict.fromkeys(["bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2"], 1),
    **dict.fromkeys(["uint16", "int16", "float16", "bfloat16"], 2),
    **dict.fromkeys(["uint32", "int32", "float32", "complex64"], 4),
    **dict.fromkeys(["uint64", "int64", "float64", "complex128"], 8),
}  # bytes of a word
ROTATED = {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"}


def decode(path: Path) -> dict[str, tuple[str, list[int], list[int]]]:
    """Key -> type, shape and words of every tensor."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    digest = header["__metadata__"]["sha256"]
    assert hashlib.sha256(data.replace(digest.encode(), b"0" * 64)).hexdigest() == digest
    assert (header["__metadata__"]["format"], header["__metadata__"]["version"]) == ("dspfx.compressed", "1")
    at = 8 + length + header["index"]["data_offsets"][1]
    index = json.loads(frame(data[8 + length : at]))
    found = {}
    names, shapes = iter(index["names"]), iter(index["shapes"])
    for coding, kind, number, size in index["streams"]:
        content = frame(data[at : at + size])
        at += size
        own = [(next(names), next(shapes)) for _ in range(number)]
        if coding in ("plain", "half"):
            words = elements(content, kind, coding == "half")
            for name, shape in own:
                number = math.prod(shape) * (2 if kind.startswith("complex") else 1)
                found[name] = (kind, shape, words[:number])
                words = words[number:]
            assert not words
        else:
            ((name, shape),) = own
            found[name] = (kind, shape, weight(content, coding, kind, shape))
    assert at == len(data)
    return found | {name: found[first] for name, first in index["shared"].items()}


def frame(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(data)


def elements(content: bytes, kind: str, half: bool) -> list[int]:
    if half:
        return [from_half(word, kind) for word in planes(content, len(content) // 2, 2, True)]
    return planes(content, len(content) // SIZES[kind], SIZES[kind], kind in ROTATED)


def planes(content: bytes, n: int, s: int, rotated: bool) -> list[int]:
    words = [sum(content[j * n + i] << 8 * (s - 1 - j) for j in range(s)) for i in range(n)]
    return [word >> 1 | (word & 1) << 8 * s - 1 for word in words] if rotated else words


def packed(content: bytes, n: int, p: int) -> list[int]:
    bits = 8 // p
    return [content[i // p] >> bits * (i % p) & 2**bits - 1 for i in range(n)]


def from_half(word: int, kind: str) -> int:
    (value,) = struct.unpack("<e", word.to_bytes(2, "little"))
    return to_word(value, kind)


def to_word(value: float, kind: str) -> int:
    """The word of a float32 value in another type, ties to even."""
    if kind == "bfloat16":
        word = int.from_bytes(struct.pack("<f", value), "little")
        return word + 0x7FFF + (word >> 16 & 1) >> 16
    return int.from_bytes(struct.pack({"float16": "<e", "float32": "<f", "float64": "<d"}[kind], value), "little")


def weight(content: bytes, coding: str, kind: str, shape: list[int]) -> list[int]:
    s, filters, channels, positions = SIZES[kind], shape[0], shape[1], math.prod(shape[2:])
    total = filters * channels * positions
    at = 0

    def take(number: int) -> bytes:
        nonlocal at
        at += number
        assert at <= len(content)
        return content[at - number : at]

    dead = dead_map(take, filters, channels, positions)
    blocks = blocks_of(coding, filters, channels, positions)
    lives = [[i for i in block if not dead[i]] for block in blocks]
    lives = [block for block in lives if block]
    classes = [0] * len(lives)
    if coding != "free":
        fives = take(-(-len(lives) // 5))
        classes = [fives[i // 5] // 3 ** (i % 5) % 3 for i in range(len(lives))]
    unified = [block for block, kind in zip(lives, classes, strict=True) if kind == 1]
    free = [i for block, kind in zip(lives, classes, strict=True) if kind == 0 for i in block]
    magnitudes = numbers(take, len(unified), kind)
    signs = sum(map(len, unified))
    sign = iter(packed(take(-(-signs // 8)), signs, 8))
    words = [0] * total
    for block, magnitude in zip(unified, magnitudes, strict=True):
        for i in block:
            words[i] = magnitude | next(sign) << 8 * s - 1
    for i, word in zip(free, numbers(take, len(free), kind), strict=True):
        words[i] = word
    assert at == len(content)
    return words


def dead_map(take: Callable[[int], bytes], filters: int, channels: int, positions: int) -> list[int]:
    total = filters * channels * positions
    (kind,) = take(1)
    if kind == 0:
        return [0] * total
    if kind == 2:
        return packed(take(-(-total // 8)), total, 8)
    number = int.from_bytes(take(4), "little")
    rows = [packed(take(-(-channels // 8)), channels, 8) for _ in range(number)]
    width = 1 if number <= 256 else 2 if number <= 65536 else 4
    chosen = [int.from_bytes(take(width), "little") for _ in range(filters)]
    return [rows[row][c] for row in chosen for c in range(channels) for _ in range(positions)]


def blocks_of(coding: str, filters: int, channels: int, positions: int) -> list[list[int]]:
    """For each block, the places of its weights in C order."""
    if coding == "free":
        return [list(range(filters * channels * positions))]
    layout, shape = coding.split()
    a, b = map(int, shape.split("x"))
    across, matrices = (channels * positions, 1) if layout == "gemm" else (channels, positions)
    return [
        [
            (row * across + column) * matrices + matrix
            for row in range(top, min(top + a, filters))
            for column in range(left, min(left + b, across))
        ]
        for matrix in range(matrices)
        for top in range(0, filters, a)
        for left in range(0, across, b)
    ]


def numbers(take: Callable[[int], bytes], n: int, kind: str) -> list[int]:
    """A list of n words."""
    if n == 0:
        return []
    s = SIZES[kind]
    (way,) = take(1)
    if way == 0:
        return planes(take(n * s), n, s, True)
    if way == 1:
        return [from_half(word, kind) for word in planes(take(n * 2), n, 2, True)]
    size = take(1)[0] + 1
    assert way == 2
    table = [int.from_bytes(take(s), "little") for _ in range(size)]
    (p,) = take(1)
    return [table[i] for i in packed(take(-(-n // p)), n, p)]
