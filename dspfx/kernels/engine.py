"""Runs a chain natively on tensors: programs by image size, workspaces by program."""

from __future__ import annotations

import ctypes
import mmap
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspfx.kernels.chain import Chain, Shape
from dspfx.kernels.library import library
from dspfx.kernels.program import Builder, Packed, Program

HUGE_PAGE = 1 << 21
KEPT = 8  # programs; a network that meets ever new sizes shall not keep a workspace for each


class Engine:
    """A chain, ready to run on batches of images of any size that it accepts, from any number of threads.

    engine = Engine(chain)
    (y,) = engine([x])  # float32 on the CPU
    """

    def __init__(self, chain: Chain) -> None:
        self.library = library()
        self.chain = chain
        self.packed = Packed(chain, self.library.max_filters)
        self.weights = _pages(self.packed.array.size)
        self.weights[: self.packed.array.size] = self.packed.array
        self.loaded: OrderedDict[tuple[Shape, ...], Loaded] = OrderedDict()

    def __call__(self, inputs: list[Tensor], threads: int | None = None) -> list[Tensor]:
        """The outputs for a batch [N, ...] of every input; `threads` are torch's own where none are given."""
        inputs = [x.contiguous() for x in inputs]
        shapes = tuple(tuple(x.shape[1:]) for x in inputs)
        loaded = self.loaded.get(shapes)
        if loaded is None:
            loaded = self._load(shapes)
        images = inputs[0].shape[0]
        outputs = [torch.empty((images, *shape)) for shape in loaded.program.outputs]
        self._run(loaded, inputs, outputs, images, threads or torch.get_num_threads())
        return outputs

    def _load(self, shapes: tuple[Shape, ...]) -> Loaded:
        program = Builder(self.chain, self.packed, shapes, self.library.lanes).build()
        loaded = self.loaded[shapes] = Loaded(program, shapes)
        while len(self.loaded) > KEPT:
            self.loaded.popitem(last=False)
        return loaded

    def _run(self, loaded: Loaded, inputs: list[Tensor], outputs: list[Tensor], images: int, threads: int) -> None:
        work = loaded.spare.pop() if loaded.spare else _pages(loaded.program.floats)  # one a call that is under way
        self.library.run(
            loaded.steps,
            loaded.program.first,
            self.weights.ctypes.data,
            work.ctypes.data,
            (ctypes.c_void_p * len(inputs))(*[x.data_ptr() for x in inputs]),
            (ctypes.c_void_p * len(outputs))(*[x.data_ptr() for x in outputs]),
            loaded.input_sizes,
            loaded.output_sizes,
            images,
            threads,
        )
        loaded.spare.append(work)


class Loaded:
    """A program with what a call of it needs."""

    def __init__(self, program: Program, shapes: tuple[Shape, ...]) -> None:
        self.program = program
        self.steps = program.steps.ctypes.data
        self.input_sizes = (ctypes.c_int64 * len(shapes))(*[int(np.prod(s)) for s in shapes])
        self.output_sizes = (ctypes.c_int64 * len(program.outputs))(*[int(np.prod(s)) for s in program.outputs])
        self.spare: list[Any] = []


def _pages(floats: int) -> Any:
    """Zeros on huge pages, where the system has them: planes lie far from each other, and each would need a page."""
    size = -(-4 * floats // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(pages, dtype=np.float32)
    start = -array.ctypes.data % HUGE_PAGE // 4
    return array[start : start + floats]
