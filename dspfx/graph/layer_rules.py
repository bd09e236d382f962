"""The rules of layers: what a convolution, a linear layer or a norm, module or functional, does to channels."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from dspfx.graph.builder import Builder
from dspfx.graph.channels import Step
from dspfx.graph.layers import Layer
from dspfx.graph.wires import spread, thin


def apply_layer(b: Builder, node: fx.Node, layer: Layer, wires: Tensor) -> Tensor | None:
    """The wires of the layer's output; None where the input is not what the rule covers."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or wires.dim() < 2 or value.dim() != wires.dim():
        return None
    if layer.family in ("norm", "coupled"):
        return _norm(b, node, layer, wires)
    weight = layer.tensor(b.model, "weight")
    assert weight is not None
    if layer.family == "conv" and wires.dim() != weight.dim():
        return None  # an unbatched input
    axis = layer.axis % wires.dim()
    place = _place(wires, axis)
    if place is not None and layer.groups == 1 and all(k == 1 for k in weight.shape[2:]):
        return _across(b, node, layer, wires, place)
    vector = b.merged(node, wires, axis)
    out = b.fresh(value.shape[axis])
    if layer.groups == 1:
        b.step(Step("conv", node, out, (vector,), layer))
    elif layer.groups == len(vector) and not (layer.transposed and len(out) != len(vector)):
        aligned = vector.repeat_interleave(len(out) // len(vector))
        b.tie(out, aligned)
        b.step(Step("depthwise", node, out, (aligned,), layer))
    else:
        _tie_whole_groups(b, layer, out, vector)
        b.step(Step("conv", node, out, (vector,), layer))
    return spread(out, value.shape, axis)


def _tie_whole_groups(b: Builder, layer: Layer, out: Tensor, vector: Tensor) -> None:
    """A grouped convolution loses whole groups, inputs and outputs, so that it stays one grouped convolution."""
    for wires in (out, vector):
        blocks = wires.unflatten(0, (layer.groups, -1))
        b.tie(blocks, blocks[:, :1].expand_as(blocks))
    b.tie(out.unflatten(0, (layer.groups, -1))[:, 0], vector.unflatten(0, (layer.groups, -1))[:, 0])


def _place(wires: Tensor, axis: int) -> int | None:
    """Where the channels stand, if it is not on the axis over which the layer sums."""
    small = thin(wires)
    places = [a for a in range(1, wires.dim()) if small.shape[a] > 1 and a != axis]
    return places[0] if len(places) == 1 and small.shape[axis] == 1 and wires.shape[axis] > 1 else None


def _across(b: Builder, node: fx.Node, layer: Layer, wires: Tensor, place: int) -> Tensor:
    """A layer that mixes positions and treats every channel, which stands on another axis, alike."""
    vector = b.merged(node, wires, place)
    out = b.fresh(len(vector))
    b.tie(out, vector)
    b.graph.steps.append(Step("map", node, out, (vector,), function=unknown if layer.bias else only_zero))
    return spread(out, node.meta["val"].shape, place)


def _norm(b: Builder, node: fx.Node, layer: Layer, wires: Tensor) -> Tensor | None:
    axis = layer.axis % wires.dim()
    if layer.family == "coupled" and layer.groups > 1 and wires.shape[axis] % layer.groups:
        return None
    vector = b.merged(node, wires, axis)
    out = b.fresh(len(vector))
    b.tie(out, vector)
    b.step(Step("coupled" if layer.family == "coupled" else "norm", node, out, (vector,), layer))
    return spread(out, wires.shape, axis)


def only_zero(v: Tensor) -> Tensor:
    """Zero stays zero; nothing is known of other constants."""
    return torch.where(v == 0, v, torch.full_like(v, float("nan")))


def unknown(v: Tensor) -> Tensor:
    """Nothing is known to be constant."""
    return torch.full_like(v, float("nan"))
