"""Networks from papers, in miniature: maps of pixels in, maps of pixels out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.parts import conv_bn, conv_bn_relu, head


class UNetTransposed(nn.Module):
    """U-Net (Ronneberger et al., 2015): two convolutions a scale, transposed convolutions up, skips concatenated."""

    def __init__(self) -> None:
        super().__init__()
        widths = (8, 12, 16)
        self.down = nn.ModuleList(self._double(i, o) for i, o in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in ((16, 12), (12, 8)))
        self.merge = nn.ModuleList(self._double(2 * o, o) for o in (12, 8))
        self.last = nn.Conv2d(8, 2, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Sequential:
        convs = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
        return nn.Sequential(*convs, nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for index, down in enumerate(self.down):
            x = down(x if index == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat((skip, up(x)), dim=1))
        return self.last(x)


def _conv_silu(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(*conv_bn(inputs, outputs, kernel, stride), nn.SiLU(inplace=True))


class CspBlock(nn.Module):
    """CSPNet (Wang et al., 2020): one half through a bottleneck, the other past it, both concatenated."""

    def __init__(self, inputs: int, outputs: int, shortcut: bool) -> None:
        super().__init__()
        hidden = outputs // 2
        self.left, self.right = _conv_silu(inputs, hidden), _conv_silu(inputs, hidden)
        self.bottleneck = nn.Sequential(_conv_silu(hidden, hidden), _conv_silu(hidden, hidden, 3))
        self.merge = _conv_silu(2 * hidden, outputs)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x)
        y = y + self.bottleneck(y) if self.shortcut else self.bottleneck(y)
        return self.merge(torch.cat((y, self.right(x)), 1))


class PooledPyramid(nn.Module):
    """Spatial pyramid pooling (He et al., 2014) in its fast form: one pool three times, all results concatenated."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = _conv_silu(channels, channels // 2)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)
        self.merge = _conv_silu(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.squeeze(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.merge(torch.cat(maps, 1))


class YoloNeck(nn.Module):
    """YOLOv4's way (Bochkovskiy et al., 2020): CSP blocks, pooled pyramid, PANet up and down, boxes at three scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_silu(3, 8, 3, 2)
        self.stage1 = CspBlock(8, 8, True)
        self.stage2 = _conv_silu(8, 12, 3, 2)
        self.stage3 = nn.Sequential(_conv_silu(12, 16, 3, 2), PooledPyramid(16))
        self.lateral2, self.up2 = _conv_silu(16, 12), CspBlock(24, 12, False)
        self.lateral1, self.up1 = _conv_silu(12, 8), _conv_silu(16, 8, 3)
        self.step1, self.down2 = _conv_silu(8, 8, 3, 2), _conv_silu(16, 12, 3)
        self.step2, self.down3 = _conv_silu(12, 12, 3, 2), _conv_silu(24, 16, 3)
        self.detect = nn.ModuleList(nn.Conv2d(c, 6, 1) for c in (8, 12, 16))

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.stage1(self.stem(x))
        second = self.stage2(first)
        third = self.lateral2(self.stage3(second))
        up = F.interpolate(third, size=second.shape[2:], mode="nearest")
        second = self.lateral1(self.up2(torch.cat([up, second], 1)))
        up = F.interpolate(second, size=first.shape[2:], mode="nearest")
        fine = self.up1(torch.cat([up, first], 1))
        middle = self.down2(torch.cat([self.step1(fine), second], 1))
        coarse = self.down3(torch.cat([self.step2(middle), third], 1))
        return [detect(level) for detect, level in zip(self.detect, (fine, middle, coarse), strict=True)]


def espcn() -> nn.Module:
    """ESPCN (Shi et al., 2016): convolutions at low resolution, whose last channels are shuffled into pixels."""
    body = [nn.Conv2d(3, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 12, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*body, nn.Conv2d(12, 12, 3, padding=1), nn.PixelShuffle(2))


def _up_bn_relu(inputs: int, outputs: int, stride: int = 2) -> list[nn.Module]:
    up = nn.ConvTranspose2d(inputs, outputs, 4, stride, padding=stride // 2, bias=False)
    return [up, nn.BatchNorm2d(outputs), nn.ReLU(True)]


def dcgan_generator() -> nn.Module:
    """DCGAN (Radford et al., 2016) as it is mostly written: a latent [B, 8, 1, 1] and transposed convolutions only."""
    layers = [*_up_bn_relu(8, 16, 1), *_up_bn_relu(16, 12), nn.ConvTranspose2d(12, 3, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers)


class ProjectedLatent(nn.Module):
    """DCGAN as its figure 1 has it: a latent [B, 8] projected, reshaped to 4x4 and scaled up."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 12 * 4 * 4)
        self.norm = nn.BatchNorm2d(12)
        self.up = nn.Sequential(*_up_bn_relu(12, 16), nn.ConvTranspose2d(16, 3, 4, 2, 1))

    def forward(self, z: Tensor) -> Tensor:
        x = self.project(z).view(-1, 12, 4, 4)
        return torch.tanh(self.up(F.relu(self.norm(x))))


class StyleTransfer(nn.Module):
    """Johnson et al., 2016, with instance norm: reflected borders, residual blocks, nearest upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*self._layer(3, 8), nn.ReLU(), *self._layer(8, 16, 2), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(*self._layer(16, 16), nn.ReLU(), *self._layer(16, 16)) for _ in range(2)
        )
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), *self._layer(16, 8), nn.ReLU())
        self.last = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(8, 3, 3))

    @staticmethod
    def _layer(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride)
        return [nn.ReflectionPad2d(1), conv, nn.InstanceNorm2d(outputs, affine=True)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        for block in self.blocks:
            x = block(x) + x
        return self.last(self.up(x))


class NormalisedScales(nn.Module):
    """SSD (Liu et al., 2016): a fine map L2-normalised over channels, times a learned scale; boxes at two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(3, 12), conv_bn_relu(12, 16))
        self.scale = nn.Parameter(torch.full((16,), 4.0))
        self.coarse = nn.Sequential(conv_bn_relu(16, 8, 1), conv_bn_relu(8, 16, stride=2))
        self.boxes = nn.ModuleList(nn.Conv2d(16, 8, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.body(x)
        maps = [F.normalize(fine, dim=1) * self.scale.view(1, -1, 1, 1), self.coarse(fine)]
        boxes = [layer(m).permute(0, 2, 3, 1).flatten(1) for layer, m in zip(self.boxes, maps, strict=True)]
        return torch.cat([b.reshape(b.shape[0], -1, 4) for b in boxes], dim=1)


class Correlated(nn.Module):
    """FlowNetC (Dosovitskiy et al., 2015): two images through one body, their maps correlated at nine shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(3, 8, stride=2), conv_bn_relu(8, 12))
        self.redirect = conv_bn_relu(12, 8, 1)
        self.flow = nn.Sequential(conv_bn_relu(17, 12), nn.Conv2d(12, 2, 3, padding=1))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a, b = self.body(first), F.pad(self.body(second), (1, 1, 1, 1))
        height, width = a.shape[-2:]
        shifted = [b[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
        correlation = torch.cat([(a * s).mean(dim=1, keepdim=True) for s in shifted], dim=1)
        return self.flow(torch.cat([F.leaky_relu(correlation, 0.1), self.redirect(a)], dim=1))


class UnshuffledStem(nn.Module):
    """TResNet (Ridnik et al., 2021): pixels folded into channels instead of a strided stem, and a gated block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), conv_bn_relu(12, 16))
        self.body = nn.Sequential(conv_bn_relu(16, 12), conv_bn(12, 16))
        self.squeeze, self.excite = nn.Linear(16, 8), nn.Linear(8, 16)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
        return self.head(F.leaky_relu(x + y * gate[:, :, None, None], 1e-3))
