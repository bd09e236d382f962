"""The same kind of inputs with another number of samples, or with larger images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dspfx.config import Inputs


def samples(inputs: Inputs) -> int:
    """The batch: the length of a list of images, else the first axis of the first tensor that has one; at least 1."""
    for value in (*inputs.args, *inputs.kwargs.values()):
        if _is_list_of_images(value):
            return len(value)
    leaves = pytree.tree_leaves((inputs.args, inputs.kwargs))
    return next((x.shape[0] for x in leaves if isinstance(x, Tensor) and x.dim()), 1) or 1


def with_samples(inputs: Inputs, count: int) -> Inputs:
    """The inputs with `count` samples: in lists of images, and along first axes that were as long as the batch."""
    batch = samples(inputs)

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or x.shape[0] != batch:
            return x
        return x[:count] if count <= batch else x[:1].expand(count, *x.shape[1:])

    def change(value: Any) -> Any:
        if _is_list_of_images(value):
            return [value[i % len(value)] for i in range(count)]
        return pytree.tree_map(cut, value)

    return _changed(inputs, change)


def with_larger_images(inputs: Inputs) -> Inputs:
    """The inputs with 32 rows and 64 columns more wherever a floating tensor has 4 axes, or 3 in a list of images."""

    def tile(x: Any) -> Any:
        for axis, more in ((-2, 32), (-1, 64)):
            size = x.shape[axis]
            x = x.index_select(axis % x.dim(), torch.arange(size + more, device=x.device) % size)
        return x

    def change(value: Any) -> Any:
        if _is_list_of_images(value):
            return [tile(x) for x in value]
        is_image = lambda x: isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point() and x.numel()  # noqa: E731
        return pytree.tree_map(lambda x: tile(x) if is_image(x) else x, value)

    return _changed(inputs, change)


def _is_list_of_images(value: Any) -> bool:
    """A list of [1, 3 or 4 channels, height, width], which is how detectors take a batch."""
    return isinstance(value, list) and bool(value) and all(isinstance(x, Tensor) and _is_image(x) for x in value)


def _is_image(x: Tensor) -> bool:
    return x.dim() == 3 and x.shape[0] in (1, 3, 4) and min(x.shape[1:]) >= 8


def _changed(inputs: Inputs, change: Callable[[Any], Any]) -> Inputs:
    return Inputs(*(change(x) for x in inputs.args), **{key: change(x) for key, x in inputs.kwargs.items()})
