"""Batch norms in an ONNX graph without statistics of their own: two values a channel in the file instead of four.

BatchNormalization(x, scale, shift, mean, var)    becomes    BatchNormalization(x, scale', shift', 0, 1), epsilon 0
"""

from __future__ import annotations

from typing import Any

import numpy as np


def merge_statistics(graph: Any) -> None:
    """Afterwards all batch norms of one width in an onnx_ir graph share their mean, 0, and variance, 1.

    The arithmetic is done in float64 and rounded once. Norms whose values are not constants are left alone, as are
    those with a constant that something else reads.
    """
    import onnx_ir as ir

    shared: dict[tuple[int, float, Any], Any] = {}

    def constant(name: str, values: np.ndarray) -> Any:
        tensor = ir.tensor(values, name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype))
        graph.register_initializer(value)
        return value

    for node in list(graph):
        if node.op_type != "BatchNormalization" or len(node.outputs) != 1:
            continue
        old = list(node.inputs[1:5])
        if any(x is None or x.const_value is None or len(x.uses()) != 1 for x in old):
            continue
        scale, shift, mean, var = (x.const_value.numpy().astype(np.float64) for x in old)
        kind = old[0].const_value.numpy().dtype
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        factor = scale / np.sqrt(var + epsilon)
        new = [constant(f"{old[0].name}_merged", factor.astype(kind))]
        new.append(constant(f"{old[1].name}_merged", (shift - mean * factor).astype(kind)))
        for level in (0.0, 1.0):
            key = (len(scale), level, kind)
            if key not in shared:
                shared[key] = constant(f"batch_norm_{level:.0f}_{len(scale)}", np.full(len(scale), level, kind))
            new.append(shared[key])
        for index, value in enumerate(new, 1):
            node.replace_input_with(index, value)
        node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.0)
        for value in old:
            graph.initializers.pop(value.name, None)
