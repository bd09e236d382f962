"""Tensors of wires: int64 tensors shaped like an activation whose elements say which channel each element is.

An activation in *channel form* differs along one axis only; it is kept as an expanded (stride 0) view, so that a
wire tensor costs its channels and not its pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spread(vector: Tensor, shape: torch.Size | tuple[int, ...], axis: int) -> Tensor:
    """Wires [C] -> a wire tensor of `shape` that holds them along `axis`."""
    view = [1] * len(shape)
    view[axis] = -1
    return vector.reshape(view).expand(tuple(shape))


def thin(wires: Tensor) -> Tensor:
    """The same tensor with every axis along which it is constant by construction (stride 0) narrowed to one."""
    for axis, (size, stride) in enumerate(zip(wires.shape, wires.stride(), strict=True)):
        if size > 1 and stride == 0:
            wires = wires.narrow(axis, 0, 1)
    return wires


def along(wires: Tensor, axis: int) -> Tensor | None:
    """The wires [C] along `axis` where they differ along no other axis, else None."""
    if wires.numel() == 0 or wires.dim() == 0:
        return None
    axis %= wires.dim()
    small = thin(wires)
    vector = small
    for other in range(wires.dim()):
        if other != axis:
            vector = vector.narrow(other, 0, 1)
    if not bool((small == vector).all()):
        return None
    return vector.reshape(-1).expand(wires.shape[axis])


def compress(wires: Tensor) -> Tensor:
    """The same values, as a view that is expanded along every axis on which they do not differ."""
    small = thin(wires)
    for axis in range(small.dim()):
        first = small.narrow(axis, 0, 1) if small.shape[axis] else small
        if small.shape[axis] > 1 and bool((small == first).all()):
            small = first
    return small.contiguous().expand(wires.shape)


def distinct(wires: Tensor, count: int) -> Tensor:
    """The different wires of a tensor, in order; `count` is more than the largest. Nothing is sorted."""
    present = torch.zeros(count, dtype=torch.bool)
    present[thin(wires).reshape(-1)] = True
    return present.nonzero().flatten()


def delete(wires: Tensor, removed: Tensor) -> Tensor | None:
    """`wires` without the elements whose wire is `removed` (bool [wires]); None where what is left is no block."""
    small = thin(wires)
    keep = ~removed[small]
    if bool(keep.all()):
        return wires
    index: list[Tensor] = []
    for axis in range(small.dim()):
        others = [a for a in range(small.dim()) if a != axis]
        index.append(keep.any(dim=others) if others else keep)
    if not bool(keep.any()):  # nothing is left: an empty tensor, along the axis that held the channels
        axes = [a for a in range(small.dim()) if small.shape[a] > 1] or [min(1, small.dim() - 1)]
        if len(axes) > 1:
            return None
        shape = list(wires.shape)
        shape[axes[0]] = 0
        return wires.new_empty(shape)
    block = torch.ones((), dtype=torch.bool)
    for axis, kept in enumerate(index):
        view = [1] * small.dim()
        view[axis] = -1
        block = block & kept.reshape(view)
    if not bool((keep == block).all()):
        return None
    shape = []
    for axis, kept in enumerate(index):
        thinned = small.shape[axis] != wires.shape[axis]
        shape.append(wires.shape[axis] if thinned else int(kept.sum()))
        small = small.index_select(axis, kept.nonzero().flatten())
    return small.expand(shape)
