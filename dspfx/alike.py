"""A weight in training whose small blocks become alike: what ADMM keeps of it, and what stays alike afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dspfx.method import levels
from dspfx.method.blocks import Tiling

_PRECISION = 36  # bits of a weight that count in a sum of up to 2 ** 26


@dataclass
class AlikeWeight:
    """A weight in training: U of ADMM, and Z - U, where the pull goes; later the blocks' classes and signs."""

    name: str
    weight: nn.Parameter
    tiling: Tiling
    dual: Tensor
    target: Tensor
    signs: Tensor | None = None  # like the weight: its sign in unified blocks, else 0
    free: Tensor | None = None  # like the weight: 1 in free blocks, else 0
    living: Tensor | None = None  # by block: how many weights a sign has
    level: Tensor | None = None  # int16 [weights]: its value's number, 1, ... in unified blocks, -1, ... in free ones

    def follow(self) -> None:
        """Goes where the network has gone since."""
        for key in ("dual", "target", "signs", "free", "living", "level"):
            value = getattr(self, key)
            if value is not None and value.device != self.weight.device:
                setattr(self, key, value.to(self.weight.device))

    def keep_alike(self) -> None:
        """The nearest weights whose unified blocks have their signs and one absolute value, and whose pruned are zero.

        Of a step along the gradient this is the step of the one shared value, scaled by the size of its block.
        """
        assert self.signs is not None
        assert self.free is not None
        if self.level is not None:
            self._keep_level(self.level.int(), (self.signs + self.free).flatten())
            return
        weight, signs, free = (self.tiling.spread(x) for x in (self.weight, self.signs, self.free))
        if self.living is None:
            self.living = _block_sums(signs.abs()).clamp_(min=1)
        value = _block_sums(weight * signs).div_(self.living).clamp_(min=0)
        weight.mul_(free).addcmul_(signs, value.expand(-1, -1, -1, signs.shape[3], *value.shape[4:]).contiguous())
        if weight.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr():
            self.weight.copy_(self.tiling.gathered(weight))

    def samples(self) -> list[levels.Sample]:
        """The values of its unified blocks, weighed by their living weights, and of its free weights, if any."""
        values, living, free, _ = self._values()
        some = [levels.Sample(values, living)] if len(values) else []
        return some + ([levels.Sample.of(free)] if len(free) else [])

    def find_levels(self, slope: float) -> None:
        """Few values for unified blocks and few for free weights, as far as `slope` of `entropy_levels` allows."""
        values, living, free, chosen = self._values()
        level = torch.zeros(self.weight.shape, dtype=torch.int16)
        if len(values):
            _, edges = levels.entropy_levels(levels.Sample(values, living), slope)
            number = torch.zeros(self.tiling.count, dtype=torch.int16)
            number[chosen] = torch.from_numpy(np.searchsorted(edges, values).astype(np.int16) + 1)
            size = math.prod(self.tiling.block)
            assert self.signs is not None
            level = self.tiling.join(number[:, None].expand(-1, size)) * (self.signs != 0).cpu()
        if len(free):
            _, edges = levels.entropy_levels(levels.Sample.of(free), slope)
            level[self._is_free().cpu()] = torch.from_numpy(-1 - np.searchsorted(edges, free).astype(np.int16))
        self.level = level.flatten().to(self.weight.device)

    def _is_free(self) -> Tensor:
        assert self.signs is not None
        return (self.signs == 0) & (self.weight != 0)

    def _values(self) -> tuple[levels.Floats, levels.Floats, levels.Floats, Tensor]:
        """Of unified blocks their values and living weights, free weights, and which blocks are unified."""
        assert self.signs is not None
        weight, signs = self.weight.detach().double().cpu(), self.signs.double().cpu()
        living = self.tiling.split(signs.abs()).sum(1)
        chosen = living > 0
        values = self.tiling.split(weight.abs() * signs.abs()).amax(1)[chosen]
        free = weight[self._is_free().cpu()]
        return values.numpy(), living[chosen].numpy(), free.numpy(), chosen

    def _keep_level(self, level: Tensor, signs: Tensor) -> None:
        """Each level's weights become their mean, of absolute values with the signs where blocks are unified.

        Sums are of integers: the same in any order, so on all ranks and in a resumed run.
        """
        zero = max(-int(level.min()), 0)  # where there is no zero, or no unified block, too
        level, size = level + zero, max(int(level.max()), 0) + zero + 1
        values = self.weight.flatten() * signs
        unit = values.abs().max().double().clamp(min=1e-30) * 2.0**-_PRECISION
        sums = torch.zeros(size, dtype=torch.int64, device=level.device)
        sums.index_add_(0, level, (values.double() / unit).round().long())
        means = (sums * unit / level.bincount(minlength=size).clamp(min=1)).to(values.dtype)
        means[zero] = 0
        means[zero:].clamp_(min=0)
        self.weight.copy_((means[level] * signs).view(self.weight.shape))


def _block_sums(spread: Tensor) -> Tensor:
    """[R, a, S, b, *kernel] -> [R, 1, S, 1, *kernel]; filters first, along which memory is read in long runs."""
    return spread.sum(1, keepdim=True).sum(3, keepdim=True)
