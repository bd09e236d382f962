"""Decides what every gated convolution keeps, so that a budget is met: one global threshold, exact liveness.

Structures are group channels (a slab W[filters of g, c]) and, where liveness cannot reach them, whole filters. All
of them stand in one order by their cumulative share of energy (METHOD, pruning); pruning drops a prefix of it.
With `GateConfig(balanced=True)` they go in steps, each a block of channels (or filters) of every group of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dspfx.config import Budget
from dspfx.errors import BudgetError, ModelError
from dspfx.graph.channels import ChannelGraph, tensors_in
from dspfx.graph.cost import LayerCost, layer_costs
from dspfx.graph.liveness import Liveness, Reads, liveness
from dspfx.graph.traced import eval_graph, network_meta, parts_of
from dspfx.modules import GatedLayer
from dspfx.passes.score_structures import Energy, order_structures, score_layer, units
from dspfx.plans import Group, PrunedLayer, PrunePlan


@dataclass(eq=False)
class Kept:
    """The state after dropping a prefix of structures, with dead filters and channels taken out."""

    reads: dict[str, Reads]
    flops: float
    params: float
    gated_flops: float
    is_connected: bool


def plan_prune(model: nn.Module, channels: ChannelGraph, budget: Budget, energy: Energy) -> PrunePlan:
    """The PrunePlan that drops the fewest structures, least energy first, such that `budget` holds.

    `energy` maps a weight [O, C, *kernel] to energies [O, C], or is Fisher's. Layers that are pruned already keep their
    groups and only lose more. Raises BudgetError, naming the floor, where the budget cannot be met, and ModelError
    where a weight or an energy is not finite.
    """
    search = Search(model, channels, energy, counts_params=budget.flops is None)
    low, high = 0, search.total  # dropping `high` structures meets the budget, or nothing does

    def meets(kept: Kept) -> bool:
        return (budget.flops is None or kept.flops <= budget.flops) and (
            budget.params is None or kept.params <= budget.params
        )

    while low < high:
        middle = (low + high) // 2
        kept = search.keep(middle)
        if meets(kept) or not kept.is_connected:
            high = middle
        else:
            low = middle + 1
    kept = search.keep(low)
    if not kept.is_connected or not meets(kept):
        floor = search.keep(max(low - 1, 0)) if not kept.is_connected else kept
        least = "one block of channels" if search.is_balanced else "one channel"
        raise BudgetError(
            f"{budget} is below what this network can reach: keeping {least} a group leaves {floor.flops:.4f} of "
            f"the FLOPs and {floor.params:.4f} of the parameters (layers without a gate count in full). Raise the "
            f"budget, use more groups, or gate more layers."
        )
    return search.plan(kept, search.beta(low))


class Search:
    """All structures of a gated network in the order in which they go; `keep(k)` drops the first k.

    What is counted are structures or, of a balanced network, steps, each of many structures that score the same. A
    state is connected while every output that varies with the input still does.
    """

    def __init__(self, model: nn.Module, channels: ChannelGraph, energy: Energy, counts_params: bool = False) -> None:
        self.channels = channels
        self.costs = layer_costs(model)
        self.gated = {name: m for name, m in model.named_modules() if isinstance(m, GatedLayer)}
        if not self.gated:
            raise ModelError(f"{model._get_name()} has no gated layer; call dspfx.prepare(model) before pruning.")
        gate_plan = network_meta(model).get("gate_plan")
        self.is_balanced = gate_plan is not None and gate_plan.config.balanced
        by_score = _filter_pruned(self, channels)
        numbers = {
            s.name: [units(channels, wires) for wires in (s.out, s.ins[0])]
            for s in reversed(channels.steps)
            if s.name in self.gated and s.kind == "conv"
        }
        self.layers = []
        for name, gate in self.gated.items():
            if name in self.costs:
                cost = self.costs[name].params_per_pair if counts_params else self.costs[name].macs_per_pair
                free = by_score.get(name)
                layer = score_layer(name, gate, energy, numbers[name], free, self.is_balanced, cost)
                self.layers.append(layer)
        self.scores, self.order, self.ends = order_structures(self.layers)
        self.total = len(self.ends) - 1
        self.dense = {s.name: Reads.whole(s) for s in channels.steps if s.kind == "conv"}
        ends = [n for part in parts_of(model).values() for n in eval_graph(part).output_node().all_input_nodes]
        outputs = [channels.values[n] for n in ends]
        wires = torch.cat([torch.empty(0, dtype=torch.int64), *(t.unique() for t in tensors_in(outputs))])
        self.outputs = wires[liveness(channels, self.rows(0)).values[wires].isnan()]

    def rows(self, dropped: int) -> dict[str, Reads]:
        """What every convolution reads once the first `dropped` structures are gone, before liveness."""
        kept = torch.ones(len(self.scores), dtype=torch.bool)
        kept[self.order[: self.ends[dropped]]] = False
        reads = dict(self.dense)
        offset = 0
        for layer in self.layers:
            parts = []
            for scores in (layer.channel_scores, layer.filter_scores):
                parts.append(kept[offset : offset + scores.numel()].reshape(scores.shape))
                offset += scores.numel()
            keep, alive = parts
            reads[layer.name] = Reads(keep, torch.where(alive, layer.group, -1))
        return reads

    def keep(self, dropped: int) -> Kept:
        """What is left without the first `dropped` structures."""
        return self.count(self.rows(dropped))

    def count(self, reads: dict[str, Reads]) -> Kept:
        """Takes out what is dead (one pass forward and back is the fixed point) and counts the rest."""
        live = liveness(self.channels, reads)
        reads, alive = _take_out_dead(self.channels, reads, live)
        flops = params = dense_flops = dense_params = gated = gated_dense = 0.0
        for name, cost in self.costs.items():
            pairs = _pairs(name, cost, reads, alive)
            flops += pairs * cost.macs_per_pair
            params += pairs * cost.params_per_pair
            dense_flops += cost.macs
            dense_params += cost.params
            if name in self.gated:
                gated += pairs * cost.macs_per_pair
                gated_dense += cost.macs
        return Kept(
            reads,
            flops / max(dense_flops, 1),
            params / max(dense_params, 1),
            gated / max(gated_dense, 1),
            bool(live.values[self.outputs].isnan().all()),
        )

    def beta(self, dropped: int) -> float:
        """The score of the last structure that goes."""
        return float(self.scores[self.order[self.ends[dropped] - 1]]) if dropped else 0.0

    def plan(self, kept: Kept, beta: float = 0.0) -> PrunePlan:
        """The frozen form of a state."""
        layers = []
        for layer in self.layers:
            read, cost = kept.reads[layer.name], self.costs[layer.name]
            groups = []
            for g in range(len(read.keep)):
                filters = (read.row == g).nonzero().flatten().tolist()
                groups.append(
                    Group(tuple(filters), tuple(read.keep[g].nonzero().flatten().tolist()) if filters else ())
                )
            pairs = sum(len(g.filters) * len(g.channels) for g in groups)
            layers.append(
                PrunedLayer(
                    layer.name,
                    cost.out_channels,
                    cost.in_channels,
                    tuple(groups),
                    cost.macs,
                    pairs * cost.macs_per_pair,
                )
            )
        return PrunePlan(tuple(layers), kept.flops, kept.params, kept.gated_flops, beta)


def _filter_pruned(search: Search, channels: ChannelGraph) -> dict[str, Tensor]:
    """The filters (bool [O]) of gated layers that are scored one by one, for the layers that have some.

    Elsewhere a filter dies when its only readers, gated layers, have dropped it. That cannot happen in a layer whose
    filters are summed with another's (a residual stream has too many readers), are read by an ungated layer, or enter
    the statistics of a norm over channels. A filter that the output or an unknown operation reads is never dropped.
    """
    makers = torch.zeros(channels.num_wires, dtype=torch.int64)
    ungated = torch.zeros(channels.num_wires, dtype=torch.bool)
    seen: set[str] = set()
    for step in channels.steps:
        if step.kind == "coupled":
            ungated[channels.root[step.ins[0]]] = True
        if step.kind != "conv":
            continue
        if step.name not in seen:
            seen.add(step.name)
            makers.index_add_(0, channels.root[step.out], torch.ones(len(step.out), dtype=torch.int64))
        if step.name not in search.gated:
            ungated[channels.root[step.ins[0]]] = True
    pinned = channels.pinned()
    found = {}
    for step in channels.steps:
        roots, free = channels.root[step.out], ~pinned[step.out]
        if step.name in search.gated and bool((free & ((makers[roots] > 1) | ungated[roots])).any()):
            found[step.name] = free
    return found


def _take_out_dead(
    channels: ChannelGraph, reads: dict[str, Reads], live: Liveness
) -> tuple[dict[str, Reads], dict[str, Tensor]]:
    """(reads without dead filters and channels, bool [O] a depthwise layer's living channels)."""
    needed: dict[str, Tensor] = {}
    fed: dict[str, Tensor] = {}
    for step in channels.steps:  # a module called twice lives if any of its calls does
        if step.kind in ("conv", "depthwise"):
            out, source = live.needed[step.out], live.values[step.ins[0]] != 0
            needed[step.name] = needed.get(step.name, torch.zeros_like(out)) | out
            fed[step.name] = fed.get(step.name, torch.zeros_like(source)) | source
    result = {}
    for name, read in reads.items():
        keep = read.keep & fed[name]
        alive = needed[name] & (read.row >= 0) & keep.any(1)[read.row.clamp(min=0)]
        result[name] = Reads(keep, torch.where(alive, read.row, -1))
    return result, {name: needed[name] & fed[name] for name in needed if name not in reads}


def _pairs(name: str, cost: LayerCost, reads: dict[str, Reads], alive: dict[str, Tensor]) -> int:
    """Kept (filter, input channel) pairs of a layer; all of them where no rule followed it."""
    if name in reads:
        read = reads[name]
        filters = torch.bincount(read.row[read.row >= 0], minlength=len(read.keep))
        return int((filters * read.keep.sum(1)).sum())
    if name in alive:
        return int(alive[name].sum()) * cost.in_channels
    return cost.out_channels * cost.in_channels
