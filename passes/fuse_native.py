"""Afterwards whatever the native kernels can run of a lowered graph is in NativeChains, one node each.

conv1 -> relu -> conv2 -> add -> attention -> fc          ->          native -> attention -> native_1

A chain has at least one convolution, is connected, and no path leaves it and comes back: it can run at once.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import replace

from torch import fx, nn
from torch.fx.passes.tools_common import stable_topological_sort

from dspfx.graph.aliases import overwrites
from dspfx.graph.to_chain import is_supported
from dspfx.graph.traced import Model, TracedModule, network_meta, parts_of
from dspfx.native import NativeChain
from dspfx.passes.simplify_moves import simplify_moves
from dspfx.plans import LowerPlan

NAME = "native"


def fuse_native(model: Model) -> Model:
    """Rewrites the parts of a lowered network in place, and its plan; every node has its value (`propagate`)."""
    for part in parts_of(model).values():
        simplify_moves(part)
        for members in _segments(part):
            _fuse(part, members)
        stable_topological_sort(part)
        part.graph.lint()
        part.recompile()
    _tell(model)
    return model


def _tell(model: nn.Module) -> None:
    """Has the network's LowerPlan say which layers are in chains, and what they compute there."""
    shares: dict[str, float] = {}
    for name, chain in model.named_modules():
        if isinstance(chain, NativeChain):
            prefix = name.rpartition(".")[0]
            shares |= {f"{prefix}.{inner}".lstrip("."): share for inner, share in chain.computed().items()}
    plan: LowerPlan = network_meta(model)["lower_plan"]
    network_meta(model)["lower_plan"] = LowerPlan(
        tuple(
            replace(layer, form="native", ms=None, macs_run=round(layer.macs_run * shares[layer.name]))
            if layer.name in shares
            else layer
            for layer in plan.layers
        )
    )


def _segments(part: TracedModule) -> list[list[fx.Node]]:
    """Nodes for each chain, in the graph's order.

    A node's level is how often a path to it has gone from supported nodes to others and back: nodes of one level have
    no others between them.
    """
    level: dict[fx.Node, int] = {}
    supported: set[fx.Node] = set()
    chain: dict[fx.Node, fx.Node] = {}  # a node -> another of its chain, the chain's first at last
    batched: set[fx.Node] = set()  # what is made of images; what is made of weights alone has no batch
    for node in part.graph.nodes:
        if node.op == "placeholder" or not batched.isdisjoint(node.all_input_nodes):
            batched.add(node)
        can_run = batched.issuperset((node, *node.all_input_nodes)) and is_supported(part, node)
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
    for node in members:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    found = [copies[node] for node in outputs]
    graph.output(found[0] if len(found) == 1 else tuple(found))
    names = itertools.chain([NAME], (f"{NAME}_{i}" for i in itertools.count(1)))
    name = next(name for name in names if not hasattr(part, name))
    part.add_module(name, NativeChain(fx.GraphModule(part, graph)).eval())
    with part.graph.inserting_after(members[-1]):
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
