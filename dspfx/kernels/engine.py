"""Runs a chain natively on tensors: programs by image size, workspaces by program."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspfx.errors import InputError
from dspfx.kernels.chain import Chain, Shape
from dspfx.kernels.library import library
from dspfx.kernels.packed import Packed
from dspfx.kernels.program import Builder, Program

HUGE_PAGE = 1 << 21
MACS_A_THREAD = 1 << 23  # below, threads wait for each other longer than they work
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
        self.weights_place = self.weights.ctypes.data
        self.loaded: OrderedDict[tuple[Shape, ...], Loaded] = OrderedDict()

    def __call__(self, inputs: list[Tensor], threads: int | None = None) -> list[Tensor]:
        """The outputs for a batch [N, ...] of every input; by default with as many of torch's threads as find work."""
        inputs = [x.contiguous() for x in inputs]
        shapes = tuple(tuple(x.shape[1:]) for x in inputs)
        loaded = self.loaded.get(shapes)
        if loaded is None:
            loaded = self._load(shapes)
        images = inputs[0].shape[0]
        if any(x.shape[0] != images or x.dtype != torch.float32 or not x.is_cpu for x in inputs):
            kinds = ", ".join(f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in inputs)
            raise InputError(f"a chain got {kinds}; it takes float32 on the CPU, as many images in each.")
        outputs = [torch.empty((images, *shape)) for shape in loaded.program.outputs]
        worth = 1 + images * loaded.program.macs // MACS_A_THREAD
        threads = threads or (min(torch.get_num_threads(), worth) if worth > 1 else 1)
        self._run(loaded, inputs, outputs, images, threads)
        return outputs

    def _load(self, shapes: tuple[Shape, ...]) -> Loaded:
        program = Builder(self.chain, self.packed, shapes, self.library.lanes).build()
        loaded = Loaded(program, shapes)
        if not self.library.is_safe(
            loaded.steps, program.steps.size, program.first, self.packed.array.size, program.floats,
            loaded.input_sizes, len(shapes), loaded.output_sizes, len(program.outputs),
        ):  # fmt: skip
            raise AssertionError(f"a program for {shapes} reaches outside of its memory")  # a mistake of ours
        self.loaded[shapes] = loaded
        while len(self.loaded) > KEPT:
            self.loaded.popitem(last=False)
        return loaded

    def _run(self, loaded: Loaded, inputs: list[Tensor], outputs: list[Tensor], images: int, threads: int) -> None:
        call = loaded.spare.pop() if loaded.spare else Call(loaded.program, len(inputs), len(outputs))
        for i, x in enumerate(inputs):
            call.inputs[i] = x.data_ptr()
        for i, x in enumerate(outputs):
            call.outputs[i] = x.data_ptr()
        self.library.run(
            loaded.steps, loaded.program.first, self.weights_place, call.work, call.inputs, call.outputs,
            loaded.input_sizes, loaded.output_sizes, images, threads,
        )  # fmt: skip
        loaded.spare.append(call)


class Call:
    """What one call at a time may use: a workspace, and room for the places of inputs and outputs."""

    def __init__(self, program: Program, inputs: int, outputs: int) -> None:
        self.pages = _pages(program.floats)
        self.work = self.pages.ctypes.data
        self.inputs, self.outputs = (ctypes.c_void_p * inputs)(), (ctypes.c_void_p * outputs)()


class Loaded:
    """A program with what all calls of it share."""

    def __init__(self, program: Program, shapes: tuple[Shape, ...]) -> None:
        self.program = program
        self.steps = program.steps.ctypes.data
        self.input_sizes = (ctypes.c_int64 * len(shapes))(*map(math.prod, shapes))
        self.output_sizes = (ctypes.c_int64 * len(program.outputs))(*map(math.prod, program.outputs))
        self.spare: list[Call] = []


def _pages(floats: int) -> Any:
    """Zeros on huge pages, where the system has them: planes lie far from each other, and each would need a page."""
    size = -(-4 * floats // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(pages, dtype=np.float32)
    start = -array.ctypes.data % HUGE_PAGE // 4
    return array[start : start + floats]
