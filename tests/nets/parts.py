"""The few blocks that most of the zoo's networks are made of."""

from __future__ import annotations

from torch import nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias and its BN, size-preserving at stride 1."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """`conv_bn` and a ReLU."""
    return nn.Sequential(*conv_bn(inputs, outputs, kernel, stride, groups), nn.ReLU())


def head(channels: int, classes: int = 10) -> nn.Sequential:
    """Global average and a linear layer: [B, channels, H, W] -> [B, classes]."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
