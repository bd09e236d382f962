"""Borders before a pooling, which ONNX Runtime (1.31) makes the pooling's own even where these mean something else.

x -> Pad -> AveragePool    becomes    x -> Pad -> Max(y, y) -> AveragePool

A border of zeros wins the maximum over negative neighbours, that of a MaxPool never does; and no pooling may have a
border as wide as its kernel. The fusion of the two leaves a Pad alone that is read twice; every runtime computes the
same as before.
"""

from __future__ import annotations

from typing import Any

POOLS = ("AveragePool", "MaxPool")


def keep_pads_apart(graph: Any) -> None:
    """Afterwards no pooling of an onnx_ir graph reads a Pad that nothing else reads and that it cannot take over."""
    import onnx_ir as ir

    for node in list(graph):
        if node.op_type not in POOLS:
            continue
        source = node.inputs[0]
        pad = source.producer()
        if pad is None or pad.op_type != "Pad" or len(source.uses()) != 1 or _can_take_over(node, pad):
            continue
        same = ir.Node("", "Max", [source, source], num_outputs=1)
        same.outputs[0].name = f"{source.name}_apart"
        same.outputs[0].shape, same.outputs[0].type = source.shape, source.type
        graph.insert_before(node, same)
        node.replace_input_with(0, same.outputs[0])


def _can_take_over(pool: Any, pad: Any) -> bool:
    """Whether it is a mean without borders yet, and with a kernel larger than these."""
    own, amounts = pool.attributes.get("pads"), pad.inputs[1].const_value
    if pool.op_type != "AveragePool" or amounts is None or (own is not None and any(own.as_ints())):
        return False
    return max(amounts.numpy().tolist()) < min(pool.attributes["kernel_shape"].as_ints())
