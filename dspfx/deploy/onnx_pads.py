"""Borders before a pooling that has borders of its own, which ONNX Runtime (1.31) adds up to more than a kernel.

x -> Pad -> AveragePool(pads)    becomes    x -> Pad -> Max(y, y) -> AveragePool(pads)

Its fusion of the two leaves a Pad alone that is read twice; every runtime computes the same as before.
"""

from __future__ import annotations

from typing import Any

POOLS = ("AveragePool", "MaxPool")


def keep_pads_apart(graph: Any) -> None:
    """Afterwards no pooling of an onnx_ir graph with borders of its own reads a Pad that nothing else reads."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type not in POOLS or "pads" not in node.attributes or not any(node.attributes["pads"].as_ints()):
            continue
        source = node.inputs[0]
        pad = source.producer()
        if pad is None or pad.op_type != "Pad" or len(source.uses()) != 1:
            continue
        same = ir.Node("", "Max", [source, source], num_outputs=1)
        same.outputs[0].name = f"{source.name}_apart"
        same.outputs[0].shape, same.outputs[0].type = source.shape, source.type
        graph.insert_before(node, same)
        node.replace_input_with(0, same.outputs[0])
