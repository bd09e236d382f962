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
    def of_weight(cls, weight: Tensor) -> Reads:
        """What the non-zero entries of a weight [O, C, ...] read."""
        used = ((weight.detach() != 0).flatten(2).any(-1) if weight.dim() > 2 else weight.detach() != 0).cpu()
        if bool(used.all()):
            return cls.dense(*used.shape)
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


def liveness(channels: ChannelGraph, reads: Mapping[str, Reads], gm: nn.Module | None = None) -> Liveness:
    """Values forward, needs backward, once each.

    With `gm` the constants are those of its weights in eval mode, exactly (what lowering may rely on). Without, they
    are those that pruning will make true: the bias and the norm's scale and shift of a dead filter are zero.
    """
    values = NAN.repeat(channels.num_wires)
    values[channels.zero] = 0.0
    tainted = channels.tainted.nonzero().flatten()
    for step in channels.steps:
        values[step.out] = _forward(step, values, reads, gm)
        if len(tainted):
            values[tainted] = NAN
    needed = channels.pinned()
    for step in reversed(channels.steps):
        _backward(step, values.numpy(), needed.numpy(), reads)
    return Liveness(values, needed)


def _forward(step: Step, values: Tensor, reads: Mapping[str, Reads], gm: nn.Module | None) -> Tensor:
    if step.kind == "map":
        assert step.function is not None
        ins = [values[i] for i in step.ins]
        result = step.function(*ins)
        return torch.where(ins[0].isnan(), NAN, result) if len(ins) == 1 else result
    module: Any = gm.get_submodule(step.module) if gm is not None else None
    source = values[step.ins[0]]
    if step.kind == "norm":
        return torch.where(source == 0, ZERO, NAN) if module is None else _norm_constants(module, source)
    if step.kind == "conv":
        read = reads[step.module]
        varies = (read.keep & (source != 0)).any(1)[read.row.clamp(min=0)] & (read.row >= 0)
    else:
        varies = source != 0
        if module is not None:
            varies = varies & (module.weight.detach().flatten(1) != 0).any(1).cpu()
    bias = getattr(module, "bias", None)
    constant = torch.zeros(len(step.out), dtype=torch.float64) if bias is None else bias.detach().double().cpu()
    return torch.where(varies, NAN, constant)


def _norm_constants(module: Any, source: Tensor) -> Tensor:
    """A batch norm in eval mode on constant channels (NaN in, NaN out, unless its scale is zero)."""
    zeros, ones = torch.zeros_like(source), torch.ones_like(source)

    def read(name: str, default: Tensor) -> Tensor:
        value = getattr(module, name)
        return default if value is None else value.detach().double().cpu()

    weight, bias = read("weight", ones), read("bias", zeros)
    if module.running_mean is None:  # statistics of the batch: a constant channel is its own mean
        normal = torch.where(source == 0, ZERO, NAN)
    else:
        normal = (source - read("running_mean", zeros)) / (read("running_var", ones) + module.eps).sqrt()
    return torch.where(weight == 0, bias, normal * weight + bias)


def _backward(step: Step, values: Array, needed: Array, reads: Mapping[str, Reads]) -> None:
    """Marks the inputs that a needed, varying output reads; a channel that is zero is never read.

    In numpy: a search for a budget walks back through the network many times, in steps too small for torch.
    """
    out = step.out.numpy()
    wanted = needed[out]
    if step.kind == "conv":
        keep, row = reads[step.module].keep.numpy(), reads[step.module].row.numpy()
        rows = np.zeros(len(keep), dtype=np.bool_)
        rows[row[wanted & (row >= 0)]] = True
        wires = step.ins[0].numpy()
        needed[wires[keep[rows].any(0) & (values[wires] != 0)]] = True
        return
    varies = np.isnan(values[out])
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
