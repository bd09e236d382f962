"""One layer as an ONNX file, written directly: torch's exporter takes a second, and a table has hundreds of layers.

A two-dimensional layer stands in a frame, narrow convolution -> layer -> global average, because runtimes keep
activations in blocks of channels between convolutions: what it costs to leave these blocks and to come back counts.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from dspfx.grouped import PaddedGroupConv2d
from dspfx.modules import GroupConv2d

FRAME = 16  # channels of a frame's input
OPSET = 18


class _Graph:
    """Nodes and constants of a file in the making; every method returns the name of its result."""

    def __init__(self) -> None:
        self.onnx = importlib.import_module("onnx")
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any) -> str:
        array = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        name = f"c{len(self.constants)}"
        self.constants.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def call(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def conv(self, x: str, conv: Any) -> str:
        options = {
            "kernel_shape": list(conv.kernel_size),
            "strides": list(conv.stride),
            "dilations": list(conv.dilation),
            "group": conv.groups,
        }
        if conv.padding == "same":  # ONNX Runtime refuses auto_pad beside dilations
            both = [rate * (size - 1) for size, rate in zip(conv.kernel_size, conv.dilation, strict=True)]
            options["pads"] = [*(n // 2 for n in both), *(n - n // 2 for n in both)]
        elif conv.padding != "valid":
            options["pads"] = [*conv.padding, *conv.padding]
        if conv.transposed:
            options["output_padding"] = list(conv.output_padding)
        bias = [self.constant(conv.bias)] if conv.bias is not None else []
        kind = "ConvTranspose" if conv.transposed else "Conv"
        return self.call(kind, x, self.constant(conv.weight), *bias, **options)

    def read(self, x: str, span: tuple[int, int] | None, channels: Tensor) -> str:
        """The range of channels, or else these channels."""
        if span is None:
            return self.call("Gather", x, self.constant(channels), axis=1)
        return self.call("Slice", x, *(self.constant(np.array([value], dtype=np.int64)) for value in (*span, 1)))

    def layer(self, x: str, module: nn.Module) -> str:
        if isinstance(module, nn.Linear):
            y = self.call("MatMul", x, self.constant(module.weight.T))
            return y if module.bias is None else self.call("Add", y, self.constant(module.bias))
        if isinstance(module, PaddedGroupConv2d):
            x = x if module.reads_all else self.read(x, module.reads, module.channels)
            y = self.conv(x, module.conv)
            return y if module.gives_all else self.read(y, module.gives, module.order)
        if not isinstance(module, GroupConv2d):
            return self.conv(x, module)
        results = []
        for i, (branch, span) in enumerate(zip(module.branches, module.slices, strict=True)):
            results.append(self.conv(self.read(x, span, getattr(module, f"channels{i}")), branch))
        y = results[0] if len(results) == 1 else self.call("Concat", *results, axis=1)
        if module.rest:
            pads = np.array([0, 0, 0, 0, 0, len(module.rest), 0, 0], dtype=np.int64)
            y = self.call("Pad", y, self.constant(pads))
        return y if module.is_ordered else self.read(y, None, module.order)


def write_layer(module: nn.Module | None, shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    """Writes the layer on an input of `shape`, in a frame where the input has four axes; the frame alone for None.

    Returns:
        The shape of the file's only input, "x".
    """
    graph = _Graph()
    helper, kinds = graph.onnx.helper, graph.onnx.TensorProto
    framed = len(shape) == 4 and not isinstance(module, nn.Linear)
    outer = (shape[0], FRAME, *shape[2:]) if framed else shape
    y = graph.conv("x", nn.Conv2d(FRAME, shape[1], 1)) if framed else "x"
    if module is not None:
        y = graph.layer(y, module)
    if framed:
        y = graph.call("GlobalAveragePool", y)
    ends = [helper.make_tensor_value_info("x", kinds.FLOAT, outer), helper.make_tensor_value_info(y, kinds.FLOAT, None)]
    made = helper.make_graph(graph.nodes, "layer", ends[:1], ends[1:], graph.constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return outer
