"""Where every parameter of a lowered network came from, element by element, found by lowering numbers.

The passes that lower a network only move data, so they are run, with the plan that was carried out before, on a copy
of the prepared network whose elements are their own numbers:

    conv1.weight  1 2 3 | 4 5 6 | 7 8 9     --shrink_channels-->     conv1.weight  1 3 | 7 9
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import MismatchError, ModelError
from dspfx.graph.analyse import analyse
from dspfx.graph.traced import Network, network_meta, settle_eval
from dspfx.grouped import EMPTY, PaddedGroupConv2d
from dspfx.modules import GroupConv2d
from dspfx.passes.lift_layers import lift_layers
from dspfx.passes.lower_convs import FORMS
from dspfx.passes.remove_gates import remove_gates
from dspfx.passes.shrink_channels import shrink_channels
from dspfx.plans import LowerPlan


@dataclass(frozen=True, eq=False)
class Origin:
    """A parameter of the prepared network, by its name there, and where the elements of one that came of it stood.

    index: int64, of the shape of the lowered parameter: places in the flat prepared one, -1 for a zero of padding.
    """

    name: str
    parameter: nn.Parameter
    index: Tensor

    def select(self, value: Tensor) -> Tensor:
        """A tensor of the prepared parameter's shape, selected as the parameter was."""
        index = self.index.to(value.device)
        return value.detach().flatten()[index.clamp(min=0)].masked_fill(index < 0, 0)

    def select_means(self, value: Tensor) -> Tensor | None:
        """The same for means over some axes, which have size 1; None where not all that was meant is still there."""
        shape = self.parameter.shape
        if self.index.dim() != len(shape) or value.dim() != len(shape) or bool((self.index < 0).any()):
            return None
        for axis, places in enumerate(torch.unravel_index(self.index, shape)):
            rows = places.movedim(axis, 0).flatten(1)
            if not torch.equal(rows, rows[:, :1].expand_as(rows)):
                return None  # no selection along the axes
            if value.shape[axis] == shape[axis]:
                value = value.index_select(axis, rows[:, 0].to(value.device))
            elif value.shape[axis] != 1 or rows[:, 0].sort().values.tolist() != list(range(shape[axis])):
                return None
        return value.clone()


def find_origins(gm: nn.Module, small: nn.Module) -> dict[str, Origin]:
    """Name of a parameter of `small` -> its origin in `gm`, from which `small` was lowered with fold=False.

    A parameter that was computed from others has none.

    Raises:
        ModelError: `gm` is not prepared, or `small` not lowered.
        MismatchError: `small` is not what its plan makes of `gm`.
    """
    plan = _check_pair(gm, small)
    twin, copies = plain_copy(gm)
    channels = analyse(twin)
    owners = list({id(p): (name, p) for name, p in gm.named_parameters()}.values())
    for parameter in twin.parameters():  # as floats, which are exact to 2 ** 53: integers would pass for indices
        parameter.requires_grad_(False).data = torch.full(parameter.shape, -1.0, dtype=torch.float64)
    start = 0
    for _, parameter in owners:
        copied = copies.get(id(parameter))
        if copied is not None:
            copied.requires_grad_(False).data = torch.arange(
                start, start + parameter.numel(), dtype=torch.float64
            ).view(parameter.shape)
        start += parameter.numel()
    shrink_channels(twin, channels, plan)
    made = {name: numbers.long() for name, numbers in _numbers(twin, plan, small).items()}
    found = dict(small.named_parameters(remove_duplicate=False))
    _check_same(gm, {name: tuple(p.shape) for name, p in found.items()}, {n: tuple(v.shape) for n, v in made.items()})
    starts = torch.tensor([p.numel() for _, p in owners]).cumsum(0)
    origins = {}
    for name, numbers in made.items():
        known = numbers[numbers >= 0]
        if len(known):
            at = int(torch.searchsorted(starts, known[0], right=True))
            before = int(starts[at]) - owners[at][1].numel()
            origins[name] = Origin(*owners[at], torch.where(numbers < 0, -1, numbers - before))
    return origins


def plain_copy(gm: Network) -> tuple[Network, dict[int, Any]]:
    """(a copy of a prepared network in eval mode, of torch's own layers; what each of its parts, by id, was copied
    to)."""
    copies: dict[int, Any] = {}
    twin = settle_eval(copy.deepcopy(gm, copies))
    remove_gates(twin)
    return lift_layers(twin), copies


def _numbers(twin: Network, plan: LowerPlan, small: nn.Module) -> dict[str, Tensor]:
    """Name in the lowered network -> numbers, of `twin`, which was shrunk, with convolutions split as in `small`."""
    made = dict(twin.named_parameters(remove_duplicate=False))
    split = {id(twin.get_submodule(layer.name)) for layer in plan.layers if layer.form in FORMS}
    for name, conv in list(twin.named_modules(remove_duplicate=False)):
        if id(conv) not in split:
            continue
        weight, bias = made.pop(f"{name}.weight"), made.pop(f"{name}.bias", None)
        module = dict(small.named_modules(remove_duplicate=False)).get(name)
        if isinstance(module, GroupConv2d):
            made |= {f"{name}.{key}": value for key, value in _of_branches(module, weight, bias)}
        elif isinstance(module, PaddedGroupConv2d):
            made |= {f"{name}.conv.{key}": value for key, value in _of_padded(module, weight, bias)}
    return made


def _of_branches(module: GroupConv2d, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of GroupConv2d.from_conv."""
    for i, group in enumerate(module.groups):
        yield f"branches.{i}.weight", weight[list(group.filters)][:, list(group.channels)]
        if bias is not None:
            yield f"branches.{i}.bias", bias[list(group.filters)]
    if module.rest_bias is not None and bias is not None:
        yield "rest_bias", bias[list(module.rest)]


def _of_padded(module: PaddedGroupConv2d, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of PaddedGroupConv2d.from_conv; the plane of filters that read nothing has the first one's bias."""
    filters = torch.tensor([g.filters for g in module.groups])
    channels = torch.tensor([g.channels for g in module.groups])
    repeated = channels == channels[:, :1]
    repeated[:, 0] = False
    padding = (filters == EMPTY)[:, :, None] | repeated[:, None]
    numbers = weight[filters[:, :, None].clamp(min=0), channels[:, None]]
    yield "weight", numbers.masked_fill(padding[..., None, None], -1).flatten(0, 1)
    if bias is not None:
        idle = sorted(set(range(module.out_channels)) - set(filters.flatten().tolist()))
        rest = bias[idle[0]] if idle else torch.tensor(-1.0, dtype=bias.dtype)
        yield "bias", torch.where(filters == EMPTY, rest, bias[filters.clamp(min=0)]).flatten()


def _check_pair(gm: nn.Module, small: nn.Module) -> LowerPlan:
    if "gate_plan" not in network_meta(gm):
        raise ModelError(
            f"{type(gm).__name__} is not prepared; give the network that dspfx.prepare returned, and that was lowered."
        )
    if "lower_plan" not in network_meta(small):
        raise ModelError(f"{type(small).__name__} is not lowered; call small = dspfx.lower(gm, fold=False) first.")
    plan: LowerPlan = network_meta(small)["lower_plan"]
    return plan


def _check_same(gm: nn.Module, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected | found:
        if found.get(name) != expected.get(name):
            here, there = (f"shape {d[name]}" if name in d else "no such parameter" for d in (found, expected))
            raise MismatchError(
                f"the lowered network is not what its plan makes of {type(gm).__name__}: at {name} it has {here}, the "
                f"plan makes {there}. It was lowered with fold=True, which merges batch norms into convolutions, or "
                f"from another network; call small = dspfx.lower(gm, fold=False)."
            )
