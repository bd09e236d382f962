"""The two forms a layer takes: gated while it learns its groups, split into branches once it is lowered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import ConfigError
from dspfx.plans import Group


class GatedLayer(nn.Module):
    """A dense layer that carries its group structure; its output is that of the layer it replaced.

    Buffers, beside `weight` (O filters of C input channels) and `bias [O]`:
        gate_logits: float [G, O], the group logits A of DSP section 3; all zero until learned.
        gate_group: int64 [O], the group of each filter once pruned; -1 is a dead filter.
        gate_keep: bool [G, C], the input channels each group still reads.

    They are buffers, not parameters, so that no optimizer, weight decay or DDP unused-parameter check sees them.
    """

    weight: Tensor
    bias: Any  # each of torch's layers declares its own
    gate_logits: Tensor
    gate_group: Tensor
    gate_keep: Tensor
    GATE_KEYS = ("gate_logits", "gate_group", "gate_keep")
    filter_axis = 0

    @classmethod
    def gate(cls, layer: nn.Module, groups: int) -> GatedLayer:
        """`layer` with `groups` groups, over its very parameters (shared, not copied), in its mode."""
        kind = next((gated for plain, gated in GATED.items() if isinstance(layer, plain)), None)
        if kind is None or getattr(layer, "groups", 1) != 1:
            raise ConfigError(
                f"only dense convolutions and linear layers are gated; this is a {type(layer).__name__} with "
                f"groups={getattr(layer, 'groups', 1)}."
            )
        gated = retyped(layer, kind)
        assert isinstance(gated, GatedLayer)
        pairs = gated.by_filter(gated.weight)
        filters, channels, device = pairs.shape[0], pairs.shape[1], pairs.device
        gated.register_buffer("gate_logits", torch.zeros(groups, filters, device=device))
        gated.register_buffer("gate_group", torch.zeros(filters, dtype=torch.int64, device=device))
        gated.register_buffer("gate_keep", torch.ones(groups, channels, dtype=torch.bool, device=device))
        return gated

    def ungated(self) -> nn.Module:
        """The plain layer over the same parameters."""
        kind = next(plain for plain, gated in GATED.items() if isinstance(self, gated))
        plain = retyped(self, kind)
        for key in self.GATE_KEYS:
            del plain._buffers[key]
        return plain

    @property
    def gate_groups(self) -> int:
        """G, the number of groups."""
        return self.gate_logits.shape[0]

    @property
    def filters(self) -> int:
        """O."""
        return self.gate_logits.shape[1]

    @property
    def channels(self) -> int:
        """C."""
        return self.gate_keep.shape[1]

    @property
    def kernel_height(self) -> int:
        """Of a linear layer, 1."""
        return self.weight.shape[2] if self.weight.dim() > 2 else 1

    @property
    def is_learned(self) -> bool:
        """True once any logit moved away from its zero start."""
        return bool((self.gate_logits != 0).any())

    @property
    def is_pruned(self) -> bool:
        """True once a filter died or a group lost an input channel."""
        return bool((self.gate_group < 0).any() or not self.gate_keep.all())

    def by_filter(self, value: Tensor) -> Tensor:
        """A view [O, C, kernel] of the weight or of a tensor of its shape."""
        value = value.transpose(0, self.filter_axis)
        return value.flatten(2) if value.dim() > 2 else value.unsqueeze(2)

    def gate_mask(self) -> Tensor:
        """bool [O, C]: the (filter, input channel) pairs that are kept."""
        return self.gate_keep[self.gate_group.clamp(min=0)] & (self.gate_group >= 0)[:, None]

    def dropped(self) -> Tensor:
        """bool, broadcastable to the weight: what the gate makes zero."""
        mask = ~self.gate_mask().transpose(0, self.filter_axis)
        return mask.reshape(*mask.shape, *[1] * (self.weight.dim() - 2))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The original model's state_dict has no gate keys: theirs keep their values, so that strict loading works.
        for key in self.GATE_KEYS:
            state_dict.setdefault(prefix + key, getattr(self, key))
        super()._load_from_state_dict(state_dict, prefix, *args)


class GatedConv1d(GatedLayer, nn.Conv1d):
    """See GatedLayer."""


class GatedConv2d(GatedLayer, nn.Conv2d):
    """See GatedLayer."""


class GatedConv3d(GatedLayer, nn.Conv3d):
    """See GatedLayer."""


class GatedConvTranspose1d(GatedLayer, nn.ConvTranspose1d):
    """See GatedLayer; the weight is [C, O, kernel]."""

    filter_axis = 1


class GatedConvTranspose2d(GatedLayer, nn.ConvTranspose2d):
    """See GatedLayer; the weight is [C, O, kernel]."""

    filter_axis = 1


class GatedConvTranspose3d(GatedLayer, nn.ConvTranspose3d):
    """See GatedLayer; the weight is [C, O, kernel]."""

    filter_axis = 1


class GatedLinear(GatedLayer, nn.Linear):
    """See GatedLayer; a 1x1 convolution of one position."""


GATED: dict[type[nn.Module], type[GatedLayer]] = {
    nn.Conv1d: GatedConv1d,
    nn.Conv2d: GatedConv2d,
    nn.Conv3d: GatedConv3d,
    nn.ConvTranspose1d: GatedConvTranspose1d,
    nn.ConvTranspose2d: GatedConvTranspose2d,
    nn.ConvTranspose3d: GatedConvTranspose3d,
    nn.Linear: GatedLinear,
}


def retyped(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """`module` as an instance of `kind`, with its attributes, parameters and buffers (shared, not copied)."""
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[registry] = dict(module.__dict__[registry])
    twin.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    return twin


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


def _as_slice(channels: tuple[int, ...]) -> tuple[int, int] | None:
    consecutive = channels == tuple(range(channels[0], channels[-1] + 1))
    return (channels[0], channels[-1] + 1) if consecutive else None


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where the qualified `name` points."""
    parent, _, child = name.rpartition(".")
    root.get_submodule(parent)._modules[child] = module
