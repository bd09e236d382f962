"""Time, volume and video: convolutions in one and three dimensions, and a recurrent layer on convolutions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.nets.parts import conv_bn_relu, head


def time_series() -> nn.Module:
    """The fully convolutional net for time series (Wang et al., 2017): signals [B, 3, L] to logits."""
    layers: list[nn.Module] = []
    for inputs, outputs, kernel in ((3, 12, 7), (12, 16, 5), (16, 12, 3)):
        conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        layers += [conv, nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 10))


class CausalBlock(nn.Module):
    """TCN (Bai et al., 2018), figure 1b: dilated convolutions padded on both sides, the future chomped off again."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 3, padding=2 * dilation, dilation=dilation)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=2 * dilation, dilation=dilation)
        self.chomp = 2 * dilation
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.1)
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.relu(self.conv1(x)[:, :, : -self.chomp].contiguous()))
        y = self.dropout(self.relu(self.conv2(y)[:, :, : -self.chomp].contiguous()))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class CausalNet(nn.Module):
    """Three causal blocks; the last moment decides: signals [B, 3, L] to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(CausalBlock(3, 12, 1), CausalBlock(12, 12, 2), CausalBlock(12, 16, 4))
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(x)[:, :, -1])


def factorised_video() -> nn.Module:
    """R(2+1)D (Tran et al., 2018): a convolution over space, then one over time: videos [B, 3, T, H, W] to logits."""
    layers: list[nn.Module] = []
    for inputs, middle, outputs in ((3, 10, 12), (12, 14, 12)):
        space = nn.Conv3d(inputs, middle, (1, 3, 3), padding=(0, 1, 1), bias=False)
        time = nn.Conv3d(middle, outputs, (3, 1, 1), padding=(1, 0, 0), bias=False)
        layers += [space, nn.BatchNorm3d(middle), nn.ReLU(), time, nn.BatchNorm3d(outputs), nn.ReLU()]
    pool = nn.MaxPool3d((1, 2, 2))
    return nn.Sequential(*layers[:6], pool, *layers[6:], nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(12, 10))


class RecurrentReader(nn.Module):
    """CRNN (Shi et al., 2017): columns of a feature map read by an LSTM in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(3, 12, stride=2), conv_bn_relu(12, 16), conv_bn_relu(16, 12))
        self.lstm = nn.LSTM(12, 8, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.body(x).mean(2).transpose(1, 2)
        return self.linear(self.lstm(columns)[0])


class TemporalShift(nn.Module):
    """Temporal shift (TSM, Lin et al., 2019): frames folded into the batch, a part of the channels moved in time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = conv_bn_relu(3, 12), conv_bn_relu(12, 16)
        self.head = head(16)

    def forward(self, video: Tensor) -> Tensor:
        batch, channels, frames, height, width = video.shape
        x = self.stem(video.transpose(1, 2).reshape(batch * frames, channels, height, width))
        y = x.view(batch, frames, 12, height, width)
        x = self.body(torch.cat([y[:, :, :4].roll(1, 1), y[:, :, 4:]], 2).flatten(0, 1))
        return self.head(x).view(batch, frames, 10).mean(1)
