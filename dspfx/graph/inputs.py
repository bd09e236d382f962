"""Example inputs: described, checked, guessed, made real again, and sent through a graph as shapes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.errors import InputError
from dspfx.graph.modes import evaluating
from dspfx.graph.traced import TracedModule, all_graphs

_GUESSED_SIZES = (224, 32, 64, 28, 128, 299, 256, 512)
# What fake tensors raise where the model needs the values of a real one.
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


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
            f"{type(model).__name__} does not run on example inputs of shape {shapes}: {last_line(error)}. Give "
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


def guess_inputs(model: nn.Module) -> Inputs:
    """A batch of two images that the model accepts, from its first layer's width; InputError where none is found."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    candidates: list[tuple[int, ...]]
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


def propagate(gm: TracedModule, inputs: Inputs) -> None:
    """Gives every node the value (`meta["val"]`, fake) it has on the described inputs, and remembers these."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    args, kwargs = materialise(gm, inputs, mode)
    bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    flat = list(bound.arguments.values())
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


def last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
