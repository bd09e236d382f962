"""Which channels are constant, and which anybody still needs: exact, symbolic, to a fixed point.

A convolution is described by `Reads`: the rows of a bool matrix [R, C] (which input channels a row reads) and the
row of each filter. A group of DSP is a row, a free filter is a row of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dspfx.graph.channels import ChannelGraph, Step
from dspfx.graph.layers import TENSORS, attribute

Array = npt.NDArray[Any]
NAN = torch.tensor(float("nan"), dtype=torch.float64)
ZERO = torch.tensor(0.0, dtype=torch.float64)


@dataclass(eq=False)
class Reads:
    """keep: bool [R, C], the input channels of each row; row: int64 [O], each filter's row, -1 where it is dead."""

    keep: Tensor
    row: Tensor

    @classmethod
    def dense(cls, out_channels: int, in_channels: int) -> Reads:
        """Every filter reads every channel."""
        return cls(torch.ones(1, in_channels, dtype=torch.bool), torch.zeros(out_channels, dtype=torch.int64))

    @classmethod
    def whole(cls, step: Step) -> Reads:
        """Every filter of a conv step reads every channel of its group."""
        groups = step.layer.groups if step.layer else 1
        if groups == 1:
            return cls.dense(len(step.out), len(step.ins[0]))
        block = torch.arange(len(step.ins[0])) // (len(step.ins[0]) // groups)
        return cls(block[None] == torch.arange(groups)[:, None], step.blocks())

    @classmethod
    def of_weight(cls, step: Step, weight: Tensor) -> Reads:
        """What the non-zero entries of a conv step's weight read."""
        assert step.layer is not None
        used = (step.layer.by_filter(weight.detach()) != 0).any(-1).cpu()
        whole = cls.whole(step)
        if bool(used.all()):
            return whole
        if step.layer.groups > 1:
            wide = torch.zeros(len(step.out), len(step.ins[0]), dtype=torch.bool)
            used = wide.masked_scatter_(whole.pairs(), used)
        keep, row = unique_rows(used)
        return cls(keep, torch.where(keep[row].any(1), row, -1))

    def pairs(self) -> Tensor:
        """bool [O, C]: the (filter, input channel) pairs that are kept."""
        return self.keep[self.row.clamp(min=0)] & (self.row >= 0)[:, None]


@dataclass(eq=False)
class Liveness:
    """values: float64 [wires], a channel's constant value, NaN where it varies; needed: bool [wires]."""

    values: Tensor
    needed: Tensor

    def removable(self, channels: ChannelGraph) -> Tensor:
        """bool [wires]: members of classes that nobody needs anywhere and nothing pins."""
        kept = torch.zeros(channels.num_wires, dtype=torch.bool)
        kept[channels.root[self.needed]] = True
        return ~kept[channels.root] & ~channels.pinned()


def liveness(channels: ChannelGraph, reads: Mapping[str, Reads], model: nn.Module | None = None) -> Liveness:
    """Values forward, needs backward, once each.

    With `model` the constants are those of its weights in eval mode, exactly (what lowering may rely on). Without, they
    are those that pruning will make true: the bias and the norm's scale and shift of a dead filter are zero.
    """
    values = NAN.repeat(channels.num_wires)
    values[channels.zero] = 0.0
    tainted = channels.tainted.nonzero().flatten()
    for step in channels.steps:
        values[step.out] = _forward(step, values, reads, model)
        if len(tainted):
            values[tainted] = NAN
    needed = channels.pinned()
    for step in reversed(channels.steps):
        _backward(step, values.numpy(), needed.numpy(), reads)
    return Liveness(values, needed)


def _forward(step: Step, values: Tensor, reads: Mapping[str, Reads], model: nn.Module | None) -> Tensor:
    if step.kind == "map":
        assert step.function is not None
        ins = [values[i] for i in step.ins]
        result = step.function(*ins)
        return torch.where(ins[0].isnan(), NAN, result) if len(ins) == 1 else result
    if step.kind == "param":
        return NAN.expand(len(step.out)) if model is None else _elements(attribute(model, step.path), step.axis)
    source = values[step.ins[0]]
    if step.kind == "merge":
        return _merged(step.out, source)
    assert step.layer is not None
    if step.kind in ("norm", "coupled"):
        if model is None:
            # A norm without a shift of its own cannot be told to leave a dead channel zero.
            stays = step.kind == "norm" or bool(step.layer.weight)
            return torch.where((source == 0) & torch.tensor(stays), ZERO, NAN)
        return _norm_constants(step, model, source)
    if step.kind == "conv":
        read = reads[step.name]
        varies = (read.keep & (source != 0)).any(1)[read.row.clamp(min=0)] & (read.row >= 0)
    else:
        varies = source != 0
        weight = step.layer.tensor(model, "weight") if model is not None else None
        if weight is not None:
            varies = varies & (weight.detach().flatten(1) != 0).any(1).cpu()
    bias = step.layer.tensor(model, "bias") if model is not None else None
    constant = torch.zeros(len(step.out), dtype=torch.float64) if bias is None else bias.detach().double().cpu()
    return torch.where(varies, NAN, constant)


def _elements(tensor: Tensor, axis: int) -> Tensor:
    """float64 [n]: the elements along `axis`, NaN where they differ along another one."""
    rows = tensor.detach().cpu().movedim(axis, 0).reshape(tensor.shape[axis], -1).double()
    return torch.where((rows == rows[:, :1]).all(1), rows[:, 0], NAN)


def _merged(out: Tensor, source: Tensor) -> Tensor:
    """The constant that all wires of an `out` wire agree on, NaN where they do not."""
    _, index = out.unique(return_inverse=True)
    count = int(index.max()) + 1 if len(index) else 0
    low = torch.full((count,), float("inf"), dtype=torch.float64).scatter_reduce(0, index, source, "amin")
    high = torch.full((count,), -float("inf"), dtype=torch.float64).scatter_reduce(0, index, source, "amax")
    return torch.where(low == high, low, NAN)[index]


def _norm_constants(step: Step, model: nn.Module, source: Tensor) -> Tensor:
    """A norm in eval mode on constant channels (NaN in, NaN out, unless its scale is zero)."""
    layer = step.layer
    assert layer is not None
    found = {key: layer.tensor(model, key) for key in TENSORS}
    read = {key: value.detach().double().cpu() for key, value in found.items() if value is not None}
    weight, bias = read.get("weight", torch.ones_like(source)), read.get("bias", torch.zeros_like(source))
    if step.kind == "coupled":  # its statistics come from all channels of the group
        return torch.where(weight == 0, bias, NAN)
    if "mean" not in read:  # statistics of the batch: a constant channel is its own mean
        normal = torch.where(source == 0, ZERO, NAN)
    else:
        normal = (source - read["mean"]) / (read["var"] + layer.eps).sqrt()
    return torch.where(weight == 0, bias, normal * weight + bias)


def _backward(step: Step, values: Array, needed: Array, reads: Mapping[str, Reads]) -> None:
    """Marks the inputs that a needed, varying output reads; a channel that is zero is never read.

    In numpy: a search for a budget walks back through the network many times, in steps too small for torch.
    """
    out = step.out.numpy()
    wanted = needed[out]
    if step.kind == "conv":
        keep, row = reads[step.name].keep.numpy(), reads[step.name].row.numpy()
        rows = np.zeros(len(keep), dtype=np.bool_)
        rows[row[wanted & (row >= 0)]] = True
        wires = step.ins[0].numpy()
        needed[wires[keep[rows].any(0) & (values[wires] != 0)]] = True
        return
    varies = np.isnan(values[out])
    if step.kind == "coupled":  # whoever is needed needs every channel that enters its statistics
        block = step.blocks().numpy()
        groups = np.zeros(int(block.max(initial=-1)) + 1, dtype=np.bool_)
        groups[block[wanted & varies]] = True
        wanted, varies = groups[block], np.ones_like(varies)
    for wires in (tensor.numpy() for tensor in step.ins):
        source = values[wires]
        constant = ~np.isnan(source) & (source != 0)
        needed[wires[wanted & (varies & (source != 0) | constant)]] = True


def unique_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(different rows [R, C], row of each [O]) of a bool matrix [O, C], in order of their first appearance.

    Rows are told apart by a random projection, which is checked: sorting whole rows is slow for wide matrices.
    """
    key = torch.rand(matrix.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, row = (matrix.double() @ key).unique(return_inverse=True)
    first = torch.full((int(row.max()) + 1,), len(row)).scatter_reduce(0, row, torch.arange(len(row)), "amin")
    order = first.argsort()
    keep, row = matrix[first[order]], order.argsort()[row]
    return (keep, row) if bool((keep[row] == matrix).all()) else matrix.unique(dim=0, return_inverse=True)
