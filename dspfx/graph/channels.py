"""`ChannelGraph`: which channels of a network are one and the same, which may go, and which must stay.

Every activation's channels are *wires*. Computing operations make fresh wires and record a `Step`; operations that
only move data are run on tensors of wires. Wires that must be kept or removed together are tied:

    conv1 -> bn1 -> relu --+            conv1's outputs, bn1, relu, conv2's outputs and the sum are one class
                           + add ->     per channel; whoever reads the sum reads that class
    conv2 -----------------+
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from dspfx.graph.wires import along, compress, spread


@dataclass(frozen=True, eq=False)
class Step:
    """One computing operation: `out` wires from `ins` wires.

    kind: "conv" (out [O] from in [C], also linear), "depthwise" and "norm" (out and in aligned),
        "map" (elementwise: `function` maps aligned vectors of channel constants, NaN = not constant).
    """

    kind: Literal["conv", "depthwise", "norm", "map"]
    node: fx.Node
    out: Tensor
    ins: tuple[Tensor, ...]
    module: str = ""
    function: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Pin:
    """Why some channels keep their place: the node, and a reason in words."""

    node: str
    reason: str


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
    """

    steps: list[Step] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    root: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    pins: dict[int, Pin] = field(default_factory=dict)
    zero: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    tainted: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))

    @property
    def num_wires(self) -> int:
        return self.root.numel()

    def pinned(self) -> Tensor:
        """bool [wires]: True for every member of a pinned class."""
        mask = torch.zeros(self.num_wires, dtype=torch.bool)
        if self.pins:
            mask[torch.tensor(sorted(self.pins))] = True
        return mask[self.root]

    def pin(self, wires: Tensor, node: fx.Node | str, reason: str) -> None:
        """Pins the classes of `wires`; a class keeps its first reason."""
        for root in self.root[wires.flatten()].unique().tolist():
            self.pins.setdefault(root, Pin(str(node), reason))


class Builder:
    """Collects steps, ties and pins while the graph is walked; rules (graph/rules.py) call its methods."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = ChannelGraph()
        self.count = 0
        self.ties: list[tuple[Tensor, Tensor]] = []
        self.pins: list[tuple[Tensor, fx.Node, str]] = []
        self._zeros: list[Tensor] = []
        self._tainted: list[Tensor] = []
        self._calls: dict[str, Step] = {}

    def fresh(self, n: int) -> Tensor:
        """n new wires."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Wires a[i] and b[i] stay or go together."""
        self.ties.append((a, b))

    def step(self, step: Step) -> None:
        """Records a step; a module called again ties its channels to those of the first call."""
        first = self._calls.setdefault(step.module, step) if step.module else step
        if first is not step:
            self.tie(first.out, step.out)
            for a, b in zip(first.ins, step.ins, strict=True):
                self.tie(a, b)
        self.graph.steps.append(step)

    def map(
        self, node: fx.Node, function: Callable[..., Tensor], *tensors: Tensor, tied: Sequence[bool] | None = None
    ) -> Tensor:
        """An elementwise operation on wire tensors of one shape: fresh wires, tied to those they come from."""
        shape = tensors[0].shape
        columns, rebuild = _align(tensors)
        out = self.fresh(len(columns[0]))
        for column, is_tied in zip(columns, tied or [True] * len(columns), strict=True):
            if is_tied:
                self.tie(out, column)
        self.graph.steps.append(Step("map", node, out, columns, function=function))
        return rebuild(out, shape)

    def zeros(self, wires: Tensor) -> Tensor:
        """The same wire tensor with a wire of its own, of value zero, for each channel that padding made."""
        if not bool((wires < 0).any()):
            return wires
        vector = along(wires, 1)
        if vector is None:
            raise ValueError("padding that mixes channels and positions")
        vector = vector.clone()
        vector[vector < 0] = self.fresh(int((vector < 0).sum()))
        self._zeros.append(vector[along(wires, 1) < 0])  # type: ignore[operator]
        return spread(vector, wires.shape, 1)

    def taint(self, tensors: list[Tensor]) -> None:
        """The values of these classes are never taken for constants."""
        self._tainted += [t.unique() for t in tensors]

    def opaque(self, node: fx.Node, args: Any, reason: str) -> Any:
        """What no rule knows: the channels it reads are pinned, and so are those it makes."""
        for wires in tensors_in(args):
            self.pins.append((wires.flatten() if wires.is_contiguous() else wires.unique(), node, reason))
        return self.constant(node, reason)

    def constant(self, node: fx.Node, reason: str) -> Any:
        """Pinned wires in the shape of the node's own value (model inputs, constants, unknown results)."""

        def make(value: Any) -> Any:
            if isinstance(value, Tensor):
                wire = self.fresh(1)
                self.pins.append((wire, node, reason))
                return wire.expand(value.shape) if value.dim() else wire.reshape(())
            if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
                return tuple(make(v) for v in value)
            if isinstance(value, dict):
                return {k: make(v) for k, v in value.items()}
            return value

        return make(node.meta.get("val"))

    def finish(self) -> ChannelGraph:
        """Resolves the ties by union-find and the pins to classes."""
        graph = self.graph
        graph.root = _union(self.count, self.ties)
        graph.zero = torch.zeros(self.count, dtype=torch.bool)
        for wires in self._zeros:
            graph.zero[wires] = True
        roots = torch.zeros(self.count, dtype=torch.bool)
        for wires in self._tainted:
            roots[graph.root[wires]] = True
        graph.tainted = roots[graph.root]
        for wires, node, reason in self.pins:
            graph.pin(wires, node, reason)
        return graph


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


def _align(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Callable[[Tensor, torch.Size], Tensor]]:
    """Aligned wire vectors that cover the tensors' elements, and how to lay a result vector out as a tensor."""
    for axis in (1, -1):
        vectors = [along(t, axis) if t.dim() > 1 else None for t in tensors]
        if all(v is not None for v in vectors):
            return tuple(v for v in vectors if v is not None), partial(spread, axis=axis)
    stacked = torch.stack(list(tensors), -1)
    rows, inverse = stacked.reshape(-1, len(tensors)).unique(dim=0, return_inverse=True)
    return rows.unbind(-1), lambda out, shape: compress(out[inverse].reshape(shape))


def _union(count: int, ties: list[tuple[Tensor, Tensor]]) -> Tensor:
    """int64 [count]: the smallest wire of each connected component, by label propagation with pointer jumping."""
    root = torch.arange(count)
    if not ties:
        return root
    a = torch.cat([x.reshape(-1) for x, _ in ties])
    b = torch.cat([y.reshape(-1) for _, y in ties])
    while True:
        low = torch.minimum(root[a], root[b])
        new = root.scatter_reduce(0, torch.cat([root[a], root[b]]), torch.cat([low, low]), "amin")
        new = new[new]
        new = new[new]
        if bool((new == root).all()):
            return root
        root = new
