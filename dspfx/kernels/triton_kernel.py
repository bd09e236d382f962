"""The group convolution as one Triton kernel: an implicit matrix product over lists of channels.

Importing this needs triton; `dspfx.kernels.triton_conv` imports it when it is called, lays out what it reads, and
describes that.
"""

# triton reads the kernels' annotations as its own types: what is none of them stands without one.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import triton
import triton.language as tl
import triton.testing
from triton.runtime.errors import OutOfResources

T = TypeVar("T")


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activation in float32; NaN stays NaN, as in torch."""
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        y = tl.clamp(y, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "hardswish":
        y = y * tl.clamp(y + 3.0, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL) / 6.0
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def conv_kernel(
    x,
    weight,
    bias,
    residual,
    y,
    tiles,
    channels,
    filters,
    tile_count,
    pixels,
    area,
    out_width,
    y_n,
    y_c,
    y_p,
    height,
    width,
    x_n,
    x_c,
    x_h,
    x_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    FLAT: tl.constexpr,
    RUN: tl.constexpr,
    FILTER_RUN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M pixels of the output times BLOCK_N filters of one group.

    Programs of the same pixels follow each other, so that what they read is in the cache. FLAT says that the output's
    pixels are the input's, one after the other (1x1, stride 1, no padding, rows without gaps); RUN and FILTER_RUN that
    the lists consist of so many consecutive channels, or filters, at a time, the first one a multiple of that number.
    """
    program = tl.program_id(0)
    row = tiles + (program % tile_count) * COLUMNS
    first_channel = tl.load(row)
    channel_count = tl.multiple_of(tl.load(row + 1).to(tl.int32), RUN)
    padded_channels = tl.multiple_of(tl.load(row + 2).to(tl.int32), 16)
    first_weight = tl.multiple_of(tl.load(row + 3), 16)
    padded_filters = tl.multiple_of(tl.load(row + 4).to(tl.int32), 16)
    first_filter = tl.load(row + 5)
    filter_count = tl.multiple_of(tl.load(row + 6).to(tl.int32), FILTER_RUN)

    m = (program // tile_count) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_pixel = m < pixels
    image = m // area
    pixel = m % area
    top = pixel // out_width * STRIDE_H - PADDING_H
    left = pixel % out_width * STRIDE_W - PADDING_W
    x_image = x + image.to(tl.int64) * x_n
    w_tile = weight + first_weight + n

    blocks = tl.cdiv(channel_count, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(KERNEL_H * KERNEL_W * blocks):
        tap = step // blocks
        own = (step - tap * blocks) * BLOCK_K + k
        # The lists are padded: no mask. Of a run, the compiler knows that what it reads stands together.
        channel = tl.multiple_of(tl.load(channels + first_channel + own // RUN * RUN), RUN) + own % RUN
        if FLAT:
            offset = pixel * x_w
            is_inside = is_pixel
        else:
            h = top + tap // KERNEL_W * DILATION_H
            w = left + tap % KERNEL_W * DILATION_W
            offset = h * x_h + w * x_w
            is_inside = is_pixel & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        a = tl.load(
            x_image[:, None] + (offset[:, None] + (channel * x_c)[None, :]),
            mask=is_inside[:, None] & (own < channel_count)[None, :],
            other=0.0,
        )
        b = tl.load(w_tile[None, :] + ((tap * padded_channels + own) * padded_filters)[:, None])
        total = tl.dot(a, b, total, input_precision=PRECISION)

    is_filter = n < filter_count
    o = tl.load(filters + first_filter + n // FILTER_RUN * FILTER_RUN, mask=is_filter, other=0)
    o = tl.multiple_of(o, FILTER_RUN) + n % FILTER_RUN
    if HAS_BIAS:
        total += tl.load(bias + o, mask=is_filter, other=0.0).to(tl.float32)[None, :]
    place = (image.to(tl.int64) * y_n + pixel * y_p)[:, None]
    plane = (o * y_c)[None, :]
    is_output = is_pixel[:, None] & is_filter[None, :]
    if HAS_RESIDUAL:
        total += tl.load(residual + place + plane, mask=is_output, other=0.0).to(tl.float32)
    total = activate(total, ACTIVATION)
    tl.store(y + place + plane, total.to(y.dtype.element_ty), mask=is_output)


IS_INTERPRETED = not isinstance(conv_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: it runs on the CPU, slowly


def fastest(launch: Callable[[T], Any], candidates: Sequence[T]) -> T:
    """The candidate with which `launch` takes the least time; those that the device has no room for are left out."""
    times: dict[T, float] = {}
    for candidate in candidates:
        with contextlib.suppress(OutOfResources):
            times[candidate] = triton.testing.do_bench(lambda c=candidate: launch(c), warmup=5, rep=20)
    return min(times, key=lambda candidate: times[candidate])
