"""Attention and channels-last blocks beside convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets.parts import conv_bn_relu, head


class EinsumAttention(nn.Module):
    """Self-attention over the pixels of a map by einsum, added through a scale (SAGAN, Zhang et al., 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn_relu(3, 12, stride=2), conv_bn_relu(12, 16))
        self.query, self.key, self.value = nn.Conv2d(16, 6, 1), nn.Conv2d(16, 6, 1), nn.Conv2d(16, 8, 1)
        self.out = nn.Conv2d(8, 16, 1)
        self.gamma = nn.Parameter(torch.tensor(0.5))
        self.tail = nn.Sequential(conv_bn_relu(16, 12), head(12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        height, width = x.shape[-2:]
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))
        weights = torch.einsum("bci,bcj->bij", query, key).softmax(dim=-1)
        mixed = torch.einsum("bij,bcj->bci", weights, value).unflatten(2, (height, width))
        return self.tail(x + self.gamma * self.out(mixed))


class ConvNextBlock(nn.Module):
    """ConvNeXt (Liu et al., 2022): depthwise 7x7, then layer norm and an MLP on permuted channels, times gamma."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.up, self.down = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.gamma * self.down(F.gelu(self.up(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """Two blocks with a downsampling between them, channels-first norms by permutation, a stem of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Sequential(conv_bn_relu(3, 12), nn.Conv2d(12, 12, 4, 2, 1)), nn.LayerNorm(12)
        self.block1, self.block2 = ConvNextBlock(12), ConvNextBlock(16)
        self.norm2, self.step = nn.LayerNorm(12), nn.Conv2d(12, 16, 2, stride=2)
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 10))

    @staticmethod
    def _channels_last(norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(self._channels_last(self.norm1, self.stem(x)))
        x = self.block2(self.step(self._channels_last(self.norm2, x)))
        return self.head(x.mean([-2, -1]))


class MlpMixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al., 2021): linear layers across patches, then across channels, both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.tokens = nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16))
        self.channels = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(self.norm3(x).mean(dim=1))


class ModuleAttention(nn.Module):
    """nn.MultiheadAttention of a token sequence with itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class HandAttention(nn.Module):
    """The same by hand: one projection to queries, keys and values, split into heads by reshape and unbind."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class VisionTransformer(nn.Module):
    """ViT (Dosovitskiy et al., 2021) behind a small convolutional stem: class token, positions, one encoder layer."""

    def __init__(self, attention: type[ModuleAttention] | type[HandAttention]) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(3, 12, stride=2), nn.Conv2d(12, 16, 2, stride=2))
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16) / 4)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = attention(16, 2)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm3(x)[:, 0])


def vit_module() -> nn.Module:
    """With torch's attention module."""
    return VisionTransformer(ModuleAttention)


def vit_by_hand() -> nn.Module:
    """With attention written out."""
    return VisionTransformer(HandAttention)
