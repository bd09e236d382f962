"""How much of a prepared network can be pruned, and what holds the rest."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from tabulate import tabulate
from torch import nn

from dspfx.errors import ModelError
from dspfx.graph.analyse import analyse
from dspfx.graph.channels import ChannelGraph
from dspfx.graph.inputs import tensors_of
from dspfx.graph.traced import network_meta
from dspfx.plans import GatePlan, Plan

_PLACES = 3  # of the model's own lines behind a pin


@dataclass(frozen=True)
class Pinned:
    """Filters whose channel must stay.

    Attributes:
        reason: why.
        filters: how many, of all layers'.
        nodes: the graph's nodes that hold them.
        where: the model's own lines behind the first few of these nodes ("net.py:12: y = torch.cdist(a, b)").
        remedy: what would free them; empty where nothing would.
    """

    reason: str
    filters: int
    nodes: tuple[str, ...]
    where: tuple[str, ...] = ()
    remedy: str = ""


@dataclass(frozen=True)
class Coverage(Plan):
    """What `prepare` could and could not do with a network.

    Attributes:
        inputs: shapes of the inputs it was traced with, given or guessed.
        plan: the gated layers, and the skipped ones with their reasons.
        gated: share, in 0 .. 1, of all layers' multiply-adds that gated layers make.
        prunable: share that can go: gated layers in full, and of the others the (filter, input channel) pairs whose
            filter or channel nothing pins.
        convs_prunable: the same over convolutions only, linear layers left out; 0 where there is none.
        pins: what must stay, most filters first.
    """

    inputs: tuple[tuple[int, ...], ...]
    plan: GatePlan
    gated: float
    prunable: float
    convs_prunable: float
    pins: tuple[Pinned, ...]

    def __str__(self) -> str:
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.inputs)
        total = len(self.plan.layers) + len(self.plan.skipped)
        lines = [
            str(self.plan),
            f"{len(self.plan.layers)} of {total} layers are gated; they make {self.gated:.1%} of the multiply-adds, "
            f"and {self.prunable:.1%} can be pruned (traced with an input of {shapes})",
        ]
        if self.pins:
            rows = [(pin.filters, pin.reason, _abridged(pin.nodes)) for pin in self.pins]
            lines += ["", tabulate(rows, headers=["filters", "must stay because", "at"])]
        for pin in self.pins:
            if pin.remedy:
                lines += ["", f"{pin.reason}:", *(f"    {line}" for line in (*pin.where, *pin.remedy.splitlines()))]
        return "\n".join(lines)


def coverage(gm: nn.Module) -> Coverage:
    """The Coverage of a prepared network, which is left as it was; raises ModelError for any other."""
    plan = network_meta(gm).get("gate_plan")
    if plan is None:
        raise ModelError(f"{type(gm).__name__} is not a prepared network; call gm = dspfx.prepare(model) first.")
    channels = analyse(gm)
    pairs = _prunable_pairs(channels)
    rows = [_Row(spec.macs, float(spec.macs), _is_linear(gm, spec.name)) for spec in plan.layers]
    gated = sum(row.macs for row in rows)
    for layer in plan.skipped:
        is_linear = "linear" in layer.kind.lower() or _is_linear(gm, layer.name)
        rows.append(_Row(layer.macs, layer.macs * pairs.get(layer.name, 0.0), is_linear))
    inputs = network_meta(gm)["inputs"]
    return Coverage(
        inputs=tuple(tuple(x.shape) for x in tensors_of(inputs)),
        plan=plan,
        gated=gated / max(sum(row.macs for row in rows), 1),
        prunable=_share(rows),
        convs_prunable=_share([row for row in rows if not row.is_linear]),
        pins=_pins(channels),
    )


@dataclass(frozen=True)
class _Row:
    """A layer's multiply-adds, and how many of them can go."""

    macs: int
    free: float
    is_linear: bool


def _share(rows: list[_Row]) -> float:
    return sum(row.free for row in rows) / max(sum(row.macs for row in rows), 1)


def _is_linear(gm: nn.Module, name: str) -> bool:
    return isinstance(dict(gm.named_modules()).get(name), nn.Linear)


def _prunable_pairs(channels: ChannelGraph) -> dict[str, float]:
    """Layer -> the share of its (filter, input channel) pairs of which one side is not pinned."""
    pinned = channels.pinned().double()
    shares = {}
    for step in channels.steps:
        if step.kind == "conv":
            shares[step.name] = 1 - float(pinned[step.out].mean() * pinned[step.ins[0]].mean())
        elif step.kind == "depthwise":  # a pair of its own for every filter
            shares[step.name] = 1 - float(pinned[step.out].mean())
    return shares


def _pins(channels: ChannelGraph) -> tuple[Pinned, ...]:
    """The pins of channels that layers make, by reason; a layer called twice counts once."""
    made = {step.name: step.out for step in reversed(channels.steps) if step.kind in ("conv", "depthwise")}
    count: dict[str, int] = defaultdict(int)
    nodes: dict[str, dict[str, None]] = defaultdict(dict)
    where: dict[str, dict[str, None]] = defaultdict(dict)
    remedy: dict[str, str] = {}
    for out in reversed(made.values()):
        for root in channels.root[out].tolist():
            pin = channels.pins.get(root)
            if pin is not None:
                count[pin.reason] += 1
                nodes[pin.reason][pin.node] = None
                where[pin.reason] |= {pin.where: None} if pin.where else {}
                remedy[pin.reason] = remedy.get(pin.reason) or pin.remedy
    order = sorted(count, key=lambda reason: -count[reason])
    return tuple(
        Pinned(reason, count[reason], tuple(nodes[reason]), tuple(where[reason])[:_PLACES], remedy[reason])
        for reason in order
    )


def _abridged(nodes: tuple[str, ...]) -> str:
    more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
    return ", ".join(nodes[:3]) + more
