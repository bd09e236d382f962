"""One safetensors file a network: tensors, and in the header's metadata JSON that says what they belong to. No pickle.

prepared, trained or pruned ("gated"):  gate plan, example inputs, state_dict   -> needs an instance of the class
lowered ("lowered"):                    graph, layers, lower plan, all tensors  -> needs nothing
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.errors import DspfxError, StorageError
from dspfx.graph.inputs import propagate
from dspfx.graph.trace import trace
from dspfx.graph.traced import TracedModule
from dspfx.modules import GatedConv2d
from dspfx.passes.insert_gates import insert_gates
from dspfx.plans import GatePlan, LowerPlan
from dspfx.storage.network import decode_network, encode_network, named_tensors
from dspfx.storage.values import decode_value, encode_value, expect, look_up

FORMAT = 1
_INPUTS_REMEDY = "Use example inputs made of tensors, numbers, strings, and lists, tuples or dicts of them."


@dataclass(frozen=True)
class _File:
    path: Path
    kind: str
    tensors: dict[str, Tensor]
    texts: dict[str, str]

    def read(self, key: str) -> Any:
        """The JSON under a key of the metadata."""
        return json.loads(look_up(self.texts, key, "in its metadata"))


def save(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a prepared, trained, pruned or lowered network into one safetensors file; `module` is left as it was.

    The file appears whole or not at all. What is shared (tied weights) is stored once. The mode is not stored.

    Raises:
        StorageError: `module` is none of dspfx's, it holds something that has no stored form (named, with what to do
            instead), or `path` cannot be written.
    """
    meta = module.meta if isinstance(module, TracedModule) else {}
    if "gate_plan" in meta:
        kind, named, texts = "gated", module.state_dict(keep_vars=True), _describe_gated(meta)
    elif "lower_plan" in meta:
        assert isinstance(module, TracedModule)
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
    texts["inputs"] = json.dumps(_encode_inputs(meta["inputs"]))
    tensors = {name: _plain(named[name]) for name in first.values()}
    _write(Path(path), tensors, {"dspfx": str(FORMAT), "kind": kind, **texts})


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> TracedModule:
    """Reads what `save` wrote; `model` is left as it was. Nothing in the file is ever run as code.

    Args:
        path: the file. It may come from anywhere: only what dspfx/allowed.py lists is built from it, though like
            any network it may ask for more time or memory than there is.
        model: for a prepared, trained or pruned network, an instance of the class it was prepared from; its values
            do not matter, its device, dtype and mode are kept. A lowered network needs none: it comes on the CPU, in
            eval mode, with bit-identical outputs.

    Raises:
        StorageError: the file is missing, truncated, damaged or of a newer version, or `model` is missing, is not
            needed, or is another network than the one saved (names the first key or shape that disagrees).
    """
    file = _read(Path(path))
    if file.kind == "lowered":
        if model is not None:
            raise StorageError(f"{file.path} holds a lowered network, which needs no model: dspfx.load({str(path)!r}).")
        with _decoding(file.path):
            return _load_lowered(file)
    with _decoding(file.path):
        plan = GatePlan.from_json(look_up(file.texts, "gate_plan", "in its metadata"))
        inputs, tensors = _decode_inputs(file.read("inputs")), _shared_out(file)
        owner = expect(file.read("class"), str, "the class of its model")
    if model is None:
        raise StorageError(
            f"{file.path} holds a prepared {owner}, which needs an instance of that class: "
            f"dspfx.load({str(path)!r}, model={owner.rpartition('.')[2]}(...))."
        )
    return _load_gated(file, model, owner, plan, inputs, tensors)


def _describe_gated(meta: dict[str, Any]) -> dict[str, str]:
    owner = meta["user_class"]
    return {
        "gate_plan": meta["gate_plan"].to_json(),
        "class": json.dumps(f"{owner.__module__}.{owner.__qualname__}"),
    }


def _describe_lowered(gm: TracedModule) -> tuple[dict[str, Tensor], dict[str, str]]:
    network = json.dumps(encode_network(gm), allow_nan=False)
    twin, _ = decode_network(json.loads(network))  # what could not be read again is not written
    held = named_tensors(gm)
    named = {name: held[name] for name in named_tensors(twin)}
    return named, {
        "network": network,
        "lower_plan": gm.meta["lower_plan"].to_json(),
        "frozen": json.dumps([n for n, v in named.items() if isinstance(v, nn.Parameter) and not v.requires_grad]),
        "channels_last": json.dumps([n for n, v in named.items() if _is_channels_last(v)]),
    }


def _load_lowered(file: _File) -> TracedModule:
    root, graph = decode_network(file.read("network"))
    plan = LowerPlan.from_json(look_up(file.texts, "lower_plan", "in its metadata"))
    inputs = _decode_inputs(file.read("inputs"))
    _fill(root, file)
    gm = TracedModule.over(root, graph, {"lower_plan": plan})
    gm.graph.lint()
    propagate(gm, _following(inputs, gm))
    return gm


def _load_gated(
    file: _File, model: nn.Module, owner: str, plan: GatePlan, inputs: Inputs, tensors: dict[str, Tensor]
) -> TracedModule:
    _check_fit(file.path, model, owner, plan, tensors)
    try:
        gm = insert_gates(trace(model, _following(inputs, model)), plan)
    except DspfxError as error:
        raise StorageError(f"{file.path} does not fit this {type(model).__name__}: {error}") from error
    gm.load_state_dict(tensors)
    for name, module in gm.named_modules():
        if isinstance(module, GatedConv2d):
            low, high = int(module.gate_group.min()), int(module.gate_group.max())
            if low < -1 or high >= module.gate_groups or not module.gate_groups:
                raise StorageError(
                    f"{file.path} is damaged: {name} puts filters into groups {low} to {high} of {module.gate_groups}."
                )
    return gm


def _check_fit(path: Path, model: nn.Module, owner: str, plan: GatePlan, tensors: dict[str, Tensor]) -> None:
    """StorageError unless model and gate plan have exactly the file's keys and shapes."""
    kind = type(model).__name__
    if any(isinstance(m, GatedConv2d) for m in model.modules()):
        raise StorageError(f"the model given for {path} is prepared already; give a fresh instance of {owner}.")
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for spec in plan.layers:
        expected[f"{spec.name}.gate_logits"] = (spec.groups, spec.out_channels)
        expected[f"{spec.name}.gate_group"] = (spec.out_channels,)
        expected[f"{spec.name}.gate_keep"] = (spec.groups, spec.in_channels)
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in expected | found:
        if expected.get(name) != found.get(name):
            here, there = (f"shape {d[name]}" if name in d else "no such tensor" for d in (found, expected))
            raise StorageError(
                f"{path} does not fit this {kind}: at {name} the file has {here}, the model {there}. Give an instance "
                f"of {owner} built with the arguments it had when it was prepared."
            )


def _fill(root: nn.Module, file: _File) -> None:
    """Puts the file's tensors in the place of the meta tensors of `root`."""
    tensors, places = _shared_out(file), named_tensors(root)
    for name in tensors | places:
        if name not in tensors or name not in places:
            raise StorageError(f"its tensors and its layers disagree about {name}")
    frozen, channels_last = ({*expect(file.read(key), list, key)} for key in ("frozen", "channels_last"))
    made: dict[int, Tensor] = {}  # by the tensor in the file: what was shared stays shared
    for name, place in places.items():
        value, (path, _, leaf) = tensors[name], name.rpartition(".")
        owner = root.get_submodule(path)
        fits = value.shape == place.shape and value.is_floating_point() == place.is_floating_point()
        if type(owner) is not nn.Module and not fits:  # a layer's; the constants of a container may have any shape
            raise StorageError(f"{name} is {value.dtype} {tuple(value.shape)}, its layer {tuple(place.shape)}")
        if id(value) not in made:
            made[id(value)] = value.contiguous(memory_format=torch.channels_last) if name in channels_last else value
            if leaf in owner._parameters:
                made[id(value)] = nn.Parameter(made[id(value)], requires_grad=name not in frozen)
        registry: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        registry[leaf] = made[id(value)]


def _shared_out(file: _File) -> dict[str, Tensor]:
    shared = expect(file.read("shared"), dict, "its table of shared tensors")
    return file.tensors | {
        name: look_up(file.tensors, first, "a tensor of this file") for name, first in shared.items()
    }


def _encode_inputs(inputs: Inputs) -> Any:
    return encode_value([list(inputs.args), dict(inputs.kwargs)], "The example input", _INPUTS_REMEDY)


def _decode_inputs(data: Any) -> Inputs:
    args, kwargs = expect(decode_value(data, {}), list, "its example inputs", 2)
    return Inputs(*args, **kwargs)


def _following(inputs: Inputs, module: nn.Module) -> Inputs:
    """Floating inputs in the one type that the module has: it may have been converted since it was traced."""
    dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if len(dtypes) != 1:
        return inputs
    [dtype] = dtypes
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (inputs.args, inputs.kwargs)
    )
    return Inputs(*args, **kwargs)


def _plain(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _is_channels_last(value: Tensor) -> bool:
    if value.dim() != 4:
        return False
    # By strides: a tensor of one pixel is contiguous in both formats, and convolutions still tell them apart.
    like = [
        torch.empty(value.shape, device="meta", memory_format=f) for f in (torch.channels_last, torch.contiguous_format)
    ]
    return value.stride() == like[0].stride() != like[1].stride()


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        save_file(tensors, part, metadata)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path} cannot be written ({error}); give a file in a folder that can be.") from error
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> _File:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copied: a mapped file could change underneath, and kernels sum in another order on unaligned memory.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist; give a file that dspfx.save wrote.") from error
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path} is no safetensors file, or a part of one ({error}); give a file that dspfx.save wrote, or copy it "
            f"again."
        ) from error
    version = metadata.get("dspfx", "")
    if not version.isdecimal():
        raise StorageError(f"{path} is a safetensors file without a network of dspfx; dspfx.save writes those.")
    if int(version) > FORMAT:
        raise StorageError(
            f"{path} was written in format {version} by a newer dspfx, this one reads up to format {FORMAT}; upgrade "
            f"dspfx: pip install --upgrade dspfx."
        )
    kind = metadata.get("kind", "")
    if kind not in ("gated", "lowered"):
        raise StorageError(f"{path} is damaged: it holds a {kind!r}, which is neither gated nor lowered.")
    return _File(path, kind, tensors, metadata)


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torch raises nearly every built-in exception on content that makes no sense
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(f"{path} is damaged, or was not written by dspfx.save: {lines[0].rstrip('.')}.") from error
