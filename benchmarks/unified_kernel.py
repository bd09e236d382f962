"""Whether a kernel on the CPU gains from blocks of weights that share one absolute value (method/blocks.py).

    OMP_NUM_THREADS=1 python -m benchmarks.unified_kernel --write docs/results/unified_kernel.md

Compiles unified_kernel.cpp, for AVX-512 and for AVX2, compares every kernel with float64, and times it beside the same
work with float32 weights, on one thread. Exits with 1 where a kernel is wrong.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.unified_kernel_page import CYCLES, Samples, page
from dspfx.cli.checkpoints import write_text
from dspfx.deploy.timing import Call, interleave
from dspfx.kernels.library import FEATURES, FLAGS, can_run

Array = NDArray[Any]
Libraries = Mapping[str, ctypes.CDLL]
CONVS = (64, 42), (128, 42), (256, 42)  # channels in and out, height and width
MATRICES = (512, 4608), (1000, 2048), (4096, 4096), (4096, 25088)
KERNELS = (
    ("float", 1, 1), ("add", 4, 4), ("add", 1, 4), ("expand", 4, 1), ("expand", 16, 1), ("look", 4, 4), ("look", 1, 4)
)  # fmt: skip
PRUNED, UNIFIED = 0.3, 0.5  # of the blocks of the mix


def build(features: str, folder: str) -> ctypes.CDLL:
    """The kernels, compiled for a processor with these features."""
    made = f"{folder}/{features}.so"
    source = Path(__file__).with_suffix(".cpp")
    subprocess.run(["c++", *FLAGS, *FEATURES[features], str(source), "-o", made], check=True)
    return ctypes.CDLL(made)


def caller(function: Any, *arrays: Array) -> Call:
    """A call of a kernel on arrays, which it keeps."""
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
    return lambda kept=arrays: function(*pointers)


def room(*shape: int) -> Array:
    """Zeros, in whole cache lines."""
    return torch.zeros(shape).numpy()


def check(name: str, found: Array, right: Array) -> None:
    """Ends the program where an array is not the float64 one."""
    error = np.abs(found - right).max() / np.abs(right).max()
    if not error <= 1e-5:
        raise SystemExit(f"{name} is wrong: relative error {error:.1e}")


def unify(weight: Array, a: int, b: int) -> Array:
    """u [O/a, T, C/b] of the blocks a x b of a weight [O, T, C]."""
    o, t, c = weight.shape
    return np.abs(weight).reshape(o // a, a, t, c // b, b).mean((1, 4), dtype=np.float32)


def lane_order(a: int, lanes: int) -> Array:
    """The filter of each lane."""
    n = max(1, lanes // a)
    return np.arange(lanes).reshape(n, -1).T.ravel() if n > 1 else np.arange(lanes)


def in_lanes(values: Array, a: int, lanes: int) -> Array:
    """[O, T, C] -> [vec, T, chunk, 32, lanes]."""
    _, t, c = values.shape
    return values.reshape(-1, lanes, t, c // 32, 32)[:, lane_order(a, lanes)].transpose(0, 2, 3, 4, 1)


def structs(*members: Array) -> Array:
    """Members [vec, T, chunk, ...] -> the bytes of structs [vec, chunk, T]."""
    raw = [np.ascontiguousarray(part).reshape(*part.shape[:3], -1).view(np.uint8) for part in members]
    return np.ascontiguousarray(np.concatenate(raw, -1).transpose(0, 2, 1, 3))


def scales(u: Array, a: int, b: int, lanes: int) -> Array:
    """u [O/a, T, C/b] -> [vec, T, chunk, 32 / b, blocks of a vec]."""
    u = u.repeat(max(1, a // lanes), 0)
    return u.reshape(-1, max(1, lanes // a), u.shape[1], u.shape[2] * b // 32, 32 // b).transpose(0, 2, 3, 4, 1)


def pack_signs(weight: Array, u: Array, a: int, b: int, lanes: int) -> Array:
    """The structs Signs<a, b>."""
    bits = np.packbits(in_lanes(np.signbit(weight), a, lanes), axis=-1, bitorder="little")
    return structs(bits, scales(u, a, b, lanes))


def pack_looks(weight: Array, u: Array, a: int, b: int, lanes: int) -> Array:
    """The structs Looks<a>, for blocks of b = 4 channels."""
    negative = in_lanes(np.signbit(weight), a, lanes).astype(np.uint8)
    split = negative.reshape(*negative.shape[:3], 8, b, lanes)
    number = split[..., 0, :] | split[..., 1, :] << 1 | split[..., 2, :] << 2 | split[..., 3, :] << 3
    if lanes == 8:  # half a table: the other half is its negative
        number = np.where(number >= 8, 15 - (number & 7), number)
    word = np.zeros((*number.shape[:3], lanes), np.uint32)
    for g in range(8):
        word |= number[..., g, :].astype(np.uint32) << (4 * g)
    return structs(word, scales(u, a, b, lanes))


def pack_blocks(weight: Array, u: Array, alike: Array, free: Array) -> list[Array]:
    """Arrays of line_blocks_4x4, in its order, of the blocks [O/4, C/4] that are alike and that are free."""
    tiled = weight.reshape(weight.shape[0] // 4, 4, -1, 4).transpose(0, 2, 1, 3)
    negative = np.signbit(tiled).reshape(*tiled.shape[:2], 16)
    signs = np.packbits(negative, axis=-1, bitorder="little").view(np.uint16)[..., 0]
    place = np.nonzero(alike)[1].astype(np.uint32) | signs[alike].astype(np.uint32) << 16
    blocks = np.stack([u[alike].view(np.uint32), place], -1)
    counts = np.stack([alike.sum(1), free.sum(1)], -1).astype(np.int32)
    return [blocks, tiled[free].reshape(-1, 16), np.nonzero(free)[1].astype(np.uint16), counts]


def measure_conv(libraries: Libraries, channels: int, size: int, rounds: int) -> Samples:
    """Seconds of a 3x3 convolution with each kernel, and of CYCLES of the processor."""
    rng = np.random.default_rng(0)
    image = np.zeros((channels, size + 2, size + 2), np.float32)
    image[:, 1:-1, 1:-1] = rng.standard_normal((channels, size, size), np.float32)
    x = np.ascontiguousarray(image.reshape(-1, 32, size + 2, size + 2).transpose(0, 2, 3, 1))
    weight = rng.standard_normal((channels, 9, channels), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(image.astype(np.float64), (size, size), (1, 2))
    columns = windows.reshape(channels, 9, -1).transpose(1, 0, 2).reshape(9 * channels, -1)
    one = next(iter(libraries.values()))
    calls: dict[str, Call] = {"cycles": lambda: one.cycles(ctypes.c_int64(CYCLES))}
    for kind, a, b in KERNELS:
        name = kind if kind == "float" else f"{kind}_{a}x{b}"
        u = unify(weight, a, b)
        dense = weight if kind == "float" else np.copysign(u.repeat(a, 0).repeat(b, 2), weight)
        right = dense.reshape(channels, -1) @ columns
        for features, library in libraries.items():
            lanes = library.lanes()
            pack = pack_looks if kind == "look" else pack_signs
            packed = structs(in_lanes(weight, 1, lanes)) if kind == "float" else pack(weight, u, a, b, lanes)
            y, work = room(channels // lanes, size * size, lanes), room((size + 2) ** 2 * 8 * lanes)
            numbers = np.array([channels // 32, channels // lanes, size])
            call = caller(library[f"conv_{name}"], x, packed, y, work, numbers)
            call()
            found = np.empty_like(y)
            found[..., lane_order(a, lanes)] = y
            check(f"{features} {name}", found.transpose(0, 2, 1).reshape(channels, -1), right)
            calls[f"{features} {name}"] = call
    own = torch.from_numpy(weight).transpose(1, 2).reshape(channels, channels, 3, 3)
    batch = torch.from_numpy(image[None])
    calls["PyTorch"] = lambda: torch.conv2d(batch, own)
    return interleave(calls, rounds)


def measure_line(libraries: Libraries, rows: int, columns: int, rounds: int) -> tuple[Samples, Samples, dict[str, int]]:
    """Seconds of a matrix times a vector, its weights in no cache and as the last call left them; their bytes."""
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((rows, columns), np.float32)).numpy()
    x = rng.standard_normal(columns, np.float32)
    u = unify(weight[:, None], 4, 4)[:, 0]
    chance = rng.random(u.shape)
    pruned, alike = chance < PRUNED, chance >= 1 - UNIFIED
    none = np.zeros_like(pruned)
    kinds = {"float": (none, ~none), "look_4x4": (~none, none), "blocks_4x4": (~none, none)}
    kinds |= {"pruned": (none, ~pruned), "mixed": (alike, ~(pruned | alike))}
    calls: dict[str, Call] = {}
    weights: dict[str, list[Array]] = {}
    for name, (same, free) in kinds.items():
        right = np.concatenate([product(weight, u, same, free, x, i) for i in range(0, rows // 4, 64)])
        blocks = pack_blocks(weight, u, same, free) if name in ("blocks_4x4", "pruned", "mixed") else []
        for features, library in libraries.items():
            lanes, label = library.lanes(), f"{features} {name}"
            more = -rows % 64
            y, work = room(rows + more), room(columns // 4 * lanes)
            order = lane_order(1, lanes)
            if name == "look_4x4":
                full, scale = np.pad(weight, ((0, more), (0, 0))), np.pad(u, ((0, more // 4), (0, 0)))
                own = [pack_looks(full[:, None], scale[:, None], 4, 4, lanes)]
                calls[label] = caller(library.line_look_4x4, x, *own, y, work, np.array([rows + more, columns]))
                order = lane_order(4, lanes)
            elif blocks:
                own, n = blocks, np.array([rows, columns])
                calls[label] = caller(library.line_blocks_4x4, x, own[0], y, own[1], n, *own[2:])
            else:
                own = [weight]
                calls[label] = caller(library.line_float, x, weight, y, work, np.array([rows, columns]))
            weights[label] = own
            calls[label]()
            found = np.empty_like(y)
            found.reshape(-1, lanes)[:, order] = y.reshape(-1, lanes)
            check(label, found[:rows], right)
    matrix, vector = torch.from_numpy(weight), torch.from_numpy(x)
    calls["PyTorch"], weights["PyTorch"] = lambda: torch.mv(matrix, vector), [weight]
    cold = from_memory(next(iter(libraries.values())), calls, weights, rounds)
    return cold, interleave(calls, rounds), {name: sum(a.nbytes for a in own) for name, own in weights.items()}


def from_memory(
    library: ctypes.CDLL, calls: Mapping[str, Call], weights: dict[str, list[Array]], rounds: int
) -> Samples:
    """Seconds of the calls, interleaved, each after its weights were driven out of all caches."""
    samples: Samples = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            for array in weights[name]:
                library.evict(ctypes.c_void_p(array.ctypes.data), ctypes.c_int64(array.nbytes))
            start = time.perf_counter()
            calls[name]()
            samples[name].append(time.perf_counter() - start)
    return samples


def product(weight: Array, u: Array, alike: Array, free: Array, x: Array, start: int) -> Array:
    """256 rows of the matrix, times x, in float64."""
    own = slice(start, start + 64)
    rows = weight[4 * start : 4 * start + 256]
    wide = [v[own].repeat(4, 0).repeat(4, 1) for v in (u, alike, free)]
    return np.asarray(np.where(wide[2], rows, np.where(wide[1], np.copysign(wide[0], rows), 0)).astype(np.float64) @ x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="of every time that is measured")
    parser.add_argument("--write", type=Path, help="the page to write; without it, it is printed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not can_run("AVX2"):
        raise SystemExit("these kernels are for x86 processors with AVX2; this one has not")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        libraries = {features: build(features, folder) for features in FEATURES if can_run(features)}
        convs = {shape: measure_conv(libraries, *shape, args.rounds) for shape in CONVS}
        lines = {shape: measure_line(libraries, *shape, args.rounds) for shape in MATRICES}
    text = page(list(libraries), convs, lines)
    if args.write:
        write_text(args.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
