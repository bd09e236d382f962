"""A group convolution's weight and index lists as the GPU kernel reads them, on the device of the packed weight.

    packed [P], Structure  ->  lay_out  ->  Layout

The weight is [kernel position, channel, filter] for each group, channels and filters padded with zeros to whole blocks.
Kernel positions are outermost, so that a block of the sum has one shift of the image, and with it one border mask for
all of its channels; filters are innermost, so that a row of a weight tile is read at once and without a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dspfx.errors import InputError
from dspfx.kernels.structure import LARGEST, Structure, weight_blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COLUMNS = 7  # of a row of a tile table
MOST_FILTERS, MOST_CHANNELS, LEAST = 128, 64, 16  # of a block; tl.dot wants 16 of each
RUN = 8  # 16 bytes of half precision, what a GPU reads at once


@dataclass(frozen=True, eq=False)
class Layout:
    """What the kernel reads beside a call's own tensors.

    Attributes:
        weight: the groups' padded weights, one after the other; 1-D, it begins with LEAST zeros.
        channels, filters: int32, the groups' lists one after the other; channels padded to whole blocks. Filters that
            read nothing stand last.
        tiles: for each number of filters a block may have, int64 [tiles, COLUMNS]: first channel, channels, padded
            channels, first weight, padded filters, first filter, filters. Those with most work stand first.
        most_channels: the largest number of channels a block may have.
        run, filter_run: RUN where every list of channels, or of filters, consists of RUN consecutive indices at a
            time, the first one a multiple of RUN; else 1.
    """

    weight: Tensor
    channels: Tensor
    filters: Tensor
    tiles: dict[int, Tensor]
    most_channels: int
    run: int
    filter_run: int


def lay_out(packed: Tensor, structure: Structure) -> Layout:
    """The layout; raises InputError for a packed weight of another length, of a dtype not in DTYPES, or too large."""
    if packed.dtype not in DTYPES:
        raise InputError(f"the packed weight is {packed.dtype}; the GPU kernel takes {', '.join(map(str, DTYPES))}.")
    weights = weight_blocks(packed.detach(), structure)
    read = [(group, block) for group, block in zip(structure.groups, weights, strict=True) if block.numel()]
    most_filters = _block((len(group.filters) for group, _ in read), MOST_FILTERS)
    most_channels = _block((len(group.channels) for group, _ in read), MOST_CHANNELS)
    channels: list[int] = []
    filters: list[int] = []
    panels, rows, start = [packed.new_zeros(LEAST)], [], LEAST  # of groups: a row for all of their filters
    for group, block in sorted(read, key=lambda pair: -len(pair[0].channels)):
        panel = _panel(block, most_channels, most_filters)
        _, padded_channels, padded_filters = panel.shape
        row = [len(channels), len(group.channels), padded_channels, start, padded_filters, len(filters)]
        rows.append([*row, len(group.filters)])
        channels += (*group.channels, *[0] * (padded_channels - len(group.channels)))
        filters += group.filters
        panels.append(panel.flatten())
        start += panel.numel()
    rows.append([0, 0, 0, 0, 0, len(filters), len(structure.rest)])
    filters += structure.rest
    sizes = [LEAST << i for i in range(8) if LEAST << i <= most_filters]

    def on_device(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=packed.device)

    return Layout(
        torch.cat(panels),
        on_device(channels or [0], torch.int32),
        on_device(filters, torch.int32),
        {size: on_device(_tiles(rows, size), torch.int64) for size in sizes},
        most_channels,
        _run([group.channels for group, _ in read]),
        _run([*(group.filters for group, _ in read), structure.rest]),
    )


def _block(counts: Any, limit: int) -> int:
    """The power of two from LEAST to `limit` that holds the largest count, if one does."""
    return min(max(1 << (max(counts, default=1) - 1).bit_length(), LEAST), limit)


def _run(lists: Sequence[Sequence[int]]) -> int:
    for indices in lists:
        starts = indices[::RUN]
        if any(s % RUN for s in starts) or list(indices) != [s + i for s in starts for i in range(RUN)]:
            return 1
    return RUN


def _panel(block: Tensor, channels: int, filters: int) -> Tensor:
    """[F, K, kh, kw] -> [kh * kw, K, F], padded to multiples of `channels` and `filters`."""
    f, k, height, width = block.shape
    shape = height * width, -(-k // channels) * channels, -(-f // filters) * filters
    if shape[0] * shape[1] * shape[2] > LARGEST:
        raise InputError(
            f"a group of {f} filters and {k} channels has {shape[0] * shape[1] * shape[2]} padded weights; the GPU "
            f"kernel takes {LARGEST}. Split it into groups of fewer filters."
        )
    panel = block.new_zeros(shape)
    panel[:, :k, :f] = block.permute(2, 3, 1, 0).flatten(0, 1)
    return panel


def _tiles(rows: list[list[int]], size: int) -> list[list[int]]:
    """The table of tiles of `size` filters, from one of whole groups."""
    return [
        [*row[:3], row[3] + start, row[4], row[5] + start, min(size, row[6] - start)]
        for row in rows
        for start in range(0, row[6], size)
    ]
