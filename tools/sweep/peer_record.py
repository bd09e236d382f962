"""What Torch-Pruning removed, layer by layer, and the dense network with exactly that silenced: what it must equal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH_NORM = nn.modules.batchnorm._BatchNorm
CONV = nn.modules.conv._ConvNd


@dataclass
class Removal:
    """What is left of each layer or free parameter: indices into the dense one, by qualified name."""

    dense: nn.Module
    out: dict[str, Tensor] = field(default_factory=dict)
    into: dict[str, Tensor] = field(default_factory=dict)
    axis: dict[str, int] = field(default_factory=dict)  # of free parameters, the dimension that was pruned

    def note(self, name: str, is_input: bool, indices: list[int], axis: int) -> None:
        """Removes `indices`, which count what is still there, from a layer's inputs or outputs."""
        owner = parameter_or_module(self.dense, name)
        one_sided = isinstance(owner, nn.Linear) or (isinstance(owner, CONV) and not is_depthwise(owner))
        side = self.into if is_input and one_sided else self.out
        if isinstance(owner, nn.Parameter):
            self.axis[name] = axis
        left = side.get(name, torch.arange(width(owner, side is self.into, axis)))
        keep = torch.ones(len(left), dtype=torch.bool)
        keep[indices] = False
        side[name] = left[keep]

    def silence(self, as_pruned: bool = False) -> None:
        """Zeroes in the dense network what produces the removed channels.

        With `as_pruned` its layer and group norms take their statistics over the channels left, and attention is
        scaled for the width left: what removing whole channels makes of them, which is another function.
        """
        with torch.no_grad():
            for name, left in self.out.items():
                owner = parameter_or_module(self.dense, name)
                gone = torch.ones(width(owner, False, self.axis.get(name, -1)), dtype=torch.bool)
                gone[left] = False
                _silence(owner, gone.nonzero().flatten(), self.axis.get(name, -1))
                if as_pruned and isinstance(owner, nn.LayerNorm):
                    _renormalise(owner, left)
                if as_pruned and isinstance(owner, nn.GroupNorm):
                    _regroup(owner, left)
                if as_pruned and isinstance(owner, nn.MultiheadAttention):
                    queries = [owner.in_proj_weight, owner.in_proj_bias]
                    for query in [x[: owner.embed_dim] for x in queries if x is not None]:
                        query.mul_((owner.embed_dim / len(left)) ** 0.5)

    def explains(self, pruned: nn.Module, dense: dict[str, Tensor]) -> str:
        """The first layer whose pruned weight is not the dense one at the noted indices; empty where all are."""
        for name in self.out | self.into:
            module = parameter_or_module(self.dense, name)
            grouped = isinstance(module, CONV) and module.groups > 1
            if grouped or not isinstance(module, nn.Linear | CONV | BATCH_NORM):
                continue
            weight = dense[f"{name}.weight"]
            flip = isinstance(module, CONV) and module.transposed
            weight = weight.transpose(0, 1) if flip else weight
            weight = weight[self.out[name]] if name in self.out else weight
            weight = weight[:, self.into[name]] if name in self.into else weight
            found: Any = pruned.get_submodule(name).weight
            found = found.transpose(0, 1) if flip else found
            if found.shape != weight.shape or not torch.equal(found, weight):
                return name
        return ""


def parameter_or_module(root: nn.Module, name: str) -> Any:
    """What the dotted name stands for."""
    found: Any = root
    for part in name.split("."):
        found = getattr(found, part)
    return found


def is_depthwise(module: CONV) -> bool:
    """True for one filter an input channel, whose inputs and outputs are the same channels."""
    return 1 < module.groups == module.in_channels == module.out_channels


def width(owner: Any, inputs: bool, axis: int) -> int:
    """Channels that a layer reads or makes, or entries of a parameter along `axis`; TypeError where unknown."""
    if isinstance(owner, nn.Parameter):
        return owner.shape[axis]
    if isinstance(owner, CONV):
        return owner.in_channels if inputs else owner.out_channels
    if isinstance(owner, nn.Linear):
        return owner.in_features if inputs else owner.out_features
    if isinstance(owner, nn.LayerNorm):
        return owner.normalized_shape[-1]
    for key in ("num_features", "num_channels", "embed_dim", "num_parameters"):
        if hasattr(owner, key):
            return int(getattr(owner, key))
    raise TypeError(f"a {type(owner).__name__} was pruned, whose width is not known here")


def _silence(owner: Any, gone: Tensor, axis: int) -> None:
    if isinstance(owner, nn.Parameter):
        owner.index_fill_(axis, gone, 0)
    elif isinstance(owner, nn.MultiheadAttention):
        rows = torch.cat([gone + i * owner.embed_dim for i in range(3)])
        for weight in (owner.in_proj_weight, owner.in_proj_bias):
            if weight is not None:
                weight[rows] = 0
        owner.in_proj_weight[:, gone] = 0
        _silence(owner.out_proj, gone, axis)
        owner.out_proj.weight[:, gone] = 0
    elif isinstance(owner, CONV) and owner.transposed:
        owner.weight[:, gone] = 0
    elif isinstance(getattr(owner, "weight", None), Tensor):
        owner.weight[gone] = 0
    if isinstance(owner, BATCH_NORM) and not owner.affine and owner.running_mean is not None:
        owner.running_mean[gone] = 0
    bias = getattr(owner, "bias", None)
    if isinstance(bias, Tensor):
        bias[gone] = 0


def _renormalise(norm: nn.LayerNorm, left: Tensor) -> None:
    """A layer norm over the channels left, zero on the others."""
    last = type(norm) is nn.LayerNorm

    def forward(x: Tensor) -> Tensor:
        x = x if last else x.permute(0, 2, 3, 1)
        weight, bias = (None if p is None else p[left] for p in (norm.weight, norm.bias))
        out = torch.zeros_like(x)
        out[..., left] = F.layer_norm(x[..., left], (len(left),), weight, bias, norm.eps)
        return out if last else out.permute(0, 3, 1, 2)

    norm.forward = forward  # type: ignore[method-assign, assignment]


def _regroup(norm: nn.GroupNorm, left: Tensor) -> None:
    """A group norm over the channels left, in as many groups, zero on the others."""

    def forward(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, left] = F.group_norm(x[:, left], norm.num_groups, norm.weight[left], norm.bias[left], norm.eps)
        return out

    norm.forward = forward  # type: ignore[method-assign, assignment]
