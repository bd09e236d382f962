"""A chain of layers as the native kernels know it: values with numbers, and layers that make values of others.

    Chain(inputs=1, layers=(Conv(x=0, y=1, ...), Mean(1, 2), Flatten(2, 3), Linear(3, 4, ...)), outputs=(4,))

A value is a feature map of one image, [C, H, W], or a vector of features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from dspfx.errors import InputError
from dspfx.kernels.structure import window_count

Floats = np.ndarray[Any, np.dtype[np.float32]]
Pair = tuple[int, int]
Shape = tuple[int, ...]
Activation = Literal["none", "relu", "relu6", "hardswish", "silu", "sigmoid", "hardsigmoid"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)  # by their numbers in native.cpp


@dataclass(frozen=True, eq=False)
class Conv:
    """activation(conv(x) + bias + residual); `weight` [O, C / groups, kh, kw], `bias` [O]."""

    x: int
    y: int
    weight: Floats
    bias: Floats
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    residual: int | None = None
    activation: Activation = "none"

    @property
    def kernel(self) -> Pair:
        return self.weight.shape[2], self.weight.shape[3]


@dataclass(frozen=True, eq=False)
class Map:
    """activation(scale * x + shift + second), channel by channel; `scale` and `shift` [C], of features [1]."""

    x: int
    y: int
    scale: Floats
    shift: Floats
    second: int | None = None
    activation: Activation = "none"


@dataclass(frozen=True)
class Scale:
    """x times `factors` [C, 1, 1]."""

    x: int
    factors: int
    y: int


@dataclass(frozen=True)
class Pool:
    """The maximum or the mean of windows, as torch's max_pool2d (perhaps in ceil_mode) and avg_pool2d."""

    x: int
    y: int
    is_max: bool
    kernel: Pair
    stride: Pair
    padding: Pair
    counts_pad: bool = True
    ceil: bool = False


@dataclass(frozen=True)
class Mean:
    """The mean of every channel: [C, 1, 1]."""

    x: int
    y: int


@dataclass(frozen=True)
class Cat:
    """The channels of several values behind each other."""

    xs: tuple[int, ...]
    y: int


@dataclass(frozen=True)
class Select:
    """Some channels, in some order."""

    x: int
    y: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Flatten:
    """[C, H, W] -> [C * H * W]."""

    x: int
    y: int


@dataclass(frozen=True, eq=False)
class Linear:
    """activation(weight @ x + bias); `weight` [out, in], `bias` [out]."""

    x: int
    y: int
    weight: Floats
    bias: Floats
    activation: Activation = "none"


Layer = Conv | Map | Scale | Pool | Mean | Cat | Select | Flatten | Linear


@dataclass(frozen=True, eq=False)
class Chain:
    """Layers in an order in which they can run; values 0 .. inputs-1 are given, `outputs` are asked for."""

    inputs: int
    layers: tuple[Layer, ...]
    outputs: tuple[int, ...]

    def shapes(self, inputs: tuple[Shape, ...]) -> dict[int, Shape]:
        """The shape of every value, of one image; InputError where a layer cannot have such an input."""
        found = dict(enumerate(inputs))
        for layer in self.layers:
            found[layer.y] = shape_of(layer, found)
            if min(found[layer.y]) < 1:
                raise InputError(
                    f"a {type(layer).__name__} of this chain makes {found[layer.y]} of an image {inputs[0]}; give "
                    f"larger images."
                )
        return found


def reads(layer: Layer) -> tuple[int, ...]:
    """The values that a layer reads."""
    if isinstance(layer, Cat):
        return layer.xs
    if isinstance(layer, Scale):
        return layer.x, layer.factors
    other = layer.residual if isinstance(layer, Conv) else layer.second if isinstance(layer, Map) else None
    return (layer.x,) if other is None else (layer.x, other)


def shape_of(layer: Layer, known: dict[int, Shape]) -> Shape:
    """The shape of a layer's value, of one image; InputError where it cannot read what it is given.

    What fits at one size of images need not fit at another: a stride rounds a window's count down, a pooling up.
    """
    shape = _shape(layer, known)
    others = [known[value] for value in reads(layer)[1:]]
    fits = shape
    if isinstance(layer, Cat):
        others = [(shape[0], *other[1:]) for other in others]
    elif isinstance(layer, Scale):
        fits = (shape[0], 1, 1)
    elif isinstance(layer, Map) and len(layer.scale) != (shape[0] if len(shape) == 3 else 1):
        others.append((len(layer.scale), *shape[1:]))
    for other in others:
        if other != fits:
            raise InputError(f"a {type(layer).__name__} of this chain joins {shape} and {other}, which do not fit.")
    return shape


def _shape(layer: Layer, known: dict[int, Shape]) -> Shape:
    if isinstance(layer, Cat):
        return (sum(known[x][0] for x in layer.xs), *known[layer.xs[0]][1:])
    x = known[layer.x]
    if isinstance(layer, Conv):
        if x[0] != layer.weight.shape[1] * layer.groups:
            raise InputError(
                f"a convolution of this chain reads {layer.weight.shape[1] * layer.groups} channels and gets {x[0]}."
            )
        windows = zip(x[1:], layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True)
        return (layer.weight.shape[0], *(window_count(*window) for window in windows))
    if isinstance(layer, Pool):
        pooled = zip(x[1:], layer.kernel, layer.stride, layer.padding, strict=True)
        return (x[0], *(_pooled(n, k, s, p, layer.ceil) for n, k, s, p in pooled))
    if isinstance(layer, Mean):
        return (x[0], 1, 1)
    if isinstance(layer, Select):
        return (len(layer.channels), *x[1:])
    if isinstance(layer, Flatten):
        return (int(np.prod(x)),)
    if isinstance(layer, Linear):
        if x != (layer.weight.shape[1],):
            raise InputError(f"a linear layer of this chain reads {layer.weight.shape[1]} features and gets {x}.")
        return (layer.weight.shape[0],)
    return x


def _pooled(size: int, kernel: int, stride: int, padding: int, ceil: bool) -> int:
    """A last window that starts behind the pixels does not count."""
    if not ceil:
        return window_count(size, kernel, stride, padding)
    count = -(-(size + 2 * padding - kernel) // stride) + 1
    return count - 1 if (count - 1) * stride >= size + padding else count
