"""Training against evaluation, several inputs or outputs, shared layers, control flow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.parts import conv_bn, conv_bn_relu, head


class SharedConv(nn.Module):
    """One convolution called twice, each time with a BN of its own (heads of a feature pyramid)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.shared = nn.Conv2d(16, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.norm2 = nn.BatchNorm2d(16)
        self.tail = conv_bn_relu(16, 24)
        self.head = head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.shared(self.stem(x))))
        x = F.relu(self.norm2(self.shared(x)))
        return self.head(self.tail(x))


class SharedHead(nn.Module):
    """One head on two scales: its weights meet feature maps of different producers."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = conv_bn_relu(3, 16)
        self.coarse = conv_bn_relu(16, 16, stride=2)
        self.tower = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.out = nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.fine(x)
        return [self.out(self.tower(level)) for level in (fine, self.coarse(fine))]


class Dropouts(nn.Module):
    """Functional dropout that follows self.training, and the modules that follow their own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(3, 16)
        self.drop_map = nn.Dropout2d(0.3)
        self.conv2 = conv_bn_relu(16, 24)
        self.drop = nn.Dropout(0.3)
        self.linear1 = nn.Linear(24, 20)
        self.linear2 = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_map(self.conv1(x))
        x = F.dropout(self.conv2(x), p=0.3, training=self.training)
        return self.linear2(self.drop(F.relu(self.linear1(x.mean((2, 3))))))


class StochasticDepth(nn.Module):
    """A residual branch dropped sample by sample in training, drawn by hand from the batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16)
        self.body = nn.Sequential(*conv_bn_relu(16, 24), *conv_bn(24, 16))
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        if self.training:
            y = y * torch.empty(y.shape[0], 1, 1, 1, dtype=y.dtype, device=y.device).bernoulli_(0.8) / 0.8
        return self.head(F.relu(x + y))


class AuxiliaryTuple(nn.Module):
    """GoogLeNet: (logits, auxiliary logits) in training, logits alone in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(3, 16)
        self.conv2 = conv_bn_relu(16, 24)
        self.conv3 = conv_bn_relu(24, 24, stride=2)
        self.auxiliary = nn.Sequential(conv_bn_relu(24, 12, 1), head(12))
        self.head = head(24)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.conv2(self.conv1(x))
        if self.training:
            return self.head(self.conv3(x)), self.auxiliary(x)
        return self.head(self.conv3(x))


class AuxiliaryDict(nn.Module):
    """Segmentation with an auxiliary head: a dict in training, the map alone in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 24))
        self.tail = conv_bn_relu(24, 16)
        self.classifier = nn.Conv2d(16, 5, 1)
        self.auxiliary = nn.Conv2d(24, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        y = self.body(x)
        out = self.classifier(self.tail(y))
        return {"out": out, "aux": self.auxiliary(y)} if self.training else out


class TwoOutputs(nn.Module):
    """A classifier and the feature map it read: (logits [B, 10], features [B, 24, H, W])."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 16), conv_bn_relu(16, 24))
        self.head = head(24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.head(features), features


class DictOutput(nn.Module):
    """Feature maps of two stages by name, one of them inside a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 16))
        self.stage2 = nn.Sequential(conv_bn_relu(16, 24, stride=2), conv_bn_relu(24, 24))
        self.head = head(24)

    def forward(self, x: Tensor) -> dict[str, Tensor | list[Tensor]]:
        low = self.stage1(x)
        high = self.stage2(low)
        return {"logits": self.head(high), "maps": [low, high * 1.0]}


class ShapeBranch(nn.Module):
    """Python control flow on the height: larger images are pooled first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(3, 16)
        self.conv2 = conv_bn_relu(16, 24)
        self.head = head(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if x.shape[2] > 16:
            x = F.max_pool2d(x, 2)
        return self.head(self.conv2(x))


class LoopOverLength(nn.Module):
    """len() and iteration over what split returned; the Res2Net way of feeding each part the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 24)
        self.convs = nn.ModuleList(conv_bn_relu(8, 8) for _ in range(3))
        self.tail = conv_bn_relu(24, 16)
        self.head = head(16)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.stem(x), 8, dim=1)
        outputs: list[Tensor] = []
        for index in range(len(parts)):
            part = parts[index] if index == 0 else parts[index] + outputs[-1]
            outputs.append(self.convs[index](part))
        return self.head(self.tail(torch.cat(outputs, 1)))


class Siamese(nn.Module):
    """Two images through one body; the head reads both features and their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 16), conv_bn_relu(16, 20))
        self.linear = nn.Linear(60, 10)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a = self.body(first).mean((2, 3))
        b = self.body(second).mean((2, 3))
        return self.linear(torch.cat([a, b, (a - b).abs()], dim=1))


class GlobalMean(nn.Module):
    """x.mean((2, 3)) and the maximum over pixels before the linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(3, 16), conv_bn_relu(16, 24))
        self.linear = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.linear(x.mean((2, 3)) + x.flatten(2).max(2).values + x.amax((-1, -2)))
