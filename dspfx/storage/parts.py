"""Networks that were not traced whole: what is stored of each traced part, and how it returns to a model's instance.

prepared:  {part: its inputs}          -> traced again in the model, without running it
lowered:   {part: its inputs, graph}   -> the graph, over the part's own attributes and the layers that the file lists
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from dspfx.config import Inputs
from dspfx.errors import MismatchError, StorageError
from dspfx.graph.inputs import following, propagate
from dspfx.graph.parts import put_parts, submodule
from dspfx.graph.traced import Network, TracedModule, network_meta, parts_of, set_network_meta
from dspfx.graph.verify import replace_everywhere
from dspfx.modules import replace_module
from dspfx.plans import LowerPlan
from dspfx.storage.container import decode_inputs, encode_inputs
from dspfx.storage.network import decode_network, encode_network, named_tensors
from dspfx.storage.values import expect


@dataclass(frozen=True)
class StoredPart:
    """A traced part as the file has it: described inputs, its work, and, once lowered, its layers and graph."""

    inputs: Inputs
    work: float
    network: tuple[nn.Module, fx.Graph] | None


def encode_parts(network: Network, lowered: bool) -> dict[str, Any]:
    """The JSON of every traced part."""
    parts: dict[str, Any] = {}
    for name, part in parts_of(network).items():
        parts[name] = {"inputs": encode_inputs(part.meta["inputs"]), "work": part.meta.get("work", 1.0)}
        if lowered:
            parts[name]["network"] = encode_network(part)
    return parts


def decode_parts(data: Any, lowered: bool) -> dict[str, StoredPart]:
    """The parts that `encode_parts` wrote."""
    parts = {}
    for name, entry in expect(data, dict, "the table of parts").items():
        expect(entry, dict, f"the part {name}")
        inputs, work = decode_inputs(entry.get("inputs")), expect(entry.get("work"), float, f"the work of {name}")
        if not 0 < work < math.inf:
            raise StorageError(f"the work of {name} is {work}")
        parts[name] = StoredPart(inputs, work, decode_network(entry.get("network")) if lowered else None)
    return parts


def held_by_parts(network: Network) -> dict[str, Tensor]:
    """Every tensor of a lowered network that is stored: its state_dict, and all that the parts' graphs use."""
    named: dict[str, Tensor] = dict(network.state_dict(keep_vars=True))
    for name, part in parts_of(network).items():
        twin, _ = decode_network(json.loads(json.dumps(encode_network(part), allow_nan=False)))
        held = named_tensors(part)
        named |= {f"{name}.{key}": held[key] for key in named_tensors(twin)}
    return named


def restore_prepared(model: nn.Module, parts: dict[str, StoredPart], untraced: dict[str, str]) -> Network:
    """A copy of `model` with its parts traced again."""
    network = put_parts(model, {name: following(p.inputs, submodule(model, name)) for name, p in parts.items()})
    for name, part in parts_of(network).items():
        part.meta["work"] = parts[name].work
    network_meta(network)["untraced"] = untraced
    return network


def restore_lowered(
    model: nn.Module, parts: dict[str, StoredPart], tensors: dict[str, Tensor], plan: LowerPlan
) -> Network:
    """A copy of `model` on the CPU, in eval mode, with the file's graphs and tensors.

    Raises TraceError where a part has no place in the model, MismatchError at the first tensor that does not fit.
    """
    network = copy.deepcopy(model).cpu().eval()
    for name, stored in parts.items():
        assert stored.network is not None
        layers, graph = stored.network
        child = submodule(network, name)
        _install(child, layers, graph)
        _drop(child, f"{name}.", tensors)
        part = TracedModule.over(child, graph, {"inputs": stored.inputs, "work": stored.work})
        part.graph.lint()
        replace_everywhere(network, child, part)
    if set(parts_of(network)) != set(parts):
        raise MismatchError(
            f"the file's parts are {sorted(parts)}, the model has room for {sorted(parts_of(network))}."
        )
    set_network_meta(network, {"user_class": type(model), "lower_plan": plan, "untraced": {}})
    return network


def propagate_parts(network: Network) -> None:
    """Every node of every part gets the shape it has on the part's inputs, in the type of its parameters."""
    for part in parts_of(network).values():
        propagate(part, following(part.meta["inputs"], part))


def places_of(network: Network, parts: dict[str, StoredPart]) -> dict[str, tuple[Tensor, bool]]:
    """Name -> (what stands in the place of each stored tensor, whether a tensor of any shape may take it)."""
    places = {name: (value, False) for name, value in network.state_dict(keep_vars=True).items()}
    for name, stored in parts.items():
        assert stored.network is not None
        places |= {f"{name}.{key}": place for key, place in stored_places(stored.network[0]).items()}
    return places


def stored_places(root: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """The same for what `decode_network` made: a layer's tensors have its shapes, a container's constants any."""
    named = named_tensors(root)
    return {name: (v, type(root.get_submodule(name.rpartition(".")[0])) is nn.Module) for name, v in named.items()}


def _install(child: nn.Module, layers: nn.Module, graph: fx.Graph) -> None:
    """Puts the stored layers and constants at their names in `child`, beside whatever else it has."""
    for node in graph.nodes:
        path, _, leaf = str(node.target).rpartition(".")
        if node.op == "call_module":
            _container(child, path)
            replace_module(child, str(node.target), layers.get_submodule(str(node.target)))
    for path, source in layers.named_modules():
        if type(source) is not nn.Module:
            continue
        owner = _container(child, path)
        for leaf, parameter in source._parameters.items():
            owner._parameters[leaf] = parameter
        for leaf, buffer in source._buffers.items():
            owner.__dict__.pop(leaf, None)  # a constant that was a plain attribute before it was traced
            owner.register_buffer(leaf, buffer, persistent=leaf not in source._non_persistent_buffers_set)


def _container(root: nn.Module, path: str) -> nn.Module:
    """The module at `path`, made where it is missing."""
    for name in path.split(".") if path else ():
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root


def _drop(child: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    """Takes out the modules that lowering took out: those with a state of which the file has nothing."""
    for name, module in list(child.named_modules()):
        own = [*module._parameters, *(set(module._buffers) - module._non_persistent_buffers_set)]
        names = [f"{prefix}{name}.{leaf}" for leaf in own if getattr(module, leaf) is not None]
        if name and names and not any(n in tensors for n in names):
            owner = child.get_submodule(name.rpartition(".")[0])
            owner._modules.pop(name.rpartition(".")[2])
