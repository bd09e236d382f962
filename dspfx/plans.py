"""The frozen decisions that passes carry out: printable, comparable, JSON-able, free of tensors and of the model."""

from __future__ import annotations

import base64
import dataclasses
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tabulate import tabulate

from dspfx.config import BlockConfig, GateConfig
from dspfx.errors import StorageError
from dspfx.plan import Plan
from dspfx.plots import plot_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Skipped:
    """A layer without a gate, and why."""

    name: str
    kind: str
    reason: str
    macs: int


@dataclass(frozen=True)
class GateSpec:
    """One gate: the convolution's qualified name, G, O, C, elements of its input activation at batch 1, and MACs."""

    name: str
    groups: int
    out_channels: int
    in_channels: int
    input_elements: int
    macs: int


@dataclass(frozen=True)
class GatePlan(Plan):
    """Which convolutions get a gate, with how many groups, and why the others get none."""

    config: GateConfig
    layers: tuple[GateSpec, ...]
    skipped: tuple[Skipped, ...]

    def within(self, prefix: str) -> GatePlan:
        """The same plan for the submodule `prefix` alone, layers named from it; for "", the plan itself."""
        if not prefix:
            return self
        start = f"{prefix}."

        def own(layers: tuple[Any, ...]) -> tuple[Any, ...]:
            inside = [layer for layer in layers if layer.name.startswith(start)]
            return tuple(dataclasses.replace(layer, name=layer.name.removeprefix(start)) for layer in inside)

        return GatePlan(self.config, own(self.layers), own(self.skipped))

    def __str__(self) -> str:
        rows: list[tuple[Any, ...]] = [
            (s.name, s.groups, f"{s.out_channels} x {s.in_channels}", s.macs, "") for s in self.layers
        ]
        rows += [(s.name, "-", s.kind, s.macs, s.reason) for s in self.skipped]
        return tabulate(
            rows, headers=["layer", "groups", "filters x channels", "MACs", "skipped because"], disable_numparse=True
        )


@dataclass(frozen=True)
class Group:
    """Filters that share one set of input channels (indices into the layer's dense weight)."""

    filters: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class PrunedLayer:
    """What is left of one gated convolution; filters in no group are dead, empty groups stay listed."""

    name: str
    out_channels: int
    in_channels: int
    groups: tuple[Group, ...]
    macs: int
    macs_left: int


@dataclass(frozen=True)
class PrunePlan(Plan):
    """What every gated convolution keeps, and what that leaves of the whole network.

    Attributes:
        layers: one entry a gated convolution.
        flops_left, params_left: remaining fraction of the MACs and weights of all convolutions and linear layers,
            counted as kept (filter, input channel) pairs.
        gated_flops_left: the same fraction over the gated convolutions only, the papers' count.
        beta: the global share of energy below which group channels were dropped; of Fisher information, the loss for
            a multiply-add (or weight).
        latency_left: measured time of the lowered network, to that of the dense one; None where it was no budget.
    """

    layers: tuple[PrunedLayer, ...]
    flops_left: float
    params_left: float
    gated_flops_left: float
    beta: float
    latency_left: float | None = None

    def plot(self, ax: Axes | None = None) -> Axes:
        """A bar a layer, the share of its FLOPs that is left; on `ax`, or on a new pyplot figure.

        Raises ConfigError where matplotlib, the extra `plots`, is missing.
        """
        shares = [layer.macs_left / layer.macs if layer.macs else 1.0 for layer in self.layers]
        return plot_shares([layer.name for layer in self.layers], shares, self.flops_left, ax)

    def __str__(self) -> str:
        rows: list[tuple[Any, ...]] = []
        for layer in self.layers:
            shape = "  ".join(f"{len(g.filters)}x{len(g.channels)}" for g in layer.groups if g.filters)
            left = layer.macs_left / layer.macs if layer.macs else 1.0
            rows.append((layer.name, f"{layer.out_channels}x{layer.in_channels}", shape or "(all dead)", f"{left:.1%}"))
        table = tabulate(
            rows, headers=["layer", "dense", "groups: filters x channels", "FLOPs left"], disable_numparse=True
        )
        return (
            f"{table}\nwhole network: {self.flops_left:.1%} of FLOPs and {self.params_left:.1%} of parameters left "
            f"(gated convolutions only: {self.gated_flops_left:.1%} of FLOPs)"
        ) + ("" if self.latency_left is None else f"\nmeasured latency: {self.latency_left:.1%} of the dense network's")


@dataclass(frozen=True)
class LoweredLayer:
    """How one layer is rewritten.

    Attributes:
        form: "dense" (one layer of the kept filters and channels), "branches" (a convolution a group), "grouped"
            (one convolution with `groups`, padded to equal ones), "kernel" (one kernel that walks the groups' lists) or
            "native" (in a `NativeChain`, by such lists).
        filters, channels: what is kept, as indices into the layer before lowering, in the order in which it stands
            afterwards.
        groups: the branches, as indices into `filters` and `channels`; empty for "dense" and "native".
        macs, macs_left, macs_run: multiply-adds before, of the kept structure, and really executed; at batch 1.
        ms: the milliseconds that the form was expected to take when it was chosen; None where nothing was measured.
    """

    name: str
    form: Literal["dense", "branches", "grouped", "kernel", "native"]
    filters: tuple[int, ...]
    channels: tuple[int, ...]
    groups: tuple[Group, ...]
    macs: int
    macs_left: int
    macs_run: int
    ms: float | None = None


@dataclass(frozen=True)
class LowerPlan(Plan):
    """The form of every layer that carries channels (norms and depthwise convolutions follow their channels)."""

    layers: tuple[LoweredLayer, ...]

    @property
    def flops_run(self) -> float:
        """Fraction of the multiply-adds before lowering that are executed after it; 1 where none were counted."""
        dense = sum(layer.macs for layer in self.layers)
        return sum(layer.macs_run for layer in self.layers) / dense if dense else 1.0

    @property
    def ms(self) -> float | None:
        """The milliseconds expected of all layers together; None where nothing was measured."""
        known = [layer.ms for layer in self.layers if layer.ms is not None]
        return sum(known) if known else None

    def __str__(self) -> str:
        rows: list[tuple[Any, ...]] = []
        for layer in self.layers:
            shape = "  ".join(f"{len(g.filters)}x{len(g.channels)}" for g in layer.groups)
            dense = f"{len(layer.filters)}x{len(layer.channels)}"
            share = [f"{part / layer.macs:.1%}" if layer.macs else "-" for part in (layer.macs_left, layer.macs_run)]
            rows.append((layer.name, layer.form, dense, shape, *share, "" if layer.ms is None else f"{layer.ms:.3f}"))
        headers = ["layer", "form", "filters x channels", "branches", "FLOPs left", "FLOPs run", "ms expected"]
        table = tabulate(rows, headers=headers, disable_numparse=True)
        return f"{table}\nthe lowered network runs {self.flops_run:.1%} of the FLOPs"


@dataclass(frozen=True)
class UnifiedLayer:
    """The blocks of one weight that are alike.

    Attributes:
        name: the layer's.
        shape: its weight's.
        classes: a digit a block, in the order of `method.blocks.Tiling`, zlib's and base64's: 0 free, 1 unified (one
            absolute value), 2 pruned (zero).
        blocks, unified, pruned: how many there are.
        distortion: how far the weight was from that: the squared distance, of its squared norm.
    """

    name: str
    shape: tuple[int, ...]
    classes: str
    blocks: int
    unified: int
    pruned: int
    distortion: float

    @staticmethod
    def encode(kinds: bytes) -> str:
        """`classes` of one byte a block."""
        return base64.b64encode(zlib.compress(kinds, 9)).decode()

    def kinds(self) -> bytes:
        """One byte a block; StorageError where `classes` are not those of so many blocks."""
        try:
            kinds = zlib.decompressobj().decompress(base64.b64decode(self.classes), self.blocks + 1)
        except (ValueError, zlib.error) as error:
            raise StorageError(f"the blocks of {self.name} cannot be read: {error}.") from error
        found = [len(kinds), kinds.count(1), kinds.count(2), kinds.count(0)]
        if found != [self.blocks, self.unified, self.pruned, self.blocks - self.unified - self.pruned]:
            raise StorageError(f"the blocks of {self.name} are not {self.unified} + {self.pruned} of {self.blocks}.")
        return kinds


@dataclass(frozen=True)
class UnifyPlan(Plan):
    """Which blocks of which weights are zero, and which have one absolute value."""

    config: BlockConfig
    layers: tuple[UnifiedLayer, ...]

    @property
    def unified(self) -> float:
        """Fraction of all blocks."""
        return sum(layer.unified for layer in self.layers) / max(sum(layer.blocks for layer in self.layers), 1)

    @property
    def pruned(self) -> float:
        """Fraction of all blocks."""
        return sum(layer.pruned for layer in self.layers) / max(sum(layer.blocks for layer in self.layers), 1)

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                layer.blocks,
                *(f"{part / layer.blocks:.1%}" for part in (layer.unified, layer.pruned)),
                f"{layer.distortion:.1%}",
            )
            for layer in self.layers
        ]
        headers = ["layer", "weight", "blocks", "unified", "pruned", "energy moved"]
        table = tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "left", *["right"] * 4))
        a, b = self.config.shape
        return (
            f"{table}\nof all blocks of {a} x {b} ({self.config.layout}), {self.unified:.1%} are unified and "
            f"{self.pruned:.1%} pruned"
        )
