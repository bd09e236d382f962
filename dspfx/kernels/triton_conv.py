"""The group convolution on a GPU: what `dspfx.kernels.structure.reference` computes, by one Triton kernel.

    packed, structure  ->  prepare_gpu  ->  GpuConv  ->  conv(input, bias, ...)

One program computes a tile of output pixels times a tile of one group's filters, and walks the group's channels by its
index list: no gather before it, no concatenation or reordering behind it. Sums are float32, whatever the input is.

The weight is laid out anew, once: [kernel position, channel, filter] for each group, channels and filters padded with
zeros to whole blocks. Kernel positions are outermost, so that a block of the sum has one shift of the image, and with
it one border mask for all of its channels, and filters innermost, so that a row of a weight tile is read at once and
without a mask. Pixels stand beside each other in NCHW inputs and in the output, and are read and written in that order.

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

from dspfx.errors import InputError
from dspfx.kernels.structure import LARGEST, Structure, check_fit, weight_blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COLUMNS = 7  # of a row of a tile table
LIMIT = LARGEST - 1024  # of offsets of 32 bits, a tile's overhang taken off
MOST_FILTERS, MOST_CHANNELS, LEAST = 128, 64, 16  # of a block; tl.dot wants 16 of each


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
        weight: for each group [kh * kw, K_g, F_g], padded, one after the other; 1-D.
        channels, filters: int32, the groups' lists one after the other; channels padded to whole blocks.
        tiles: for each number of filters a block may have, int64 [tiles, COLUMNS]: first channel, channels, padded
            channels, first weight, padded filters, first filter, filters. Those with most work stand first.
        precision: "ieee", or "tf32" for float32 inputs on tensor cores, with 10 bits of mantissa.
        chosen: the blocks measured to be fastest, by the call's sizes.
    """

    structure: Structure
    weight: Tensor
    channels: Tensor
    filters: Tensor
    tiles: dict[int, Tensor]
    most_channels: int
    precision: str
    chosen: dict[tuple[Any, ...], Blocks] = field(default_factory=dict)

    def candidates(self) -> list[Blocks]:
        """The blocks that are no larger than the largest group."""
        return [b for b in CANDIDATES if b.filters in self.tiles and b.channels <= self.most_channels]

    def __call__(
        self,
        input: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        residual: Tensor | None = None,
        activation: str = "none",
        blocks: Blocks | None = None,
    ) -> Tensor:
        """As `reference`, without gradients; [N, O, H', W'], contiguous. The input may have any strides.

        The first call with inputs of a size measures which `blocks` are fastest, unless they are given or a CUDA graph
        is being captured: call once before capturing. Raises what `reference` raises, and InputError where the input
        has another dtype or device than the weight, or a dtype that is not in DTYPES.
        """
        shape = check_fit(self.structure, input, self.weight, bias, stride, padding, dilation, residual, activation)
        kernel = importlib.import_module("dspfx.kernels.triton_kernel")
        _check_limits(input, shape, kernel.IS_INTERPRETED)
        y = input.new_empty(shape)
        if y.numel() == 0:
            return y
        area = shape[2] * shape[3]
        pixels = shape[0] * area
        is_flat = self.structure.kernel == (1, 1) and set(stride) == {1} and set(padding) == {0}
        is_flat = is_flat and input.stride(2) == input.stride(3) * input.shape[3]
        residual = None if residual is None else residual.contiguous()

        def launch(b: Blocks) -> None:
            tiles = self.tiles[b.filters]
            kernel.conv_kernel[(len(tiles) * math.ceil(pixels / b.pixels),)](
                input, self.weight, y if bias is None else bias, y if residual is None else residual, y,
                tiles, self.channels, self.filters, len(tiles), pixels, area, shape[3], shape[1],
                input.shape[2], input.shape[3], *input.stride(),
                *self.structure.kernel, *stride, *padding, *dilation,
                FLAT=is_flat, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
                PRECISION=self.precision, COLUMNS=COLUMNS,
                BLOCK_M=b.pixels, BLOCK_N=b.filters, BLOCK_K=b.channels, num_warps=b.warps, num_stages=b.stages,
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
    `Structure.read` and `weight_blocks` raise, and InputError for a dtype that is not in DTYPES.
    """
    known = Structure.read(structure)
    weights = weight_blocks(packed.detach(), known)
    _check_dtype("packed weight", packed)
    read = [(group, block) for group, block in zip(known.groups, weights, strict=True) if block.numel()]
    most_filters = _block(max((len(group.filters) for group, _ in read), default=1), MOST_FILTERS)
    most_channels = _block(max((len(group.channels) for group, _ in read), default=1), MOST_CHANNELS)
    channels: list[int] = []
    filters: list[int] = []
    panels, rows, start = [packed.new_zeros(LEAST)], [], LEAST  # of groups: a row for all of their filters
    for group, block in sorted(read, key=lambda pair: -len(pair[0].channels)):
        panel = _panel(block, most_channels, most_filters)
        padded_channels, padded_filters = panel.shape[1:]
        rows.append([len(channels), len(group.channels), padded_channels, start, padded_filters, len(filters)])
        rows[-1].append(len(group.filters))
        channels += (*group.channels, *[0] * (padded_channels - len(group.channels)))
        filters += group.filters
        panels.append(panel.flatten())
        start += panel.numel()
    rows.append([0, 0, 0, 0, 0, len(filters), len(known.rest)])
    filters += known.rest
    sizes = [LEAST << i for i in range(8) if LEAST << i <= most_filters]

    def on_device(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=packed.device)

    return GpuConv(
        known,
        torch.cat(panels),
        on_device(channels or [0], torch.int32),
        on_device(filters, torch.int32),
        {size: on_device(_tiles(rows, size), torch.int64) for size in sizes},
        most_channels,
        "tf32" if allow_tf32 and packed.dtype == torch.float32 else "ieee",
    )


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


def _block(most: int, limit: int) -> int:
    """The power of two from LEAST to `limit` that holds the most of something, if one does."""
    return min(max(1 << (most - 1).bit_length(), LEAST), limit)


def _panel(block: Tensor, channels: int, filters: int) -> Tensor:
    """[F, K, kh, kw] -> [kh * kw, K, F], padded to multiples of `channels` and `filters`."""
    f, k, height, width = block.shape
    panel = block.new_zeros(height * width, -(-k // channels) * channels, -(-f // filters) * filters)
    if panel.numel() > LARGEST:
        raise InputError(
            f"a group of {f} filters and {k} channels has {panel.numel()} padded weights; the GPU kernel takes "
            f"{LARGEST}. Split it into groups of fewer filters."
        )
    panel[:, :k, :f] = block.permute(2, 3, 1, 0).flatten(0, 1)
    return panel


def _tiles(rows: list[list[int]], size: int) -> list[list[int]]:
    """The table of tiles of `size` filters, from one of whole groups."""
    return [
        [*row[:3], row[3] + start, row[4], row[5] + start, min(size, row[6] - start)]
        for row in rows
        for start in range(0, row[6], size)
    ]


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise InputError(f"the {name} is {tensor.dtype}; the GPU kernel takes {', '.join(map(str, DTYPES))}.")


def _check_limits(input: Tensor, shape: tuple[int, int, int, int], is_interpreted: bool) -> None:
    """What the kernel adds: a device to run on, and offsets within an image that fit 32 bits."""
    if not (input.is_cuda or is_interpreted):
        raise InputError(f"the input is on {input.device}; the GPU kernel needs it, and the weight, on a CUDA device.")
    span = sum((size - 1) * step for size, step in zip(input.shape[1:], input.stride()[1:], strict=True))
    largest = max(span, shape[1] * shape[2] * shape[3], shape[0] * shape[2] * shape[3])
    if largest > LIMIT:
        raise InputError(
            f"the input has shape {tuple(input.shape)}, the output {shape}; the GPU kernel takes images of up to "
            f"{LIMIT} elements, and as many output pixels in a batch. Give smaller images or batches."
        )
