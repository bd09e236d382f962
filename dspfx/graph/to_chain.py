"""Reads a graph in eval mode as a chain of layers that the native kernels run (dspfx/kernels/chain.py).

conv1 (Conv2d) -> relu -> mean((2, 3)) -> fc (Linear)      ->      Chain(1, (Conv(relu), Mean, Flatten, Linear), ...)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from dspfx.errors import InputError
from dspfx.graph.native_layers import Reader, Unsupported
from dspfx.kernels.chain import Chain, Shape
from dspfx.kernels.fuse import fused


def chain_of(gm: fx.GraphModule, shapes: tuple[Shape, ...]) -> Chain:
    """The chain of a graph of which every node is supported, whose inputs have these shapes (of one image)."""
    *nodes, output = gm.graph.nodes
    inputs = [node for node in nodes if node.op == "placeholder"]
    reader = Reader(gm, dict(zip(inputs, shapes, strict=True)))
    for node in nodes:
        if node.op != "placeholder":
            reader.add(node)
    found = output.args[0] if isinstance(output.args[0], (tuple, list)) else (output.args[0],)
    return fused(Chain(len(inputs), tuple(reader.layers), tuple(reader.values[node] for node in found)))


def is_supported(gm: nn.Module, node: fx.Node) -> bool:
    """True where the native kernels have a layer for this node (whose inputs' values and own value are known)."""
    values: dict[fx.Node, Any] = {n: n.meta.get("val") for n in (*node.all_input_nodes, node)}
    if not all(isinstance(x, Tensor) and x.dtype == torch.float32 and x.dim() in (2, 4) for x in values.values()):
        return False
    reader = Reader(gm, {n: tuple(map(int, values[n].shape[1:])) for n in node.all_input_nodes})
    try:
        reader.add(node)
    except (Unsupported, InputError):
        return False
    return reader.shapes[reader.values[node]] == tuple(values[node].shape[1:])
