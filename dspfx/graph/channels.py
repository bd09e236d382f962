"""`ChannelGraph`: which channels of a network are one and the same, which may go, and which must stay.

Every activation's channels are *wires*. Computing operations make fresh wires and record a `Step`; operations that
only move data are run on tensors of wires. Wires that must be kept or removed together are tied:

    conv1 -> bn1 -> relu --+            conv1's outputs, bn1, relu, conv2's outputs and the sum are one class
                           + add ->     per channel; whoever reads the sum reads that class
    conv2 -----------------+
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from dspfx.graph.layers import Layer


@dataclass(frozen=True, eq=False)
class Step:
    """One computing operation: `out` wires from `ins` wires, and the `layer` whose tensors take part.

    kind:
        "conv": out [O] from in [C]; also linear, transposed and grouped layers.
        "depthwise", "norm": out and in aligned, every channel by itself.
        "coupled": aligned, and statistics shared within each of the layer's groups of channels.
        "map": elementwise; `function` maps aligned vectors of channel constants, NaN = not constant.
        "merge": pairs (out[i] holds in[i]); an out wire that several pairs name holds all their channels.
        "param": out are the elements of the stored tensor `path` along `axis`; no ins.
    """

    kind: Literal["conv", "depthwise", "norm", "coupled", "map", "merge", "param"]
    node: fx.Node
    out: Tensor
    ins: tuple[Tensor, ...] = ()
    layer: Layer | None = None
    function: Callable[..., Tensor] | None = None
    path: str = ""
    axis: int = 0

    @property
    def name(self) -> str:
        """The layer's name; "" without one."""
        return self.layer.name if self.layer else ""

    def blocks(self) -> Tensor:
        """int64 [len(out)]: the group of each output channel of a conv, or of each channel of a coupled norm."""
        groups = self.layer.groups if self.layer else 1
        return torch.arange(len(self.out)) // max(len(self.out) // groups, 1)


@dataclass(frozen=True)
class Pin:
    """Why some channels keep their place: the node, a reason in words, the model's own line that made the node
    ("net.py:12: y = torch.cdist(a, b)"; "" where it is not known), and what the user can do about it."""

    node: str
    reason: str
    where: str = ""
    remedy: str = ""

    @classmethod
    def at(cls, node: fx.Node, reason: str, remedy: str = "") -> Pin:
        """A pin at `node`."""
        file, line = node.meta.get("where", ("", 0))
        where = f"{Path(file).name}:{line}: {linecache.getline(file, line).strip()}" if file else ""
        return cls(str(node), reason, where, remedy)


@dataclass(eq=False)
class ChannelGraph:
    """The wires of one traced network.

    Attributes:
        steps: computing operations, in execution order.
        values: node -> wire tensor (or a nesting of them) of its output.
        root: int64 [wires], the representative of each wire's class.
        pins: representative -> why the class must stay.
        zero: bool [wires], channels that padding made.
        tainted: bool [wires], classes whose values an unknown operation may overwrite.
        selections: (tensor, later tensor, axis) -> which channel of the one each channel of the other is, if it is so.
    """

    steps: list[Step] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    root: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    pins: dict[int, Pin] = field(default_factory=dict)
    zero: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    tainted: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    selections: dict[tuple[fx.Node, fx.Node, int], Tensor | None] = field(default_factory=dict)

    @property
    def num_wires(self) -> int:
        return self.root.numel()

    def pinned(self) -> Tensor:
        """bool [wires]: True for every member of a pinned class."""
        mask = torch.zeros(self.num_wires, dtype=torch.bool)
        if self.pins:
            mask[torch.tensor(sorted(self.pins))] = True
        return mask[self.root]

    def pin(self, wires: Tensor, pin: Pin) -> None:
        """Pins the classes of `wires`; a class keeps its first reason."""
        for root in self.root[wires.flatten()].unique().tolist():
            self.pins.setdefault(root, pin)


def tensors_in(value: Any) -> list[Tensor]:
    """Every wire tensor in a nesting of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in tensors_in(v)]
    return []


def module_of(gm: nn.Module, node: fx.Node) -> nn.Module:
    """The module a call_module node calls."""
    return gm.get_submodule(str(node.target))
