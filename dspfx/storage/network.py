"""A lowered network as JSON and back: graph, layers and values, made only of what dspfx/allowed.py lists.

    gm -> {"nodes": [...], "layers": [...], "constants": {...}} -> a network of the same structure on the meta device

torch.fx turns a graph into Python source, so every name that reaches it is checked against a strict pattern first;
strings and numbers in arguments reach the source through repr(), which cannot end the literal.
"""

from __future__ import annotations

import inspect
import keyword
import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from dspfx.errors import StorageError
from dspfx.graph.layers import is_plain
from dspfx.graph.tracer import attribute
from dspfx.grouped import EMPTY, PaddedGroupConv2d
from dspfx.kernel_conv import KernelConv2d
from dspfx.modules import GroupConv2d
from dspfx.native import NativeChain
from dspfx.plans import Group
from dspfx.storage.allowed import ATTRIBUTES, FUNCTION_NAMES, FUNCTIONS, LAYER_NAMES, LAYERS, METHODS
from dspfx.storage.values import check_identifier, decode_value, encode_value, expect, look_up, short

_PATH_PART = re.compile(r"(?!__)[A-Za-z0-9_-]+", re.ASCII)
_RESERVED = frozenset(
    {"self", "torch", "torchvision", "dspfx", "inf", "nan", "NoneType", "device", "pytree", "fx_pytree"}
)
_WIDEST = 2**20  # channels; no layer has more
_OPTIONS = ("stride", "padding", "dilation", "bias", "padding_mode")  # of a GroupConv2d's branches
NATIVE = "dspfx.NativeChain"
_SPLIT = (GroupConv2d, PaddedGroupConv2d, KernelConv2d)
_INSTEAD = "Store this network with torch.export, or save the prepared one (dspfx.save before dspfx.lower) instead."


def encode_network(gm: fx.GraphModule) -> dict[str, Any]:
    """The JSON of `gm`'s graph and layers; StorageError that names what is not in the tables."""
    called = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "call_module")
    inner = next((a for a in called for b in called if a.startswith(f"{b}.")), None)
    if inner is not None:
        raise StorageError(f"{inner} is called by itself and is part of another called layer. {_INSTEAD}")
    first: dict[nn.Module, str] = {}
    layers: list[list[Any]] = []
    place = {name: i for i, (name, _) in enumerate(gm.named_modules(remove_duplicate=False))}
    for name in sorted(called, key=place.__getitem__):  # in the order that the containers have, and shall have again
        module = gm.get_submodule(name)
        if module in first:
            layers.append([name, "same", first[module]])
            continue
        first[module] = name
        layers.append([name, *_encode_layer(name, module)])
    attributes = dict.fromkeys(str(n.target) for n in gm.graph.nodes if n.op == "get_attr")
    constants = {name: _constant_kind(gm, name) for name in attributes if not _within(name, called)}
    return {"layers": layers, "constants": constants, "nodes": [_encode_node(n) for n in gm.graph.nodes]}


def decode_network(data: Any) -> tuple[nn.Module, fx.Graph]:
    """The modules, on the meta device and in eval mode, and the graph over them."""
    expect(data, dict, "the network")
    root = nn.Module()
    layers: dict[str, nn.Module] = {}
    for entry in expect(data.get("layers"), list, "the list of layers"):
        name, kind, options = expect(entry, list, "a layer", 3)
        layer = look_up(layers, options, "an earlier layer") if kind == "same" else _decode_layer(kind, options)
        _place(root, name, layers).add_module(name.rpartition(".")[2], layer)
        layers[name] = layer
    for name, kind in expect(data.get("constants"), dict, "the table of constants").items():
        parent, leaf = _place(root, name, layers), name.rpartition(".")[2]
        if kind == "parameter":
            parent.register_parameter(leaf, nn.Parameter(torch.empty(0, device="meta")))
        else:
            look_up({"buffer": None, "transient": None}, kind, "a kind of constant")
            parent.register_buffer(leaf, torch.empty(0, device="meta"), persistent=kind == "buffer")
    tensors = named_tensors(root)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for entry in expect(data.get("nodes"), list, "the list of nodes"):
        _decode_node(graph, nodes, layers, tensors, entry)
    operations = [n.op for n in graph.nodes]
    if operations.count("output") != 1 or operations[-1] != "output":
        raise StorageError("its graph does not end in its one output")
    return root.eval(), graph


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, persistent or not, under each of its names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def _encode_node(node: fx.Node) -> list[Any]:
    place = f"Node {node.name} ({node.op})"
    target: Any = node.target
    if node.op == "call_function":
        target = FUNCTION_NAMES.get(target)
        if target is None:
            name = f"{getattr(node.target, '__module__', '?')}.{getattr(node.target, '__name__', node.target)}"
            raise StorageError(f"{place} calls {name}(), which is not among the storable functions. {_INSTEAD}")
        if target == "getattr" and (len(node.args) != 2 or node.args[1] not in ATTRIBUTES):
            raise StorageError(f"{place} reads .{node.args[1]}, which is not a storable attribute. {_INSTEAD}")
    elif node.op == "call_method" and target not in METHODS:
        raise StorageError(f"{place} calls .{target}(), which is not among the storable methods. {_INSTEAD}")
    args, kwargs = (
        [encode_value(a, place, _INSTEAD) for a in node.args],
        encode_value(dict(node.kwargs), place, _INSTEAD)["dict"],
    )
    return [node.name, node.op, target, args, kwargs]


def _decode_node(
    graph: fx.Graph, nodes: dict[str, fx.Node], layers: dict[str, nn.Module], tensors: dict[str, Tensor], entry: Any
) -> None:
    name, op, target, args, kwargs = expect(entry, list, "a node", 5)
    check_identifier(name, "node")
    if name in nodes:
        raise StorageError(f"two nodes are called {name}")
    known = {} if op == "placeholder" else nodes  # a default value is written into the signature: no node exists there
    values = tuple(decode_value(a, known) for a in expect(args, list, f"the arguments of {name}"))
    named = {k: decode_value(v, known) for k, v in expect(kwargs, dict, f"the keywords of {name}").items()}
    for key in named:
        check_identifier(key, "keyword")
    function = target
    if op == "placeholder":
        check_identifier(re.sub(r"^\*{1,2}", "", expect(target, str, "an input's name")), "input")
        if target.strip("*") in _RESERVED or len(values) > 1 or named:
            raise StorageError(f"{short(target)} cannot be an input")
    elif op == "call_module":
        look_up(layers, target, "a layer of this network")
    elif op == "get_attr":
        look_up(tensors, target, "a tensor of this network")
    elif op == "call_method":
        look_up(dict.fromkeys(METHODS), target, "a storable method")
    elif op == "call_function":
        function = look_up(FUNCTIONS, target, "a storable function")
    elif op != "output" or target != "output" or len(values) != 1:
        raise StorageError(f"{short(op)} is no kind of node")
    if op == "call_method" or function is getattr:
        _check_receiver(name, function, values, named)
    nodes[name] = graph.create_node(op, function, values, named, name=name)


def _check_receiver(name: str, function: Any, values: tuple[Any, ...], named: dict[str, Any]) -> None:
    if not values or not isinstance(values[0], fx.Node):
        raise StorageError(f"{name} takes a method or attribute of something that is not a node")
    if function is getattr and (len(values) != 2 or named or not isinstance(values[1], str)):
        raise StorageError(f"{name} reads an attribute in an unknown way")
    if function is getattr:
        look_up(dict.fromkeys(ATTRIBUTES), values[1], "a storable attribute")


def _encode_layer(name: str, module: nn.Module) -> tuple[str, dict[str, Any]]:
    if type(module) is NativeChain:
        return NATIVE, {"network": encode_network(module.plain)}
    known = next((k for k in type(module).__mro__ if k in LAYER_NAMES), None)
    changed = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    # A subclass that computes what torch's class computes is stored as that class.
    if known is None or changed or (known is not type(module) and not is_plain(module, (known,))):
        what = f"{type(module).__module__}.{type(module).__qualname__}" + (" with hooks" if changed else "")
        raise StorageError(f"{name} is a {what}, which is not among the storable layers. {_INSTEAD}")
    kind = LAYER_NAMES[known]
    options = {key: encode_value(value, name, _INSTEAD) for key, value in _arguments(module, known).items()}
    twin = _decode_layer(kind, options)
    same = module.extra_repr() == twin.extra_repr() and list(map(repr, module.children())) == list(
        map(repr, twin.children())
    )
    if not same or _shapes(twin) != _shapes(module):
        raise StorageError(f"{name} is not what {type(module).__name__}'s arguments make of it. {_INSTEAD}")
    return kind, options


def _arguments(module: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """Constructor arguments that make this layer again, those left at their defaults omitted."""
    if isinstance(module, _SPLIT):
        groups = tuple((list(g.filters), list(g.channels)) for g in module.groups)
        branch = _arguments(module.branches[0] if isinstance(module, GroupConv2d) else module.conv, nn.Conv2d)
        own: dict[str, Any] = {"in_channels": module.in_channels, "out_channels": module.out_channels, "groups": groups}
        if isinstance(module, GroupConv2d) and module.rest_bias is not None:
            own["rest_bias"] = True
        return own | {key: branch[key] for key in ("kernel_size", *_OPTIONS) if key in branch}
    found: dict[str, Any] = {}
    for key, parameter in inspect.signature(kind).parameters.items():
        if key in ("device", "dtype") or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = getattr(module, key, parameter.default)
        if key == "bias":
            held = module.in_proj_bias if isinstance(module, nn.MultiheadAttention) else module.bias
            # A norm without weights has no bias either, whatever was asked for.
            value = held is not None or getattr(module, "weight", 0) is None
        elif key == "add_bias_kv":
            value = module.bias_k is not None
        if type(value) is not type(parameter.default) or value != parameter.default:
            found[key] = value
    return found


def _decode_layer(kind: Any, options: Any) -> nn.Module:
    if kind == NATIVE:
        return _decode_native(options)
    layer = look_up(LAYERS, kind, "a storable layer")
    values = {k: decode_value(v, {}) for k, v in expect(options, dict, f"the arguments of a {kind}").items()}
    allowed = {"in_channels", "out_channels", "kernel_size", "groups", *_OPTIONS}
    if issubclass(layer, GroupConv2d):
        allowed.add("rest_bias")
    if layer not in _SPLIT:
        allowed = set(inspect.signature(layer).parameters) - {"device", "dtype"}
    for key in values:
        look_up(dict.fromkeys(allowed), key, f"an argument of {kind}")
    if layer in _SPLIT:
        values["groups"] = _decode_groups(values, layer is PaddedGroupConv2d)
    with torch.device("meta"):
        return layer(**values)


def _decode_native(options: Any) -> NativeChain:
    network = expect(expect(options, dict, "a native chain").get("network"), dict, "a native chain's network")
    if any(
        NATIVE in entry for entry in expect(network.get("layers"), list, "the list of layers") if type(entry) is list
    ):
        raise StorageError("a native chain is part of another one")
    root, graph = decode_network(network)
    return NativeChain(fx.GraphModule(root, graph)).eval()


def _decode_groups(values: dict[str, Any], padded: bool) -> tuple[Group, ...]:
    """Checked before a constructor counts up to any of these numbers."""
    groups = tuple(Group(tuple(f), tuple(c)) for f, c in expect(values["groups"], tuple, "the groups"))
    width = min(values["in_channels"], _WIDEST)
    if not all(g.channels and all(type(c) is int and 0 <= c < width for c in g.channels) for g in groups):
        raise StorageError(f"a group convolution reads channels outside its {width}")
    filters, most = [o for g in groups for o in g.filters], values["out_channels"]
    least, room = (EMPTY, _WIDEST) if padded else (0, most)
    if not all(type(o) is int and least <= o < most for o in filters) or not (len(filters) <= room and most <= _WIDEST):
        raise StorageError(f"a group convolution's {values['out_channels']} filters are not those of its groups")
    return groups


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in named_tensors(module).items()}


def _constant_kind(gm: nn.Module, name: str) -> str:
    value, (path, _, leaf) = attribute(gm, name), name.rpartition(".")
    if not isinstance(value, Tensor):
        raise StorageError(f"{name} is a {type(value).__name__}, not a tensor. {_INSTEAD}")
    if isinstance(value, nn.Parameter):
        return "parameter"
    return "transient" if leaf in gm.get_submodule(path)._non_persistent_buffers_set else "buffer"


def _within(name: str, layers: Any) -> bool:
    """True for a part of one of the layers."""
    return any(name.startswith(f"{layer}.") for layer in layers)


def _place(root: nn.Module, path: Any, layers: dict[str, nn.Module]) -> nn.Module:
    """The container that `path` lies in, made where it is missing."""
    parts = expect(path, str, "a path").split(".")
    if not all(_PATH_PART.fullmatch(p) and not keyword.iskeyword(p) for p in parts) or _within(path, layers):
        raise StorageError(f"{short(path)} is no path of a layer or tensor")
    for part in parts[:-1]:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root
