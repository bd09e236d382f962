"""A tracer whose proxies know example values: control flow on shapes works, sizes stay symbolic in the graph."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import Attribute

from dspfx.errors import InputError, TraceError
from dspfx.graph.layers import BATCH_NORMS, CONVS, INSTANCE_NORMS, TRANSPOSED, attribute, evaluated, is_plain, overrides
from dspfx.graph.ops import RULES

LEAF_TYPES: tuple[type[nn.Module], ...] = (
    *(*CONVS, *TRANSPOSED, nn.Linear, *BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm, nn.GroupNorm),
    nn.MultiheadAttention,
)
# Made from sizes alone: torch's own dispatch does not see a proxy among plain integers.
_FACTORIES = (
    *(torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn, torch.randint, torch.arange),
    *(torch.linspace, torch.eye, torch.tensor),
)
_SYMBOLS = {"gt": ">", "lt": "<", "ge": ">=", "le": "<=", "eq": "==", "ne": "!=", "floordiv": "//", "truediv": "/"}
_SYMBOLS |= {"add": "+", "sub": "-", "mul": "*", "mod": "%"}
_UNKNOWN = object()


def expect(value: Any, traced: Any, where: str) -> None:
    """Raises InputError unless `value` is what it was while tracing: only this value's branch is in the graph."""
    is_tensor = isinstance(value, Tensor)  # whose comparison would be a tensor, or refused
    if is_tensor or value != traced:
        met = f"a tensor of shape {tuple(value.shape)}" if is_tensor else repr(value)
        raise InputError(
            f"{where} was {traced!r} with the traced example inputs and is {met} now; the model branches on it "
            f"in Python, so this network holds only the traced branch. Give inputs of the traced kind, or prepare "
            f"the model again with such example inputs."
        )


class ShapeProxy(fx.Proxy):
    """A proxy that answers shape questions from the example value its node carries in `meta["val"]`."""

    tracer: ShapeTracer

    @property
    def _value(self) -> Any:
        return self.node.meta.get("val", _UNKNOWN)

    def __getattr__(self, name: str) -> Any:
        value = self._value
        if isinstance(value, Tensor):
            # The rank is part of what a network is: it is answered at once, without a guard.
            if name == "ndim":
                return value.dim()
            if name in ("dim", "ndimension"):
                return value.dim
        if value is _UNKNOWN or callable(getattr(value, name)):
            return Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __len__(self) -> int:
        value = self._value
        if isinstance(value, Tensor):
            return self.shape[0].__index__()
        if hasattr(value, "__len__"):
            return len(value)
        raise TraceError(f"len() of {self.node} is asked while tracing, and no example value is known for it.")

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __index__(self) -> int:
        return self.tracer.concrete(self, int)

    def __int__(self) -> int:
        return int(self.tracer.concrete(self, (int, float)))

    def __float__(self) -> float:
        return float(self.tracer.concrete(self, (int, float)))


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[ShapeProxy, Any], Any]:
    def method(self: ShapeProxy, other: Any) -> Any:
        if not isinstance(self._value, Tensor):
            return NotImplemented  # Python then computes the number anew
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


_IN_PLACE = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
}
for _function in _IN_PLACE:
    setattr(ShapeProxy, f"__{_function.__name__}__", _in_place(_function))


class ShapeTracer(fx.Tracer):
    """Traces a module into an `fx.Graph`; each node's `meta["val"]` holds its fake example value.

    Where Python needs a concrete value (an if, a range, an int()), the example's value decides and an `expect`
    node guards it; everything else stays symbolic, so the graph takes every size that takes the same branches.
    """

    proxy_buffer_attributes = True  # a buffer stays a buffer, else its value of today would be baked in

    def __init__(self, example: dict[str, Any], mode: FakeTensorMode) -> None:
        super().__init__(autowrap_functions=_FACTORIES)
        self._autowrap_search.append(torch)
        self.example = example
        self.mode = mode
        self._evaluating = False
        self._guarded: set[fx.Node] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leaves by what they compute: layers of a user's class that keep torch's forward, and all of torch.nn.

        A layer with a forward of its own ("same" padding, a norm with its activation) is traced through.
        """
        base = next((kind for kind in LEAF_TYPES if isinstance(m, kind)), None)
        is_layer = base is not None and not overrides(m, base)
        return is_layer or type(m) in RULES or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ShapeProxy(node, self)

    def create_node(self, kind: str, *rest: Any, **named: Any) -> fx.Node:
        node = super().create_node(kind, *rest, **named)
        if kind == "get_attr":
            value = self._evaluate(node)
            if value is not _UNKNOWN:
                node.meta["val"] = value
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        proxy.node.meta["where"] = _user_line()
        value = self._evaluate(proxy.node)
        if value is not _UNKNOWN:
            proxy.node.meta["val"] = value
        return proxy

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """The model's arguments: proxies, but None, flags and words as they are, which Python looks at unseen."""
        function, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        return function, [self._fixed(arg) for arg in args]

    def _fixed(self, arg: Any) -> Any:
        if not isinstance(arg, fx.Proxy) or arg.node.op != "placeholder":
            return arg
        node = arg.node
        if "val" not in node.meta and node.args:  # no example was given: the model's default is one
            node.meta["val"] = node.args[0]
        value = node.meta.get("val", _UNKNOWN)
        if value is not None and not isinstance(value, (bool, str)):
            return arg
        self.create_node("call_function", expect, (node, value, f"the argument {node.target}"), {})
        return value

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        assign = nn.Module.__setattr__
        nn.Module.__setattr__ = self._assigned(assign)  # type: ignore[method-assign,assignment]
        try:
            graph = super().trace(root, concrete_args)
        finally:
            nn.Module.__setattr__ = assign  # type: ignore[method-assign]
        for node in graph.nodes:
            if node.target in _FACTORIES:
                node.meta.pop("is_wrapped", None)  # else the generated code would wrap torch's functions for good
        return graph

    def _assigned(self, assign: Callable[..., None]) -> Callable[[nn.Module, str, Any], None]:
        """Module.__setattr__ while tracing: what a forward assigns to a buffer is copied into it."""

        def setattr_(module: nn.Module, name: str, value: Any) -> None:
            held = module._buffers.get(name) if "_buffers" in module.__dict__ else None
            known = value.node.meta.get("val") if isinstance(value, fx.Proxy) else None
            if held is None or not isinstance(known, Tensor) or known.shape != held.shape:
                return assign(module, name, value)  # of another shape it is a cache, which is made anew at every call
            buffer = getattr(module, name)  # a proxy, as everywhere in the model's forward
            source: Any = value.node.args[0] if value.node.target in _IN_PLACE else None
            if source is None or source.target != buffer.node.target:
                self.create_proxy("call_method", "copy_", (buffer, value), {})

        return setattr_

    def _evaluate(self, node: fx.Node) -> Any:
        """The node's value on the fake example inputs; _UNKNOWN where it depends on data."""
        if node.op == "placeholder":
            return self.example.get(str(node.target).lstrip("*"), _UNKNOWN)
        if node.op == "output" or any("val" not in n.meta for n in node.all_input_nodes):
            return _UNKNOWN
        args = tuple(evaluated(arg, lambda n: n.meta["val"]) for arg in node.args)
        kwargs = {key: evaluated(arg, lambda n: n.meta["val"]) for key, arg in node.kwargs.items()}
        self._evaluating = True
        try:
            with self.mode, torch.no_grad():
                if node.op == "get_attr":
                    value = attribute(self.root, str(node.target))
                    return self.mode.from_tensor(value) if isinstance(value, Tensor) else value
                if node.op == "call_module":
                    module = self.root.get_submodule(str(node.target))
                    is_norm = is_plain(module, BATCH_NORMS) and len(args) == 1  # its fake arithmetic: half of a trace
                    if is_norm or RULES.get(type(module)) == "elementwise":  # which may depend on data inside
                        return torch.empty_like(args[0])
                    return module(*args, **kwargs)
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                assert callable(node.target)
                return node.target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, IndexError, KeyError):
            return _UNKNOWN  # data-dependent; whoever needs the value says so
        finally:
            self._evaluating = False

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self._evaluating:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._evaluating else super().getattr(attr, attr_val, parameter_proxy_cache)

    def concrete(self, proxy: fx.Proxy, kind: type | tuple[type, ...]) -> Any:
        """The example's value of `proxy`, guarded in the graph; TraceError where it depends on tensor data."""
        node = proxy.node
        value = node.meta.get("val", _UNKNOWN)
        if not isinstance(value, kind):
            what = "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            what = "an unknown value" if value is _UNKNOWN else what
            raise TraceError(
                f"the model needs the Python value of {_text(node)}, {what}, while it is traced: "
                f"its control flow depends on tensor data."
            )
        if node not in self._guarded:
            self._guarded.add(node)
            where = self.scope.module_path or "the model"
            self.create_node("call_function", expect, (node, value, f"{_text(node)} in {where}"), {})
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        value = obj.node.meta.get("val", _UNKNOWN)
        if isinstance(value, (tuple, list, dict, str)) or value is None:
            return bool(value)
        return bool(self.concrete(obj, (bool, int, float)))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        sequence: Any = obj
        return iter([sequence[i] for i in range(len(sequence))])

    def keys(self, obj: fx.Proxy) -> Any:
        value = obj.node.meta.get("val", _UNKNOWN)
        return list(value) if isinstance(value, dict) else super().keys(obj)


def _user_line() -> tuple[str, int]:
    """(file, line) of the innermost call outside torch and dspfx: the model's own line; ("", 0) in nn.Sequential."""
    frame: Any = sys._getframe(2)
    while frame is not None and is_library(frame.f_code.co_filename):
        if frame.f_code is fx.Tracer.trace.__code__:
            return "", 0
        frame = frame.f_back
    return (frame.f_code.co_filename, frame.f_lineno) if frame else ("", 0)


@cache
def is_library(filename: str) -> bool:
    """True for torch's files and for ours, compared by folder: a user's file may live anywhere."""
    parts = filename.replace("\\", "/").split("/")
    return "torch" in parts or ("dspfx" in parts and "graph" in parts) or filename.startswith("<")


def _text(value: Any, depth: int = 4) -> str:
    """A size or comparison as the model's author wrote it, as far as the graph tells: "x.shape[2] > 16"."""
    if not isinstance(value, fx.Node) or not depth:
        return str(value)
    name = value.target if isinstance(value.target, str) else getattr(value.target, "__name__", value.name)
    args = [_text(a, depth - 1) for a in value.args]
    if value.op == "call_function" and name in _SYMBOLS and len(args) == 2:
        return f"{args[0]} {_SYMBOLS[name]} {args[1]}"
    if value.op == "call_function" and name == "getattr":
        return f"{args[0]}.{args[1]}"
    if value.op == "call_function" and name == "getitem":
        return f"{args[0]}[{args[1]}]"
    if value.op == "call_method":
        return f"{args[0]}.{name}({', '.join(args[1:])})"
    return value.name
