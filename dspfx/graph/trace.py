"""From a user's model to one `TracedModule` that accepts what the model accepts and follows train() and eval()."""

from __future__ import annotations

import copy
import inspect
import traceback
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.errors import DspfxError, TraceError
from dspfx.graph.aliases import overwrites
from dspfx.graph.inputs import (
    Attributes,
    check_run,
    last_line,
    materialise,
    try_guess,
    try_inputs,
)
from dspfx.graph.traced import TracedModule, TrainingFlag
from dspfx.graph.tracer import ShapeTracer, attribute

_PURE = ("torch.", "torchvision.ops.", "_operator.", "builtins.", "math.")
_REMEDY = "Make that line independent of tensor values, or wrap the function with torch.fx.wrap."


def trace(model: nn.Module, example_inputs: Any = None) -> TracedModule:
    """Returns a traced deep copy of `model`, which is no TracedModule yet and is left as it was.

    Raises InputError where the model does not run on the example inputs (or none were given and none could be
    guessed) and TraceError where its control flow depends on tensor data.
    """
    root = copy.deepcopy(model)
    inputs, undecided = try_guess(root) if example_inputs is None else try_inputs(root, example_inputs)
    gm = trace_shared(root, inputs)
    if undecided is not None:
        check_run(gm, inputs if example_inputs is None else example_inputs)
    return gm


def trace_shared(root: nn.Module, inputs: Inputs) -> TracedModule:
    """A traced module over everything that `root` owns, which is shared and not copied; of the described inputs.

    Raises TraceError, and leaves `root` as it was, where it cannot be traced.
    """
    if "forward" in root.__dict__:
        raise TraceError(
            f"{type(root).__name__} cannot be traced: its forward was replaced on the instance, by a "
            f"{type(root.__dict__['forward']).__name__}. Define forward in a class."
        )
    training, before = root.training, Attributes(root)
    meta: dict[str, Any] = {"inputs": inputs, "user_class": type(root)}
    try:
        evaluate = _trace_mode(root, inputs, training=False)  # first: its errors are not about missing targets
        modes = {"train": _trace_mode(root, inputs, training=True), "eval": evaluate}
        _own_constants(root, modes.values())
        merged = _merge(root, modes["train"], modes["eval"])
        if merged is None:
            meta["graphs"] = modes
            merged = modes["train" if training else "eval"]
        return TracedModule.over(root, merged, meta)
    except TraceError:
        before.put_back(root)
        raise


def _trace_mode(root: nn.Module, inputs: Inputs, training: bool) -> fx.Graph:
    buffers = [(value, value.clone()) for value in root.buffers()]
    modules = [(module, Attributes(module)) for module in root.modules()]
    graph: fx.Graph | None = None
    try:
        root.train(training)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        args, kwargs = materialise(root, inputs, mode)
        bound = inspect.signature(root.forward).bind(*args, **kwargs)
        graph = ShapeTracer(dict(bound.arguments), mode).trace(root)
    except DspfxError as error:
        raise TraceError(f"{type(root).__name__} cannot be traced at {_user_line(error)}: {error} {_REMEDY}") from error
    except Exception as error:
        raise TraceError(
            f"{type(root).__name__} cannot be traced at {_user_line(error)}: {last_line(error)}. {_REMEDY}"
        ) from error
    finally:
        constants = {str(n.target) for n in graph.nodes if n.op == "get_attr"} if graph else set()
        for module, attributes in modules:  # modes, and what forward assigned to: proxies, fake tensors
            attributes.put_back(module, lambda key, value: key in constants and isinstance(value, Tensor))
        for buffer, value in buffers:  # a batch counter is a real tensor that fake arithmetic still advances
            buffer.copy_(value)
    graph.eliminate_dead_code(is_impure_node=has_effect)
    return graph


def has_effect(node: fx.Node) -> bool:
    """True for what must stay though nobody reads it: modules with state, guards, asserts, in-place operations, and
    functions of others (wrapped by torch.fx.wrap), which may do anything to their arguments."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    owner = getattr(node.target, "__module__", None) or "torch"
    if node.op == "call_function" and not f"{owner}.".startswith(_PURE):
        return True
    return getattr(node.target, "__name__", "") in ("expect", "_assert") or overwrites(None, node)


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
            elif (isinstance(y, fx.Node) and twin.get(y) is x) or (not isinstance(x, fx.Node) and x == y):
                values.append(x)
            else:
                return None
        if any(isinstance(v, TrainingFlag) for v in values):
            flips.append((a, values, spec_a))
    for node, values, spec in flips:
        values = [_flag_node(root, train, v) if isinstance(v, TrainingFlag) else v for v in values]
        node.args, node.kwargs = pytree.tree_unflatten(values, spec)
    return train


def _same_constant(root: nn.Module, a: fx.Node, b: fx.Node) -> bool:
    x, y = attribute(root, str(a.target)), attribute(root, str(b.target))
    return isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape and bool((x == y).all())


def _flag_node(root: nn.Module, graph: fx.Graph, flag: TrainingFlag) -> fx.Node:
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


def _user_line(error: BaseException) -> str:
    """file:line of the innermost frame outside torch and dspfx."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else "an unknown line"


def _is_library(filename: str) -> bool:
    # Compared by folder name: a user's file may live anywhere, torch's and ours live in packages of that name.
    parts = filename.replace("\\", "/").split("/")
    return "torch" in parts or ("dspfx" in parts and "graph" in parts) or filename.startswith("<")
