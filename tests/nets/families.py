"""Families of classifiers in miniature, each with the unit that its paper draws."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from tests.nets.parts import conv_bn, conv_bn_relu, head


def group_norm_resnet() -> nn.Module:
    """Group normalisation (Wu and He, 2018) in residual blocks."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), GroupNormBlock(16, 16), GroupNormBlock(16, 24, 2), head(24))


class GroupNormBlock(nn.Module):
    """Two convolutions with four groups of normalised channels, and a projection where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(4, outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.GroupNorm(4, outputs)
        self.project = None if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.project is None else self.project(x)))


class ResNextBlock(nn.Module):
    """ResNeXt (Xie et al., 2017), figure 3c: a bottleneck whose middle convolution has many groups."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn_relu(inputs, 16, 1), *conv_bn_relu(16, 16, 3, stride, groups=4), *conv_bn(16, outputs, 1)
        )
        self.shortcut = nn.Sequential() if inputs == outputs else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.body(x) + self.shortcut(x))


def resnext_stages() -> nn.Module:
    """Three ResNeXt blocks, one of them strided."""
    return nn.Sequential(
        conv_bn_relu(3, 24), ResNextBlock(24, 24), ResNextBlock(24, 32, 2), ResNextBlock(32, 32), head(32)
    )


class ShuffleUnit2(nn.Module):
    """ShuffleNet V2 (Ma et al., 2018), figure 3c and d: halves that go their own ways and are shuffled together."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.is_strided = inputs != outputs
        stride, source = (2, inputs) if self.is_strided else (1, half)
        middle = conv_bn(half, half, 3, stride, groups=half)
        self.right = nn.Sequential(conv_bn_relu(source, half, 1), middle, conv_bn_relu(half, half, 1))
        self.left = nn.Sequential(conv_bn(inputs, inputs, 3, 2, groups=inputs), conv_bn_relu(inputs, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.is_strided:
            y = torch.cat((self.left(x), self.right(x)), 1)
        else:
            kept, changed = x.chunk(2, 1)
            y = torch.cat((kept, self.right(changed)), 1)
        batch, channels, height, width = y.shape
        return y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def shufflenet_v2() -> nn.Module:
    """A strided unit and two plain ones in a row."""
    units = [ShuffleUnit2(12, 24), ShuffleUnit2(24, 24), ShuffleUnit2(24, 24)]
    for unit in units[1:]:
        unit.left = nn.Sequential()
    return nn.Sequential(conv_bn_relu(3, 12), *units, conv_bn_relu(24, 20, 1), head(20))


class MobileUnit(nn.Module):
    """MobileNetV2 (Sandler et al., 2018), figure 4d: wide inside, narrow and linear outside."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers = [] if expand == 1 else [*conv_bn(inputs, hidden, 1), nn.ReLU6(inplace=True)]
        layers += [*conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(inplace=True)]
        self.conv = nn.Sequential(*layers, *conv_bn(hidden, outputs, 1))
        self.has_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.has_residual else self.conv(x)


def mobilenet_v2() -> nn.Module:
    """One unit that does not expand, one strided, one residual."""
    stem = nn.Sequential(*conv_bn(3, 12, 3, 2), nn.ReLU6(inplace=True))
    units = [MobileUnit(12, 8, 1, 1), MobileUnit(8, 12, 2, 3), MobileUnit(12, 12, 1, 3)]
    return nn.Sequential(stem, *units, nn.Dropout(0.2), head(12))


class FrozenBlock(nn.Module):
    """A residual block of Faster R-CNN's backbone (Ren et al., 2015): batch norms that are buffers only."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), self._frozen(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), self._frozen(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), self._frozen(outputs))

    @staticmethod
    def _frozen(channels: int) -> nn.Module:
        norm = FrozenBatchNorm2d(channels)
        for buffer, low in ((norm.weight, 0.5), (norm.bias, -0.2), (norm.running_mean, -0.5), (norm.running_var, 0.7)):
            buffer.uniform_(low, low + 0.8)
        return norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


def frozen_resnet() -> nn.Module:
    """Two blocks with frozen batch norms."""
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), FrozenBlock(12, 16, 1), FrozenBlock(16, 20, 2), head(20))


class SameConv(nn.Conv2d):
    """TensorFlow's "same" padding, as ports of EfficientNet (Tan and Le, 2019) write it: the odd pixel goes right."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = max((-(-height // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - height, 0)
        columns = max((-(-width // self.stride[1]) - 1) * self.stride[1] + self.kernel_size[1] - width, 0)
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def same_padding() -> nn.Module:
    """Strided and depthwise convolutions that pad for themselves, between plain ones."""
    block = [conv_bn_relu(16, 20, 1), SameConv(20, 20, 3, 2, groups=20), nn.BatchNorm2d(20), nn.SiLU()]
    return nn.Sequential(
        SameConv(3, 12, 3, 2), nn.ReLU(), SameConv(12, 16, 2, 1), *block, conv_bn_relu(20, 16), head(16)
    )


class ActivatedNorm(nn.BatchNorm2d):
    """A batch norm with its activation inside, as in in-place ABN (Rota Bulò et al., 2018) and timm's models."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.momentum is not None
        trains = self.training or self.running_mean is None
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, trains, self.momentum, self.eps
        )
        return F.leaky_relu(x, 0.01)


def activated_norms() -> nn.Module:
    """Convolutions with norms that activate too."""
    widths = ((3, 12), (12, 16), (16, 20))
    layers = [m for i, o in widths for m in (nn.Conv2d(i, o, 3, padding=1, bias=False), ActivatedNorm(o))]
    return nn.Sequential(*layers, head(20))
