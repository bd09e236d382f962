"""Chains: what single layers, activations, norms and paddings do to channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.parts import conv_bn_relu, head


def plain() -> nn.Module:
    """conv-bn-relu, three times."""
    return nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 24, stride=2), conv_bn_relu(24, 32), head(32))


def vgg_flatten() -> nn.Module:
    """No BN, biases, and a linear layer that reads 16 pixels of every channel."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24 * 16, 20), nn.ReLU(), nn.Linear(20, 10))


def vgg_pooled() -> nn.Module:
    """As torchvision's VGG with BN: adaptive pooling to 2x2 lets any size in; dropout between linear layers."""
    body = [conv_bn_relu(3, 16), nn.MaxPool2d(2), conv_bn_relu(16, 32), nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(128, 24), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(24, 10))


class FlattenByView(nn.Module):
    """`view` with literal sizes: the channel count and the map size are baked into the source."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv_bn_relu(3, 12, stride=2)
        self.conv2 = conv_bn_relu(12, 16, stride=2)
        self.linear = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv2(self.conv(x)).view(-1, 16 * 4 * 4))


def conv_options() -> nn.Module:
    """Dilated, strided, 'same', reflect-padded, replicate-padded, non-square and unpadded convolutions with biases."""
    return nn.Sequential(
        *[nn.Conv2d(3, 12, 3, padding=2, dilation=2), nn.ReLU()],
        *[nn.Conv2d(12, 16, 5, stride=2, padding=1), nn.ReLU()],
        *[nn.Conv2d(16, 16, 4, padding="same", dilation=2), nn.ReLU()],
        *[nn.Conv2d(16, 20, 3, padding=1, padding_mode="reflect"), nn.ReLU()],
        *[nn.Conv2d(20, 16, (1, 3), padding=(0, 1), padding_mode="replicate"), nn.ReLU()],
        *[nn.Conv2d(16, 24, (3, 1), padding="valid"), nn.ReLU()],
        head(24),
    )


def activations() -> nn.Module:
    """Activations with f(0) = 0 and others, with a weight for each channel, and clamped ones."""
    acts = [nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.PReLU(16), nn.LeakyReLU(0.1), nn.ELU(), nn.Softplus(), nn.Tanh()]
    layers = [conv_bn_relu(3, 16)]
    for act in acts:
        layers.append(nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), act))
    return nn.Sequential(*layers, head(16))


def group_norm() -> nn.Module:
    """GroupNorm's statistics count every channel of a group, the removed ones too."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()]
    layers += [nn.Conv2d(16, 24, 3, padding=1), nn.GroupNorm(1, 24), nn.ReLU()]
    layers += [nn.Conv2d(24, 24, 3, padding=1), nn.InstanceNorm2d(24, affine=True), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(24, 16, 1), nn.ReLU(), head(16))


class LayerNormBlock(nn.Module):
    """A ConvNeXt block: depthwise 7x7, channels last, LayerNorm, two linear layers, a layer scale, a residual."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 2, stride=2)
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 3 * channels)
        self.down = nn.Linear(3 * channels, channels)
        self.scale = nn.Parameter(torch.rand(channels))
        self.tail = nn.Conv2d(channels, 24, 3, padding=1)
        self.head = head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return self.head(F.relu(self.tail(x + y.permute(0, 3, 1, 2))))


def ends_in_conv() -> nn.Module:
    """The last convolution's channels are the model's output."""
    return nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 16), nn.Conv2d(16, 5, 3, padding=1))


def single_conv() -> nn.Module:
    """One convolution: the model's input and its output at once."""
    return nn.Conv2d(3, 8, 3, padding=1)


class PixelMixer(nn.Module):
    """1x1 convolutions only, with residuals: an MLP over the channels of each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 4, stride=4)
        self.up = nn.ModuleList(nn.Conv2d(20, 36, 1) for _ in range(2))
        self.down = nn.ModuleList(nn.Conv2d(36, 20, 1) for _ in range(2))
        self.head = head(20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.gelu(up(x)))
        return self.head(x)


class CumulativeChannels(nn.Module):
    """`cumsum` over channels: no rule can know it, so what it touches has to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 16))
        self.after = nn.Sequential(conv_bn_relu(16, 24), conv_bn_relu(24, 16), head(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cumsum(self.before(x), dim=1) / 4)


class FourierChannels(nn.Module):
    """A Fourier transform along the channels, then along the pixels: another op without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 16))
        self.after = nn.Sequential(conv_bn_relu(16, 24), conv_bn_relu(24, 16), head(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.fft.fft2(torch.fft.fft(self.before(x), dim=1)).abs() / 16)


class PaddedAverage(nn.Module):
    """Constant padding around feature maps and averages that count it: dead channels differ at the borders."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((1, 2, 0, 1))
        self.ones = nn.ConstantPad2d(1, 0.5)
        self.conv1 = conv_bn_relu(3, 16)
        self.conv2 = conv_bn_relu(16, 20)
        self.conv3 = nn.Conv2d(20, 16, 3)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.pad(self.conv1(self.pad(x))), 3, stride=2, padding=1)
        x = F.avg_pool2d(self.ones(self.conv2(x)), 2, count_include_pad=False)
        return self.head(F.relu(self.conv3(F.pad(x, (1, 1, 1, 1), mode="replicate"))))


class Affine(nn.Module):
    """Scalars, a scale for each channel and a spatial mask: `x * 2 - 0.5`, a parameter, a buffer."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(3, 16)
        self.conv2 = conv_bn_relu(16, 16)
        self.conv3 = conv_bn_relu(16, 24)
        self.scale = nn.Parameter(torch.rand(1, 16, 1, 1) + 0.5)
        self.shift = nn.Parameter(torch.randn(16, 1, 1) / 4)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("offset", torch.tensor(0.25))
        self.head = head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1((x - 0.5) * 2)
        x = self.conv2(x * self.scale + self.shift) / self.temperature
        return self.head(1 - self.conv3(0.5 * x + self.offset))


class FunctionalLayers(nn.Module):
    """Weights that are the model's own parameters: F.conv2d, F.batch_norm and F.linear instead of modules."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.weight = nn.Parameter(torch.randn(24, 16, 3, 3) / 12)
        self.gain = nn.Parameter(torch.rand(24) + 0.5)
        self.shift = nn.Parameter(torch.randn(24) / 4)
        self.register_buffer("mean", torch.zeros(24))
        self.register_buffer("var", torch.ones(24))
        self.tail = conv_bn_relu(24, 16)
        self.classifier = nn.Parameter(torch.randn(10, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x), self.weight, stride=2, padding=1)
        x = F.relu(F.batch_norm(x, self.mean, self.var, self.gain, self.shift, self.training))
        return F.linear(self.tail(x).mean((2, 3)), self.classifier)
