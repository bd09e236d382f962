"""From a traced module to its ChannelGraph: walk the graph, apply the rules, pin what literal sizes hold."""

from __future__ import annotations

from dspfx.graph.channels import Builder, ChannelGraph
from dspfx.graph.rules import apply_rule
from dspfx.graph.simulate import pin_what_breaks
from dspfx.graph.traced import TracedModule, all_graphs


def analyse(gm: TracedModule) -> ChannelGraph:
    """The ChannelGraph of a traced module; of the union of its train and eval graphs where they differ."""
    builder = Builder(gm)
    graphs = all_graphs(gm)
    for graph in graphs:
        for node in graph.nodes:
            builder.graph.values[node] = apply_rule(builder, node)
    channels = builder.finish()
    for graph in graphs:
        pin_what_breaks(gm, channels, graph)
    return channels
