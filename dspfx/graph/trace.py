"""From a user's model to one `TracedModule` that accepts what the model accepts and follows train() and eval()."""

from __future__ import annotations

import copy
import inspect
import traceback
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.errors import DspfxError, InputError, TraceError
from dspfx.graph.modes import evaluating
from dspfx.graph.tracer import ShapeTracer, attribute

# What fake tensors raise where the model needs the values of a real one.
_DATA_DEPENDENT = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
_REMEDY = "Make that line independent of tensor values, or wrap the function with torch.fx.wrap."
_GUESSED_SIZES = (224, 32, 64, 28, 128, 299, 256, 512)


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
            found = inspect.getattr_static(owner, name, None) if owner else None
            if found is None or not hasattr(found, "__get__"):
                raise
            return found.__get__(self, owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        # fx's own copy would drop what the graph does not mention and make every buffer persistent.
        new = type(self)(nn.Module(), fx.Graph())
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        new.graph = new.__dict__["_graph"]
        traced_modules.add(new)
        return new


def trace(model: nn.Module, example_inputs: Any = None) -> TracedModule:
    """Returns a traced deep copy of `model`; a TracedModule is only copied. `model` is left as it was.

    Raises InputError where the model does not run on the example inputs (or none were given and none could be
    guessed) and TraceError where its control flow depends on tensor data.
    """
    root = copy.deepcopy(model)
    if isinstance(root, TracedModule):
        if example_inputs is not None:
            root.meta["inputs"] = describe_inputs(root, example_inputs)
        return root
    inputs = describe_inputs(root, example_inputs) if example_inputs is not None else guess_inputs(root)
    training = root.training
    modes = {mode: _trace_mode(root, inputs, mode == "train") for mode in ("train", "eval")}
    root.train(training)
    for mod, state in zip(root.modules(), [m.training for m in model.modules()], strict=True):
        mod.training = state
    _own_constants(root, modes.values())
    meta: dict[str, Any] = {"inputs": inputs, "user_class": type(model)}
    merged = _merge(root, modes["train"], modes["eval"])
    if merged is None:
        meta["graphs"] = modes
        merged = modes["train" if training else "eval"]
    return TracedModule.over(root, merged, meta)


def eval_graph(gm: TracedModule) -> fx.Graph:
    """The graph that runs in eval mode, whatever mode the module is in."""
    return gm.meta["graphs"]["eval"] if "graphs" in gm.meta else gm.graph


def all_graphs(gm: TracedModule) -> list[fx.Graph]:
    """Both modes' graphs where they differ, else the one."""
    return list(gm.meta["graphs"].values()) if "graphs" in gm.meta else [gm.graph]


def describe_inputs(model: nn.Module, example_inputs: Any) -> Inputs:
    """Example inputs as meta tensors, after checking that the model runs on them (on fake tensors, so at no cost)."""
    inputs = Inputs.of(example_inputs)
    device = next((p.device for p in model.parameters()), None)
    for leaf in pytree.tree_leaves((inputs.args, inputs.kwargs)):
        if isinstance(leaf, Tensor) and device is not None and leaf.device not in (device, torch.device("meta")):
            raise InputError(
                f"the example input {tuple(leaf.shape)} is on {leaf.device}, the model on {device}; move one of them "
                f"with .to(...)."
            )
    to_meta = lambda x: x.to("meta") if isinstance(x, Tensor) else x  # noqa: E731
    described = Inputs(*pytree.tree_map(to_meta, inputs.args), **pytree.tree_map(to_meta, inputs.kwargs))
    try:
        _dry_run(model, described)
    except _DATA_DEPENDENT:
        pass  # tracing names the line; a network that is traced already runs
    except Exception as error:
        shapes = [tuple(x.shape) for x in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor)]
        raise InputError(
            f"{type(model).__name__} does not run on example inputs of shape {shapes}: {_last_line(error)}. Give "
            f"example_inputs that the model accepts."
        ) from error
    return described


def _dry_run(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output on fake tensors, in eval mode: no arithmetic, and buffers, modes and RNG are left alone."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = materialise(model, inputs, mode)
    with evaluating([model]), mode, torch.no_grad():
        return model(*args, **kwargs)


def materialise(model: nn.Module, inputs: Inputs, mode: FakeTensorMode | None = None) -> tuple[Any, Any]:
    """(args, kwargs) of the described inputs on the model's device: fake in `mode`, else random (integers zero)."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def make(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if mode is not None:
            with mode:
                return torch.empty(x.shape, dtype=x.dtype, device=device)
        generator = torch.Generator().manual_seed(x.numel())
        if x.is_floating_point():
            return torch.randn(x.shape, generator=generator, dtype=torch.float32).to(device, x.dtype)
        return torch.zeros(x.shape, dtype=x.dtype, device=device)

    return pytree.tree_map(make, inputs.args), pytree.tree_map(make, inputs.kwargs)


def propagate(gm: TracedModule, inputs: Inputs) -> None:
    """Gives every node the value (`meta["val"]`, fake) it has on the described inputs, and remembers these."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = materialise(gm, inputs, mode)
    flat = list(inspect.signature(gm.forward).bind(*args, **kwargs).arguments.values())
    for graph in all_graphs(gm):
        _Values(gm, graph=graph).run_on(mode, flat)
    gm.meta["inputs"] = inputs


class _Values(fx.Interpreter):
    def run_on(self, mode: FakeTensorMode, args: list[Any]) -> None:
        buffers = [(value, value.clone()) for value in self.module.buffers()]
        with mode, torch.no_grad():
            self.run(*args)
        for buffer, value in buffers:
            buffer.copy_(value)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value


def eval_only(gm: TracedModule) -> TracedModule:
    """The same network in eval mode over the parts that mode uses, in plain containers: no class of the user's."""
    gm.eval()
    lean = TracedModule(gm, gm.graph)
    lean.meta = {"inputs": gm.meta["inputs"]}
    traced_modules.add(lean)
    return lean


def guess_inputs(model: nn.Module) -> Inputs:
    """A batch of two images that the model accepts, from its first layer's width; InputError where none is found."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    if isinstance(first, nn.Linear):
        candidates = [(2, first.in_features)]
    else:
        candidates = [(2, first.in_channels, size, size) for size in _GUESSED_SIZES] if first is not None else []
    dtype = first.weight.dtype if first is not None else torch.float32
    for shape in candidates:
        described = Inputs(torch.empty(shape, dtype=dtype, device="meta"))
        try:
            _dry_run(model, described)
        except _DATA_DEPENDENT:
            return described
        except Exception:
            continue  # not this size; the last resort below says what to do
        return described
    raise InputError(
        f"no example inputs were given, and {type(model).__name__} accepts none of the shapes {candidates} that its "
        f"first layer suggests. Call again with example_inputs=torch.randn(...) of a shape the model accepts."
    )


def _trace_mode(root: nn.Module, inputs: Inputs, training: bool) -> fx.Graph:
    root.train(training)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = materialise(root, inputs, mode)
    bound = inspect.signature(root.forward).bind(*args, **kwargs)
    tracer = ShapeTracer(dict(bound.arguments), mode)
    buffers = [(value, value.clone()) for value in root.buffers()]
    try:
        graph = tracer.trace(root)
    except DspfxError as error:
        raise TraceError(
            f"{type(root).__name__} cannot be traced at {_user_line(error)}: {error} {_REMEDY}"
        ) from error
    except Exception as error:
        raise TraceError(
            f"{type(root).__name__} cannot be traced at {_user_line(error)}: {_last_line(error)}. {_REMEDY}"
        ) from error
    finally:
        for buffer, value in buffers:  # a batch counter is a real tensor that fake arithmetic still advances
            buffer.copy_(value)
    graph.eliminate_dead_code(is_impure_node=_has_effect)
    return graph


def _has_effect(node: fx.Node) -> bool:
    """True for what must stay though nobody reads it: modules with state, guards, asserts, in-place operations."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("expect", "_assert", "setitem") or name.endswith("_")


def _own_constants(root: nn.Module, graphs: Any) -> None:
    """Tensors the tracer stored as plain attributes become buffers outside the state_dict, so that they move along."""
    for graph in graphs:
        for node in graph.nodes:
            if node.op != "get_attr":
                continue
            path, _, name = str(node.target).rpartition(".")
            owner = root.get_submodule(path)
            if isinstance(owner.__dict__.get(name), Tensor):
                owner.register_buffer(name, owner.__dict__.pop(name), persistent=False)


def _merge(root: nn.Module, train: fx.Graph, evaluate: fx.Graph) -> fx.Graph | None:
    """One graph for both modes: bools that differ become TrainingFlag outputs; None where the structures differ."""
    pairs = list(zip(train.nodes, evaluate.nodes, strict=False))
    if len(train.nodes) != len(evaluate.nodes):
        return None
    twin = {b: a for a, b in pairs}
    flips: list[tuple[fx.Node, list[Any], Any]] = []
    for a, b in pairs:
        same_target = a.target == b.target or (a.op == "get_attr" and _same_constant(root, a, b))
        leaves_a, spec_a = pytree.tree_flatten((a.args, a.kwargs))
        leaves_b, spec_b = pytree.tree_flatten((b.args, b.kwargs))
        if a.op != b.op or not same_target or spec_a != spec_b:
            return None
        values: list[Any] = []
        for x, y in zip(leaves_a, leaves_b, strict=True):
            if isinstance(x, bool) and isinstance(y, bool) and x != y:
                values.append(TrainingFlag(inverted=y))
            elif isinstance(y, fx.Node) and twin.get(y) is x or not isinstance(x, fx.Node) and x == y:
                values.append(x)
            else:
                return None
        if any(isinstance(v, TrainingFlag) for v in values):
            flips.append((a, values, spec_a))
    for node, values, spec in flips:
        values = [_flag_node(root, train, node, v) if isinstance(v, TrainingFlag) else v for v in values]
        node.args, node.kwargs = pytree.tree_unflatten(values, spec)
    return train


def _same_constant(root: nn.Module, a: fx.Node, b: fx.Node) -> bool:
    x, y = attribute(root, str(a.target)), attribute(root, str(b.target))
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and bool((x == y).all())


def _flag_node(root: nn.Module, graph: fx.Graph, before: fx.Node, flag: TrainingFlag) -> fx.Node:
    name = "is_evaluating" if flag.inverted else "is_training"
    if not hasattr(root, name):
        root.add_module(name, flag.train(root.training))
    found = next((n for n in graph.nodes if n.op == "call_module" and n.target == name), None)
    if found is None:
        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            found = graph.call_module(name)
            found.meta["val"] = not flag.inverted
    return found


def _last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _user_line(error: BaseException) -> str:
    """file:line of the innermost frame outside torch and dspfx."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else "an unknown line"


def _is_library(filename: str) -> bool:
    # Compared by folder name: a user's file may live anywhere, torch's and ours live in packages of that name.
    parts = filename.replace("\\", "/").split("/")
    return "torch" in parts or ("dspfx" in parts and "graph" in parts) or filename.startswith("<")
