"""Afterwards whatever the native kernels can run of a lowered graph is in NativeChains, one node each.

conv1 -> relu -> conv2 -> add -> attention -> fc          ->          native -> attention -> native_1

A chain has at least one convolution, is connected, and no path leaves it and comes back: it can run at once.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.tools_common import stable_topological_sort

from dspfx.graph.aliases import overwrites
from dspfx.graph.to_chain import floats, is_supported
from dspfx.graph.traced import Model, TracedModule, parts_of
from dspfx.kernels.library import library
from dspfx.kernels.tiles import conv_tiles
from dspfx.native import NativeChain

NAME = "native"


def fuse_native(model: Model) -> Model:
    """Rewrites the parts of a lowered network in place; every node has its value (`propagate`)."""
    for part in parts_of(model).values():
        _flatten_views(part)
        for members in _segments(part):
            _fuse(part, members)
        stable_topological_sort(part)
        part.graph.lint()
        part.recompile()
    return model


def pairs_run(model: nn.Module) -> dict[str, int]:
    """By name, for each convolution in a NativeChain: the (filter, input channel) pairs that are computed."""
    found = {}
    for name, chain in model.named_modules():
        if isinstance(chain, NativeChain):
            for inner, layer in chain.plain.named_modules():
                if isinstance(layer, nn.Conv2d):
                    path = f"{name.rpartition('.')[0]}.{inner}" if "." in name else inner
                    tiles = conv_tiles(floats(layer.weight), layer.groups, library().max_filters)
                    found[path] = sum(len(t.filters) * len(t.channels) for t in tiles)
    return found


def _segments(part: TracedModule) -> list[list[fx.Node]]:
    """Nodes for each chain, in the graph's order.

    A node's level is how often a path to it has gone from supported nodes to others and back: nodes of one level have
    no others between them.
    """
    level: dict[fx.Node, int] = {}
    supported: set[fx.Node] = set()
    chain: dict[fx.Node, fx.Node] = {}  # a node -> another of its chain, the chain's first at last
    for node in part.graph.nodes:
        can_run = is_supported(part, node)
        level[node] = max((level[n] + (can_run and n not in supported) for n in node.all_input_nodes), default=0)
        if can_run:
            supported.add(node)
            chain[node] = node
            for source in node.all_input_nodes:
                if source in supported and level[source] == level[node]:
                    chain[_first(chain, source)] = _first(chain, node)
    segments: dict[fx.Node, list[fx.Node]] = {}
    for node in chain:
        segments.setdefault(_first(chain, node), []).append(node)
    return [members for members in segments.values() if _is_worth(part, members)]


def _first(chain: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    while chain[node] is not node:
        node = chain[node]
    return node


def _is_worth(part: nn.Module, members: list[fx.Node]) -> bool:
    """True where there is a convolution among them, and nothing between them changes in place what they may read."""
    inside, nodes = set(members), list(members[0].graph.nodes)
    between = nodes[nodes.index(members[0]) : nodes.index(members[-1])]
    if any(overwrites(part, node) for node in between if node not in inside):
        return False
    return any(n.op == "call_module" and isinstance(part.get_submodule(str(n.target)), nn.Conv2d) for n in members)


def _fuse(part: TracedModule, members: list[fx.Node]) -> None:
    inside = set(members)
    inputs = list(dict.fromkeys(n for node in members for n in node.all_input_nodes if n not in inside))
    outputs = [node for node in members if not inside.issuperset(node.users)]
    graph = fx.Graph()
    copies = {source: graph.placeholder(f"x{i}") for i, source in enumerate(inputs)}
    for source, copy in list(copies.items()):
        copy.meta["val"] = source.meta["val"]
    for node in members:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    found = [copies[node] for node in outputs]
    graph.output(found[0] if len(found) == 1 else tuple(found))
    name = NAME
    while hasattr(part, name):
        name = f"{NAME}_{int(name.rpartition('_')[2]) + 1}" if "_" in name else f"{NAME}_1"
    part.add_module(name, NativeChain(fx.GraphModule(part, graph)).eval())
    with part.graph.inserting_after(max(members, key=list(part.graph.nodes).index)):
        call = part.graph.call_module(name, tuple(inputs))
    _replace(part.graph, call, outputs)
    for node in reversed(members):
        part.graph.erase_node(node)
    part.delete_all_unused_submodules()


def _replace(graph: fx.Graph, call: fx.Node, outputs: list[fx.Node]) -> None:
    """The outputs' users read the call instead, or its items."""
    values = tuple(node.meta["val"] for node in outputs)
    call.meta["val"] = values[0] if len(outputs) == 1 else values
    for index, node in enumerate(outputs):
        new = call
        if len(outputs) > 1:
            with graph.inserting_after(call):
                new = graph.call_function(operator.getitem, (call, index))
            new.meta["val"] = values[index]
        node.replace_all_uses_with(new)


def _flatten_views(part: TracedModule) -> None:
    """x.view(x.size(0), -1) becomes torch.flatten(x, 1): a size is no tensor, and would stand outside of any chain."""
    for node in list(part.graph.nodes):
        if node.target not in ("view", "reshape", torch.reshape) or len(node.args) != 3:
            continue
        source, batch, rest = node.args
        before, after = source.meta.get("val"), node.meta.get("val")
        if not isinstance(before, Tensor) or not isinstance(rest, int) or before.dim() != 4:
            continue
        if tuple(after.shape) != (before.shape[0], before[0].numel()) or not (
            _is_first_size(batch, source) or (batch == -1 and rest > 0)
        ):
            continue
        with part.graph.inserting_before(node):
            flat = part.graph.call_function(torch.flatten, (source, 1))
        flat.meta["val"] = after
        node.replace_all_uses_with(flat)
        sizes = (batch, batch.args[0]) if isinstance(batch, fx.Node) else ()
        for unused in (node, *sizes):  # not what changes something in place: that has no users, either
            if not unused.users and unused is not source:
                part.graph.erase_node(unused)


def _is_first_size(batch: object, source: fx.Node) -> bool:
    """True for x.size(0) and x.shape[0]."""
    if not isinstance(batch, fx.Node):
        return False
    if batch.target == "size":
        return batch.args == (source, 0)
    shape = batch.args[0] if batch.target is operator.getitem and batch.args[1:] == (0,) else None
    return isinstance(shape, fx.Node) and (
        (shape.target is getattr and shape.args == (source, "shape"))
        or (shape.target == "size" and shape.args == (source,))
    )
