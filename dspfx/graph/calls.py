"""What a model's own forward does with its modules and tensors: recorded in one real run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.graph.inputs import as_found, describe, realise, tensors_of
from dspfx.graph.modes import evaluating
from dspfx.graph.samples import samples

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
_PLAIN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


class Calls:
    """Which modules were called, with arguments of which shapes, and from where.

    Attributes:
        inputs: module -> the described arguments of each of its calls.
        within: id of a module, parameter or buffer -> the modules in whose forward *every* use of it lay; a module's
            call lies in itself.
        macs: convolution or linear layer -> multiply-adds of all its calls.
    """

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, list[Inputs]] = {}
        self.within: dict[int, set[nn.Module]] = {}
        self.macs: dict[nn.Module, int] = {}
        self.stack: list[nn.Module] = []

    def use(self, thing: Any) -> None:
        """Notes a use of `thing` from where the run is now."""
        here = set(self.stack)
        self.within[id(thing)] = self.within[id(thing)] & here if id(thing) in self.within else here

    def used_elsewhere(self, module: nn.Module) -> str | None:
        """The name of a part of `module` that was also used from outside of it, if there is one."""
        for name, part in [*module.named_modules(), *module.named_parameters(), *module.named_buffers()]:
            if module not in self.within.get(id(part), {module}):
                return name or "itself"
        return None

    def example(self, module: nn.Module) -> tuple[Inputs | None, str]:
        """(the largest call's arguments, ""), or (None, why the calls cannot be one graph)."""
        calls = self.inputs.get(module, [])
        if not calls:
            return None, "the model's forward does not call it with the example inputs"
        kinds = [_kind(call) for call in calls]
        opaque = next((x for x in _leaves(calls[0]) if not isinstance(x, _PLAIN)), None)
        if opaque is not None:
            return None, f"it takes a {type(opaque).__name__}, which a graph cannot look into"
        if any(kind != kinds[0] for kind in kinds):
            return None, "its calls differ in the kind of their arguments"
        largest = max(calls, key=_size)
        if any(0 in x.shape[1:] for x in tensors_of(largest)):
            return None, "it takes an empty tensor"
        args, kwargs = pytree.tree_map_only(Tensor, _filled, (largest.args, largest.kwargs))
        return Inputs(*args, **kwargs), ""

    def work(self, module: nn.Module, root: nn.Module) -> float:
        """The work of all calls of `module` in one sample of `root`, in units of one sample of the largest call."""
        sizes = [_size(call) for call in self.inputs[module]]
        largest, _ = self.example(module)
        calls = sum(sizes) / max(sizes) if max(sizes) else 1.0
        return calls * samples(largest) / samples(self.inputs[root][0]) if largest is not None else calls


def record(model: nn.Module, inputs: Inputs) -> Calls:
    """The Calls of one run in eval mode; the model is left as it was. Raises what the model raises."""
    args, kwargs = realise(model, inputs)
    calls = Calls()
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}
    with ExitStack() as stack:
        stack.enter_context(as_found(model))
        stack.enter_context(evaluating([model]))
        for module in model.modules():
            enter = module.register_forward_pre_hook(_entering(calls), with_kwargs=True)
            leave = module.register_forward_hook(_leaving(calls), prepend=True)
            stack.callback(enter.remove)
            stack.callback(leave.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Uses(calls, tensors))
        model(*args, **kwargs)
    return calls


def _entering(calls: Calls) -> Any:
    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.stack.append(module)
        calls.use(module)
        calls.inputs.setdefault(module, []).append(describe(args, kwargs))

    return enter


def _leaving(calls: Calls) -> Any:
    def leave(module: nn.Module, args: Any, output: Any) -> None:
        calls.stack.pop()
        if isinstance(module, LAYERS) and isinstance(output, Tensor):
            # Each output of a layer, and each input of a transposed one, meets the weights of one filter.
            positions = args[0].numel() if getattr(module, "transposed", False) else output.numel()
            work = positions * module.weight.numel() // max(module.weight.shape[0], 1)
            calls.macs[module] = calls.macs.get(module, 0) + work

    return leave


class _Uses(TorchFunctionMode):
    """Notes every parameter and buffer that a torch function is given."""

    def __init__(self, calls: Calls, tensors: dict[int, Tensor]) -> None:
        super().__init__()
        self.calls, self.tensors = calls, tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # .dtype, .device, .shape: no values are read
            for leaf in pytree.tree_leaves((args, kwargs)):
                if id(leaf) in self.tensors:
                    self.calls.use(leaf)
        return func(*args, **(kwargs or {}))


def _leaves(inputs: Inputs) -> list[Any]:
    return pytree.tree_leaves((inputs.args, inputs.kwargs))


def _kind(inputs: Inputs) -> Any:
    """What must agree between two calls that one graph shall take: structure, ranks, types, flags and words."""
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    return spec, [_leaf_kind(x) for x in leaves]


def _leaf_kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.dim()
    return leaf if isinstance(leaf, (bool, str, torch.dtype, torch.device)) else type(leaf)


def _size(inputs: Inputs) -> int:
    return sum(x.numel() for x in tensors_of(inputs))


def _filled(value: Tensor) -> Tensor:
    """No detections, no boxes: a batch of none would leave nothing to see."""
    return value.new_empty(2, *value.shape[1:]) if value.dim() and not value.shape[0] else value
