"""Would the graph still mean the same with its channels in another order? Found out by running its data movement.

An order is one tensor, `stands` (int64 [wires]): the class that stands where the class of a wire stood. It applies to
every tensor alike, so whatever is added up stays aligned, and each tensor's new order follows from its classes:

    classes 3 4 5 6, and 4 stands where 3 stood, 3 where 4 stood:      [3 4 5 6] -> [4 3 5 6]      [6 4 3] -> [6 3 4]

What has to be found out is whether movements carry it: whether a movement of the reordered tensors is the movement of
the tensors, reordered. It is run on tensors in which every element has a number of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from dspfx.graph.channels import ChannelGraph, Step, tensors_in
from dspfx.graph.layers import attribute
from dspfx.graph.moves import Call, is_index, is_move, run_move
from dspfx.graph.simulate import Outcome
from dspfx.graph.wires import along, thin

MISPLACED = "the channels here would not stand in the order in which they are read"
_ERRORS = (RuntimeError, TypeError, ValueError, IndexError)


def reordered(wires: Tensor, root: Tensor, stands: Tensor) -> Tensor | None:
    """int64 [n]: which of the wires [n] each place holds in the new order; None where these classes do not keep among
    themselves. Wires of one class stay in their order."""
    have, wanted = root[wires], stands[wires]
    if torch.equal(have, wanted):
        return torch.arange(len(wires))
    source, place = have.argsort(stable=True), wanted.argsort(stable=True)
    if not torch.equal(have[source], wanted[place]):
        return None
    return torch.empty_like(source).scatter_(0, place, source)


def check_order(
    gm: nn.Module, channels: ChannelGraph, graph: fx.Graph, removed: Tensor, outcome: Outcome, stands: Tensor
) -> list[tuple[fx.Node, str]]:
    """What would no longer mean the same, and why; `outcome` is what `simulate` found for the removal.

    Selections of channels by number among its repairs are rewritten for the new order: that costs nothing.
    """
    return _Check(gm, channels, removed, outcome, stands).run(graph)


class _Check:
    def __init__(
        self, gm: nn.Module, channels: ChannelGraph, removed: Tensor, outcome: Outcome, stands: Tensor
    ) -> None:
        self.gm, self.channels, self.removed, self.outcome, self.stands = gm, channels, removed, outcome, stands
        self.moving = stands != channels.root
        self.held = self.moving & channels.pinned()
        self.steps: dict[fx.Node, list[Step]] = {}
        for step in channels.steps:
            self.steps.setdefault(step.node, []).append(step)
        # What a chain of movements makes before its channels stand on one axis again: elements by number, without
        # and with the new order.
        self.loose: dict[fx.Node, tuple[Any, Any]] = {}
        self.numbered = 0

    def run(self, graph: fx.Graph) -> list[tuple[fx.Node, str]]:
        broken = []
        for node in graph.nodes:
            sources = [n for n in node.all_input_nodes if tensors_in(self.outcome.values[n])]
            if node in self.outcome.skipped or not any(map(self.is_touched, (node, *sources))):
                continue
            if node.op == "output":
                fine = not any(n in self.loose or self.is_held(n) for n in sources)
            elif not tensors_in(self.outcome.values[node]):
                continue
            else:
                fine = self.moves(node) if is_move(self.gm, node) else self.computes(node, sources)
            if not fine or self.is_held(node):
                broken.append((node, MISPLACED))
        return broken

    def is_touched(self, node: fx.Node) -> bool:
        """Whether some of the node's channels change their places."""
        return node in self.loose or any(map(self.is_moving, tensors_in(self.outcome.values.get(node))))

    def is_moving(self, wires: Tensor) -> bool:
        return bool(self.moving[thin(wires)].any())

    def is_held(self, node: fx.Node) -> bool:
        """Whether some of its channels are pinned and would move all the same."""
        wires = tensors_in(self.outcome.values.get(node))
        return bool(self.held.any()) and any(bool(self.held[thin(w)].any()) for w in wires)

    def order(self, wires: Tensor) -> tuple[int, Tensor] | None:
        """The axis of a tensor's channels and its new order; None where no one axis holds them."""
        if not self.is_moving(wires):
            return 0, torch.arange(wires.shape[0] if wires.dim() else 0)
        for axis in (*range(1, wires.dim()), 0):
            vector = along(wires, axis)
            if vector is not None:
                index = reordered(vector, self.channels.root, self.stands)
                return None if index is None else (axis, index)
        return None

    def moves(self, node: fx.Node) -> bool:
        """Runs a movement by number; False where it breaks for good."""
        call = self.outcome.repairs.get(node)
        if call is None and node.op != "call_module":
            call = self.stored_selection(node)
        if call is not None and call[0] is torch.index_select:
            return self.selects(node, call)
        inputs = [n for n in self.sources(node, call) if tensors_in(self.outcome.values[n])]
        axis = self.joined_axis(node, inputs)
        numbers = {n: self.numbers(n, axis) for n in inputs}
        if any(pair is None for pair in numbers.values()):
            return False
        pair = []
        for side in (0, 1):
            given = {n: pair[side] for n, pair in numbers.items() if pair is not None}
            try:
                pair.append(run_move(self.gm, node, self.reader(given), call))
            except _ERRORS:
                return False
        old, new = (value if isinstance(value, Tensor) else tuple(value) for value in pair)
        if not self.agree(self.outcome.values[node], old, new):
            self.loose[node] = old, new
        return True

    def reader(self, given: dict[fx.Node, Any]) -> Callable[[fx.Node], Any]:
        return lambda n: given[n] if n in given else self.outcome.values[n]

    def sources(self, node: fx.Node, call: Call | None) -> list[fx.Node]:
        found: dict[fx.Node, None] = {}
        fx.map_arg(call[1:] if call else (node.args, node.kwargs), lambda n: found.setdefault(n))
        return [n for n in found if not is_index(self.gm, n)]

    def joined_axis(self, node: fx.Node, inputs: list[fx.Node]) -> int | None:
        """The axis of a concatenation of channels: it may be run on one position."""
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        values = [self.outcome.values[n] for n in (node, *inputs)]
        if node.target not in (torch.cat, torch.concat) or not isinstance(dim, int):
            return None
        if any(n in self.loose for n in inputs) or any(along(v, dim) is None for v in values):
            return None
        return dim % values[0].dim()

    def numbers(self, node: fx.Node, axis: int | None) -> tuple[Any, Any] | None:
        """The node's value with a number for each element, or each index on `axis`, in the old and the new order."""
        if node in self.loose:
            return self.loose[node]
        value = self.outcome.values[node]
        if isinstance(value, Tensor):
            return self.number(value, axis)
        pairs = [self.number(v, axis) if isinstance(v, Tensor) else None for v in value]
        if any(pair is None for pair in pairs):
            return None
        return tuple(p[0] for p in pairs if p), tuple(p[1] for p in pairs if p)

    def number(self, wires: Tensor, axis: int | None) -> tuple[Tensor, Tensor] | None:
        order = self.order(wires)
        if order is None:
            return None
        shape = torch.Size(s if axis in (None, a) else 1 for a, s in enumerate(wires.shape))
        old = torch.arange(self.numbered, self.numbered + shape.numel()).reshape(shape)
        self.numbered += shape.numel()
        return old, old if not self.is_moving(wires) else old.index_select(*order)

    def agree(self, value: Any, old: Any, new: Any) -> bool:
        """Whether `new` is `old` in the new order of `value`."""
        if not isinstance(value, Tensor):
            return all(self.agree(*three) for three in zip(value, old, new, strict=True))
        order = self.order(value)
        if order is None or old.shape != new.shape:
            return False
        return torch.equal(old.index_select(*order) if self.is_moving(value) else old, new)

    def stored_selection(self, node: fx.Node) -> Call | None:
        """An index_select along one axis by numbers that the network stores."""
        if node.target not in (torch.index_select, "index_select") or len(node.args) != 3:
            return None
        index = node.args[2]
        if not (isinstance(index, fx.Node) and is_index(self.gm, index)):
            return None
        return torch.index_select, (*node.args[:2], attribute(self.gm, str(index.target)).cpu()), {}

    def selects(self, node: fx.Node, call: Call) -> bool:
        """Rewrites the numbers of a selection for the new order."""
        source, axis, index = call[1]
        before, after = self.outcome.values[source], self.outcome.values[node]
        if source in self.loose or not isinstance(axis, int):
            return False
        orders = []
        for value in (before, after):
            vector = along(value, axis)
            order = None if vector is None else reordered(vector, self.channels.root, self.stands)
            if order is None:
                return False
            orders.append(order)
        place = orders[0].argsort()[index.cpu()[orders[1]]]
        if not torch.equal(place, index.cpu()):
            self.outcome.repairs[node] = torch.index_select, (source, axis, place), {}
        return True

    def computes(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        """Whether an operation finds its channels where it looks for them."""
        if any(n in self.loose for n in sources):
            return False
        value = self.outcome.values[node]
        if not isinstance(value, Tensor) or self.order(value) is None:
            return False
        steps = self.steps.get(node, [])
        if not steps and node.op != "get_attr":  # it changes nothing: an operation that no rule knows is pinned
            return any(self.channels.values[n] is self.channels.values[node] for n in sources)
        return all(self.carries(step, sources) for step in steps)

    def carries(self, step: Step, sources: list[fx.Node]) -> bool:
        left = [v[~self.removed[v]] for v in (step.out, *step.ins)]
        if not any(map(self.is_moving, left)):
            return True
        orders = [reordered(v, self.channels.root, self.stands) for v in left]
        if any(o is None for o in orders) or step.kind == "merge":
            return False
        layer = step.layer
        if step.kind == "conv":
            return layer is not None and layer.groups == 1 and self.order(self.outcome.values[sources[0]]) is not None
        out = orders[0]
        assert out is not None
        # Each operand has to stand in the output's order, not in one of its own.
        if any(not torch.equal(v[o], v[out]) for v, o in zip(left[1:], orders[1:], strict=True) if o is not None):
            return False
        if step.kind == "coupled" and layer is not None and layer.groups > 1:
            counts_anew = step.node.op == "call_module" and len(out) < len(step.out)  # a SparseNorm: any order
            blocks = step.blocks()[~self.removed[step.out]]
            return counts_anew or torch.equal(blocks[out], blocks)
        if step.kind == "depthwise":  # filter o reads channel o // multiplier
            order = self.order(self.outcome.values[sources[0]])
            vector = along(self.outcome.values[sources[0]], 1)
            if order is None or vector is None or len(out) % len(vector):
                return False
            arriving = vector[order[1]] if self.is_moving(vector) else vector
            return torch.equal(arriving.repeat_interleave(len(out) // len(vector)), left[1][out])
        return True
