"""A layer as a table of costs knows it: its sizes and its form, without its weights.

FormCase("dense", "Conv2d", (1, 64, 56, 56), 64, (3, 3), ...)      ->  build_form  ->      nn.Conv2d(64, 64, 3)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import nn

from dspfx.graph.layers import CONVS, TRANSPOSED
from dspfx.grouped import PaddedGroupConv2d, pad_groups
from dspfx.kernel_conv import KernelConv2d
from dspfx.kernels.op import has_kernel
from dspfx.modules import GroupConv2d
from dspfx.plans import Group

Form = Literal["dense", "branches", "grouped", "kernel", "native"]


@dataclass(frozen=True)
class Branch:
    """Filters and channels of one branch; `is_slice` where its channels stand beside each other."""

    filters: int
    channels: int
    is_slice: bool


@dataclass(frozen=True)
class FormCase:
    """One call of one layer in one form.

    Attributes:
        form: see `LoweredLayer`.
        kind: the name of a class of torch.nn: "Conv1d" to "ConvTranspose3d", or "Linear".
        shape: of the input, batch included.
        filters: O.
        groups: of the layer itself (a depthwise convolution has one a channel).
        branches: of every form but "dense"; filters in none of them read nothing, and stand last.
        is_ordered: the branches' filters stand in the order of the result.
    """

    form: Form
    kind: str
    shape: tuple[int, ...]
    filters: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    branches: tuple[Branch, ...] = ()
    is_ordered: bool = True

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[-1] if self.kind == "Linear" else self.shape[1]

    @property
    def key(self) -> str:
        """The case in one line, the same for equal cases."""
        parts = [_text(getattr(self, field.name)) for field in fields(self) if field.name != "branches"]
        return "|".join([*parts, *(f"{b.filters}x{b.channels}{'s' if b.is_slice else 'g'}" for b in self.branches)])

    def resized(self, filters: int, channels: int) -> FormCase:
        """The same layer, dense, with other numbers of filters and channels."""
        place = len(self.shape) - 1 if self.kind == "Linear" else 1
        shape = (*self.shape[:place], channels, *self.shape[place + 1 :])
        return replace(self, form="dense", shape=shape, filters=filters, branches=(), is_ordered=True)


Clock = Callable[[FormCase], float]  # the milliseconds of a case
NODES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of a layer's width, where `AnyWidth` measures; it interpolates between them


class AnyWidth:
    """Milliseconds of a layer at any number of filters and channels, from a few that the clock gives.

    Widths above `block`, the number of channels that the runtime computes together, count in whole blocks.
    """

    def __init__(self, clock: Clock, block: int) -> None:
        self.clock, self.block = clock, block
        self.known: dict[tuple[FormCase, int, int], float] = {}

    def dense(self, case: FormCase, filters: int, channels: int) -> float:
        """`case` with other widths; a grouped layer loses whole groups, so its filters say it all."""
        if case.groups == 1:
            return self._grid(case, filters, channels)
        filters_each, channels_each = case.filters // case.groups, case.channels // case.groups
        left = self._between(filters // filters_each, case.groups, max(self.block // channels_each, 1))
        sizes = [(replace(case.resized(n * filters_each, n * channels_each), groups=n), part) for n, part in left]
        return sum(part * self._time(size, 0, 0) for size, part in sizes)

    def branches(self, case: FormCase, groups: int, filters: int, channels: int) -> float:
        """`filters` in equal groups, each of which reads `channels`."""
        branch = Branch(0, 0, groups < 3)
        return self._grid(replace(case, form="branches", branches=(branch,) * groups), filters, channels)

    def _grid(self, case: FormCase, filters: int, channels: int) -> float:
        rows = self._between(filters, case.filters, self.block)
        columns = self._between(channels, case.channels, self.block)
        return sum(a * b * self._time(case, o, c) for o, a in rows for c, b in columns)

    @staticmethod
    def _between(size: int, whole: int, block: int) -> list[tuple[int, float]]:
        """The nodes around a size, and their parts in it."""

        def blocks(size: int) -> int:
            return min(size if size <= block else -(-size // block) * block, whole)

        size = blocks(size)
        nodes = sorted({blocks(max(round(part * whole), 1)) for part in NODES})
        high = next(node for node in nodes if node >= size)
        low = max((node for node in nodes if node <= size), default=high)
        part = (size - low) / (high - low) if high > low else 1.0
        return [(node, share) for node, share in ((low, 1 - part), (high, part)) if share > 0]

    def _time(self, case: FormCase, filters: int, channels: int) -> float:
        key = case, filters, channels
        if key not in self.known:
            if case.form == "branches":
                each = max(filters // len(case.branches), 1)
                equal = tuple(replace(b, filters=each, channels=channels) for b in case.branches)
                self.known[key] = self.clock(replace(case, filters=each * len(equal), branches=equal))
            else:
                self.known[key] = self.clock(case.resized(filters, channels) if filters else case)
        return self.known[key]


def case_of(module: nn.Module, shape: tuple[int, ...]) -> FormCase | None:
    """The dense case of a layer on an input of this shape; None for what is no layer of torch's own."""
    if isinstance(module, nn.Linear):
        return FormCase("dense", "Linear", shape, module.out_features)
    kind = next((kind.__name__ for kind in (*CONVS, *TRANSPOSED) if isinstance(module, kind)), None)
    if kind is None:
        return None
    conv: Any = module
    return FormCase(
        "dense",
        kind,
        shape,
        conv.out_channels,
        kernel=tuple(conv.kernel_size),
        stride=tuple(conv.stride),
        padding=conv.padding if isinstance(conv.padding, str) else tuple(conv.padding),
        dilation=tuple(conv.dilation),
        groups=conv.groups,
    )


def split_forms(runtime: str, device: torch.device, dtype: torch.dtype) -> tuple[Form, ...]:
    """The forms of split layers that are worth timing there: a kernel of our own is one on GPUs.

    On CPUs whole chains of layers run in native kernels, and compete as such.
    """
    calls_ours = runtime in ("eager", "inductor") and device.type == "cuda" and has_kernel(device, dtype)
    return ("kernel", "grouped", "branches") if calls_ours else ("grouped", "branches")


def build_form(case: FormCase) -> nn.Module:
    """A module of this case, with random weights."""
    options: dict[str, Any] = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    if case.kind == "Linear":
        return nn.Linear(case.channels, case.filters)
    if case.form in ("branches", "kernel"):
        kind = GroupConv2d if case.form == "branches" else KernelConv2d
        return kind(case.channels, case.filters, case.kernel, _spread(case), **options)
    if case.form == "grouped":
        groups = pad_groups(case.channels, case.filters, _spread(case))
        return PaddedGroupConv2d(case.channels, case.filters, case.kernel, groups, **options)
    plain: Any = getattr(nn, case.kind)
    return plain(case.channels, case.filters, case.kernel, groups=case.groups, **options)


def _spread(case: FormCase) -> tuple[Group, ...]:
    """Groups like the case's: slices at even distances, selections that skip channels, filters in order or not."""
    numbers = [i for i, branch in enumerate(case.branches) for _ in range(branch.filters)]
    order = sorted(range(len(numbers)), key=lambda i: (0 if case.is_ordered else i % 7, i))
    groups = []
    for i, branch in enumerate(case.branches):
        spare = case.channels - branch.channels
        if branch.is_slice or spare == 0:
            start = spare * i // max(len(case.branches) - 1, 1)
            channels = tuple(range(start, start + branch.channels))
        else:
            channels = tuple(j * case.channels // branch.channels for j in range(branch.channels - 1))
            channels = (*channels, case.channels - 1)
        groups.append(Group(tuple(o for o, n in zip(order, numbers, strict=True) if n == i), channels))
    return tuple(groups)


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
