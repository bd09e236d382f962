"""A model that does not trace whole: its largest submodules that do are traced in place, and checked.

detector(images)                        detector(images)             its own class, forward, losses, attributes
    backbone, rpn.head, box_head            backbone, rpn.head ...   TracedModules, each also of its own class
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from dspfx.config import Inputs
from dspfx.errors import InputError, TraceError
from dspfx.graph.calls import LAYERS, Calls, record
from dspfx.graph.inputs import (
    describe,
    describe_inputs,
    following,
    propagate,
    real_candidates,
    realise,
    refusal,
    tensors_of,
    try_inputs,
)
from dspfx.graph.samples import samples
from dspfx.graph.trace import trace, trace_shared
from dspfx.graph.traced import Network, TracedModule, is_traced_in_parts, network_meta, parts_of, set_network_meta
from dspfx.graph.verify import NotAccepted, Pair, find_direct_fault, find_fault, replace_everywhere, variants

# What a user's class may define though a traced module has it too.
_COOPERATIVE = {"__init__", "__new__", "__call__", "__str__", "__module__", "__doc__", "__dict__", "__weakref__"}
_RESERVED = {name for name in vars(fx.GraphModule) if name not in _COOPERATIVE and not name.startswith("__")} | {"meta"}


def trace_parts(model: nn.Module, example_inputs: Any = None) -> Network:
    """A copy of `model`: traced whole (a TracedModule) where that can be done, else with its parts traced in place.

    Parts compute bit for bit what they replaced, which is checked on the example inputs and on others of another
    size. `network_meta` of the copy then holds "inputs", "user_class", "untraced": {module: why it is no part} and
    "macs": {layer: its multiply-adds}.
    What was returned once is only copied, and its parts get the example inputs' shapes where some are given.

    Raises:
        InputError: the model does not run on the example inputs, or none could be guessed.
        TraceError: no part of the model can be traced; names what stopped the whole.
    """
    if is_traced_in_parts(model) or isinstance(model, TracedModule):
        network = copy.deepcopy(model)
        describe_parts(network, example_inputs)
        return network
    try:
        return trace(model, example_inputs)
    except TraceError as error:
        whole = error
    if any(p.is_meta for p in model.parameters()):  # which cannot run, and so cannot show how its parts are called
        raise whole
    root = copy.deepcopy(model)
    inputs, calls = _run(root, example_inputs)
    placing = _Placing(root, calls, {"": str(whole)})
    placing.place(root, "")
    placing.check_all(inputs)
    if not placing.pairs:
        raise whole
    macs = {name: calls.macs.get(m, 0) // samples(inputs) for name, m in root.named_modules() if isinstance(m, LAYERS)}
    described = describe(inputs.args, inputs.kwargs)
    meta = {"inputs": described, "user_class": type(model), "untraced": placing.untraced, "macs": macs}
    set_network_meta(root, meta)
    return root


def describe_parts(network: Network, example_inputs: Any) -> None:
    """Gives every node of every traced part the shapes that it has when the network runs on these inputs.

    Without any they stay what they were, in the type that the weights have now. Raises InputError where the network
    does not run on them.
    """
    if example_inputs is None:
        _follow_type(network)
        return
    if isinstance(network, TracedModule):
        propagate(network, describe_inputs(network, example_inputs))
        return
    inputs, calls = _run(network, example_inputs)
    for part in parts_of(network).values():
        described, _ = calls.example(part)
        if described is not None:  # None: not called this time, and what was known stays
            propagate(part, described)
            part.meta["work"] = calls.work(part, network)
    network_meta(network)["inputs"] = describe(inputs.args, inputs.kwargs)


def _follow_type(network: Network) -> None:
    """What the network remembers of its inputs is of its weights' type again: it may have been cast since."""
    meta = network_meta(network)
    for part in parts_of(network).values():
        known = part.meta["inputs"]
        inputs = following(known, part)
        if [x.dtype for x in tensors_of(known)] != [x.dtype for x in tensors_of(inputs)]:
            propagate(part, inputs)
    meta["inputs"] = following(meta["inputs"], network)


def put_parts(model: nn.Module, parts: Mapping[str, Inputs]) -> nn.Module:
    """A copy of `model` whose named submodules are traced again with the described inputs; the model is not run.

    Raises TraceError where a submodule is missing or cannot be traced, InputError where it refuses its inputs.
    """
    root = copy.deepcopy(model)
    for name, inputs in parts.items():
        child = submodule(root, name)
        described, _ = try_inputs(child, inputs)
        replace_everywhere(root, child, trace_shared(child, described))
    if set(parts_of(root)) != set(parts):
        raise TraceError(
            f"{type(model).__name__} has room for the parts {sorted(parts_of(root))}, not {sorted(parts)}."
        )
    set_network_meta(root, {"user_class": type(model), "untraced": {}})
    return root


def submodule(root: nn.Module, name: str) -> nn.Module:
    """`root.get_submodule(name)`; TraceError where there is none."""
    try:
        return root.get_submodule(name)
    except AttributeError as error:
        raise TraceError(f"{type(root).__name__} has no submodule {name!r} to trace: {error}.") from error


def why_untraced(model: nn.Module, name: str) -> str:
    """Why the module `name` lies in no traced part: the reason of the nearest module around it that has one."""
    reasons: dict[str, str] = network_meta(model).get("untraced", {})
    while name and name not in reasons:
        name = name.rpartition(".")[0]
    return reasons.get(name, "")


def _run(root: nn.Module, example_inputs: Any) -> tuple[Inputs, Calls]:
    """Real inputs and the Calls of a run on them; guesses where none were given."""
    given = [Inputs.of(example_inputs)] if example_inputs is not None else real_candidates(root)
    errors: list[InputError] = []
    for candidate in given:
        args, kwargs = realise(root, candidate)
        try:
            return Inputs(*args, **kwargs), record(root, Inputs(*args, **kwargs))
        except Exception as error:
            errors.append(refusal(root, candidate, error))
    if example_inputs is not None:
        raise errors[0]
    raise InputError(
        f"no example inputs were given, and {type(root).__name__} runs on none of those that its first layer suggests "
        f"(lists and batches of images). Call again with example_inputs=... that the model accepts; the first guess "
        f"failed so: {errors[0]}"
    )


@dataclass(eq=False)
class _Placing:
    """The parts of one model while they are found: each is tried, and put back with a reason where it fails."""

    root: nn.Module
    calls: Calls
    untraced: dict[str, str]
    pairs: dict[str, Pair] = field(default_factory=dict)

    def place(self, module: nn.Module, prefix: str) -> None:
        """Replaces, top-down, every submodule of `module` that can be a part; notes why the others cannot."""
        for child_name, child in list(module.named_children()):
            name = f"{prefix}.{child_name}" if prefix else child_name
            if isinstance(child, (TracedModule, *LAYERS)) or not any(isinstance(m, LAYERS) for m in child.modules()):
                continue  # a layer that stands alone has nothing inside that could be pruned
            try:
                part = _part(self.root, child, self.calls)
            except TraceError as error:
                self.untraced[name] = str(error)
                self.place(child, name)
                continue
            self.pairs[name] = Pair(name, part, child)
            replace_everywhere(self.root, child, part)

    def put_back(self, name: str, reason: str) -> None:
        """Gives a part's place back to the module that it replaced, and tries the submodules of that."""
        pair = self.pairs.pop(name)
        replace_everywhere(self.root, pair.part, pair.module)
        self.untraced[name] = f"{type(pair.module).__name__} does not work as a graph: {reason.rstrip('.')}."
        self.place(pair.module, name)

    def check(self, inputs: Inputs, training: bool) -> bool:
        """Puts back what does not hold on these inputs; False where the model itself does not accept them."""
        while self.pairs:
            try:
                fault = find_fault(self.root, list(self.pairs.values()), inputs, training)
            except NotAccepted:
                return False
            if fault is None:
                return True
            self.put_back(*fault)
        return True

    def check_all(self, inputs: Inputs) -> None:
        """In eval mode on other sizes where the model takes them; in train mode where it needs no targets."""
        if not any(self.check(other, training=False) for other in variants(inputs)):
            self.check(inputs, training=False)
        self.check(inputs, training=True)
        for pair in list(self.pairs.values()):
            fault = None if pair.is_compared else find_direct_fault(pair, pair.part.meta["inputs"])
            if fault is not None:
                self.put_back(*fault)


def _part(root: nn.Module, module: nn.Module, calls: Calls) -> TracedModule:
    """`module` as a part; TraceError where it cannot be one."""
    name = type(module).__name__
    taken = _RESERVED & ({key for kind in _own_classes(module) for key in vars(kind)} | set(module.__dict__))
    if taken:
        raise TraceError(f"{name} cannot be traced: its attribute {min(taken)!r} has a name that torch.fx uses itself.")
    elsewhere = calls.used_elsewhere(module)
    if elsewhere is not None:
        raise TraceError(f"{name} is no part by itself: {elsewhere} is used from outside of it, too.")
    inputs, reason = calls.example(module)
    if inputs is None:
        raise TraceError(f"{name} cannot be traced by itself: {reason}.")
    part = trace_shared(module, inputs)
    part.meta["work"] = calls.work(module, root)
    return part


def _own_classes(module: nn.Module) -> list[type]:
    kinds = type(module).__mro__
    return list(kinds[: kinds.index(nn.Module)])
