"""`Builder`: collects the steps, ties and pins of a ChannelGraph while the rules walk a model's graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from dspfx.graph.channels import ChannelGraph, Pin, Step, tensors_in
from dspfx.graph.layers import TENSORS, attribute
from dspfx.graph.wires import along, compress, distinct, spread, thin


class Builder:
    """Collects steps, ties and pins while the graph is walked; rules (graph/rules.py) call its methods."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.part, self.prefix = model, ""
        self.graph = ChannelGraph()
        self.count = 0
        self.ties: list[tuple[Tensor, Tensor]] = []
        self.pins: list[tuple[Tensor, Pin]] = []
        self._zeros: list[Tensor] = []
        self._tainted: list[Tensor] = []
        self._owners: dict[Any, dict[int, Tensor]] = {}  # a stored tensor's id, or a layer's name -> wires by axis
        self._params: dict[int, tuple[int, Tensor]] = {}
        self._param_paths: set[str] = set()

    def enter(self, part: nn.Module, prefix: str) -> None:
        """The nodes that follow are of `part`, which the model has under `prefix` ("" or ending in a dot)."""
        self.part, self.prefix = part, prefix

    def fresh(self, n: int) -> Tensor:
        """n new wires."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Wires a[i] and b[i] stay or go together."""
        self.ties.append((a, b))

    def pin(self, wires: Tensor, node: fx.Node, reason: str, remedy: str = "") -> None:
        """The classes of these wires stay."""
        self.pins.append((wires, Pin.at(node, reason, remedy)))

    def step(self, step: Step) -> None:
        """Records a step; whatever shares a stored tensor with an earlier one ties its channels to that one's."""
        layer = step.layer
        if layer is not None:
            self._share(("name", layer.name), {0: step.out}, step.node)
            for key in TENSORS:
                tensor = layer.tensor(self.model, key)
                if tensor is not None:
                    self._share(id(tensor), _sides(step) if key == "weight" else {0: step.out}, step.node)
        self.graph.steps.append(step)

    def _share(self, key: Any, sides: dict[int, Tensor], node: fx.Node) -> None:
        known = self._owners.setdefault(key, {})
        for axis, wires in sides.items():
            first = known.setdefault(axis, wires)
            if len(first) == len(wires):
                self.tie(first, wires)
            else:
                self.pin(torch.cat([first, wires]), node, "a tensor is shared by layers that use it differently")

    def param(self, node: fx.Node, axis: int, path: str) -> Tensor:
        """The wires [n] of the elements of the part's stored tensor `path` along `axis`, the same at every use."""
        tensor = attribute(self.part, path)
        known, wires = self._params.setdefault(id(tensor), (axis, self.fresh(tensor.shape[axis])))
        if self.prefix + path not in self._param_paths:
            self._param_paths.add(self.prefix + path)
            self._share(id(tensor), {axis: wires}, node)
            self.graph.steps.append(Step("param", node, wires, path=self.prefix + path, axis=axis))
        if known != axis:
            other = self.fresh(tensor.shape[axis])
            self.pin(torch.cat([wires, other]), node, "a tensor is read along two of its axes")
            return other
        return wires

    def merged(self, node: fx.Node, wires: Tensor, axis: int) -> Tensor:
        """The wires [n] along `axis`; a fresh one, tied to all its channels, where an index holds several."""
        vector = along(wires, axis)
        if vector is not None:
            return vector
        rows = thin(wires.movedim(axis, 0)).flatten(1)
        pairs = (torch.arange(len(rows))[:, None] * self.count + rows).unique()
        index, source = pairs // self.count, pairs % self.count
        out = self.fresh(len(rows))
        self.tie(out[index], source)
        self.graph.steps.append(Step("merge", node, out[index], (source,)))
        return out.expand(wires.shape[axis]) if len(out) == 1 else out

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
        self._tainted += [distinct(t, self.count) for t in tensors]

    def opaque(self, node: fx.Node, args: Any, reason: str, remedy: str = "") -> Any:
        """What no rule knows: the channels it reads are pinned, and so are those it makes."""
        for wires in tensors_in(args):
            self.pin(distinct(wires, self.count), node, reason, remedy)
        return self.constant(node, reason, remedy)

    def constant(self, node: fx.Node, reason: str, remedy: str = "") -> Any:
        """Pinned wires in the shape of the node's own value (model inputs, constants, unknown results)."""

        def make(value: Any) -> Any:
            if isinstance(value, Tensor):
                wire = self.fresh(1)
                self.pin(wire, node, reason, remedy)
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
        for wires, pin in self.pins:
            graph.pin(wires, pin)
        return graph


def _sides(step: Step) -> dict[int, Tensor]:
    """The wires along each axis of the step's weight."""
    if step.kind != "conv" or step.layer is None:
        return {0: step.out}
    if step.layer.groups > 1:
        return {0: step.ins[0] if step.layer.transposed else step.out}
    return {0: step.ins[0], 1: step.out} if step.layer.transposed else {0: step.out, 1: step.ins[0]}


def _align(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Callable[[Tensor, torch.Size], Tensor]]:
    """Aligned wire vectors that cover the tensors' elements, and how to lay a result vector out as a tensor."""
    for axis in (1, -1):
        vectors = [along(t, axis) if t.dim() > 1 else None for t in tensors]
        if all(v is not None for v in vectors):
            return tuple(v for v in vectors if v is not None), partial(spread, axis=axis)
    small = torch.broadcast_tensors(*(thin(t) for t in tensors))
    columns = [t.flatten() for t in small]
    index = torch.zeros_like(columns[0])
    for column in columns:  # rows of wires become numbers, one column after the other: numbers are sorted quickly
        _, index = (index * (int(column.max()) + 1 if len(column) else 1) + column).unique(return_inverse=True)
    first = torch.full((int(index.max()) + 1 if len(index) else 0,), len(index))
    first = first.scatter_reduce(0, index, torch.arange(len(index)), "amin")
    rows = tuple(column[first] for column in columns)
    return rows, lambda out, shape: compress(out[index].reshape(small[0].shape).expand(shape))


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
