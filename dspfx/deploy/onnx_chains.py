"""Chains of the native kernels in an ONNX file: one node of ONNX Runtime's operator dspfx::Chain each.

    images -> Chain(program, weights, layout, images) -> logits

The operator is in the kernels' own library (kernels/onnxruntime_op.cpp), which a session has to load:

    options.register_custom_ops_library("small.avx512.so")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dspfx.held import module_of
from dspfx.kernels.chain import Shape
from dspfx.kernels.library import Library
from dspfx.kernels.packed import Packed
from dspfx.kernels.program import Builder
from dspfx.native import NativeChain

DOMAIN, OPERATOR, VERSION = "dspfx", "Chain", 1
FORMAT = 1  # of the layout, as in onnxruntime_op.cpp


@dataclass(frozen=True)
class Kernels:
    """For whom chains are written: `threads` of a call at most, 0 for as many as the processor has."""

    library: Library
    threads: int = 0


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For torch.onnx.export: a chain becomes a node that `embed_chains` completes."""
    return {torch.ops.dspfx.native_chain.default: _node}


def _node(inputs: list[Any], handle: int) -> Any:
    """The node of a chain, recorded; always a tuple, as the operation returns a list."""
    import onnx
    from onnxscript import values

    kind = onnx.defs.OpSchema
    outputs = len(module_of(handle).chain(tuple(_shape(x) for x in inputs)).outputs)
    schema = kind(
        OPERATOR,
        DOMAIN,
        VERSION,
        inputs=[kind.FormalParameter(f"x{i}", "tensor(float)") for i in range(len(inputs))],
        outputs=[kind.FormalParameter(f"y{i}", "tensor(float)") for i in range(outputs)],
        attributes=[kind.Attribute("handle", kind.AttrType.INT)],
    )
    found = values.Op(values.Opset(DOMAIN, VERSION), OPERATOR, schema)(*inputs, handle=handle)
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def embed_chains(graph: Any, kernels: Kernels) -> None:
    """Gives the nodes of chains in an onnx_ir graph what they run: constants in front of the images."""
    import onnx_ir as ir

    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        handle = node.attributes["handle"].as_int()
        arrays = _written(module_of(handle), tuple(_shape(x) for x in node.inputs), kernels)
        constants = []
        for name, array in arrays.items():
            value = ir.val(f"{node.outputs[0].name}_{name}", const_value=ir.tensor(array))
            graph.register_initializer(value)
            constants.append(value)
        whole = ir.Node(DOMAIN, OPERATOR, [*constants, *node.inputs], num_outputs=len(node.outputs), name=node.name)
        for new, old in zip(whole.outputs, node.outputs, strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], [whole], node.outputs, whole.outputs)
    graph.opset_imports[DOMAIN] = VERSION


def _written(chain: NativeChain, shapes: tuple[Shape, ...], kernels: Kernels) -> dict[str, np.ndarray[Any, Any]]:
    """The operator's constants, for images of these shapes."""
    layers = chain.chain(shapes)
    packed = Packed(layers, kernels.library.max_filters)
    program = Builder(layers, packed, shapes, kernels.library.lanes).build()
    head = [FORMAT, kernels.library.lanes, program.first, program.floats, kernels.threads, program.macs]
    sizes = [number for shape in (*shapes, *program.outputs) for number in (len(shape), *shape)]
    layout = [*head, len(shapes), len(program.outputs), *sizes]
    return {"program": program.steps, "weights": packed.array, "layout": np.array(layout, np.int64)}


def _shape(value: Any) -> Shape:
    """Of one image."""
    return tuple(int(size) for size in value.shape[1:])
