"""Does every traced part do exactly what the module did that it replaced? Asked bit by bit, in the model's own run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.graph.inputs import as_found, last_line, realise, tensors_of
from dspfx.graph.modes import evaluating
from dspfx.graph.samples import samples, with_larger_images, with_samples
from dspfx.graph.traced import TracedModule

Fault = tuple[str, str]  # the part's name, and what is wrong with it


class NotAccepted(Exception):
    """The original model does not run on these inputs in this mode: they tell nothing about its parts."""


@dataclass(eq=False)
class Pair:
    """A traced part and the module whose place it took; they share submodules, parameters and buffers."""

    name: str
    part: TracedModule
    module: nn.Module
    is_compared: bool = False  # on a call with anything in it


def find_fault(root: nn.Module, pairs: list[Pair], inputs: Inputs, training: bool) -> Fault | None:
    """The first part that fails in a run of `root`, which is left as it was; None where all agree.

    Raises NotAccepted where the model with its own modules does not run on these inputs either.
    """
    watch = _Watch(pairs)
    error = _run(root, inputs, training, watch)
    if watch.fault is not None or error is None:
        return watch.fault
    with _swapped(root, pairs):
        failing = _run(root, inputs, training)
    if failing is not None:
        raise NotAccepted from failing
    if watch.active:
        return watch.active[-1].name, last_line(error)
    for pair in pairs:  # the user's own code failed: at which part?
        with _swapped(root, [pair]):
            if _run(root, inputs, training) is None:
                return pair.name, last_line(error)
    return pairs[0].name, last_line(error)


def find_direct_fault(pair: Pair, inputs: Inputs) -> Fault | None:
    """As `find_fault`, of one part on random values of the described inputs in eval mode."""
    watch = _Watch([pair])
    error = _run(pair.part, inputs, False, watch)
    return watch.fault or (None if error is None else (pair.name, last_line(error)))


def replace_everywhere(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` in the place of `old` under each of its names."""
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new


def _run(root: nn.Module, inputs: Inputs, training: bool, watch: _Watch | None = None) -> Exception | None:
    """What the run raised."""
    args, kwargs = realise(root, inputs)
    with ExitStack() as stack:
        stack.enter_context(as_found(root))
        stack.enter_context(evaluating([root]))  # which puts every mode back
        root.train(training)
        if watch is not None:
            stack.enter_context(watch.hooks())
        stack.enter_context(torch.no_grad())
        try:
            root(*args, **kwargs)
        except Exception as error:
            return error
    return None


class _swapped:
    """The modules themselves in the place of their parts, for a while."""

    def __init__(self, root: nn.Module, pairs: list[Pair]) -> None:
        self.root, self.pairs = root, pairs

    def __enter__(self) -> None:
        for pair in self.pairs:
            replace_everywhere(self.root, pair.part, pair.module)

    def __exit__(self, *error: object) -> None:
        for pair in self.pairs:
            replace_everywhere(self.root, pair.module, pair.part)


class _State:
    """The random number generators' states and a module's buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.devices = {p.device for p in module.parameters() if p.is_cuda}
        self.cpu = torch.get_rng_state()
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in self.devices}
        self.buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
        for buffer, value in self.buffers:
            buffer.copy_(value)

    def same(self, other: _State) -> bool:
        pairs = zip(self.buffers, other.buffers, strict=True)
        return torch.equal(self.cpu, other.cpu) and all(_same_tensor(a, b) for (_, a), (_, b) in pairs)


class _Watch:
    """Hooks on parts: after each call the module that was replaced does the same again, and both must agree."""

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = {pair.part: pair for pair in pairs}
        self.fault: Fault | None = None
        self.active: list[Pair] = []
        self.before: list[tuple[Any, Any, _State]] = []  # args, kwargs and state that the active calls start from

    def hooks(self) -> ExitStack:
        stack = ExitStack()
        for part in self.pairs:
            stack.callback(part.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
            stack.callback(part.register_forward_hook(self._leave, with_kwargs=True, prepend=True).remove)
        return stack

    def _enter(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        pair = self.pairs.get(part)  # type: ignore[call-overload]
        if pair is None:  # hooks are shared with the module that was replaced
            name = next((p.name for p in self.pairs.values() if p.module is part), "?")
            self.fault = self.fault or (name, "the model reaches it by another way than its attribute")
            return
        self.active.append(pair)
        self.before.append((*_copies((args, kwargs)), _State(part)))

    def _leave(self, part: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if part not in self.pairs:
            return
        pair, (args, kwargs, before), after = self.active.pop(), self.before.pop(), _State(part)
        module = pair.module
        before.restore()
        module.training = part.training
        pair.is_compared |= all(x.numel() for x in tensors_of(Inputs(*args, **kwargs)))
        expected = type(module).forward(module, *args, **kwargs)
        if not after.same(_State(module)):
            self.fault = self.fault or (pair.name, "its buffers or random numbers are others than before")
        after.restore()
        if not same_values(output, expected):
            self.fault = self.fault or (pair.name, "its outputs differ from those of the module itself")


def same_values(a: Any, b: Any) -> bool:
    """Equal nestings of bitwise equal tensors (NaN equals NaN) and equal values."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and _same_tensor(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same_values(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_values, a, b))
    return type(a) is type(b) and bool(a == b)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a != a) & (b != b)).all())


def _copies(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), value)


def variants(inputs: Inputs) -> list[Inputs]:
    """Other inputs of the same kind: another batch and larger images, larger images, another batch."""
    other = with_samples(inputs, 1 if samples(inputs) > 1 else 2)
    return [with_larger_images(other), with_larger_images(inputs), other]
