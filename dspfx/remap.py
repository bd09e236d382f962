"""What trains along with a network follows it through lowering: its optimizer, and its averaged copy.

gm (prepared, pruned, trained by `optimizer`)  ->  small = lower(gm, fold=False)   ->  small, trained on
optimizer  ------------------------------------->  remap_optimizer(optimizer, gm, small)
ema  ------------------------------------------->  remap_ema(ema, gm, small)
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from dspfx.errors import MismatchError
from dspfx.graph.analyse import analyse
from dspfx.graph.inputs import propagate
from dspfx.graph.traced import Network, network_meta, parts_of
from dspfx.modules import GatedLayer
from dspfx.origins import Origin, find_origins, plain_copy
from dspfx.passes.apply_masks import find_masks
from dspfx.passes.lower_convs import lower_convs
from dspfx.passes.shrink_channels import shrink_channels

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
AnyModule = TypeVar("AnyModule", bound=nn.Module)
Followers = dict[int, list[tuple[str, nn.Parameter]]]  # id of gm's parameter -> what came of it, by its names
_PLAIN = (bool, int, float, complex, str, type(None))


def remap_optimizer(optimizer: AnyOptimizer, gm: nn.Module, small: nn.Module) -> AnyOptimizer:
    """An optimizer of the same class for `small`, with the options and the state that `optimizer` has for `gm`.

        small = dspfx.lower(gm, fold=False).train()
        optimizer = dspfx.remap_optimizer(optimizer, gm, small)   # and the loop goes on

    Groups keep their number, order and options (lr, momentum, names, what a scheduler stores); what `optimizer` owns
    beside `gm` (a loss with weights of its own) stays owned. Momentum, second moments and other state of a parameter's
    shape are selected, ordered and split as the parameter was; step counts are copied. All three arguments are left as
    they were. Hooks are not taken over: a GroupLearner has nothing to learn in `small`, and a scheduler is
    constructed on the new optimizer, with the old one's state_dict.

    The next step then changes `small` as it would have changed `gm`, with three exceptions. Zeros inside of a layer
    that stays dense, which pruning holds at zero in `gm`, are ordinary weights of `small`: they cost nothing more, and
    train from zero with a state of zero. Optimizers that look at a whole tensor (Adafactor's and LAMB's norms, Muon)
    see one without its dead channels. And dropout draws other numbers for fewer channels.

    Args:
        optimizer: any torch optimizer that keeps its state by parameter, and that owns what `small` trains.
        gm: the prepared network that was lowered, whole or in parts.
        small: what `dspfx.lower(gm, fold=False)` returned.

    Raises:
        ModelError: `gm` is not prepared, or `small` not lowered.
        MismatchError: `small` was lowered with fold=True, or from another network; a parameter of `small` is computed
            from several of `gm`'s (a parametrization), or one of `gm`'s that layers share became several, or
            `optimizer` does not own one that trains (all are named); or there is state that is not by parameter, or
            that is a mean over channels of which some are gone.
    """
    _check_class(optimizer)
    origins = find_origins(gm, small)
    _check_owned(optimizer, small, origins)
    names = {id(p): name for name, p in gm.named_parameters()}
    followers: Followers = {key: [] for key in names}
    for name, parameter in small.named_parameters():
        if name in origins:
            followers[id(origins[name].parameter)].append((name, parameter))
    for found in followers.values():
        _check_tied([name for name, _ in found], origins)
    masks, state = find_masks(gm, analyse(gm)), {}
    for old, values in optimizer.state.items():
        if id(old) not in names:
            state[old] = copy.deepcopy(values)
            continue
        dead = masks.get(names[id(old)])
        for name, new in followers[id(old)]:
            state[new] = {key: _carried(v, key, optimizer, origins[name], new, dead) for key, v in values.items()}
    return _like(optimizer, [_group(group, followers) for group in optimizer.param_groups], state)


def remap_ema(ema: AnyModule, gm: nn.Module, small: nn.Module) -> AnyModule:
    """The averaging wrapper `ema` with its averaged copy of `gm` lowered by the plan by which `small` was.

    For whatever holds the copy as `ema.module` and averages by position or by name: torch's AveragedModel, timm's
    ModelEmaV2 and V3. What pruning dropped in `gm` becomes zero in the average, which may still remember it. All three
    arguments are left as they were; call `update` of the result with `small` from then on.

    Raises:
        ModelError: `gm` is not prepared, or `small` not lowered.
        MismatchError: `ema.module` is no copy of `gm`; or `small` was not made by `dspfx.lower(gm, fold=False)`.
    """
    find_origins(gm, small)
    average: Any = getattr(ema, "module", None)
    gates = {name: m for name, m in gm.named_modules() if isinstance(m, GatedLayer)}
    expected = {name: value.shape for name, value in gm.state_dict().items()}
    found = {name: value.shape for name, value in average.state_dict().items()} if average is not None else {}
    if found != expected:
        raise MismatchError(
            f"{type(ema).__name__}.module is no copy of {type(gm).__name__}: {_first_difference(expected, found)}. "
            f"Make the average of the network that dspfx.prepare returned."
        )
    lowered = _lowered_alike(copy.deepcopy(average), gates, find_masks(gm, analyse(gm)), small)
    shapes = {name: value.shape for name, value in small.state_dict().items()}
    made = {name: value.shape for name, value in lowered.state_dict().items()}
    if made != shapes:
        raise MismatchError(
            f"the average does not lower like {type(gm).__name__} did: {_first_difference(shapes, made)}. "
            f"Lower gm again, and average what comes of it anew."
        )
    result = copy.copy(ema)
    result.__dict__["_buffers"] = copy.deepcopy(ema._buffers)
    result.__dict__["_modules"] = ema._modules | {"module": lowered.train(average.training)}
    return result


def _lowered_alike(
    average: Network, gates: dict[str, GatedLayer], masks: dict[str, Tensor], small: nn.Module
) -> Network:
    """A copy of a prepared network with these gates and masks, lowered in place by the plan of `small`."""
    for name, gate in gates.items():
        other = average.get_submodule(name)
        other.gate_group.copy_(gate.gate_group)
        other.gate_keep.copy_(gate.gate_keep)
    with torch.no_grad():
        for name, dead in masks.items():
            parameter = average.get_parameter(name)
            parameter.masked_fill_(dead.to(parameter.device), 0)
    network, plan = plain_copy(average)[0], network_meta(small)["lower_plan"]
    shrink_channels(network, analyse(network), plan)
    lower_convs(network, plan)
    network_meta(network)["lower_plan"] = plan
    for part in parts_of(network).values():
        propagate(part, part.meta["inputs"])
    return network


def _group(group: dict[str, Any], followers: Followers) -> dict[str, Any]:
    """A parameter group with what came of its parameters."""
    items: list[tuple[str, nn.Parameter]] = []
    for name, old in zip(group.get("param_names", [""] * len(group["params"])), group["params"], strict=True):
        items += followers.get(id(old), [(name, old)])
    new: dict[str, Any] = {"params": [p for _, p in items]}
    if "param_names" in group:
        new["param_names"] = [name for name, _ in items]
    return new | {key: copy.deepcopy(value) for key, value in group.items() if key not in new}


def _carried(value: Any, key: str, optimizer: Optimizer, origin: Origin, new: nn.Parameter, dead: Tensor | None) -> Any:
    """What is `value` for the old parameter, for the new one."""
    old = origin.parameter
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        if value.shape == old.shape:
            value = value if dead is None else value.masked_fill(dead.to(value.device), 0)
            return torch.empty_like(new, dtype=value.dtype, requires_grad=False).copy_(origin.select(value))
        if value.dim() == 0:  # a step count: it stays on the CPU where it was there
            return value.clone() if value.device != old.device else value.to(new.device, copy=True)
        reduced = origin.select_means(value)
        if reduced is not None:
            return reduced.to(new.device)
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    raise MismatchError(
        f"{type(optimizer).__name__} keeps {key!r}, a {type(value).__name__}{shape}, for {origin.name}, of shape "
        f"{tuple(old.shape)} and {tuple(new.shape)} once lowered; it cannot be selected as the parameter was. "
        f"Construct a new optimizer over the lowered network, or train with one that keeps state of the parameter's "
        f"shape (SGD, Adam)."
    )


def _check_class(optimizer: Optimizer) -> None:
    """MismatchError for an optimizer with state that is not by parameter: LBFGS, wrappers around another one."""
    odd = [key for key, _ in _own_attributes(optimizer)] + [
        repr(key) for key in optimizer.state if not isinstance(key, Tensor)
    ]
    if odd:
        raise MismatchError(
            f"{type(optimizer).__name__} keeps {odd[0]}, which is not state by parameter and cannot follow a lowered "
            f"network; give the optimizer that it wraps, or construct a new one."
        )


def _own_attributes(optimizer: Optimizer, plain: bool = False) -> Iterator[tuple[str, Any]]:
    """What a subclass stores beside what torch's own class does, functions excepted: plain values, or all others."""
    common = vars(SGD([nn.Parameter(torch.empty(0))])).keys()
    for key, value in vars(optimizer).items():
        if key not in common and not callable(value) and isinstance(value, _PLAIN) == plain:
            yield key, value


def _check_owned(optimizer: Optimizer, small: nn.Module, origins: dict[str, Origin]) -> None:
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = [name for name, p in small.named_parameters() if p.requires_grad and p.numel()]
    computed = [name for name in trained if name not in origins]
    if computed:
        raise MismatchError(
            f"{', '.join(computed)} of the lowered network is computed from other parameters of the prepared one (a "
            f"parametrization, or the model's own code), so no state can follow it. Remove parametrizations before "
            f"dspfx.prepare, or construct a new optimizer."
        )
    missing = [name for name in trained if id(origins[name].parameter) not in owned]
    if missing:
        raise MismatchError(
            f"The optimizer does not own {', '.join(origins[name].name for name in missing)}, which the lowered "
            f"network trains ({len(missing)} of {len(trained)}); give the optimizer of the network that was lowered, "
            f"or freeze those with requires_grad_(False) before lowering."
        )


def _check_tied(names: list[str], origins: dict[str, Origin]) -> None:
    """MismatchError where an element of one parameter went into several: lowering splits each layer by itself."""
    places = torch.cat([origins[name].index[origins[name].index >= 0].unique() for name in names])
    if len(places.unique()) < len(places):
        raise MismatchError(
            f"{origins[names[0]].name} is one weight of several layers, and the lowered network has it in "
            f"{names[0]} and {names[-1]}, which would drift apart in training. Untie it before dspfx.prepare, or "
            f"construct a new optimizer over the lowered network."
        )


def _like(optimizer: AnyOptimizer, groups: list[dict[str, Any]], state: dict[Any, Any]) -> AnyOptimizer:
    """An optimizer of the same class, made as unpickling makes one: constructors differ, what they leave does not."""
    new = type(optimizer).__new__(type(optimizer))
    content = {"defaults": copy.deepcopy(optimizer.defaults), "state": defaultdict(dict), "param_groups": groups}
    new.__setstate__(content)
    new.state.update(state)
    new.__dict__.update(_own_attributes(optimizer, plain=True))
    return new


def _first_difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    name = next(name for name in expected | found if expected.get(name) != found.get(name))
    here, there = (f"shape {tuple(d[name])}" if name in d else "no such tensor" for d in (found, expected))
    return f"at {name} it has {here}, the other {there}"
