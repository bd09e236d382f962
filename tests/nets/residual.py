"""Sums and products: several producers whose channels belong together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.parts import conv_bn, conv_bn_relu, head


class Sum(nn.Module):
    """relu(body(x) + shortcut(x))."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, act: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.body = body
        self.shortcut = nn.Identity() if shortcut is None else shortcut
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


class SliceAndPad(nn.Module):
    """The parameter-free shortcut of the original CIFAR ResNet: every second pixel, zero channels on both sides."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class SqueezeExcite(nn.Module):
    """x * gate(up(relu(down(mean of x)))), the gate in [0, 1] for each channel."""

    def __init__(self, channels: int, squeezed: int, gate: nn.Module) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, squeezed, 1)
        self.up = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


def _basic(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(*conv_bn_relu(inputs, outputs, stride=stride), *conv_bn(outputs, outputs))


def resnet_projection() -> nn.Module:
    """Basic blocks, one with an identity and one with a strided 1x1 projection shortcut."""
    wider = Sum(_basic(16, 24, 2), conv_bn(16, 24, 1, 2))
    return nn.Sequential(conv_bn_relu(3, 16), Sum(_basic(16, 16)), wider, Sum(_basic(24, 24)), head(24))


def resnet_padded() -> nn.Module:
    """The original CIFAR ResNet: channels of the first stage are zero-padded into the second."""
    wider = Sum(_basic(16, 32, 2), SliceAndPad(16))
    return nn.Sequential(conv_bn_relu(3, 16), Sum(_basic(16, 16)), wider, Sum(_basic(32, 32)), head(32))


def resnet_bottleneck() -> nn.Module:
    """1x1 down, 3x3, 1x1 up."""

    def block(inputs: int, width: int, outputs: int, stride: int = 1) -> nn.Sequential:
        middle = [*conv_bn_relu(inputs, width, 1), *conv_bn_relu(width, width, 3, stride)]
        return nn.Sequential(*middle, *conv_bn(width, outputs, 1))

    first = Sum(block(16, 12, 32, 2), conv_bn(16, 32, 1, 2))
    return nn.Sequential(conv_bn_relu(3, 16), first, Sum(block(32, 12, 32)), head(32))


def resnext() -> nn.Module:
    """A bottleneck whose 3x3 convolution has four groups: its input and output channels move in step."""
    body = nn.Sequential(*conv_bn_relu(24, 16, 1), *conv_bn_relu(16, 16, groups=4), *conv_bn(16, 24, 1))
    widening = nn.Sequential(nn.Conv2d(24, 48, 3, padding=1, groups=8), nn.ReLU())
    return nn.Sequential(conv_bn_relu(3, 24), Sum(body), widening, conv_bn_relu(48, 24), head(24))


def inverted_residual() -> nn.Module:
    """MobileNetV2: 1x1 up, depthwise with relu6, linear 1x1 down, residual where the stride is 1."""

    def block(inputs: int, width: int, outputs: int, stride: int) -> nn.Sequential:
        up = [*conv_bn(inputs, width, 1), nn.ReLU6()]
        depthwise = [*conv_bn(width, width, 3, stride, groups=width), nn.ReLU6()]
        return nn.Sequential(*up, *depthwise, *conv_bn(width, outputs, 1))

    residual = Sum(block(16, 32, 16, 1), act=nn.Identity())
    return nn.Sequential(conv_bn_relu(3, 16), residual, block(16, 32, 24, 2), conv_bn_relu(24, 32, 1), head(32))


def depth_multiplier() -> nn.Module:
    """A depthwise convolution that makes two outputs of each channel."""
    depthwise = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 16), depthwise, conv_bn_relu(32, 24, 1), head(24))


def squeeze_excite() -> nn.Module:
    """A sigmoid gate of 1x1 convolutions on pooled channels."""
    attention = SqueezeExcite(24, 8, nn.Sigmoid())
    return nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 24), attention, conv_bn_relu(24, 24), head(24))


def squeeze_excite_hard() -> nn.Module:
    """MobileNetV3: hardswish, a hardsigmoid gate inside an inverted residual."""
    up = [*conv_bn(16, 32, 1), nn.Hardswish(), *conv_bn(32, 32, 5, groups=32), nn.Hardswish()]
    body = nn.Sequential(*up, SqueezeExcite(32, 8, nn.Hardsigmoid()), *conv_bn(32, 16, 1))
    return nn.Sequential(conv_bn_relu(3, 16), Sum(body, act=nn.Identity()), conv_bn_relu(16, 24), head(24))


def preactivation() -> nn.Module:
    """BN and ReLU before each convolution: every reader of the stream has its own BN."""

    def block(channels: int) -> nn.Module:
        layers = [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
        return Sum(nn.Sequential(*layers), act=nn.Identity())

    end = [nn.BatchNorm2d(16), nn.ReLU(), head(16)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), block(16), block(16), *end)


class ThreeWaySum(nn.Module):
    """Three branches of different kernels, summed by `sum` over a list and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.branches = nn.ModuleList(conv_bn(16, 24, kernel) for kernel in (1, 3, 5))
        self.tail = conv_bn_relu(24, 24)
        self.head = head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total += branch(x)
        return self.head(self.tail(torch.relu_(total)))


class SubtractAndMultiply(nn.Module):
    """a * b - c of three convolutions: a channel is dead only where the whole term is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.a = conv_bn(16, 20)
        self.b = nn.Sequential(nn.Conv2d(16, 20, 1), nn.Sigmoid())
        self.c = conv_bn_relu(16, 20)
        self.tail = conv_bn_relu(20, 16)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.tail(self.a(x) * self.b(x) - self.c(x)))


class BroadcastSum(nn.Module):
    """A one-channel attention map multiplied into, and a pooled vector added to, every channel and pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.body = conv_bn_relu(16, 24)
        self.attention = nn.Conv2d(24, 1, 7, padding=3)
        self.context = nn.Conv2d(16, 24, 1)
        self.tail = conv_bn_relu(24, 16)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        y = y * torch.sigmoid(self.attention(y)) + self.context(x.mean((2, 3), keepdim=True))
        return self.head(self.tail(y))
