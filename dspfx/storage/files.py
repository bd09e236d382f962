"""One safetensors file a network: tensors, and in the header's metadata JSON that says what they belong to. No pickle.

prepared, trained or pruned ("gated"):  gate plan, example inputs, state_dict   -> needs an instance of the class
lowered ("lowered"):                    graph, layers, lower plan, all tensors  -> needs nothing
lowered, but not traced whole:          the same, a graph for each traced part  -> needs an instance of the class
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspfx.errors import DspfxError, StorageError
from dspfx.graph.inputs import following, propagate
from dspfx.graph.trace import trace
from dspfx.graph.traced import Network, TracedModule, is_traced_in_parts, network_meta
from dspfx.modules import GatedLayer
from dspfx.passes.insert_gates import insert_gates
from dspfx.plans import GatePlan, LowerPlan
from dspfx.storage.container import (
    FORMAT,
    File,
    decode_inputs,
    decoding,
    encode_inputs,
    is_channels_last,
    plain,
    read,
    shared_out,
    write,
)
from dspfx.storage.network import decode_network, encode_network, named_tensors
from dspfx.storage.parts import (
    StoredPart,
    decode_parts,
    encode_parts,
    held_by_parts,
    places_of,
    propagate_parts,
    restore_lowered,
    restore_prepared,
)
from dspfx.storage.values import expect, look_up


def save(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a prepared, trained, pruned or lowered network into one safetensors file; `module` is left as it was.

    The file appears whole or not at all. What is shared (tied weights) is stored once. The mode is not stored.

    Raises:
        StorageError: `module` is none of dspfx's, it holds something that has no stored form (named, with what to do
            instead), or `path` cannot be written.
    """
    meta = network_meta(module)
    if "gate_plan" in meta:
        kind, named, texts = "gated", module.state_dict(keep_vars=True), {"gate_plan": meta["gate_plan"].to_json()}
    elif "lower_plan" in meta:
        kind, named, texts = "lowered", *_describe_lowered(module)
    else:
        raise StorageError(
            f"{type(module).__name__} is neither prepared nor lowered; save what dspfx.prepare or dspfx.lower returned."
        )
    first: dict[int, str] = {}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise StorageError(f"{name} in the state_dict is a {type(value).__name__}; only tensors can be stored.")
        first.setdefault(id(value), name)
    texts["shared"] = json.dumps({n: first[id(v)] for n, v in named.items() if first[id(v)] != n})
    texts["inputs"] = json.dumps(encode_inputs(meta["inputs"]))
    if is_traced_in_parts(module):
        texts["parts"] = json.dumps(encode_parts(module, kind == "lowered"), allow_nan=False)
        texts["untraced"] = json.dumps(meta["untraced"])
    if kind == "gated" or is_traced_in_parts(module):
        texts["class"] = json.dumps(f"{meta['user_class'].__module__}.{meta['user_class'].__qualname__}")
    tensors = {name: plain(named[name]) for name in first.values()}
    version = FORMAT if is_traced_in_parts(module) else 1
    write(Path(path), tensors, {"dspfx": str(version), "kind": kind, **texts})


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> Network:
    """Reads what `save` wrote; `model` is left as it was. Nothing in the file is ever run as code.

    Args:
        path: the file. It may come from anywhere: only what dspfx/storage/allowed.py lists is built from it, though
            like any network it may ask for more time or memory than there is.
        model: for a prepared, trained or pruned network, an instance of the class it was prepared from; its values
            do not matter, its device, dtype and mode are kept. A lowered network needs none, unless it was not traced
            whole: it comes on the CPU, in eval mode, with bit-identical outputs.

    Raises:
        StorageError: the file is missing, truncated, damaged or of a newer version, or `model` is missing, is not
            needed, or is another network than the one saved (names the first key or shape that disagrees).
    """
    file = read(Path(path))
    if file.kind == "lowered" and "parts" not in file.texts:
        if model is not None:
            raise StorageError(f"{file.path} holds a lowered network, which needs no model: dspfx.load({str(path)!r}).")
        with decoding(file.path):
            return _load_lowered(file)
    with decoding(file.path):
        inputs, tensors = decode_inputs(file.read("inputs")), shared_out(file)
        key, kind = ("gate_plan", GatePlan) if file.kind == "gated" else ("lower_plan", LowerPlan)
        plan: Any = kind.from_json(look_up(file.texts, key, "in its metadata"))
        owner = expect(file.read("class"), str, "the class of its model")
        parts = decode_parts(file.read("parts"), file.kind == "lowered") if "parts" in file.texts else None
        untraced = expect(file.read("untraced"), dict, "its reasons") if "parts" in file.texts else {}
    if model is None:
        raise StorageError(
            f"{file.path} holds a {'prepared' if file.kind == 'gated' else 'lowered'} {owner}, which needs an instance "
            f"of that class: dspfx.load({str(path)!r}, model={owner.rpartition('.')[2]}(...))."
        )
    if any(isinstance(m, GatedLayer) for m in model.modules()):
        raise StorageError(f"the model given for {path} is prepared already; give a fresh instance of {owner}.")
    if file.kind == "lowered":
        gm = _load_lowered_parts(file, model, owner, plan, parts or {}, tensors)
        network_meta(gm).update({"inputs": inputs, "untraced": untraced})
        return gm
    if parts is None:
        return _load_gated(file, model, owner, plan, tensors, lambda: trace(model, following(inputs, model)))
    gm = _load_gated(file, model, owner, plan, tensors, lambda: restore_prepared(model, parts, untraced))
    network_meta(gm)["inputs"] = inputs
    return gm


def _describe_lowered(network: Network) -> tuple[dict[str, Tensor], dict[str, str]]:
    texts = {"lower_plan": network_meta(network)["lower_plan"].to_json()}
    if is_traced_in_parts(network):
        named = held_by_parts(network)
    else:
        texts["network"] = json.dumps(encode_network(network), allow_nan=False)
        twin, _ = decode_network(json.loads(texts["network"]))  # what could not be read again is not written
        held = named_tensors(network)
        named = {name: held[name] for name in named_tensors(twin)}
    return named, texts | {
        "frozen": json.dumps([n for n, v in named.items() if isinstance(v, nn.Parameter) and not v.requires_grad]),
        "channels_last": json.dumps([n for n, v in named.items() if is_channels_last(v)]),
    }


def _load_lowered(file: File) -> TracedModule:
    root, graph = decode_network(file.read("network"))
    plan = LowerPlan.from_json(look_up(file.texts, "lower_plan", "in its metadata"))
    inputs = decode_inputs(file.read("inputs"))
    places = {
        n: (v, type(root.get_submodule(n.rpartition(".")[0])) is nn.Module) for n, v in named_tensors(root).items()
    }
    _fill(root, places, shared_out(file), file)
    gm = TracedModule.over(root, graph, {"lower_plan": plan})
    gm.graph.lint()
    propagate(gm, following(inputs, gm))
    return gm


def _load_lowered_parts(
    file: File, model: nn.Module, owner: str, plan: LowerPlan, parts: dict[str, StoredPart], tensors: dict[str, Tensor]
) -> Network:
    try:
        network = restore_lowered(model, parts, tensors, plan)
        _fill(network, places_of(network, parts), tensors, file)
        propagate_parts(network)
    except Exception as error:  # torch raises nearly every built-in exception on layers that do not fit
        raise StorageError(
            f"{file.path} does not fit this {type(model).__name__}: {str(error).rstrip('.')}. Give an instance of "
            f"{owner} built with the arguments it had when it was prepared."
        ) from error
    return network


def _load_gated(
    file: File,
    model: nn.Module,
    owner: str,
    plan: GatePlan,
    tensors: dict[str, Tensor],
    again: Callable[[], Network],
) -> Network:
    _check_fit(file.path, model, owner, plan, tensors)
    try:
        gm = insert_gates(again(), plan)
    except DspfxError as error:
        raise StorageError(f"{file.path} does not fit this {type(model).__name__}: {error}") from error
    state = gm.state_dict()
    for key in list(state):
        state[key] = tensors[key]
    gm.load_state_dict(state)  # with the versions of this class's modules, that some look at
    for name, module in gm.named_modules():
        if isinstance(module, GatedLayer):
            low, high = int(module.gate_group.min()), int(module.gate_group.max())
            if low < -1 or high >= module.gate_groups or not module.gate_groups:
                raise StorageError(
                    f"{file.path} is damaged: {name} puts filters into groups {low} to {high} of {module.gate_groups}."
                )
    return gm


def _check_fit(path: Path, model: nn.Module, owner: str, plan: GatePlan, tensors: dict[str, Tensor]) -> None:
    """StorageError unless model and gate plan have exactly the file's keys and shapes."""
    kind = type(model).__name__
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    for spec in plan.layers:
        layer = modules.get(spec.name)
        for name in [n for n, m in modules.items() if m is layer] if layer else [spec.name]:  # all its names
            expected[f"{name}.gate_logits"] = (spec.groups, spec.out_channels)
            expected[f"{name}.gate_group"] = (spec.out_channels,)
            expected[f"{name}.gate_keep"] = (spec.groups, spec.in_channels)
            expected[f"{name}.gate_fisher"] = (spec.groups, spec.in_channels)
            expected[f"{name}.gate_filter_fisher"] = (spec.out_channels,)
            for key in ("gate_fisher", "gate_filter_fisher"):  # which older files lack
                tensors.setdefault(f"{name}.{key}", torch.zeros(expected[f"{name}.{key}"]))
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in expected | found:
        if expected.get(name) != found.get(name):
            here, there = (f"shape {d[name]}" if name in d else "no such tensor" for d in (found, expected))
            raise StorageError(
                f"{path} does not fit this {kind}: at {name} the file has {here}, the model {there}. Give an instance "
                f"of {owner} built with the arguments it had when it was prepared."
            )


def _fill(root: nn.Module, places: dict[str, tuple[Tensor, bool]], tensors: dict[str, Tensor], file: File) -> None:
    """Puts the file's tensors in their places in `root`; StorageError at the first that has none or another shape."""
    for name in tensors | places:
        if name not in tensors or name not in places:
            raise StorageError(f"its tensors and its layers disagree about {name}")
    frozen, channels_last = ({*expect(file.read(key), list, key)} for key in ("frozen", "channels_last"))
    made: dict[int, Tensor] = {}  # by the tensor in the file: what was shared stays shared
    for name, (place, takes_any_shape) in places.items():
        value, (path, _, leaf) = tensors[name], name.rpartition(".")
        owner = root.get_submodule(path)
        fits = value.shape == place.shape and value.is_floating_point() == place.is_floating_point()
        if not takes_any_shape and not fits:
            raise StorageError(f"{name} is {value.dtype} {tuple(value.shape)}, its layer {tuple(place.shape)}")
        if id(value) not in made:
            made[id(value)] = value.contiguous(memory_format=torch.channels_last) if name in channels_last else value
            if leaf in owner._parameters:
                made[id(value)] = nn.Parameter(made[id(value)], requires_grad=name not in frozen)
        registry: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        registry[leaf] = made[id(value)]
