"""The exporter's own optimisations of a graph, but for constants that would make the file larger."""

from __future__ import annotations

import math
from typing import Any


def optimize(model: Any) -> None:
    """Optimises an onnx_ir model in place, as torch.onnx does by itself, without computing products that grow.

    An embedding of a table of positions by a small network, as in Swin v2, is a product of constants; what comes of it
    is larger than the file's weights that made it.
    """
    from onnxscript import optimizer
    from onnxscript.rewriter import onnx_fusions

    optimizer.optimize_ir(model, should_fold=_worth_folding)
    onnx_fusions.fuse(model)


def _worth_folding(node: Any) -> bool | None:
    """False for a product that is larger than its factors together; else None, which leaves it to the optimiser."""
    if node.op_type not in ("MatMul", "Gemm") or any(x is None or x.shape is None for x in node.inputs):
        return None
    shapes = [tuple(x.shape) for x in node.inputs]
    if not all(isinstance(size, int) for shape in shapes for size in shape) or min(map(len, shapes[:2])) < 2:
        return None
    across = (
        shapes[1][-2] if any(a.name == "transB" and a.as_int() for a in node.attributes.values()) else shapes[1][-1]
    )
    made = math.prod(shapes[0][:-1]) * across
    return False if made > sum(map(math.prod, shapes)) else None
