"""The two forms a layer takes: gated while it learns its groups, split into branches once it is lowered."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.errors import ConfigError
from dspfx.plans import Group


class GatedLayer(nn.Module):
    """A dense layer that carries its group structure; its output is that of the layer it replaced.

    Buffers, beside `weight` (O filters of C input channels) and `bias [O]`:
        gate_logits: float [G, O], the group logits A of DSP section 3; all zero until learned.
        gate_group: int64 [O], the group of each filter once pruned; -1 is a dead filter.
        gate_keep: bool [G, C], the input channels each group still reads.
        gate_fisher: float [G, C], what learning found out of each group channel's worth: the mean over steps of the
            sum over the group's filters of <W[o, c], g[o, c]>^2, g being the gradient of the loss.
        gate_filter_fisher: float [O], the same summed over channels instead, of each filter.

    They are buffers, not parameters, so that no optimizer, weight decay or DDP unused-parameter check sees them.
    """

    weight: Tensor
    bias: Any  # each of torch's layers declares its own
    gate_logits: Tensor
    gate_group: Tensor
    gate_keep: Tensor
    gate_fisher: Tensor
    gate_filter_fisher: Tensor
    GATE_KEYS = ("gate_logits", "gate_group", "gate_keep", "gate_fisher", "gate_filter_fisher")
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
        gated.register_buffer("gate_fisher", torch.zeros(groups, channels, device=device))
        gated.register_buffer("gate_filter_fisher", torch.zeros(filters, device=device))
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
    def is_weighed(self) -> bool:
        """True once learning has seen what the group channels are worth."""
        return bool((self.gate_fisher != 0).any())

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

    def _apply(self, fn: Any, *rest: Any) -> Any:
        # A learner's steps of 1e-3 would be lost: in gm.half() and gm.bfloat16() what it learns stays in float32.
        learned = {key: value for key, value in self._buffers.items() if key in self.GATE_KEYS and value is not None}
        super()._apply(fn, *rest)
        for key, value in learned.items():
            if value.is_floating_point() and getattr(self, key).dtype.itemsize < 4:
                setattr(self, key, value.to(getattr(self, key).device, torch.promote_types(value.dtype, torch.float32)))
        return self

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
    selection of them. Filters in no group read nothing: they are constant planes behind the branches' results, their
    bias or, without `rest_bias`, zero. One reordering puts all of it into the filters' order where it is not in that
    order already. Input [N, C, H, W], output [N, O, H', W'].
    """

    order: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        groups: tuple[Group, ...],
        rest_bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        filters = [o for g in groups for o in g.filters]
        if not groups or len(set(filters)) < len(filters) or not set(filters) <= set(range(out_channels)):
            raise ConfigError(
                f"GroupConv2d needs at least one group and each of its {out_channels} filters in at most one; the "
                f"groups hold {len(filters)} filters, {len(set(filters))} different ones."
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.branches = nn.ModuleList(
            nn.Conv2d(len(g.channels), len(g.filters), kernel_size, **options) for g in groups
        )
        for i, group in enumerate(groups):
            self.register_buffer(f"channels{i}", torch.tensor(group.channels), persistent=False)
        self.slices = [_as_slice(g.channels) for g in groups]
        self.rest = tuple(sorted(set(range(out_channels)) - set(filters)))
        device = options.get("device")
        self.rest_bias = nn.Parameter(torch.zeros(len(self.rest), device=device)) if self.rest and rest_bias else None
        filters += self.rest
        order = torch.empty(out_channels, dtype=torch.int64)
        order[filters] = torch.arange(out_channels)
        self.is_ordered = filters == list(range(out_channels))
        self.register_buffer("order", order, persistent=False)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, groups: tuple[Group, ...]) -> GroupConv2d:
        """The same function as `conv`, whose weights outside the groups are zero."""
        grouped = {o for g in groups for o in g.filters}
        rest = [o for o in range(conv.out_channels) if o not in grouped]
        constants = conv.bias.detach()[rest] if conv.bias is not None else torch.zeros(0)
        module = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            groups,
            rest_bias=bool(constants.any()),
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
        if module.rest_bias is not None:
            assert conv.bias is not None
            module.rest_bias = nn.Parameter(constants, conv.bias.requires_grad)
        return module.to(conv.weight.device).train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for i, (branch, span) in enumerate(zip(self.branches, self.slices, strict=True)):
            part = x[:, span[0] : span[1]] if span else x.index_select(1, getattr(self, f"channels{i}"))
            outputs.append(branch(part))
        if self.rest_bias is not None:
            size = outputs[0].shape
            outputs.append(self.rest_bias.view(1, -1, 1, 1).expand(size[0], len(self.rest), size[2], size[3]))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        if self.rest and self.rest_bias is None:
            y = F.pad(y, (0, 0, 0, 0, 0, len(self.rest)))
        return y if self.is_ordered else y.index_select(1, self.order)


def _as_slice(channels: tuple[int, ...]) -> tuple[int, int] | None:
    consecutive = channels == tuple(range(channels[0], channels[-1] + 1))
    return (channels[0], channels[-1] + 1) if consecutive else None


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where the qualified `name` points."""
    parent, _, child = name.rpartition(".")
    root.get_submodule(parent)._modules[child] = module
