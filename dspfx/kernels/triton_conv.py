"""The group convolution on a GPU: what `dspfx.kernels.structure.reference` computes, by one Triton kernel.

    packed, structure  ->  prepare_gpu  ->  GpuConv  ->  conv(input, bias, ...)

One program computes a tile of output pixels times a tile of one group's filters, and walks the group's channels by its
index list: no gather before it, no concatenation or reordering behind it. Sums are float32, whatever the input is.

Pixels stand beside each other in contiguous inputs and outputs, and are read and written in that order. Where channels
do (channels_last), lists of any indices are read one element at a time; lists in whole runs of eight (balanced
structures whose channels are laid out by groups) are read in vectors, and suit tensor cores best.

Importing this module needs no triton. The tests run the kernel in triton's interpreter and compile it for GPUs; its
speed on one is not measured yet.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dspfx.errors import ConfigError, InputError
from dspfx.kernels.gpu_layout import COLUMNS, Layout, lay_out
from dspfx.kernels.structure import LARGEST, Structure, check_fit

LIMIT = LARGEST - 1024  # of offsets of 32 bits, a tile's overhang taken off


@dataclass(frozen=True)
class Blocks:
    """The size of a program's tile (pixels, filters, channels a step) and how the GPU runs it."""

    pixels: int
    filters: int
    channels: int
    warps: int = 4
    stages: int = 3


# Tried in this order; the first that fits is taken where nothing can be measured.
CANDIDATES = (
    Blocks(64, 64, 32),
    Blocks(128, 128, 32, warps=8),
    Blocks(128, 64, 32),
    Blocks(128, 64, 64, warps=8),
    Blocks(64, 32, 32),
    Blocks(32, 64, 64),
    Blocks(16, 64, 64, warps=2, stages=4),
    Blocks(128, 32, 32),
    Blocks(32, 32, 32, warps=2, stages=4),
    Blocks(128, 16, 32),
    Blocks(64, 16, 16, warps=2),
    Blocks(128, 32, 16),
    Blocks(64, 64, 16),
)


@dataclass(eq=False)
class GpuConv:
    """A group convolution whose weight and index lists lie on a device as the kernel reads them.

    Attributes:
        structure: what it computes.
        layout: see there.
        precision: "ieee", or "tf32" for float32 inputs on tensor cores, with 10 bits of mantissa.
        chosen: the blocks measured to be fastest, by the call's sizes.
    """

    structure: Structure
    layout: Layout
    precision: str
    chosen: dict[tuple[Any, ...], Blocks] = field(default_factory=dict)

    def candidates(self) -> list[Blocks]:
        """The blocks that are no larger than the largest group.

        Exact float32 takes no tensor cores; steps of 64 channels, compiled for it, do not fit into registers.
        """
        is_exact = self.layout.weight.dtype == torch.float32 and self.precision == "ieee"
        most = min(self.layout.most_channels, 32) if is_exact else self.layout.most_channels
        return [b for b in CANDIDATES if b.filters in self.layout.tiles and b.channels <= most]

    def __call__(
        self,
        input: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        residual: Tensor | None = None,
        activation: str = "none",
        channels_last: bool = False,
        blocks: Blocks | None = None,
    ) -> Tensor:
        """As `reference`, without gradients; [N, O, H', W'], contiguous or in the memory format channels_last.

        The input may have any strides, and so may the residual, which is copied where its differ from the output's.

        The first call with inputs of a size measures which `blocks` are fastest, unless they are given or a CUDA graph
        is being captured: call once before capturing. Raises what `reference` raises, and InputError for inputs that
        are not on a CUDA device or have 2**31 elements an image, and ConfigError without triton.
        """
        shape = check_fit(
            self.structure, input, self.layout.weight, bias, stride, padding, dilation, residual, activation
        )
        kernel = _kernel()
        _check_limits(input, shape, kernel.IS_INTERPRETED)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        y = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
        if y.numel() == 0:
            return y
        area = shape[2] * shape[3]
        pixels = shape[0] * area
        steps = (1, shape[1]) if channels_last else (area, 1)  # from filter to filter, from pixel to pixel
        is_flat = self.structure.kernel == (1, 1) and set(stride) == {1} and set(padding) == {0}
        is_flat = is_flat and input.stride(2) == input.stride(3) * input.shape[3]
        residual = None if residual is None else residual.contiguous(memory_format=layout)
        own = self.layout

        def launch(b: Blocks) -> None:
            tiles = own.tiles[b.filters]
            kernel.conv_kernel[(len(tiles) * math.ceil(pixels / b.pixels),)](
                input, own.weight, y if bias is None else bias, y if residual is None else residual, y,
                tiles, own.channels, own.filters, len(tiles), pixels, area, shape[3], shape[1] * area, *steps,
                input.shape[2], input.shape[3], *input.stride(),
                *self.structure.kernel, *stride, *padding, *dilation,
                FLAT=is_flat, RUN=own.run, FILTER_RUN=own.filter_run,
                HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
                PRECISION=self.precision, COLUMNS=COLUMNS,
                BLOCK_M=b.pixels, BLOCK_N=b.filters, BLOCK_K=b.channels, num_warps=b.warps, num_stages=b.stages,
                enable_fp_fusion=True,
            )  # fmt: skip

        with torch.cuda.device(input.device) if input.is_cuda else contextlib.nullcontext():
            launch(blocks or self._choose(launch, kernel, (input.shape, input.stride(), stride, padding, dilation)))
        return y

    def _choose(self, launch: Callable[[Blocks], None], kernel: Any, sizes: tuple[Any, ...]) -> Blocks:
        candidates = self.candidates()
        if kernel.IS_INTERPRETED:
            return candidates[0]
        key = tuple(map(tuple, sizes))
        if key not in self.chosen:
            if torch.cuda.is_current_stream_capturing():
                return candidates[0]
            self.chosen[key] = kernel.fastest(launch, candidates)
        return self.chosen[key]


def prepare_gpu(packed: Tensor, structure: Tensor, allow_tf32: bool = False) -> GpuConv:
    """Lays a packed weight and its index lists out for the kernel, on the packed weight's device.

    `allow_tf32` rounds float32 inputs and weights to 10 bits of mantissa in the products. Needs no triton. Raises what
    `Structure.read` and `lay_out` raise.
    """
    known = Structure.read(structure)
    is_tf32 = allow_tf32 and packed.dtype == torch.float32
    return GpuConv(known, lay_out(packed, known), "tf32" if is_tf32 else "ieee")


def group_conv2d(
    input: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    structure: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`reference` on a GPU, without gradients; see there, and `GpuConv` for what it raises besides.

    What `prepare_gpu` makes is kept as long as the packed weight lives, and made again where torch has seen it change;
    writing through `packed.data`, or to tensors made in inference mode, is not seen.
    """
    stamp = None if packed.is_inference() else packed._version, packed.data_ptr()
    kept = _PREPARED.get(packed)
    if kept is None or kept.stamp != stamp or not torch.equal(kept.structure, structure):
        kept = _PREPARED[packed] = _Kept(stamp, structure.clone(), prepare_gpu(packed, structure))
    return kept.conv(input, bias, stride, padding, dilation, residual, activation)


def is_available() -> bool:
    """Whether triton can be imported and there is a CUDA device."""
    try:
        importlib.import_module("triton")
    except ImportError:
        return False
    return torch.cuda.is_available()


@dataclass(frozen=True, eq=False)
class _Kept:
    stamp: tuple[int | None, int]
    structure: Tensor
    conv: GpuConv


_PREPARED: MutableMapping[Tensor, _Kept] = WeakTensorKeyDictionary()


def _kernel() -> Any:
    try:
        return importlib.import_module("dspfx.kernels.triton_kernel")
    except ImportError as error:
        raise ConfigError(
            f"the GPU kernel needs the package triton, which cannot be imported ({error}); run: pip install triton"
        ) from error


def _check_limits(input: Tensor, shape: tuple[int, int, int, int], is_interpreted: bool) -> None:
    """What the kernel adds: a device to run on, and offsets within an image that fit 32 bits."""
    if is_interpreted and input.dtype == torch.bfloat16:
        raise InputError(
            "triton's interpreter (TRITON_INTERPRET=1) multiplies the bits of bfloat16 as integers; run in another "
            "dtype, or without it."
        )
    if not (input.is_cuda or is_interpreted):
        raise InputError(f"the input is on {input.device}; the GPU kernel needs it, and the weight, on a CUDA device.")
    span = sum((size - 1) * step for size, step in zip(input.shape[1:], input.stride()[1:], strict=True))
    largest = max(span, shape[1] * shape[2] * shape[3], shape[0] * shape[2] * shape[3])
    if largest > LIMIT:
        raise InputError(
            f"the input has shape {tuple(input.shape)}, the output {shape}; the GPU kernel takes images of up to "
            f"{LIMIT} elements, and as many output pixels in a batch. Give smaller images or batches."
        )
