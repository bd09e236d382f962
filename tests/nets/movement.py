"""Ops that only move channels: concatenate, split, shuffle, pad, slice, fold pixels into channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.parts import conv_bn, conv_bn_relu, head


class DenseBlock(nn.Module):
    """DenseNet: BN, ReLU and convolution over everything made so far; each reader normalises the channels anew."""

    def __init__(self, growth: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + growth * i) for i in range(layers))
        self.convs = nn.ModuleList(nn.Conv2d(16 + growth * i, growth, 3, padding=1) for i in range(layers))
        channels = 16 + growth * layers
        self.transition = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 20, 1), nn.AvgPool2d(2)
        )
        self.head = head(20)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        return self.head(self.transition(torch.cat(features, 1)))


class Inception(nn.Module):
    """Parallel 1x1, 3x3, factorised 5x5 and pooled branches, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.one = conv_bn_relu(16, 8, 1)
        self.three = nn.Sequential(conv_bn_relu(16, 8, 1), conv_bn_relu(8, 12))
        self.five = nn.Sequential(conv_bn_relu(16, 8, 1), conv_bn_relu(8, 10), conv_bn_relu(10, 10))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_bn_relu(16, 6, 1))
        self.tail = conv_bn_relu(36, 24, stride=2)
        self.head = head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.tail(torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)))


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half of the channels pass by, then view-transpose-view interleaves the halves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 32)
        half = [*conv_bn_relu(16, 16, 1), *conv_bn(16, 16, groups=16), *conv_bn_relu(16, 16, 1)]
        self.branch = nn.Sequential(*half)
        self.tail = nn.Sequential(*conv_bn_relu(32, 24, 1))
        self.head = head(24)

    def shuffle(self, x: Tensor, groups: int) -> Tensor:
        batch, channels, height, width = x.size()
        x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2).contiguous()
        return x.view(batch, channels, height, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            left, right = x.chunk(2, dim=1)
            x = self.shuffle(torch.cat((left, self.branch(right)), dim=1), 2)
        return self.head(self.tail(x))


def channel_shuffle() -> nn.Module:
    """Grouped 1x1 convolutions with nn.ChannelShuffle between them."""
    grouped = [*conv_bn_relu(24, 24, 1, groups=3), nn.ChannelShuffle(3), *conv_bn_relu(24, 24, 1, groups=3)]
    return nn.Sequential(conv_bn_relu(3, 24), conv_bn_relu(24, 24), *grouped, conv_bn_relu(24, 16), head(16))


class DoubledConcat(nn.Module):
    """The same tensor twice in one concatenation, and once more with its sign changed (CReLU)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.middle = conv_bn_relu(32, 16)
        self.signed = conv_bn(16, 12)
        self.tail = conv_bn_relu(24, 16)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.signed(self.middle(torch.cat([x, x], 1)))
        return self.head(self.tail(F.relu(torch.cat([x, -x], 1))))


class UnequalSplit(nn.Module):
    """Pieces of different sizes take different ways; one of them is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 28)
        self.first = conv_bn_relu(12, 16)
        self.second = conv_bn_relu(10, 16)
        self.tail = conv_bn_relu(16, 16)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        first, second, _ = torch.split(self.stem(x), [12, 10, 6], dim=1)
        return self.head(self.tail(self.first(first) + self.second(second)))


class RawInputConcat(nn.Module):
    """Later layers read the image beside learned channels (CoordConv, refinement nets)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.middle = conv_bn_relu(19, 24)
        self.tail = conv_bn_relu(27, 16)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(torch.cat([x, self.stem(x)], 1))
        return self.head(self.tail(torch.cat([y, x], 1)))


class UNet(nn.Module):
    """Two scales, upsampled to the skip's size and concatenated; a map of classes at the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = conv_bn_relu(3, 16)
        self.down2 = conv_bn_relu(16, 24, stride=2)
        self.bottom = conv_bn_relu(24, 32, stride=2)
        self.up2 = conv_bn_relu(56, 24)
        self.up1 = conv_bn_relu(40, 16)
        self.classifier = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        c = F.interpolate(self.bottom(b), size=b.shape[-2:], mode="nearest")
        d = self.up2(torch.cat([c, b], 1))
        d = F.interpolate(d, size=a.shape[-2:], mode="bilinear", align_corners=False)
        return self.classifier(self.up1(torch.cat([d, a], 1)))


class FullyConvolutional(nn.Module):
    """Segmentation: a strided body with dilation, its coarse map scaled to x.shape[-2:]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(3, 16, stride=2), conv_bn_relu(16, 24, stride=2))
        self.context = nn.Sequential(nn.Conv2d(24, 24, 3, padding=2, dilation=2), nn.ReLU())
        self.classifier = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        y = self.classifier(self.context(self.body(x)))
        return F.interpolate(y, size=size, mode="bilinear", align_corners=False)


def super_resolution() -> nn.Module:
    """Pixels folded into channels and back: four channels become one (pixel shuffle)."""
    down = [nn.PixelUnshuffle(2), conv_bn_relu(12, 24), conv_bn_relu(24, 32), nn.PixelShuffle(2)]
    return nn.Sequential(*down, conv_bn_relu(8, 16), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2))


def transposed() -> nn.Module:
    """An autoencoder whose decoder is made of transposed convolutions, one of them grouped."""
    encoder = [conv_bn_relu(3, 16), conv_bn_relu(16, 24, stride=2)]
    up = nn.ConvTranspose2d(24, 16, 2, stride=2)
    grouped = nn.ConvTranspose2d(16, 16, 3, padding=1, groups=4)
    return nn.Sequential(*encoder, up, nn.ReLU(), conv_bn_relu(16, 16), grouped, nn.ReLU(), nn.Conv2d(16, 3, 1))


class Rolled(nn.Module):
    """roll, flip, slices, stack and an index: channels change places and come back (Res2Net, TSM)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 24)
        self.part = conv_bn_relu(8, 8)
        self.mixed = conv_bn_relu(24, 16)
        self.tail = conv_bn_relu(16, 16)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.roll(self.stem(x), 5, dims=1)
        x = torch.cat([x[:, :8], self.part(x[:, 8:16]), x[:, 16:].flip(1)], 1)
        x = self.mixed(x)
        return self.head(self.tail(torch.stack([x, x * 2], dim=2).mean(2)))
