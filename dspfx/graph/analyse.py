"""From a model to its ChannelGraph: walk its graphs, apply the rules, pin what literal sizes hold."""

from __future__ import annotations

from torch import nn

from dspfx.graph.builder import Builder
from dspfx.graph.channels import ChannelGraph
from dspfx.graph.rules import apply_rule
from dspfx.graph.simulate import pin_what_breaks
from dspfx.graph.traced import all_graphs, parts_of


def analyse(model: nn.Module) -> ChannelGraph:
    """The ChannelGraph of everything traced in `model`, layers named from it.

    Of the union of the train and eval graphs where they differ.
    """
    builder = Builder(model)
    graphs = [(name, part, graph) for name, part in parts_of(model).items() for graph in all_graphs(part)]
    for name, part, graph in graphs:
        builder.enter(part, f"{name}." if name else "")
        for node in graph.nodes:
            builder.graph.values[node] = apply_rule(builder, node)
    channels = builder.finish()
    for _, part, graph in graphs:
        pin_what_breaks(part, channels, graph)
    return channels
