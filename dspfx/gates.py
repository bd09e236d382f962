"""The gates of a prepared network as the learner sees them: found, checked, and batched by shape."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspfx import ranks
from dspfx.errors import MismatchError, ModelError
from dspfx.graph.traced import network_meta
from dspfx.method import grouping
from dspfx.method.clustering import cluster_filters
from dspfx.modules import GatedLayer
from dspfx.plans import GatePlan

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-8  # Adam's usual ones; the paper names only the learning rate
WEIGHED_EVERY = 4  # steps: what channels are worth changes slowly, and every look at it goes through all products
_NEWEST = 0.04  # what the last look counts for
_LARGE = 1 << 16  # (filter, channel) pairs of a layer that is cheaper by itself than copied together with others
_LEAN = 0.5  # at tau 0.5 and four groups a filter stays with its cluster in about half of the samples


@dataclass
class Gate:
    """One gated layer, its weight in the regulariser, and the Adam state of its logits."""

    name: str
    layer: GatedLayer
    scale: float
    exp_avg: Tensor
    exp_avg_sq: Tensor
    steps: int = 0

    @property
    def weight(self) -> Tensor:
        """A view [O, C, kernel] of the layer's weight."""
        return self.layer.by_filter(self.layer.weight)

    def lean_towards_clusters(self) -> None:
        """Starts logits that are all zero at `_LEAN` for the group that clustering gives each filter."""
        if self.layer.is_learned or self.layer.gate_groups == 1:
            return
        energy = ranks.whole(grouping.kernel_energy(self.weight.detach()))
        if not bool(energy.isfinite().all()):
            return  # the first step names the layer
        group = cluster_filters(energy.cpu(), self.layer.gate_groups).to(energy.device)
        self.layer.gate_logits.scatter_(0, group[None], _LEAN)


@dataclass(frozen=True)
class GateBatch:
    """Gates of equal shape, kind and learning rate, whose formulas are evaluated together; B gates."""

    gates: list[Gate]
    lr: float
    scale: Tensor  # [B, 1, 1]

    @property
    def parameters(self) -> list[Tensor]:
        """The weights themselves, as their layers hold them."""
        return [gate.layer.weight for gate in self.gates]

    @property
    def weights(self) -> list[Tensor]:
        """Views of the weights, B times [O, C, kernel]."""
        return [gate.weight for gate in self.gates]

    @property
    def gradients(self) -> list[Tensor]:
        """What the training step left in `.grad`, like `parameters`."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def logits(self) -> Tensor:
        """A copy of A, [B, G, O]."""
        return torch.stack([gate.layer.gate_logits for gate in self.gates])

    def energies(self) -> Tensor:
        """w2 [B, O, C]."""
        return _stacked([ranks.whole(grouping.kernel_energy(weight)) for weight in self.weights])

    def products(self, gradients: list[Tensor]) -> Tensor:
        """<W, g> [B, O, C], of gradients like `parameters`."""
        pairs = zip(self.gates, gradients, strict=True)
        products = [grouping.kernel_products(gate.weight, gate.layer.by_filter(g)) for gate, g in pairs]
        return _stacked([ranks.whole(product) for product in products])

    def multiply(self, factor: Tensor) -> None:
        """W[o, c] <- W[o, c] * factor[b, o, c] for each weight, in place; zeros stay zeros."""
        for weight, kernels in zip(self.weights, factor[..., None], strict=True):
            weight.mul_(ranks.shared_like(kernels, weight))

    def weigh(self, hard: Tensor, products: Tensor, times: int) -> None:
        """Adds <W, g> [B, O, C] of a step to what the hard groups' channels and the filters are known to be worth.

        `times` is how often that happened before. The mean forgets the first steps.
        """
        squares = products.square()
        for key, values in (("gate_fisher", hard @ squares), ("gate_filter_fisher", squares.sum(-1))):
            for gate, value in zip(self.gates, values, strict=True):
                mean: Tensor = getattr(gate.layer, key)
                mean.lerp_(value.to(mean.dtype), max(1 / (times + 1), _NEWEST))

    def step_logits(self, hypergradient: Tensor, lr: float) -> None:
        """One Adam step on the logits, along [B, G, O]."""
        logits = [gate.layer.gate_logits for gate in self.gates]
        gradients = list(hypergradient.to(logits[0].dtype).unbind())
        for gate in self.gates:
            gate.steps += 1
            if gate.exp_avg.device != hypergradient.device:  # the network has moved since
                gate.exp_avg = gate.exp_avg.to(hypergradient.device)
                gate.exp_avg_sq = gate.exp_avg_sq.to(hypergradient.device)
        exp_avg, exp_avg_sq = [gate.exp_avg for gate in self.gates], [gate.exp_avg_sq for gate in self.gates]
        torch._foreach_lerp_(exp_avg, gradients, 1 - _BETA1)
        torch._foreach_mul_(exp_avg_sq, _BETA2)
        torch._foreach_addcmul_(exp_avg_sq, gradients, gradients, 1 - _BETA2)
        root = torch._foreach_sqrt(exp_avg_sq)
        torch._foreach_div_(root, [math.sqrt(1 - _BETA2**gate.steps) for gate in self.gates])
        torch._foreach_add_(root, _EPS)
        torch._foreach_addcdiv_(logits, exp_avg, root, [-lr / (1 - _BETA1**gate.steps) for gate in self.gates])


def find_gates(gm: nn.Module) -> tuple[GatePlan, list[Gate]]:
    """Every `GatedLayer` of a prepared network, logits in float32 or better, with the weight its plan gives it.

    Raises:
        ModelError: `gm` was not prepared, or nothing in it is gated.
        MismatchError: a gated layer is missing in the network's gate plan.
    """
    plan = network_meta(gm).get("gate_plan")
    layers = {name: module for name, module in gm.named_modules() if isinstance(module, GatedLayer)}
    if not isinstance(plan, GatePlan) or not layers:
        missing = "gated layer" if isinstance(plan, GatePlan) else "gate plan"
        raise ModelError(
            f"GroupLearner found no {missing} in this {type(gm).__name__}; call dspfx.prepare first and pass the "
            "network that it returns (print(dspfx.coverage(gm)) says what was gated)."
        )
    specs = {spec.name: spec for spec in plan.layers}
    reference = statistics.median(specs[name].input_elements for name in layers if name in specs) if specs else 1
    gates = []
    for name, layer in layers.items():
        if name not in specs:
            raise MismatchError(
                f"The gated layer {name!r} is not in the network's gate plan, which lists {len(specs)} layers; "
                "prepare the network anew."
            )
        relative = specs[name].input_elements / reference
        scale = grouping.layer_scale(layer.gate_groups, layer.filters, layer.kernel_height, relative, plan.config.cost)
        # gm.half() turns the logits into half precision too, in which steps of 1e-3 are lost.
        layer.gate_logits = layer.gate_logits.to(torch.promote_types(layer.gate_logits.dtype, torch.float32))
        zeros = torch.zeros_like(layer.gate_logits)
        gates.append(Gate(name, layer, scale, zeros, zeros.clone()))
    return plan, gates


def gated_tensors(gm: nn.Module) -> dict[str, Tensor]:
    """What a PrunePlan depends on, by name: the weight of every gate, and all that the gate itself holds."""
    gates = {name: m for name, m in gm.named_modules() if isinstance(m, GatedLayer)}
    return {f"{name}.{key}": getattr(gate, key) for name, gate in gates.items() for key in ("weight", *gate.GATE_KEYS)}


def batch_gates(gates: list[Gate], optimizer: torch.optim.Optimizer, scales: dict[Any, Tensor]) -> list[GateBatch]:
    """The gates whose weights this optimizer step has trained: in the optimizer, not frozen, with a gradient.

    `scales` caches [B, 1, 1] tensors between steps; new ones every step would cost a transfer each on a GPU.
    """
    owners = {id(p): (i, group) for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    found: dict[Any, tuple[float, list[Gate]]] = {}
    for gate in gates:
        weight, logits = gate.layer.weight, gate.layer.gate_logits
        if not weight.requires_grad or weight.grad is None or id(weight) not in owners:
            continue
        index, group = owners[id(weight)]
        single = gate.name if gate.layer.filters * gate.layer.channels >= _LARGE else ""
        key = (logits.shape, logits.dtype, gate.layer.channels, weight.dtype, weight.device, index, single)
        found.setdefault(key, (float(group["lr"]), []))[1].append(gate)
    return [GateBatch(members, lr, _scale(members, scales)) for lr, members in found.values()]


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)


def _scale(gates: list[Gate], scales: dict[Any, Tensor]) -> Tensor:
    weight = gates[0].layer.weight
    key = (tuple(gate.name for gate in gates), weight.device)
    if key not in scales:
        values = [gate.scale for gate in gates]
        scales[key] = torch.tensor(values, dtype=grouping.compute_dtype(weight), device=weight.device)[:, None, None]
    return scales[key]


def check_finite(batches: list[GateBatch], hypergradients: list[Tensor]) -> None:
    """Raises ModelError naming the first gate whose weight or gradient spoiled its hypergradient."""
    if not batches:
        return
    sums = [hypergradient.sum() for hypergradient in hypergradients]
    if torch.isfinite(torch.stack([value.to(sums[0]) for value in sums])).all():
        return
    for batch, hypergradient in zip(batches, hypergradients, strict=True):
        for gate, part in zip(batch.gates, hypergradient, strict=True):
            if not torch.isfinite(part).all():
                what = "gradient" if torch.isfinite(ranks.whole(gate.layer.weight)).all() else "weight"
                raise ModelError(
                    f"The {what} of {gate.name!r} holds NaN or infinity; the logits and weights were not touched by "
                    "GroupLearner in this step. Lower the learning rate, or use a GradScaler with float16."
                )


def check_saved(saved: dict[str, Any], gates: list[Gate]) -> None:
    """Raises MismatchError where a learner state's layers are not these gates, by name or by shape."""
    names = {gate.name for gate in gates}
    other = sorted(names.symmetric_difference(saved))
    if other:
        where = "only in the network" if other[0] in names else "only in the state"
        raise MismatchError(
            f"The GroupLearner state has {len(saved)} layers, the network {len(names)}; {other[0]!r} is {where}. Load "
            "the state of the same prepared network."
        )
    for gate in gates:
        shape, ours = tuple(saved[gate.name]["exp_avg"].shape), tuple(gate.exp_avg.shape)
        if shape != ours:
            raise MismatchError(
                f"The GroupLearner state of {gate.name!r} has shape {shape} (groups, filters), the network {ours}; "
                "prepare the network with the same GateConfig."
            )
