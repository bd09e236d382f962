"""Unifier: makes small blocks of weights alike while the user's own loop trains the network (MSWU, METHOD 5)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from dspfx import ranks
from dspfx.alike import AlikeWeight
from dspfx.config import BlockConfig
from dspfx.errors import ConfigError, MismatchError, ModelError, StorageError
from dspfx.learner_checks import check_optimizer
from dspfx.method.blocks import FREE, UNIFIED, Tiling, projected
from dspfx.method.levels import slope_for
from dspfx.optimizers import Follower, is_skipped, stepping_optimizer
from dspfx.passes.plan_unify import choose_blocks, plan_unify, weights_to_unify
from dspfx.passes.unify_blocks import classes_of, unify_blocks
from dspfx.plans import UnifyPlan

_STATE_VERSION = 2  # 1 had no "levels"
_PULL = 16.0  # rho="auto": the sum of all pulls, were the learning rate constant; falling rates halve it
_RAMP = 10.0  # rho grows from its tenth to its tenfold
_MOST = 0.5  # of the way to its target that a weight is pulled in a step


class Unifier(Follower):
    """Trains a network towards weights whose blocks are alike (ADMM), then keeps them alike while it trains on.

        unifier = dspfx.Unifier(model, optimizer, dspfx.BlockConfig((4, 4), prune=0.3, unify=0.5), total_steps=N)
        for x, y in loader: ...                  # the loop as it is
        plan = unifier.project()                 # after N steps or so: now the blocks are alike
        for x, y in loader: ...                  # and stay so: signs fixed, one trained value a block, zeros zero
        unifier.close()

    It minimises f(W) + rho/2 ||W - Z + U||^2 beside f: after every optimizer step that really happened, weights are
    pulled towards Z - U by rho times the learning rate (of SGD with momentum m, by 1/(1 - m) of that, as m does to
    gradients); every `every` steps Z becomes the projection of W + U (`method.blocks`) and U grows by W - Z. What is
    exactly zero, such as what `dspfx.prune` dropped, stays zero and out of it: both constraints hold at once.

    In a distributed training construct it on every rank: equal weights lead to equal projections, which is compared
    whenever they are made. Save network, optimizer and unifier together, and a resumed run continues as an
    uninterrupted one.

    Args:
        model: any network, prepared or not; its convolutions and linear layers are unified.
        optimizer: any torch optimizer that owns their weights, or a wrapper of one.
        config: blocks, and how many of them become alike.
        total_steps: optimizer steps until `project()`, over which rho grows.
        rho: the middle of its course, from a tenth to ten times; "auto" is such that these steps bring weights and
            projections together.
        every: steps between projections; by default a twentieth of `total_steps`.
        distributed: where torch.distributed is initialised, all ranks train one network; False: each its own.

    Raises:
        ConfigError: an argument out of its range, `config.skip` names no layer, a sharded network, or an optimizer
            that cannot be hooked.
        ModelError: there is nothing to unify, or a weight is not finite.
        MismatchError: the optimizer does not own a weight; while training, on every rank: the ranks' weights differ.
        While training, ModelError too: a weight became not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: BlockConfig,
        total_steps: int,
        rho: float | Literal["auto"] = "auto",
        every: int | None = None,
        *,
        distributed: bool = True,
    ) -> None:
        _check_arguments(total_steps, rho, every)
        ranks.require_whole(model, "Unifier")
        weights = weights_to_unify(model, config)
        optimizer = stepping_optimizer(optimizer)
        check_optimizer(optimizer, weights)
        self.config, self.total_steps, self.rho = config, total_steps, rho
        self.every = max(1, total_steps // 20) if every is None else every
        self.steps = 0
        self.plan: UnifyPlan | None = None
        self._model, self._optimizer = model, optimizer
        self._is_shared = distributed and ranks.count() > 1
        self._scale = 1.0  # U is kept for this rho, as a factor on its middle
        self._largest_rate = 0.0  # so far
        self._layers = [
            AlikeWeight(
                name,
                weight,
                Tiling(tuple(weight.shape), config.shape, config.layout),
                torch.zeros_like(weight, requires_grad=False),
                weight.detach().clone(),
            )
            for name, weight in weights.items()
        ]
        self._update()
        self._hooks = [optimizer.register_step_post_hook(self._after_optimizer_step)]

    @torch.no_grad()
    def project(self, bits: float | None = None) -> UnifyPlan:
        """Makes the blocks alike, in place, and keeps them so from now on; returns what was decided.

        With `bits`, from 0.5 to 8, unified blocks and free weights get few values, with an entropy of about so many
        bits each over the whole network, at the least squared error (`method.levels`): which block or weight has
        which of them stays, the values train on. `write_compressed` then writes them exactly.

        Raises ModelError where a weight is not finite, or it was called before; ConfigError for other bits.
        """
        if bits is not None and (isinstance(bits, bool) or not 0.5 <= bits <= 8):
            raise ConfigError(f"Unifier.project got bits={bits!r}; give 0.5 to 8, or None for values of any number.")
        if self.plan is not None:
            raise ModelError("Unifier.project() was called before; what it decided is in `unifier.plan`.")
        weights = {layer.name: layer.weight for layer in self._layers}
        self._compare()
        self.plan = plan_unify(weights, self.config)
        self._fix(self.plan)
        unify_blocks(self._model, self.plan)
        samples = [sample for layer in self._layers for sample in layer.samples()]
        if bits is not None and samples:
            slope = slope_for(samples, bits)
            for layer in self._layers:
                layer.find_levels(slope)
                layer.keep_alike()
        return self.plan

    def stats(self) -> dict[str, float]:
        """For progress bars: steps, rho, and how far the weights are from alike: ||W - Z|| of ||W||, all layers."""
        with torch.no_grad():
            gap = sum(float((x.weight - x.target - x.dual).square().sum()) for x in self._layers)
            norm = sum(float(x.weight.square().sum()) for x in self._layers)
        return {"steps": self.steps, "rho": self._rho(), "gap": 0.0 if self.plan else math.sqrt(gap / max(norm, 1e-30))}

    def state_dict(self) -> dict[str, Any]:
        """Steps, U, Z - U and, after `project()`, the plan, signs and levels; plain tensors, numbers and text."""
        layers = {x.name: {"dual": x.dual.clone(), "target": x.target.clone()} for x in self._layers}
        signs = {x.name: x.signs.to(torch.int8) for x in self._layers if x.signs is not None}
        shared = {x.name: x.level.clone() for x in self._layers if x.level is not None}
        plan = None if self.plan is None else self.plan.to_json()
        head: dict[str, Any] = {
            "version": _STATE_VERSION,
            "steps": self.steps,
            "scale": self._scale,
            "rate": self._largest_rate,
        }
        head["blocks"] = repr(self.config)
        return head | {"layers": {} if plan else layers, "signs": signs, "levels": shared, "plan": plan}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict()` was taken; raises, and changes nothing, where it is of another network."""
        if state.get("version") not in range(1, _STATE_VERSION + 1):
            raise StorageError(
                f"The Unifier state has version {state.get('version')!r}, this dspfx reads up to {_STATE_VERSION}; "
                "load it with the dspfx that wrote it."
            )
        if state["blocks"] != repr(self.config):
            raise MismatchError(
                f"The Unifier state is of {state['blocks']}, this one has {self.config}; construct it as it was."
            )
        plan = None if state["plan"] is None else UnifyPlan.from_json(state["plan"])
        held = state["signs"] if plan else state["layers"]
        own = {layer.name: layer for layer in self._layers}
        for name in held | own:
            if name not in held or name not in own:
                raise MismatchError(f"The Unifier state and the network disagree about the layer {name}.")
            shapes = (held[name] if plan else held[name]["dual"]).shape, own[name].weight.shape
            if shapes[0] != shapes[1]:
                raise MismatchError(f"The Unifier state has {shapes[0]} for {name}, the network {shapes[1]}.")
        if plan is not None:
            self._fix(plan)
        for layer in self._layers:
            if plan is not None:
                assert layer.signs is not None
                layer.signs.copy_(held[layer.name])
                layer.living, level = None, state.get("levels", {}).get(layer.name)
                layer.level = None if level is None else level.to(layer.weight.device, copy=True)
            else:
                layer.dual.copy_(held[layer.name]["dual"])
                layer.target.copy_(held[layer.name]["target"])
        self.plan, self.steps = plan, state["steps"]
        self._scale, self._largest_rate = state["scale"], state["rate"]

    @torch.no_grad()
    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if is_skipped(optimizer):
            return
        for layer in self._layers:
            layer.follow()
        if self.plan is not None:
            for layer in self._layers:
                layer.keep_alike()
            return
        self.steps += 1
        rates = self._rates()
        for rate in set(rates.values()):
            chosen = [x for x in self._layers if rates.get(id(x.weight)) == rate]
            pull = min(self._rho() * rate, _MOST)
            torch._foreach_lerp_([x.weight for x in chosen], [x.target for x in chosen], pull)
        if self.steps % self.every == 0:
            self._update()

    @torch.no_grad()
    def _update(self) -> None:
        """Z = Proj(W + U), U = W + U - Z; U is kept in units that change with rho."""
        self._compare()
        course = _RAMP ** (2 * min(self.steps / self.total_steps, 1.0) - 1)
        for layer in self._layers:
            layer.dual.mul_(self._scale / course)
            layer.dual.add_(layer.weight.detach())  # W + U
        self._scale = course
        chosen = choose_blocks({x.name: x.dual for x in self._layers}, self.config)
        for layer in self._layers:
            tiling, classes = chosen[layer.name]
            blocks = tiling.split(layer.dual)
            nearest = tiling.join(projected(blocks, blocks != 0, classes))  # Z
            layer.dual.sub_(nearest)
            layer.target.copy_(nearest - layer.dual)

    def _rho(self) -> float:
        if self.rho != "auto":
            return float(self.rho) * self._scale
        self._largest_rate = max(self._largest_rate, *self._rates().values(), 0.0)
        return _PULL / (self.total_steps * self._largest_rate) * self._scale if self._largest_rate else 0.0

    def _rates(self) -> dict[int, float]:
        """By parameter, what a constant gradient moves it by in a step; of those that train."""
        found: dict[int, float] = {}
        for group in self._optimizer.param_groups:
            rate = float(group["lr"]) / (1 - float(group.get("momentum", 0.0)))
            found |= {id(p): rate for p in group["params"]}
        return {id(x.weight): found[id(x.weight)] for x in self._layers if x.weight.requires_grad}

    def _fix(self, plan: UnifyPlan) -> None:
        """The blocks' classes, and the signs that they have now."""
        fits = classes_of(plan, {layer.name: layer.weight for layer in self._layers})
        for layer in self._layers:
            kinds = fits[layer.name][1][:, None].to(layer.weight.device).expand(-1, math.prod(self.config.shape))
            unified, free = (layer.tiling.join(kinds == kind).to(layer.weight) for kind in (UNIFIED, FREE))
            layer.signs, layer.free = torch.empty_like(layer.weight), torch.empty_like(layer.weight)  # strided alike
            layer.signs.copy_(layer.weight.sign() * unified)
            layer.free.copy_(free)
            layer.living = None

    def _compare(self) -> None:
        """MismatchError where the ranks' weights differ."""
        if self._is_shared:
            ranks.check_same({f"{layer.name}.weight": layer.weight.detach() for layer in self._layers})


def unify(model: nn.Module, config: BlockConfig) -> UnifyPlan:
    """Makes blocks of the model's weights alike, in place and without training, and returns the plan (MSWU).

    What changes the weights least is chosen. Zeros stay zero: of what `prune` left, blocks are unified. For training
    towards it, and with it, there is `Unifier`.

    Raises:
        ConfigError: `config.skip` names no convolution or linear layer; or the network is sharded.
        ModelError: there is no such layer, or a weight is not finite.
    """
    ranks.require_whole(model, "unify")
    plan = plan_unify(weights_to_unify(model, config), config)
    unify_blocks(model, plan)
    return plan


def _check_arguments(total_steps: int, rho: float | str, every: int | None) -> None:
    for name, value in (("total_steps", total_steps), ("every", 1 if every is None else every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"Unifier got {name}={value!r}; give a number of optimizer steps, at least 1.")
    is_number = isinstance(rho, (int, float)) and not isinstance(rho, bool) and math.isfinite(rho)
    if rho != "auto" and not (is_number and float(rho) > 0):
        raise ConfigError(f"Unifier got rho={rho!r}; give 'auto' or a positive number.")
