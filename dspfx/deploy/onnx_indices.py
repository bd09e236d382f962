"""Constant indices in an ONNX graph in half the bytes: int32, which is also what TensorRT gathers with.

Gather(x, int64 constant)    becomes    Gather(x, int32 constant)
"""

from __future__ import annotations

from typing import Any

import numpy as np


def narrow_indices(graph: Any) -> None:
    """Afterwards every Gather of an onnx_ir graph by constant indices that nothing else reads has them in int32."""
    import onnx_ir as ir

    for node in list(graph):
        old = node.inputs[1] if node.op_type == "Gather" else None
        if old is None or old.const_value is None or not old.is_initializer() or len(old.uses()) != 1:
            continue
        values = old.const_value.numpy()
        if values.dtype != np.int64 or not values.size or abs(values).max() >= 2**31:
            continue
        tensor = ir.tensor(values.astype(np.int32), name=f"{old.name}_int32")
        new = ir.Value(name=tensor.name, const_value=tensor, shape=old.shape, type=ir.TensorType(tensor.dtype))
        graph.register_initializer(new)
        node.replace_input_with(1, new)
        graph.initializers.pop(old.name)
