"""`TracedModule`: a model as a graph over its own parts, and the views of it that others need."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

from torch import fx, nn

from dspfx.errors import TraceError

# Weak references to every traced network in use: an optimizer's step must reach the masks of those it trains
# (passes/apply_masks.py), copies included.
traced_modules: weakref.WeakSet[TracedModule] = weakref.WeakSet()

_NETWORK_META = "_dspfx_meta"
# A TracedModule, or the user's own class with TracedModules in it: a type that no annotation can name.
Network: TypeAlias = Any


Model = TypeVar("Model", bound=nn.Module)  # traced whole or in parts: a pass returns what it was given


class TrainingFlag(nn.Module):
    """Its output is the Python bool `training` (or `not training`), so that functional calls follow the mode."""

    def __init__(self, inverted: bool = False) -> None:
        super().__init__()
        self.inverted = inverted

    def forward(self) -> bool:
        return self.training != self.inverted


class TracedModule(fx.GraphModule):
    """A GraphModule over all of a model's own modules and attributes, and an instance of its class as well.

        gm = TracedModule.over(model, graph, meta)      isinstance(gm, type(model)), gm.forward runs `graph`

    `meta` holds "inputs" (the example inputs' shapes), "user_class", and, only where the two modes differ in
    structure, "graphs": {"train": Graph, "eval": Graph}; `graph` is then always the current mode's.
    """

    _user_class: ClassVar[type[nn.Module] | None] = None
    _run_graph: ClassVar[Callable[..., Any]]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Whatever the user's class and instance have; nn.Module's own type would be Tensor | Module."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Nothing happens: a class that keeps a register of its subclasses shall not hear of ours."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A call of a traced network's class (as slices of nn.Sequential do) makes an object of the user's own."""
        if cls._user_class is not None:
            return cls._user_class(*args, **kwargs)
        return super().__new__(cls, *args, **kwargs)

    @classmethod
    def over(cls, root: nn.Module, graph: fx.Graph, meta: dict[str, Any]) -> TracedModule:
        """A module that runs `graph` on everything `root` owns (shared, not copied).

        Raises TraceError where no class can be made that is the root's and ours.
        """
        gm = _blank(type(root))
        reserved = set(gm.__dict__) - set(nn.Module().__dict__)
        gm.__dict__.update({key: value for key, value in root.__dict__.items() if key not in reserved})
        gm.meta = meta
        gm.graph = graph
        traced_modules.add(gm)
        return gm

    def recompile(self) -> Any:
        code = super().recompile()
        kind = type(self)
        kind._run_graph = kind.forward

        # Whoever keeps `forward` (Accelerate's mixed precision wraps it) keeps one that runs the mode's graph.
        @functools.wraps(kind.forward)
        def forward(self: TracedModule, *args: Any, **kwargs: Any) -> Any:
            return type(self)._run_graph(self, *args, **kwargs)

        kind.forward = forward
        return code

    def train(self, mode: bool = True, *rest: Any, **named: Any) -> TracedModule:
        super().train(mode, *rest, **named)  # the user's own, where the class has one
        graphs = self.meta.get("graphs")
        if graphs:
            self.graph = graphs["train" if mode else "eval"]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        # fx's own copy would drop what the graph does not mention and make every buffer persistent.
        new = _blank(self._user_class or nn.Module)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new.graph = new.__dict__["_graph"]
        traced_modules.add(new)
        return new

    def __copy__(self) -> TracedModule:
        new = _blank(self._user_class or nn.Module)
        registries = {key: self.__dict__[key].copy() for key in ("_parameters", "_buffers", "_modules", "meta")}
        new.__dict__.update({**self.__dict__, **registries})
        new.graph = self.graph
        traced_modules.add(new)
        return new

    def _replicate_for_data_parallel(self) -> TracedModule:
        replica = copy.copy(self)
        traced_modules.discard(replica)  # its parameters are plain tensors, and nobody steps them
        replica.__dict__.update({"_parameters": {}, "_is_replica": True})
        return replica


def _blank(owner: type[nn.Module]) -> TracedModule:
    """An empty TracedModule of a class of its own (fx writes `forward` into the class) below `owner`."""
    donor = TracedModule(nn.Module(), fx.Graph())
    if owner is nn.Module or issubclass(owner, fx.GraphModule):  # whose graph would be in the way of ours
        return donor
    namespace = {"_user_class": owner, "__module__": owner.__module__, "__doc__": owner.__doc__}
    try:
        kind = types.new_class(owner.__name__, (TracedModule, owner), exec_body=lambda body: body.update(namespace))
        gm: TracedModule = object.__new__(kind)
    except Exception as error:  # a metaclass may do anything
        raise TraceError(
            f"{owner.__name__} cannot be traced: no class below it can be made ({type(error).__name__}: {error}). "
            f"Wrap the model in a plain nn.Module that calls it."
        ) from error
    gm.__dict__.update(donor.__dict__)
    return gm


def parts_of(model: nn.Module) -> dict[str, TracedModule]:
    """The outermost TracedModules in `model` by qualified name, each once; {"": model} where it is one itself."""
    found: dict[str, TracedModule] = {}
    _find_parts(model, "", found, set())
    return found


def _find_parts(module: nn.Module, name: str, found: dict[str, TracedModule], seen: set[nn.Module]) -> None:
    if module in seen:
        return
    seen.add(module)
    if isinstance(module, TracedModule):
        found[name] = module
        return
    for child_name, child in module.named_children():
        _find_parts(child, f"{name}.{child_name}" if name else child_name, found, seen)


def network_meta(model: nn.Module) -> dict[str, Any]:
    """What dspfx knows of a network as a whole ("inputs", "user_class", "gate_plan", ...); to be read and written.

    `model.meta` of a network traced whole; one private attribute of a model whose parts are traced; else empty.
    """
    if isinstance(model, TracedModule):
        return model.meta
    meta: dict[str, Any] = model.__dict__.get(_NETWORK_META, {})
    return meta


def set_network_meta(model: nn.Module, meta: dict[str, Any]) -> None:
    """Makes `meta` what `network_meta(model)` returns, for a model whose parts are traced."""
    model.__dict__[_NETWORK_META] = meta


def is_traced_in_parts(model: nn.Module) -> bool:
    """True for what `trace_parts` made of a model that does not trace whole, and for copies of it."""
    return not isinstance(model, TracedModule) and _NETWORK_META in model.__dict__


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
    traced_modules.discard(gm)  # it shares layers with the lean one, which will be rewritten
    traced_modules.add(lean)
    return lean


def settle_eval(network: Network) -> Network:
    """The network in eval mode for good: traced whole, see `eval_only`; else each part with its eval graph alone."""
    if isinstance(network, TracedModule):
        return eval_only(network)
    network.eval()
    for part in parts_of(network).values():
        part.meta.pop("graphs", None)
    return network
