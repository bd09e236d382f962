"""The DSP authors' CIFAR ResNet20, so that their published pruned network can be read (tests/data.py says where)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """conv-bn-relu-conv-bn beside the identity, or beside a 1x1 convolution and its BN where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn_a = nn.BatchNorm2d(channels)
        self.conv_b = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn_b = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential()
        if in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn_b(self.conv_b(F.relu(self.bn_a(self.conv_a(x)))))
        return F.relu(self.downsample(x) + y)


class DspResNet20(nn.Module):
    """Keys conv_1_3x3, bn_1, stage_{1,2,3}.{0,1,2}, classifier; images [B, 3, 32, 32] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1_3x3 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(16)
        self.stage_1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.stage_2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.stage_3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_1(self.conv_1_3x3(x)))
        x = self.stage_3(self.stage_2(self.stage_1(x)))
        return self.classifier(x.mean((2, 3)))


def load_published(path: Path) -> DspResNet20:
    """The published network in eval mode; the file leaves out some batch counters, which eval mode does not read."""
    model = DspResNet20()
    result = model.load_state_dict(load_file(path), strict=False)
    missing = [key for key in result.missing_keys if not key.endswith("num_batches_tracked")]
    if missing or result.unexpected_keys:
        raise ValueError(f"{path} is another network: missing {missing}, unexpected {result.unexpected_keys}")
    return model.eval()


def load_images(path: Path) -> tuple[Tensor, Tensor]:
    """(images [N, 3, 32, 32] normalised as the network was trained, labels [N]) of the lossless CIFAR-10 file."""
    with np.load(path) as content:
        images, labels = torch.from_numpy(content["x"]).float() / 255, torch.from_numpy(content["y"]).long()
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (images - mean) / std, labels


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The network's answers [N, 10], in batches."""
    return torch.cat([model(part) for part in images.split(256)])
