"""ResNets for small images whose shortcuts are 1x1 convolutions, from weights with parameter-free shortcuts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspfx.cli import models
from dspfx.cli.models import BasicBlock


class ProjectionBlock(nn.Module):
    """A basic block whose shortcut is a 1x1 convolution that at first computes what the parameter-free one did.

    Torch-Pruning takes the zero padding of the parameter-free shortcut for an elementwise operation, and removes other
    channels behind it than before it; its authors' own CIFAR networks have convolutions there.
    """

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        inside, outside = block.conv1.in_channels, block.conv1.out_channels
        self.shortcut = nn.Conv2d(inside, outside, 1, stride=block.stride, bias=False)
        first = (outside - inside) // 2
        with torch.no_grad():
            self.shortcut.weight.zero_()
            self.shortcut.weight[first : first + inside, :, 0, 0] = torch.eye(inside)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def build(checkpoint: Path | None, name: str = "resnet20") -> nn.Module:
    """A ResNet for CIFAR with the checkpoint's weights and 1x1 convolutions for shortcuts."""
    model = models.build(name, 10)
    if checkpoint is not None:
        models.load_checkpoint(model, checkpoint)
    for layer in (model.layer2, model.layer3):
        assert isinstance(layer, nn.Sequential)
        assert isinstance(layer[0], BasicBlock)
        layer[0] = ProjectionBlock(layer[0])
    return model.to(memory_format=torch.channels_last)
