"""The two forms a convolution takes: gated while it learns its groups, split into branches once it is lowered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import ConfigError
from dspfx.plans import Group


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
        for key, value in _fresh_gates(gate_groups, self.out_channels, self.in_channels, self.weight.device).items():
            self.register_buffer(key, value)

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
            device="meta",  # no memory, and no random numbers drawn for weights that nobody will see
            gate_groups=gate_groups,
        )
        gated.weight, gated.bias = conv.weight, conv.bias
        gates = _fresh_gates(gate_groups, conv.out_channels, conv.in_channels, conv.weight.device)
        for key, value in gates.items():
            setattr(gated, key, value)
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


class GroupConv2d(nn.Module):
    """A convolution split into branches: branch g computes `groups[g].filters` from `groups[g].channels`.

    Each branch is a plain dense `nn.Conv2d` over a slice of the input (where its channels are consecutive) or a
    selection of them; one reordering puts the concatenated results into the filters' order. Input [N, C, H, W],
    output [N, O, H', W'].
    """

    order: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, groups: tuple[Group, ...], **options: Any
    ) -> None:
        super().__init__()
        filters = [o for g in groups for o in g.filters]
        if sorted(filters) != list(range(out_channels)):
            raise ConfigError(
                f"GroupConv2d needs each of its {out_channels} filters in exactly one group; the groups hold "
                f"{len(filters)} filters, {len(set(filters))} different ones."
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.branches = nn.ModuleList(
            nn.Conv2d(len(g.channels), len(g.filters), kernel_size, **options) for g in groups
        )
        for i, group in enumerate(groups):
            self.register_buffer(f"channels{i}", torch.tensor(group.channels), persistent=False)
        self.slices = [_as_slice(g.channels) for g in groups]
        order = torch.empty(out_channels, dtype=torch.int64)
        order[filters] = torch.arange(out_channels)
        self.is_ordered = filters == list(range(out_channels))
        self.register_buffer("order", order, persistent=False)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, groups: tuple[Group, ...]) -> GroupConv2d:
        """The same function as `conv`, whose weights outside the groups are zero."""
        module = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            groups,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            bias=conv.bias is not None,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        for branch, group in zip(module.branches, groups, strict=True):
            assert isinstance(branch, nn.Conv2d)
            filters, channels = list(group.filters), list(group.channels)
            branch.weight = nn.Parameter(conv.weight.detach()[filters][:, channels], conv.weight.requires_grad)
            if conv.bias is not None:
                branch.bias = nn.Parameter(conv.bias.detach()[filters], conv.bias.requires_grad)
        return module.to(conv.weight.device).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for i, (branch, span) in enumerate(zip(self.branches, self.slices, strict=True)):
            part = x[:, span[0] : span[1]] if span else x.index_select(1, getattr(self, f"channels{i}"))
            outputs.append(branch(part))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return y if self.is_ordered else y.index_select(1, self.order)


def _fresh_gates(groups: int, out_channels: int, in_channels: int, device: torch.device) -> dict[str, Tensor]:
    """Gate buffers that have learned and pruned nothing."""
    return {
        "gate_logits": torch.zeros(groups, out_channels, device=device),
        "gate_group": torch.zeros(out_channels, dtype=torch.int64, device=device),
        "gate_keep": torch.ones(groups, in_channels, dtype=torch.bool, device=device),
    }


def _as_slice(channels: tuple[int, ...]) -> tuple[int, int] | None:
    consecutive = channels == tuple(range(channels[0], channels[-1] + 1))
    return (channels[0], channels[-1] + 1) if consecutive else None


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where the qualified `name` points."""
    parent, _, child = name.rpartition(".")
    root.get_submodule(parent)._modules[child] = module
