"""Fourier transforms in an ONNX graph as sums of products: TensorRT has no DFT, and OpenVINO 2026.4 has another one.

DFT(x, axis)    becomes    Einsum(x, cosines and sines)    of N^2 products instead of N log N: for transforms of some
                                                           hundred points, as networks have them
"""

from __future__ import annotations

import string
from typing import Any

import numpy as np

LONGEST = 1024  # points; what is longer stays a DFT


def write_out_transforms(graph: Any) -> None:
    """Afterwards no transform of a known length and axis, up to LONGEST points, is left in an onnx_ir graph."""
    import onnx_ir as ir

    for node in list(graph):
        described = _described(node) if node.op_type == "DFT" else None
        if described is None:
            continue
        axis, length, parts = described
        x, y = node.inputs[0], node.outputs[0]
        is_inverse, is_onesided = (bool(_attribute(node, name)) for name in ("inverse", "onesided"))
        table = coefficients(length, parts, is_inverse, is_onesided).astype(_kind(x))
        name = f"{y.name}_coefficients"
        tensor = ir.tensor(table, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(table.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
        einsum = ir.node("Einsum", [x, value], attributes={"equation": equation(len(x.shape), axis)})
        ir.convenience.replace_nodes_and_values(graph, node, [node], [einsum], [y], list(einsum.outputs))


def equation(rank: int, axis: int) -> str:
    """Einsum's equation for a transform along an axis of a tensor whose last axis holds real and imaginary parts.

    "abcd,bdef->aecf" for rank 4, axis 1.
    """
    letters = string.ascii_lowercase[:rank]
    after, part = string.ascii_lowercase[rank], string.ascii_lowercase[rank + 1]
    result = letters[:axis] + after + letters[axis + 1 : -1] + part
    return f"{letters},{letters[axis]}{letters[-1]}{after}{part}->{result}"


def coefficients(length: int, parts: int, is_inverse: bool, is_onesided: bool) -> np.ndarray:
    """float64 [points before, parts before (1: real, 2: complex), points after, 2], as ONNX defines its DFT."""
    points = length // 2 + 1 if is_onesided else length
    angle = 2 * np.pi * (np.outer(np.arange(length), np.arange(points)) % length) / length
    sign = 1 if is_inverse else -1
    real, imaginary = np.cos(angle), sign * np.sin(angle)
    table = np.stack([np.stack([real, imaginary], -1), np.stack([-imaginary, real], -1)], 1)
    return table[:, :parts] / (length if is_inverse else 1)


def _described(node: Any) -> tuple[int, int, int] | None:
    """(axis, points, parts) of a transform; None for one that is left as it is."""
    x, length, axis = [*node.inputs, None, None][:3]
    rank = len(x.shape) if x.shape is not None else 0
    if rank < 2 or (axis is not None and axis.const_value is None) or (length and length.const_value is None):
        return None
    place = (int(axis.const_value.numpy()) if axis is not None else -2) % rank
    points, parts = x.shape[place], x.shape[-1]
    if not isinstance(points, int) or points > LONGEST or parts not in (1, 2) or place == rank - 1:
        return None
    if length is not None and int(length.const_value.numpy()) != points:
        return None  # cut, or filled up with zeros
    if _attribute(node, "inverse") and _attribute(node, "onesided"):
        return None
    return place, points, parts


def _kind(value: Any) -> Any:
    """NumPy's name for a value's type; float32 where the graph does not tell."""
    return value.dtype.numpy() if value.dtype is not None else np.float32


def _attribute(node: Any, name: str) -> int:
    return int(node.attributes[name].as_int()) if name in node.attributes else 0
