"""Whether two callables return the same: tensors of one kind, within a tolerance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def disagreement(found: Any, expected: Any) -> tuple[float, str]:
    """(the largest difference of two outputs, where it is), relative to the largest value of the tensor it is in.

    Infinite where they are nested differently, or differ in shape, dtype, in what is not finite, or in integers.
    """
    ours, spec = pytree.tree_flatten(found)
    theirs, other = pytree.tree_flatten(expected)
    if spec != other:
        return float("inf"), f"the outputs' nesting: {spec} instead of {other}"
    worst, place = 0.0, "none"
    for index, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        error, what = _difference(x, y)
        if error > worst:
            worst, place = error, f"output {index}{what}"
    return worst, place


def tolerance_of(outputs: Any, tolerance: float) -> float:
    """A tolerance meant for float32 outputs, widened for those of coarser dtypes among them."""
    kinds = {x.dtype for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()}
    finest = torch.finfo(torch.float32).eps
    return tolerance * max([1.0, *(torch.finfo(kind).eps / finest for kind in kinds)])


def _difference(x: Any, y: Any) -> tuple[float, str]:
    """(error, what differs beside the values)."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return (0.0, "") if x == y else (float("inf"), f": {x!r} instead of {y!r}")
    if x.shape != y.shape or x.dtype != y.dtype:
        return float("inf"), f": {_kind(x)} instead of {_kind(y)}"
    if not y.numel():
        return 0.0, ""
    if not (y.is_floating_point() or y.is_complex()):
        return (0.0, "") if torch.equal(x, y) else (float("inf"), ": other integers")
    finite = y.isfinite()
    if not torch.equal(x[~finite].nan_to_num(7e7), y[~finite].nan_to_num(7e7)) or not x[finite].isfinite().all():
        return float("inf"), ": other values that are not finite"
    if not finite.any():
        return 0.0, ""
    x, y = x[finite].double(), y[finite].double()
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-30)), ""


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
