"""The norm that a GroupNorm or LayerNorm becomes where some of its channels are gone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SparseNorm(nn.Module):
    """A GroupNorm, or a LayerNorm over channels, of which some channels are gone: they were zero, and still count.

    Args:
        members: the group of each channel that is left.
        counts: how many channels each group had.
        axis: 1, input [N, C, ...]; or -1, input [..., C].
    """

    membership: Tensor

    def __init__(
        self,
        members: tuple[int, ...],
        counts: tuple[int, ...],
        eps: float = 1e-5,
        axis: int = 1,
        affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.members, self.counts, self.eps, self.axis, self.affine = members, counts, eps, axis, affine
        one_hot = torch.zeros(len(members), len(counts))
        one_hot[torch.arange(len(members)), torch.tensor(members, dtype=torch.int64)] = 1
        self.register_buffer("membership", one_hot, persistent=False)
        self.weight = nn.Parameter(torch.ones(len(members))) if affine else None
        self.bias = nn.Parameter(torch.zeros(len(members))) if affine and bias else None

    @classmethod
    def of(cls, norm: nn.GroupNorm | nn.LayerNorm, kept: list[int], blocks: Tensor) -> SparseNorm:
        """`norm`, whose weight and bias are cut to the channels `kept` already; `blocks` are all channels' groups."""
        counts = tuple(torch.bincount(blocks).tolist())
        axis = 1 if isinstance(norm, nn.GroupNorm) else -1
        has_weight, has_bias = norm.weight is not None, norm.bias is not None
        new = cls(tuple(blocks[kept].tolist()), counts, norm.eps, axis, has_weight, has_bias)
        if has_weight:
            new.membership = new.membership.to(norm.weight)
            new.weight, new.bias = norm.weight, norm.bias
        return new.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        # [N, C, positions]; a LayerNorm takes every position by itself
        y = x.reshape(-1, x.shape[-1], 1) if self.axis == -1 else x.reshape(*x.shape[:2], -1)
        group = self.membership.to(x.dtype)
        left = group.sum(0)
        count = torch.tensor(self.counts, dtype=x.dtype, device=x.device)
        mean = (y.mean(2) @ group) / count
        centred = y - (mean @ group.T).unsqueeze(2)
        # A channel that is gone was zero, so it differs from the mean by the mean.
        var = (centred.square().mean(2) @ group + (count - left) * mean.square()) / count
        y = centred * (torch.rsqrt(var + self.eps) @ group.T).unsqueeze(2)
        if self.weight is not None:
            y = y * self.weight[:, None]
        if self.bias is not None:
            y = y + self.bias[:, None]
        return y.reshape(x.shape)
