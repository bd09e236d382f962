"""The layers that the native kernels have for a graph's nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dspfx.graph.aliases import is_read_later, overwrites
from dspfx.graph.ops import IDENTITY_MODULES
from dspfx.kernels.chain import (
    Activation,
    Cat,
    Conv,
    Flatten,
    Floats,
    Layer,
    Linear,
    Map,
    Mean,
    Pair,
    Pool,
    Scale,
    Select,
    Shape,
    shape_of,
)

ACTIVATIONS: dict[Any, Activation] = {
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((nn.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "hardswish"),
    **dict.fromkeys((nn.SiLU, F.silu), "silu"),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), "sigmoid"),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), "hardsigmoid"),
}  # fmt: skip
ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
LARGEST_LINEAR = 1 << 22  # weights; larger ones are read once for a batch by a library, and here once an image


class Unsupported(Exception):
    """The native kernels have no layer for a node."""


class Reader:
    """Collects the layers of nodes; `add` raises Unsupported, and leaves nothing behind, where there is none for it."""

    def __init__(self, gm: nn.Module, inputs: dict[fx.Node, Shape]) -> None:
        self.gm = gm
        self.values = {node: i for i, node in enumerate(inputs)}
        self.shapes = dict(enumerate(inputs.values()))
        self.layers: list[Layer] = []

    def new(self) -> int:
        """The next value's number."""
        return len(self.shapes)

    def append(self, layer: Layer) -> int:
        """The layer's value."""
        self.layers.append(layer)
        self.shapes[layer.y] = shape_of(layer, self.shapes)
        return layer.y

    def add(self, node: fx.Node) -> None:
        """Appends the layers of a node whose inputs are known."""
        if overwrites(self.gm, node) and is_read_later(self.gm, node):
            raise Unsupported("it changes in place what is read later")
        self.values[node] = _value(self, node)


def _value(reader: Reader, node: fx.Node) -> int:
    """The value that a node makes."""
    module = reader.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    target: Any = type(module) if module is not None else node.target
    if target in IDENTITY_MODULES:
        return _input(reader, node)
    if target in ACTIVATIONS:
        return _map(reader, node, activation=ACTIVATIONS[target])
    if target in ADDITIONS:
        return _add(reader, node)
    if target in PRODUCTS:
        return _scale(reader, node)
    make = LAYERS.get(target)
    if make is None:
        raise Unsupported(f"no layer for {node.target}")
    return make(reader, node, module)


def _input(reader: Reader, node: fx.Node) -> int:
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        raise Unsupported("its input is not its first argument")
    return reader.values[source]


def _plane(reader: Reader, node: fx.Node) -> Shape:
    """The shape [C, H, W] of a node's first input."""
    shape = reader.shapes[_input(reader, node)]
    if len(shape) != 3:
        raise Unsupported("features instead of planes")
    return shape


def _map(reader: Reader, node: fx.Node, **options: Any) -> int:
    shape = reader.shapes[_input(reader, node)]
    channels = shape[0] if len(shape) == 3 else 1  # features are one plane
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    return reader.append(Map(_input(reader, node), reader.new(), ones, zeros, **options))


def _add(reader: Reader, node: fx.Node) -> int:
    values = [reader.values[source] for source in node.args if isinstance(source, fx.Node)]
    if len(values) != 2 or len(node.args) != 2 or node.kwargs:
        raise Unsupported("an addition of something else than two tensors")
    if reader.shapes[values[0]] != reader.shapes[values[1]]:
        raise Unsupported("an addition that broadcasts")
    return _map(reader, node, second=values[1])


def _scale(reader: Reader, node: fx.Node) -> int:
    """Planes times a number each, as squeeze-and-excitation has it."""
    values = [reader.values[source] for source in node.args if isinstance(source, fx.Node)]
    if len(values) != 2 or len(node.args) != 2 or node.kwargs:
        raise Unsupported("a product of something else than two tensors")
    for x, factors in (values, values[::-1]):
        if len(reader.shapes[x]) == 3 and reader.shapes[factors] == (reader.shapes[x][0], 1, 1):
            return reader.append(Scale(x, factors, reader.new()))
    raise Unsupported("a product of other shapes")


def _conv(reader: Reader, node: fx.Node, module: Any) -> int:
    if module.padding_mode != "zeros" or len(node.all_input_nodes) != 1:
        raise Unsupported("a padding of something else than zeros")
    padding = _padding(module)
    bias = np.zeros(module.out_channels, np.float32) if module.bias is None else floats(module.bias)
    options = {"stride": module.stride, "padding": padding, "dilation": module.dilation, "groups": module.groups}
    return reader.append(Conv(_input(reader, node), reader.new(), floats(module.weight), bias, **options))


def _padding(module: nn.Conv2d) -> Pair:
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(span % 2 for span in spans):
            raise Unsupported("a padding that differs between the sides")
        return spans[0] // 2, spans[1] // 2
    return int(module.padding[0]), int(module.padding[1])


def _norm(reader: Reader, node: fx.Node, module: Any) -> int:
    if module.running_mean is None:
        raise Unsupported("statistics of the batch")
    _plane(reader, node)
    scale = (module.running_var.detach().double() + module.eps).rsqrt()
    shift = -module.running_mean.detach().double() * scale
    if module.weight is not None:
        scale, shift = scale * module.weight.detach(), shift * module.weight.detach() + module.bias.detach()
    return reader.append(Map(_input(reader, node), reader.new(), floats(scale), floats(shift)))


def _pool(reader: Reader, node: fx.Node, module: Any) -> int:
    """Of the module, or of the functional call with the same arguments."""
    is_max = isinstance(module, nn.MaxPool2d) or node.target in (F.max_pool2d, torch.max_pool2d)
    if module is None:
        kind = nn.MaxPool2d if is_max else nn.AvgPool2d
        if any(isinstance(a, fx.Node) for a in (*node.args[1:], *node.kwargs.values())):
            raise Unsupported("sizes that are computed")
        module = kind(*node.args[1:], **node.kwargs)  # type: ignore[arg-type]
    other = module.dilation not in (1, (1, 1)) or module.return_indices if is_max else module.divisor_override
    if (module.ceil_mode and not is_max) or other:
        raise Unsupported("an unusual pooling")
    kernel, stride, padding = (_pair(x) for x in (module.kernel_size, module.stride, module.padding))
    counts = True if is_max else module.count_include_pad
    return reader.append(
        Pool(_input(reader, node), reader.new(), is_max, kernel, stride, padding, counts, module.ceil_mode)
    )


def _pair(value: Any) -> Pair:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _global_pool(reader: Reader, node: fx.Node, module: Any) -> int:
    size = module.output_size if module is not None else node.args[1] if len(node.args) > 1 else None
    if size not in (1, (1, 1), [1, 1]):
        raise Unsupported("a pooling to several places")
    return reader.append(Mean(_input(reader, node), reader.new()))


def _mean(reader: Reader, node: fx.Node, module: Any) -> int:
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if not isinstance(axes, (tuple, list)) or sorted(a % 4 for a in axes if isinstance(a, int)) != [2, 3]:
        raise Unsupported("a mean of something else than planes")
    if set(node.kwargs) - {"dim", "keepdim"} or len(node.args) > 3:
        raise Unsupported("a mean of another type")
    mean = reader.append(Mean(_input(reader, node), reader.new()))
    return mean if keep else reader.append(Flatten(mean, reader.new()))


def _flatten(reader: Reader, node: fx.Node, module: Any) -> int:
    """[N, C, H, W] to [N, C * H * W]."""
    named = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    axes = (module.start_dim, module.end_dim) if module else (named.get("start_dim", 0), named.get("end_dim", -1))
    if axes not in ((1, -1), (1, 3)):
        raise Unsupported("another reshape")
    _plane(reader, node)
    return reader.append(Flatten(_input(reader, node), reader.new()))


def _linear(reader: Reader, node: fx.Node, module: Any) -> int:
    if module.weight.numel() > LARGEST_LINEAR or len(reader.shapes[_input(reader, node)]) != 1:
        raise Unsupported("a large linear layer, or one over a plane's columns")
    bias = np.zeros(module.out_features, np.float32) if module.bias is None else floats(module.bias)
    return reader.append(Linear(_input(reader, node), reader.new(), floats(module.weight), bias))


def _cat(reader: Reader, node: fx.Node, module: Any) -> int:
    sources = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    values = [reader.values[s] for s in sources if isinstance(s, fx.Node)] if isinstance(sources, (tuple, list)) else []
    if axis not in (1, -3) or not values or any(len(reader.shapes[value]) != 3 for value in values):
        raise Unsupported("a concatenation of something else than channels")
    return reader.append(Cat(tuple(values), reader.new()))


def _select(reader: Reader, node: fx.Node, module: Any) -> int:
    """x[:, a:b], or every so-many-th row and column: x[:, :, ::2, ::2]."""
    channels = _plane(reader, node)[0]
    index: Any = node.args[1]
    if not isinstance(index, tuple) or not all(isinstance(i, slice) for i in index) or index[0] != slice(None):
        raise Unsupported("another indexing")
    own, spatial = (*index, slice(None))[1], index[2:]
    if any(isinstance(bound, fx.Node) for i in index for bound in (i.start, i.stop, i.step)):
        raise Unsupported("bounds that are computed")
    if any(i.start is not None or i.stop is not None for i in spatial):
        raise Unsupported("a part of a plane")
    value = _input(reader, node)
    if own != slice(None):
        value = reader.append(Select(value, reader.new(), tuple(range(channels)[own])))
    steps = [i.step or 1 for i in spatial] + [1] * (2 - len(spatial))
    if steps != [1, 1]:
        value = reader.append(Pool(value, reader.new(), True, (1, 1), (steps[0], steps[1]), (0, 0)))
    return value


def _shuffle(reader: Reader, node: fx.Node, module: Any) -> int:
    channels, groups = _plane(reader, node)[0], node.args[1]
    if not isinstance(groups, int):
        raise Unsupported("a number of groups that is computed")
    order = np.arange(channels).reshape(groups, -1).T.reshape(-1)
    return reader.append(Select(_input(reader, node), reader.new(), tuple(order.tolist())))


def _pad(reader: Reader, node: fx.Node, module: Any) -> int:
    """Channels of zeros: convolutions that read nothing."""
    arguments = dict(zip(("pad", "mode", "value"), node.args[1:], strict=False)) | node.kwargs
    sizes: Any = arguments["pad"]
    is_constant = arguments.get("mode", "constant") == "constant" and not arguments.get("value")
    if not isinstance(sizes, (tuple, list)) or len(sizes) != 6 or any(sizes[:4]) or min(sizes) < 0 or not is_constant:
        raise Unsupported("a padding of planes")
    value, channels = _input(reader, node), _plane(reader, node)[0]
    xs = [value]
    for count, place in ((sizes[4], 0), (sizes[5], 2)):
        if count:
            zeros = np.zeros((count, channels, 1, 1), np.float32)
            xs.insert(place, reader.append(Conv(value, reader.new(), zeros, np.zeros(count, np.float32))))
    return reader.append(Cat(tuple(xs), reader.new()))


def floats(tensor: Tensor) -> Floats:
    """A copy of a tensor's values."""
    return np.array(tensor.detach().cpu().float().numpy(), dtype=np.float32)


LayerOf: TypeAlias = Callable[[Reader, fx.Node, Any], int]
LAYERS: dict[Any, LayerOf] = {
    nn.Conv2d: _conv,
    F.channel_shuffle: _shuffle,
    nn.BatchNorm2d: _norm,
    nn.Linear: _linear,
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, F.max_pool2d, torch.max_pool2d, F.avg_pool2d), _pool),
    **dict.fromkeys((nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d), _global_pool),
    **dict.fromkeys((torch.mean, "mean"), _mean),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten"), _flatten),
    **dict.fromkeys((torch.cat, torch.concat), _cat),
    operator.getitem: _select,
    F.pad: _pad,
}
