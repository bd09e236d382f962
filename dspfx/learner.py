"""GroupLearner: learns which filters belong together while the user's own loop trains the network (DSP, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dspfx import ranks
from dspfx.config import Budget
from dspfx.errors import ConfigError, MismatchError, ModelError, StorageError
from dspfx.gates import WEIGHED_EVERY, GateBatch, batch_gates, check_finite, check_saved, find_gates
from dspfx.learner_checks import check_arguments, check_optimizer
from dspfx.method import grouping
from dspfx.optimizers import Follower, is_skipped, stepping_optimizer
from dspfx.second_pass import gradient_at
from dspfx.steering import Steering

_STATE_VERSION = 2  # 1 had no "steering"
_SMALL = 0.01  # of a layer's mean energy, below which a group channel counts as sparse
_COMPARED_EVERY = 100  # steps, and the first: are the ranks still alike?


class GroupLearner(Follower):
    """Learns the groups of every `GatedLayer` of a prepared network beside any training loop.

    mode="fused" (default): construct it, and leave the loop as it is. After every optimizer step that really happened
    it reuses the gradients the loop has just computed (`p.grad` as the optimizer saw it: unscaled, and clipped if the
    loop clips), updates the logits, and applies the penalty to the gated weights. Weights without a gradient, frozen,
    or not in the optimizer are left alone.

    mode="exact": call `learner.step(closure)` after `optimizer.step()`; the closure runs the forward pass on the same
    batch and returns the loss, unscaled. The gradient is taken at the one-step adapted filters (a second forward and
    backward); weights, buffers of `gm`, random number generators and `.grad` are then as if nothing had happened.

        learner = GroupLearner(gm, optimizer, total_steps=epochs * len(loader))
        for x, y in loader:
            optimizer.zero_grad()
            loss(gm(x), y).backward()
            optimizer.step()

    It also gathers, from the same gradients, what every group channel is worth to the loss (`GatedLayer.gate_fisher`),
    by which `dspfx.prune` then decides what goes first.

    In a distributed training (DistributedDataParallel, or fully_shard of the whole network) construct it on every rank.
    The hypergradients are averaged over the ranks, so that all of them learn what one process would from the joint
    batch. Noise and logits are the same everywhere, which is compared now and then.

    The learner keeps no copy of the network: logits live in `gm` (`gate_logits`) and in its state_dict. Save
    `gm`, optimizer and learner together, and a resumed run continues as an uninterrupted one.

    Args:
        gm: a network that `dspfx.prepare` returned.
        optimizer: any torch optimizer that owns the gated weights, or a wrapper of one (Accelerate, Lightning, SAM).
        total_steps: optimizer steps over which the penalty ramps up to `strength`; afterwards it stays there.
        strength: lambda; "auto" is 540 / number of parameters, the authors' settings.
        mode: "fused" or "exact".
        lr: learning rate of Adam on the logits.
        start: where logits that are still zero begin. "clusters" leans every filter towards the group that clustering
            by channel energies gives it, which short trainings need: from "zeros", the paper's start, thousands of
            steps at lr 1e-3 hardly tell filters apart.
        seed: of the learner's own noise; the global generators are never touched.
        budget: what the network will be pruned to; the strength is then steered from `strength` on, so that this costs
            little (see dspfx/steering.py and docs/results/steering.md).
        distributed: where torch.distributed is initialised, all ranks train one network; False: each its own.

    Raises:
        ConfigError: an argument out of its range, mode="exact" of a sharded network, or an optimizer that maximizes,
            has no learning rate, or cannot be hooked.
        ModelError: `gm` has no gates.
        BudgetError: `budget` cannot be reached, or holds a latency.
        MismatchError: the optimizer does not own a gated weight, or the gates differ from the network's gate plan;
            while learning, on every rank: the ranks' weights or logits differ.
    """

    def __init__(
        self,
        gm: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        strength: float | Literal["auto"] = "auto",
        mode: Literal["fused", "exact"] = "fused",
        lr: float = 1e-3,
        start: Literal["clusters", "zeros"] = "clusters",
        seed: int = 0,
        *,
        budget: Budget | None = None,
        distributed: bool = True,
    ) -> None:
        check_arguments(total_steps, strength, mode, lr, start)
        if mode == "exact" and ranks.is_sharded(gm):
            raise ConfigError(
                "GroupLearner with mode='exact' takes gradients past the hooks of fully_shard; use mode='fused', or "
                "DistributedDataParallel."
            )
        plan, self._gates = find_gates(gm)
        optimizer = stepping_optimizer(optimizer)
        check_optimizer(optimizer, {gate.name: gate.layer.weight for gate in self._gates})
        if start == "clusters":
            for gate in self._gates:
                gate.lean_towards_clusters()
        self.mode = mode
        self.total_steps = total_steps
        self.strength = 540 / sum(p.numel() for p in gm.parameters()) if strength == "auto" else float(strength)
        self.lr = lr
        self.steps = 0
        self._is_shared = distributed and ranks.count() > 1
        self._gm, self._optimizer, self._config = gm, optimizer, plan.config
        self._steering = None if budget is None else Steering(gm, budget, total_steps, self._is_shared)
        self._generator = torch.Generator().manual_seed(seed)
        self._hypergradients: list[Tensor] = []
        self._scales: dict[Any, Tensor] = {}
        self._due: list[GateBatch] | None = None  # exact: what an optimizer step left to be done by step(closure)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_optimizer_step),
            optimizer.register_step_post_hook(self._after_optimizer_step),
        ]

    def step(self, closure: Callable[[], Tensor]) -> bool:
        """mode="exact" only: one learning step; False, and nothing done, when GradScaler skipped the optimizer step."""
        if self.mode != "exact":
            raise ModelError(
                f"GroupLearner.step(closure) was called with mode={self.mode!r}, which steps by itself inside "
                "optimizer.step(). Remove the call, or construct the learner with mode='exact'."
            )
        if not self._hooks:
            raise ModelError("GroupLearner.step(closure) was called after close(); construct a new learner.")
        batches, self._due = self._due, None
        if batches is None:
            return False
        self._learn(batches, closure)
        return True

    def stats(self) -> dict[str, float]:
        """For progress bars and logs: steps, penalty R of the hard groups (unweighted), mean entropy of a filter's
        group probabilities in nats (log G at the start, 0 when decided), sparsity (the fraction of group channels
        whose energy a weight is below a hundredth of their layer's mean), and the norm of the last hypergradient;
        steered, also the factor on the strength, and beta. Under fully_shard, to be called on every rank."""
        penalty, entropy, filters, small, channels = 0.0, 0.0, 0, 0, 0
        with torch.no_grad():
            for gate in self._gates:
                logits, energy = gate.layer.gate_logits, ranks.whole(grouping.kernel_energy(gate.weight))
                hard = grouping.hard_groups(logits).to(energy.dtype)
                penalty += float(grouping.penalty(hard, energy, gate.scale))
                logs = torch.log_softmax(logits / self._config.tau, dim=0)
                entropy -= float((logs.exp() * logs).sum())
                filters += logits.shape[1]
                sizes = hard.sum(1, keepdim=True)
                means = (hard @ energy / sizes.clamp(min=1))[sizes[:, 0] > 0]
                small += int((means < _SMALL * energy.mean()).sum())
                channels += means.numel()
        norm = math.hypot(*(float(gradient.norm()) for gradient in self._hypergradients))
        found = {"steps": self.steps, "penalty": penalty, "entropy": entropy / filters, "sparsity": small / channels}
        found["hypergradient"] = norm
        steering = self._steering
        return found if steering is None else found | {"factor": steering.factor, "beta": steering.beta or math.nan}

    def state_dict(self) -> dict[str, Any]:
        """Step count, noise generator and Adam state, a copy of plain tensors and numbers; logits are in `gm`'s."""
        layers = {
            gate.name: {
                "steps": gate.steps,
                "exp_avg": gate.exp_avg.clone(),
                "exp_avg_sq": gate.exp_avg_sq.clone(),
            }
            for gate in self._gates
        }
        return {
            "version": _STATE_VERSION,
            "steps": self.steps,
            "generator": self._generator.get_state(),
            "layers": layers,
            "steering": None if self._steering is None else self._steering.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict()` was taken; raises, and changes nothing, when it is of another network."""
        if state.get("version") not in range(1, _STATE_VERSION + 1):
            raise StorageError(
                f"The GroupLearner state has version {state.get('version')!r}, this dspfx reads up to "
                f"{_STATE_VERSION}; load it with the dspfx that wrote it."
            )
        saved, steering = state["layers"], state.get("steering")
        check_saved(saved, self._gates)
        if (steering is None) != (self._steering is None):
            raise MismatchError(
                f"The GroupLearner state is of a learner {'without' if steering is None else 'with'} a budget to steer "
                f"by, this one has {'none' if self._steering is None else 'one'}; construct it as it was."
            )
        if self._steering is not None and steering is not None:
            self._steering.load_state_dict(steering)
        for gate in self._gates:
            gate.steps = saved[gate.name]["steps"]
            gate.exp_avg.copy_(saved[gate.name]["exp_avg"])
            gate.exp_avg_sq.copy_(saved[gate.name]["exp_avg_sq"])
        self.steps = state["steps"]
        self._generator.set_state(state["generator"].cpu())

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._due is not None:
            raise ModelError(
                "GroupLearner with mode='exact' saw a second optimizer.step() without learner.step(closure) between. "
                "Call learner.step(closure) after every optimizer.step(), or construct the learner with mode='fused'."
            )

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if is_skipped(optimizer):
            return
        batches = batch_gates(self._gates, self._optimizer, self._scales)
        if self.mode == "exact":
            self._due = batches
        else:
            self._learn(batches, None)

    @torch.no_grad()
    def _learn(self, batches: list[GateBatch], closure: Callable[[], Tensor] | None) -> None:
        """Samples P, takes the gradient (exact: at W'), steps the logits, penalises the hard groups; in this order."""
        tau, noise = self._config.tau, self._config.noise
        strength = self.strength * min(1.0, (self.steps + 1) / self.total_steps)
        if self._steering is not None:
            strength *= self._steering.adjust(self.steps)
        energies = [batch.energies() for batch in batches]
        soft = [
            grouping.sample_groups(batch.logits(), tau, noise, self._generator).to(energy.dtype)
            for batch, energy in zip(batches, energies, strict=True)
        ]
        factors: list[Tensor] | list[None] = [None] * len(batches)
        if closure is None:
            gradients = [batch.gradients for batch in batches]
        else:
            factors = [
                grouping.adapted_factor(p, energy, batch.scale, batch.lr, strength)
                for batch, p, energy in zip(batches, soft, energies, strict=True)
            ]
            gradients = gradient_at(self._gm, closure, batches, factors)
        products = [batch.products(g) for batch, g in zip(batches, gradients, strict=True)]
        if self._is_shared and closure is not None:
            ranks.average(products)  # of gradients that no hook of DDP has seen
        hypergradients = [
            grouping.hypergradient(
                p, energy, product, batch.scale, xi=batch.lr, strength=strength, tau=tau, factor=factor
            )
            for batch, p, energy, product, factor in zip(batches, soft, energies, products, factors, strict=True)
        ]
        if self._is_shared:
            if self.steps % _COMPARED_EVERY == 0:
                ranks.check_same(_compared(batches, energies))
            ranks.average(hypergradients)  # equal but for rounding, on machines that are not
        check_finite(batches, hypergradients)
        for batch, energy, product, hypergradient in zip(batches, energies, products, hypergradients, strict=True):
            batch.step_logits(hypergradient, self.lr)
            hard = grouping.hard_groups(batch.logits()).to(energy.dtype)
            if self.steps % WEIGHED_EVERY == 0:
                batch.weigh(hard, product, self.steps // WEIGHED_EVERY)
            # What prune zeroed stays zero: the slope is finite, and it multiplies the weight.
            factor = grouping.adapted_factor(hard, energy, batch.scale, batch.lr, strength)
            batch.multiply(factor)
        self._hypergradients = hypergradients
        self.steps += 1


def _compared(batches: list[GateBatch], energies: list[Tensor]) -> dict[str, Tensor]:
    """What has to be the same on every rank: the kernels' energies, for the weights, and the logits."""
    found: dict[str, Tensor] = {}
    for batch, energy in zip(batches, energies, strict=True):
        for gate, w2 in zip(batch.gates, energy, strict=True):
            found |= {f"{gate.name}.weight": w2, f"{gate.name}.gate_logits": gate.layer.gate_logits}
    return found
