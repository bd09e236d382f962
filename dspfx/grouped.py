"""A convolution whose filters read different channels, as one true grouped convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import ConfigError
from dspfx.method.balance import BLOCK
from dspfx.plans import Group

EMPTY = -1  # a filter's place that no filter takes
_SPARE = 1.25  # groups that stand in consecutive blocks may be padded to this multiple of the largest, to stay there
_MORE = 1.1  # each group more has to save this much


class PaddedGroupConv2d(nn.Module):
    """One grouped `nn.Conv2d`: group g computes `groups[g].filters` from `groups[g].channels`.

    All groups have equally many channels and equally many filters. What a group lacks is padded: channels that it
    repeats, or lists without reading them, have zero weights, and so has a filter's place that is EMPTY. Filters in no
    group read nothing: they all are the first EMPTY place, a plane of their common bias. The input is selected, and
    the output put into the filters' order, only where they do not stand so already. Input [N, C, H, W], output
    [N, O, H', W'].

        groups = (Group((0, 1, 3), (0, 1, 2)), Group((2, 4, EMPTY), (5, 6, 5)))  # of 5 filters, or of more
    """

    channels: Tensor
    order: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, groups: tuple[Group, ...], **options: Any
    ) -> None:
        super().__init__()
        _check(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        channels = [c for g in groups for c in g.channels]
        places = [o for g in groups for o in g.filters]
        place_of = {o: place for place, o in reversed(list(enumerate(places)))}
        order = [place_of[o] if o in place_of else place_of[EMPTY] for o in range(out_channels)]
        self.conv = nn.Conv2d(len(channels), len(places), kernel_size, groups=len(groups), **options)
        self.reads, self.reads_all = _as_slice(channels, in_channels)
        self.gives, self.gives_all = _as_slice(order, len(places))
        self.register_buffer("channels", torch.tensor(channels), persistent=False)
        self.register_buffer("order", torch.tensor(order), persistent=False)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, groups: tuple[Group, ...]) -> PaddedGroupConv2d:
        """The same function as `conv`, whose weights outside the groups are zero; the groups are padded here.

        Filters that read nothing may be in any group, or in none.
        """
        if conv.groups != 1:
            raise ConfigError(f"PaddedGroupConv2d is made from a dense convolution; this one has groups={conv.groups}.")
        groups, idle = _without_idle(conv, groups)
        groups = pad_groups(conv.in_channels, conv.out_channels, groups)
        module = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            groups,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        filters, channels = torch.tensor([g.filters for g in groups]), torch.tensor([g.channels for g in groups])
        first = channels != channels[:, :1]  # not a repeated one
        first[:, 0] = True
        real = (filters != EMPTY)[:, :, None] & first[:, None]  # [G, F, K]
        dense = conv.weight.detach()
        weight = dense[filters[:, :, None].clamp(min=0), channels[:, None]]  # [G, F, K, *kernel]
        weight = weight.masked_fill(~real.to(dense.device)[..., None, None], 0)
        module.conv.weight = nn.Parameter(weight.flatten(0, 1), conv.weight.requires_grad)
        if conv.bias is not None:
            dense = conv.bias.detach()
            rest = dense[idle[0]] if idle else torch.zeros_like(dense[0])
            bias = torch.where((filters == EMPTY).to(dense.device), rest, dense[filters.clamp(min=0)])
            module.conv.bias = nn.Parameter(bias.flatten(), conv.bias.requires_grad)
        return module.to(conv.weight.device).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.reads_all:
            x = x[:, self.reads[0] : self.reads[1]] if self.reads else x.index_select(1, self.channels)
        y = self.conv(x)
        if not self.gives_all:
            y = y[:, self.gives[0] : self.gives[1]] if self.gives else y.index_select(1, self.order)
        return y


def pad_groups(in_channels: int, out_channels: int, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups as PaddedGroupConv2d needs them: all of one size.

    A group of many more filters than the others is split, where that leaves less to compute. Groups that stand in
    consecutive blocks of the channels, or of the filters, keep to them if that costs little. There is an EMPTY place
    where a filter is in no group.
    """
    groups = tuple(g for g in groups if g.filters)
    if not groups or not all(g.channels for g in groups):
        raise ConfigError(f"pad_groups needs groups that read at least one channel each; got {groups}.")
    groups = _split_long(groups)
    channels = _blocks([g.channels for g in groups], in_channels)
    if channels is None:
        width = max(len(g.channels) for g in groups)
        channels = [g.channels + g.channels[:1] * (width - len(g.channels)) for g in groups]
    filters = _blocks([g.filters for g in groups], out_channels)
    if filters is None:
        height, total = max(len(g.filters) for g in groups), sum(len(g.filters) for g in groups)
        height += total == height * len(groups) and total < out_channels
        filters = [g.filters + (EMPTY,) * (height - len(g.filters)) for g in groups]
    return tuple(Group(own, read) for own, read in zip(filters, channels, strict=True))


def _without_idle(conv: nn.Conv2d, groups: tuple[Group, ...]) -> tuple[tuple[Group, ...], list[int]]:
    """(the groups without filters that read nothing, these filters); each keeps its place where their biases differ."""
    reads = (conv.weight.detach() != 0).flatten(1).any(1).tolist()
    idle = [o for o in range(conv.out_channels) if not reads[o]]
    lost = sorted(set(range(conv.out_channels)) - set(idle) - {o for g in groups for o in g.filters})
    if lost:
        raise ConfigError(f"PaddedGroupConv2d.from_conv got groups without filter {lost[0]}, which reads its input.")
    used = [Group(tuple(o for o in g.filters if reads[o]), g.channels) for g in groups]
    used = [g for g in used if g.filters]
    bias = None if conv.bias is None else conv.bias.detach()[idle]
    if used and (bias is None or bool((bias == bias[:1]).all())):
        return tuple(used), idle
    used = used or [Group((), g.channels) for g in groups[:1]]
    for o in idle if used else ():
        g = min(range(len(used)), key=lambda g: len(used[g].filters))
        used[g] = Group((*used[g].filters, o), used[g].channels)
    return tuple(used), []


def _split_long(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Groups of more filters than a common height become several of the same channels; the height is the best one."""
    longest = max(len(g.filters) for g in groups)
    heights = {math.ceil(len(g.filters) / parts) for g in groups for parts in range(1, 9)}
    heights = {longest, *(height for height in heights if height >= BLOCK)}

    def cost(height: int) -> float:
        count = sum(math.ceil(len(g.filters) / height) for g in groups)
        return math.log(height * count) + count * math.log(_MORE)

    height = min(sorted(heights), key=cost)
    found: list[Group] = []
    for g in groups:
        found += [Group(g.filters[i : i + height], g.channels) for i in range(0, len(g.filters), height)]
    return tuple(found)


def _blocks(members: list[tuple[int, ...]], count: int) -> list[tuple[int, ...]] | None:
    """The consecutive blocks of 0 .. count-1 in which the members lie, one in each; None where they do not."""
    size = count // len(members)
    lies_inside = all(g * size <= min(own) and max(own) < (g + 1) * size for g, own in enumerate(members))
    if size * len(members) != count or not lies_inside or size > _SPARE * max(map(len, members)):
        return None
    return [tuple(range(g * size, (g + 1) * size)) for g in range(len(members))]


def _as_slice(indices: list[int], count: int) -> tuple[tuple[int, int] | None, bool]:
    """(the range that the indices are, if they are one; whether it is all of 0 .. count-1)."""
    is_range = indices == list(range(indices[0], indices[0] + len(indices)))
    return (indices[0], indices[-1] + 1) if is_range else None, is_range and len(indices) == count


def _check(in_channels: int, out_channels: int, groups: tuple[Group, ...]) -> None:
    shapes = {(len(g.filters), len(g.channels)) for g in groups}
    if len(shapes) != 1 or (0 in next(iter(shapes))):
        raise ConfigError(
            f"PaddedGroupConv2d needs groups of one size, with at least a filter and a channel; these are "
            f"{sorted(shapes)} (filters, channels). Pad them with pad_groups."
        )
    filters = [o for g in groups for o in g.filters if o != EMPTY]
    count = len(set(filters))
    if count < len(filters) or not all(0 <= o < out_channels for o in filters):
        raise ConfigError(
            f"PaddedGroupConv2d needs each of its {out_channels} filters in at most one group; the groups hold "
            f"{len(filters)} filters from {min(filters)} to {max(filters)}, {count} different ones."
        )
    if count < out_channels and not any(EMPTY in g.filters for g in groups):
        raise ConfigError(
            f"PaddedGroupConv2d needs an EMPTY place for its {out_channels - count} filters in no group; pad the "
            f"groups with pad_groups."
        )
    far = [c for g in groups for c in g.channels if not 0 <= c < in_channels]
    if far:
        raise ConfigError(f"PaddedGroupConv2d reads channel {far[0]}; it has {in_channels}.")
