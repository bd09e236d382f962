"""`TracedModule`: a model as a graph over its own parts, and the views of it that others need."""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any

from torch import fx, nn

# Weak references to every traced network in use: an optimizer's step must reach the masks of those it trains
# (passes/apply_masks.py), copies included.
traced_modules: weakref.WeakSet[TracedModule] = weakref.WeakSet()


class TrainingFlag(nn.Module):
    """Its output is the Python bool `training` (or `not training`), so that functional calls follow the mode."""

    def __init__(self, inverted: bool = False) -> None:
        super().__init__()
        self.inverted = inverted

    def forward(self) -> bool:
        return self.training != self.inverted


class TracedModule(fx.GraphModule):
    """A GraphModule over all of a model's own modules, attributes and methods.

    `meta` holds "inputs" (the example inputs' shapes), "user_class", and, only where the two modes differ in
    structure, "graphs": {"train": Graph, "eval": Graph}; `graph` is then always the current mode's.
    """

    @classmethod
    def over(cls, root: nn.Module, graph: fx.Graph, meta: dict[str, Any]) -> TracedModule:
        """A module that runs `graph` on everything `root` owns (shared, not copied)."""
        gm = cls(nn.Module(), fx.Graph())
        reserved = set(gm.__dict__) - set(nn.Module().__dict__)
        gm.__dict__.update({key: value for key, value in root.__dict__.items() if key not in reserved})
        gm.meta = meta
        gm.graph = graph
        traced_modules.add(gm)
        return gm

    def train(self, mode: bool = True) -> TracedModule:
        super().train(mode)
        graphs = self.meta.get("graphs")
        if graphs:
            self.graph = graphs["train" if mode else "eval"]
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            owner = self.__dict__.get("meta", {}).get("user_class")
            if owner is None or not hasattr(owner, name):
                raise
            found = inspect.getattr_static(owner, name)
            return found.__get__(self, owner) if hasattr(found, "__get__") else found

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        # fx's own copy would drop what the graph does not mention and make every buffer persistent.
        new = type(self)(nn.Module(), fx.Graph())
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new.graph = new.__dict__["_graph"]
        traced_modules.add(new)
        return new


def eval_graph(gm: TracedModule) -> fx.Graph:
    """The graph that runs in eval mode, whatever mode the module is in."""
    return gm.meta["graphs"]["eval"] if "graphs" in gm.meta else gm.graph


def all_graphs(gm: TracedModule) -> list[fx.Graph]:
    """Both modes' graphs where they differ, else the one."""
    return list(gm.meta["graphs"].values()) if "graphs" in gm.meta else [gm.graph]


def eval_only(gm: TracedModule) -> TracedModule:
    """The same network in eval mode over the parts that mode uses, in plain containers: no class of the user's."""
    gm.eval()
    lean = TracedModule(gm, gm.graph)
    for node in gm.graph.nodes:  # torch 2.11's copy makes every buffer persistent
        path, _, name = str(node.target).rpartition(".") if node.op == "get_attr" else ("", "", "")
        if name in gm.get_submodule(path)._non_persistent_buffers_set:
            lean.get_submodule(path)._non_persistent_buffers_set.add(name)
    lean.meta = {"inputs": gm.meta["inputs"]}
    traced_modules.add(lean)
    return lean
