"""Runs chains of random layers, and damaged programs, through a library that is built with AddressSanitizer.

LD_PRELOAD=$(c++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 python -m tests.kernels.sanitized library.so

A read or write outside of a workspace, an input, an output, the weights or the program ends the process; wrong numbers
do, too. A damaged program that the library calls safe is run.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dspfx.kernels import engine as engine_module
from dspfx.kernels.chain import Cat, Chain, Conv, Flatten, Linear, Map, Mean, Pool, Scale, Shape
from dspfx.kernels.engine import Engine
from dspfx.kernels.library import Library

CASES = 60
DAMAGED = 400  # programs of each chain


def exact(floats: int) -> Any:
    """A workspace of the heap, with nothing to spare behind it."""
    return np.zeros(floats, np.float32)


def random_chain(seed: int) -> tuple[Chain, Shape, int]:
    """Two convolutions, the second with a residual, a pooling, features; the shape of an image, threads."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    channels, filters = pick(1, 9), pick(1, 30)
    kernel, stride, dilation = (pick(1, 5), pick(1, 5)), (pick(1, 3), pick(1, 3)), (pick(1, 2), pick(1, 2))
    padding = (pick(0, 4), pick(0, 4))
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    shape = (channels, least[0] + pick(0, 40), least[1] + pick(0, 40))
    first = torch.randn(filters, channels, *kernel, generator=generator)
    first *= torch.rand(filters, channels, 1, 1, generator=generator) < 0.6
    second = torch.randn(filters, filters, 3, 3, generator=generator)
    bias, last = torch.randn(filters, generator=generator), torch.randn(7, 2 * filters, generator=generator)
    layers = (
        Conv(0, 1, first.numpy(), bias.numpy(), stride, padding, dilation, activation="relu"),
        Conv(1, 2, second.numpy(), bias.numpy(), padding=(1, 1), residual=1, activation="silu"),
        Map(2, 3, bias.numpy(), bias.numpy(), activation="hardswish"),
        Pool(3, 4, bool(seed % 2), (3, 2), (pick(1, 3), pick(1, 3)), (1, 1)),
        Cat((4, 4), 5),
        Mean(5, 9),
        Scale(5, 9, 10),
        Mean(10, 6),
        Flatten(6, 7),
        Linear(7, 8, last.numpy(), torch.randn(7, generator=generator).numpy()),
    )
    return Chain(1, layers, (8, 1, 4)), shape, 1 + seed % 3


def run_damaged(engine: Engine, x: torch.Tensor, generator: np.random.Generator) -> int:
    """How many of the damaged programs of an engine's last images were safe, and ran."""
    loaded = next(reversed(engine.loaded.values()))
    program, library, count = loaded.program, engine.library, 0
    outputs = [torch.empty((len(x), *shape)) for shape in program.outputs]
    places = (ctypes.c_void_p * 1)(x.data_ptr()), (ctypes.c_void_p * len(outputs))(*(y.data_ptr() for y in outputs))
    steps_only = generator.random() < 0.5  # else nearly all damage falls on lists of offsets
    for _ in range(DAMAGED):
        steps, floats = program.steps.copy(), program.floats
        at = generator.integers(program.first if steps_only else 0, len(steps), generator.integers(1, 4))
        kind = generator.integers(4)
        if kind == 0:
            steps[at] += generator.integers(-40, 40, at.size, np.int32)
        elif kind == 1:
            steps[at] = generator.choice(np.array([-1, 0, 1, 2**31 - 1, -(2**31), floats - 1, floats], np.int32))
        elif kind == 2:
            steps[at] = steps[generator.integers(0, len(steps), at.size)]
        else:
            steps = steps[: at.max()].copy()
        sizes = loaded.input_sizes, 1, loaded.output_sizes, len(outputs)
        first, weights = program.first, engine.packed.array.size
        if library.is_safe(steps.ctypes.data, steps.size, first, weights, floats, *sizes):
            count += 1
            work = exact(floats)
            library.run(
                steps.ctypes.data, first, engine.weights_place, work.ctypes.data, *places,
                loaded.input_sizes, loaded.output_sizes, len(x), 1,
            )  # fmt: skip
    return count


def main() -> None:
    library = Library(Path(sys.argv[1]))
    engine_module.library = lambda: library  # type: ignore[assignment]
    engine_module._pages = exact
    damaged = 0
    for seed in range(CASES):
        chain, shape, threads = random_chain(seed)
        x = torch.randn(2, *shape)
        engine = Engine(chain)
        _, found, _ = engine([x], threads)
        first = chain.layers[0]
        assert isinstance(first, Conv)
        weight, bias = torch.from_numpy(first.weight), torch.from_numpy(first.bias)
        expected = F.relu(F.conv2d(x, weight, bias, first.stride, first.padding, first.dilation))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        damaged += run_damaged(engine, x, np.random.default_rng(seed))
    print(f"{CASES} chains")
    assert 0.1 < damaged / (CASES * DAMAGED) < 0.9, damaged  # most changes matter, and not all


if __name__ == "__main__":
    main()
