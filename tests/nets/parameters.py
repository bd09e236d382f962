"""Weights outside of layers: free scales, tied and functional convolutions; inputs and outputs by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.parts import conv_bn, conv_bn_relu, head


class FreeScales(nn.Module):
    """Residual branches times a free parameter: LayerScale (Touvron et al., 2021), ReZero (Bachlechner et al., 2020)
    and SkipInit (De and Smith, 2020), in the shapes that people give it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 12)
        self.bodies = nn.ModuleList(conv_bn(12, 12) for _ in range(4))
        self.column = nn.Parameter(torch.rand(12, 1, 1) + 0.5)
        self.viewed = nn.Parameter(torch.rand(12) + 0.5)
        self.zero = nn.Parameter(torch.tensor(0.7))
        self.one = nn.Parameter(torch.ones(1) / 2)
        self.last = nn.Parameter(torch.rand(12) + 0.5)
        self.head = head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.column * self.bodies[0](F.relu(x))
        x = x + self.bodies[1](F.relu(x)) * self.viewed.view(1, -1, 1, 1)
        x = x + self.zero * self.bodies[2](F.relu(x))
        x = x + self.bodies[3](F.relu(x)).mul(self.one)
        return self.head((x.permute(0, 2, 3, 1) * self.last).permute(0, 3, 1, 2))


class TiedAutoencoder(nn.Module):
    """An autoencoder whose decoder is its encoder transposed (Vincent et al., 2010; Masci et al., 2011)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 16, 4, stride=2, padding=1)
        self.bias1, self.bias2 = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.tanh(self.conv2(torch.tanh(self.conv1(x))))
        y = torch.tanh(F.conv_transpose2d(code, self.conv2.weight, self.bias1, stride=2, padding=1))
        return F.conv_transpose2d(y, self.conv1.weight, self.bias2, padding=1), code.mean((2, 3))


class TiedConvs(nn.Module):
    """Convolutions that are two modules over one parameter (recursive nets such as DRCN, Kim et al., 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.first, self.second = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.second.weight = self.first.weight
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))
        self.tail = nn.Sequential(conv_bn_relu(16, 12), head(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + F.relu(self.norms[0](self.first(x)))
        return self.tail(F.relu(self.norms[1](self.second(x))))


class RawParameters(nn.Module):
    """Nothing but parameters and functions, as meta-learning code is written (MAML, Finn et al., 2017)."""

    mean1: Tensor
    mean2: Tensor
    var1: Tensor
    var2: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(16, 3, 3, 3) / 5), nn.Parameter(torch.randn(16) / 4)
        self.w2, self.b2 = nn.Parameter(torch.randn(20, 16, 3, 3) / 12), nn.Parameter(torch.randn(20) / 4)
        self.w3, self.b3 = nn.Parameter(torch.randn(10, 20) / 4), nn.Parameter(torch.randn(10) / 4)
        self.gain1, self.shift1 = nn.Parameter(torch.rand(16) + 0.5), nn.Parameter(torch.randn(16) / 4)
        self.gain2, self.shift2 = nn.Parameter(torch.rand(20) + 0.5), nn.Parameter(torch.randn(20) / 4)
        for index, width in ((1, 16), (2, 20)):
            self.register_buffer(f"mean{index}", torch.zeros(width))
            self.register_buffer(f"var{index}", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w1, self.b1, stride=1, padding=1)
        x = F.relu(F.batch_norm(x, self.mean1, self.var1, self.gain1, self.shift1, training=self.training))
        x = F.conv2d(F.max_pool2d(x, 2), self.w2, self.b2, stride=1, padding=1)
        x = F.relu(F.batch_norm(x, self.mean2, self.var2, self.gain2, self.shift2, training=self.training))
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.w3, self.b3)


class NamedInputs(nn.Module):
    """RGB-D fusion (FuseNet, Hazirbas et al., 2016): a dict of image and depth in, a dict of maps and logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.color, self.depth = conv_bn_relu(3, 12), conv_bn_relu(3, 12)
        self.body = nn.Sequential(conv_bn_relu(12, 16, stride=2), conv_bn_relu(16, 16))
        self.segment = nn.Conv2d(16, 4, 1)
        self.head = head(16)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.body(self.color(batch["image"]) + self.depth(batch["depth"]))
        return {"logits": self.head(x), "masks": F.interpolate(self.segment(x), scale_factor=2.0)}


class PrimaryCapsules(nn.Module):
    """The first layers of a capsule network (Sabour et al., 2017): x.view(x.size(0), ...), lengths, a dynamic batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv_bn_relu(3, 12), conv_bn_relu(12, 16))
        self.capsules = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.capsules(self.conv(x))
        x = x.view(x.size(0), 3, 8, x.size(2), x.size(3)).permute(0, 1, 3, 4, 2).reshape(x.size(0), -1, 8)
        squared = x.pow(2).sum(-1, keepdim=True)
        return self.linear((x * squared.sqrt() / (1 + squared)).mean(1))
