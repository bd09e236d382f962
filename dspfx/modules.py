"""The two forms a convolution takes: gated while it learns its groups, split into branches once it is lowered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import ConfigError


class GatedConv2d(nn.Conv2d):
    """A dense `nn.Conv2d` that carries its group structure; its output is that of the convolution it replaced.

    Buffers, beside `weight [O, C, kh, kw]` and `bias [O]`:
        gate_logits: float [G, O], the group logits A of DSP section 3; all zero until learned.
        gate_group: int64 [O], the group of each filter once pruned; -1 is a dead filter.
        gate_keep: bool [G, C], the input channels each group still reads.

    They are buffers, not parameters, so that no optimizer, weight decay or DDP unused-parameter check sees them.
    """

    gate_logits: Tensor
    gate_group: Tensor
    gate_keep: Tensor
    GATE_KEYS = ("gate_logits", "gate_group", "gate_keep")

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, *, gate_groups: int = 4, **options: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        if self.groups != 1:
            raise ConfigError(f"GatedConv2d gates dense convolutions only; this one has groups={self.groups}.")
        device = self.weight.device
        self.register_buffer("gate_logits", torch.zeros(gate_groups, out_channels, device=device))
        self.register_buffer("gate_group", torch.zeros(out_channels, dtype=torch.int64, device=device))
        self.register_buffer("gate_keep", torch.ones(gate_groups, in_channels, dtype=torch.bool, device=device))

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, gate_groups: int) -> GatedConv2d:
        """A gated convolution over the very parameters of `conv` (shared, not copied), in its mode."""
        gated = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
            gate_groups=gate_groups,
        )
        gated.weight, gated.bias = conv.weight, conv.bias
        for key, value in cls(1, 1, 1, gate_groups=1).named_buffers():
            shape = getattr(gated, key).shape
            fill = torch.ones if value.dtype == torch.bool else torch.zeros
            setattr(gated, key, fill(shape, dtype=value.dtype, device=conv.weight.device))
        return gated.train(conv.training)

    @property
    def gate_groups(self) -> int:
        """G, the number of groups."""
        return self.gate_logits.shape[0]

    @property
    def is_learned(self) -> bool:
        """True once any logit moved away from its zero start."""
        return bool((self.gate_logits != 0).any())

    @property
    def is_pruned(self) -> bool:
        """True once a filter died or a group lost an input channel."""
        return bool((self.gate_group < 0).any() or not self.gate_keep.all())

    def gate_mask(self) -> Tensor:
        """bool [O, C]: the (filter, input channel) pairs that are kept."""
        return self.gate_keep[self.gate_group.clamp(min=0)] & (self.gate_group >= 0)[:, None]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The original model's state_dict has no gate keys: theirs keep their values, so that strict loading works.
        for key in self.GATE_KEYS:
            state_dict.setdefault(prefix + key, getattr(self, key))
        super()._load_from_state_dict(state_dict, prefix, *args)
