"""Layers by their tensors: modules, functional calls, subclasses with a forward of their own, shared weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dspfx.graph.analyse import analyse
from dspfx.graph.channels import Step
from dspfx.graph.layers import Layer, is_constant, layer_of
from dspfx.graph.trace import trace
from dspfx.graph.traced import TracedModule


class Same(nn.Conv2d):
    """Pads as TensorFlow does, then convolves."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Functions(nn.Module):
    """Every functional layer once, over bare parameters."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.shift = nn.Parameter(torch.randn(8, 3, 3, 3)), nn.Parameter(torch.randn(8))
        self.grouped = nn.Parameter(torch.randn(8, 2, 1, 1))
        self.up = nn.Parameter(torch.randn(8, 6, 2, 2))
        self.scale = nn.Parameter(torch.rand(6))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6))
        self.matrix = nn.Parameter(torch.randn(5, 6))
        self.same = Same(6, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, bias=self.shift, stride=2)
        x = F.conv2d(x, self.grouped, None, 1, 0, 1, 4)
        x = F.group_norm(x, 2, self.shift, self.shift, eps=1e-3)
        x = F.conv_transpose2d(x, self.up, stride=2)
        x = F.batch_norm(x, self.mean, self.var, self.scale, training=self.training)
        x = F.instance_norm(self.same(x), weight=self.scale, bias=self.scale)
        x = F.layer_norm(x.mean((2, 3)), (6,), self.scale)
        return F.linear(x, self.matrix)


def layers_of(gm: TracedModule, prefix: str = "") -> dict[str, Layer]:
    found = [layer_of(gm, node, prefix) for node in gm.graph.nodes]
    return {layer.name: layer for layer in found if layer is not None}


def test_functional_layers_are_named_by_their_tensors() -> None:
    found = layers_of(trace(Functions().eval(), torch.zeros(2, 3, 9, 9)), "body.")
    assert found == {
        "body.kernel": Layer("body.kernel", "F.conv2d", "conv", "body.kernel", "body.shift"),
        "body.grouped": Layer("body.grouped", "F.conv2d", "conv", "body.grouped", groups=4),
        "body.shift": Layer("body.shift", "F.group_norm", "coupled", "body.shift", "body.shift", groups=2, eps=1e-3),
        "body.up_transposed": Layer("body.up_transposed", "F.conv_transpose2d", "conv", "body.up", transposed=True),
        "body.scale": Layer("body.scale", "F.layer_norm", "coupled", "body.scale", axis=-1, eps=1e-5),
        "body.same": Layer("body.same", "F.conv2d", "conv", "body.same.weight", "body.same.bias"),
        "body.matrix": Layer("body.matrix", "F.linear", "linear", "body.matrix", axis=-1),
    }
    gm = trace(Functions().eval(), torch.zeros(2, 3, 9, 9))
    (norm,) = (n for n in gm.graph.nodes if n.target is F.batch_norm)
    assert layer_of(gm, norm) == Layer("scale", "F.batch_norm", "norm", "scale", "", "mean", "var", eps=1e-5)


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        (nn.Conv1d(4, 6, 3), Layer("", "Conv1d", "conv", "weight", "bias")),
        (nn.Conv3d(4, 6, 3, groups=2, bias=False), Layer("", "Conv3d", "conv", "weight", groups=2)),
        (nn.ConvTranspose2d(4, 6, 2), Layer("", "ConvTranspose2d", "conv", "weight", "bias", transposed=True)),
        (nn.Linear(4, 6), Layer("", "Linear", "linear", "weight", "bias", axis=-1)),
        (nn.BatchNorm2d(4, affine=False), Layer("", "BatchNorm2d", "norm", "", "", "mean", "var", eps=1e-5)),
        (nn.InstanceNorm2d(4), Layer("", "InstanceNorm2d", "norm", eps=1e-5)),
        (nn.GroupNorm(2, 4), Layer("", "GroupNorm", "coupled", "weight", "bias", groups=2, eps=1e-5)),
        (nn.LayerNorm(4), Layer("", "LayerNorm", "coupled", "weight", "bias", axis=-1, eps=1e-5)),
        (FrozenBatchNorm2d(4), Layer("", "FrozenBatchNorm2d", "norm", "weight", "bias", "mean", "var", eps=1e-5)),
        (nn.LayerNorm((4, 8)), None),
        (nn.ReLU(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules(module: nn.Module, layer: Layer | None) -> None:
    graph = torch.fx.Graph()
    node = graph.call_module("layer", (graph.placeholder("x"),))
    found = layer_of(nn.ModuleDict({"layer": module}), node)
    if layer is None:
        assert found is None
        return
    stats = {"mean": "layer.running_mean" if layer.mean else "", "var": "layer.running_var" if layer.var else ""}
    paths: dict[str, Any] = {key: f"layer.{key}" if getattr(layer, key) else "" for key in ("weight", "bias")} | stats
    rest = {key: getattr(layer, key) for key in ("kind", "family", "axis", "groups", "transposed", "eps")}
    assert found == Layer(name="layer", **rest, **paths)


def test_a_layer_with_more_than_its_class_is_none() -> None:
    hooked, changed = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    hooked.register_forward_hook(lambda module, args, out: out + 1)
    changed.forward = lambda input: input  # type: ignore[method-assign]
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 1))
    for module in (hooked, changed, spectral):
        graph = torch.fx.Graph()
        node = graph.call_module("layer", (graph.placeholder("x"),))
        assert layer_of(nn.ModuleDict({"layer": module}), node) is None


@pytest.mark.parametrize(
    ("layer", "shape", "pairs"),
    [
        (Layer("", "", "conv"), (4, 6, 3, 3), (4, 6, 9)),
        (Layer("", "", "conv", transposed=True), (6, 4, 3), (4, 6, 3)),
        (Layer("", "", "conv", groups=2), (4, 3, 3, 3), (4, 3, 9)),
        (Layer("", "", "conv", groups=2, transposed=True), (6, 2, 5), (4, 3, 5)),
        (Layer("", "", "linear"), (4, 6), (4, 6, 1)),
    ],
)
def test_weights_by_filter(layer: Layer, shape: tuple[int, ...], pairs: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    found = layer.by_filter(weight)
    assert found.shape == pairs
    if layer.transposed and layer.groups == 2:  # filter o of group g reads channels 3g .. 3g + 2
        assert all(torch.equal(found[o, c], weight[3 * (o // 2) + c, o % 2]) for o in range(4) for c in range(3))
    elif layer.transposed:
        assert torch.equal(found[1, 5], weight[5, 1])


class Tied(nn.Module):
    """Two modules over one parameter, and a function that reads it once more, the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.one, self.two = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.two.weight = self.one.weight
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(F.relu(self.one(self.stem(x))))
        return self.head(F.conv_transpose2d(x, self.one.weight, padding=1))


def test_a_shared_weight_ties_its_axes() -> None:
    channels = analyse(trace(Tied(), torch.zeros(2, 3, 5, 5)))
    steps: dict[str, Step] = {step.name: step for step in channels.steps if step.kind == "conv"}
    assert list(steps) == ["stem", "one", "two", "conv_transpose2d_transposed", "head"]

    def roots(wires: Tensor) -> list[int]:
        return channels.root[wires].tolist()

    one, two, back = steps["one"], steps["two"], steps["conv_transpose2d_transposed"]
    assert roots(one.out) == roots(two.out) == roots(back.ins[0])
    assert roots(one.ins[0]) == roots(two.ins[0]) == roots(back.out)


def test_what_depends_on_stored_tensors_alone_is_constant() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            weight = (self.weight - self.weight.mean()) / self.weight.std()
            return F.conv2d(input, weight, self.bias) * input.mean()

    gm = trace(nn.Sequential(Standardised(3, 4, 1)), torch.zeros(2, 3, 5, 5))
    (conv,) = (n for n in gm.graph.nodes if n.target is F.conv2d)
    assert is_constant(conv.args[1])
    assert not is_constant(conv.args[0])
    assert not is_constant(conv)
    assert layer_of(gm, conv) is None


def test_running_statistics_that_are_not_used_are_none_of_the_layer() -> None:
    class Batch(nn.Module):
        mean: Tensor
        var: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("var", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.var, training=True)

    gm = trace(Batch(), torch.zeros(2, 3, 4, 4))
    found: Any = [layer_of(gm, n) for n in gm.graph.nodes if n.target is F.batch_norm]
    assert [(layer.mean, layer.var) for layer in found] == [("", "")]
