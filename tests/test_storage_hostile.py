"""A stored network is hostile until proven otherwise: nothing in a file becomes code, and damage is a StorageError."""

from __future__ import annotations

import copy
import inspect
import json
import random
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dspfx
from dspfx.errors import StorageError
from dspfx.graph import moves, ops
from dspfx.storage import allowed as allow_list
from dspfx.storage.network import decode_network
from tests.test_storage import metadata


class Tiny(nn.Module):
    """A layer, a method, an attribute, functions and a parameter of its own: every kind of node."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 2, 1), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)) * self.scale
        return y.view(x.shape[0], -1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    small = dspfx.lower(Tiny(), torch.randn(2, 3, 4, 4), tune=None)
    dspfx.save(small, tmp_path / "a")
    return tmp_path / "a"


def network(path: Path) -> Any:
    return json.loads(metadata(path)["network"])


def node(data: Any, op: str) -> list[Any]:
    """The first node of a kind: [name, op, target, args, kwargs]."""
    return next(entry for entry in data["nodes"] if entry[1] == op)


def refused(path: Path, data: Any, message: str) -> None:
    """Loading a file with this network raises exactly this."""
    save_file(load_file(path), path, metadata(path) | {"network": json.dumps(data)})
    whole = f"{path} is damaged, or was not written by dspfx.save: {message}."
    with pytest.raises(StorageError, match=f"^{re.escape(whole)}$"):
        dspfx.load(path)


def test_the_example_has_every_kind_of_node(path: Path) -> None:
    ops = {entry[1] for entry in network(path)["nodes"]}
    assert ops == {"placeholder", "call_module", "call_function", "call_method", "get_attr", "output"}
    assert isinstance(dspfx.load(path), nn.Module)


@pytest.mark.parametrize(
    "target",
    [
        *(
            "torch.load",
            "os.system",
            "builtins.eval",
            "eval",
            "exec",
            "builtins.getattr",
            "torch.hub.load",
            "torch.save",
        ),
        *("operator.attrgetter", "operator.methodcaller", "setattr", "__import__", "torch._assert.__globals__", ""),
        *("torch.ops.load_library", "torch.nn.functional.__builtins__", "torch.from_file", None, 7, ["torch.relu"]),
    ],
)
def test_functions_outside_the_table_are_refused(path: Path, target: Any) -> None:
    data = network(path)
    node(data, "call_function")[2] = target
    refused(path, data, f"{target!r} is not a storable function")


@pytest.mark.parametrize(
    "target",
    [
        *("__reduce__", "__class__", "apply_", "map_", "register_hook", "backward", "tofile", "numpy", "share_memory_"),
        *("view.__globals__", "_backward_hooks", "requires_grad_", "storage", "data_ptr", "view)(x", "format", None),
    ],
)
def test_methods_outside_the_table_are_refused(path: Path, target: Any) -> None:
    data = network(path)
    node(data, "call_method")[2] = target
    refused(path, data, f"{target!r} is not a storable method")


@pytest.mark.parametrize("name", ["__class__", "_backward_hooks", "grad_fn", "data", "__globals__", "shape.__class__"])
def test_attributes_outside_the_table_are_refused(path: Path, name: str) -> None:
    data = network(path)
    found = next(entry for entry in data["nodes"] if entry[2] == "getattr")
    found[3][1] = name
    refused(path, data, f"{name!r} is not a storable attribute")


def test_attributes_are_read_from_nodes_and_in_one_way(path: Path) -> None:
    data = network(path)
    found = next(entry for entry in data["nodes"] if entry[2] == "getattr")
    name = found[0]
    for args, kwargs, message in (
        (["x", "shape"], {}, f"{name} takes a method or attribute of something that is not a node"),
        ([{"node": "x"}, "shape", {"node": "x"}], {}, f"{name} reads an attribute in an unknown way"),
        ([{"node": "x"}, {"node": "x"}], {}, f"{name} reads an attribute in an unknown way"),
        ([{"node": "x"}, "shape"], {"default": 1}, f"{name} reads an attribute in an unknown way"),
    ):
        found[3], found[4] = args, kwargs
        refused(path, data, message)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "x): import os #",
            "x\n",
            "x=__import__('os')",
            "lambda",
            "__import__",
            "",
            "x y",
            "1x",
            "x;y",
            "x.y",
            "ｘ",
            "é",
            5,
        )
    ],
)
def test_names_that_would_reach_the_source_are_refused(path: Path, name: Any) -> None:
    whole = network(path)
    for place, what in ((2, "input"), (0, "node")):
        data = copy.deepcopy(whole)
        data["nodes"][0][place] = name
        message = f"{name!r} is no name of a {what}"
        refused(path, data, message if place == 0 or isinstance(name, str) else f"an input's name is {name!r}")
    if isinstance(name, str):
        data = copy.deepcopy(whole)
        node(data, "call_method")[4] = {name: 1}
        refused(path, data, f"{name!r} is no name of a keyword")


@pytest.mark.parametrize("name", ["torch", "self", "dspfx", "*torch", "inf", "device"])
def test_inputs_do_not_shadow_what_the_source_uses(path: Path, name: str) -> None:
    data = network(path)
    data["nodes"][0][2] = name
    refused(path, data, f"{name!r} cannot be an input")


def test_strings_in_arguments_stay_strings(path: Path) -> None:
    data, hostile = network(path), "'); __import__('os').system('exit 1') #\n\"\"\""
    first = data["nodes"][0]
    data["nodes"].insert(-1, ["note", "call_function", "torch._assert", [True, hostile], {}])
    first[3] = [hostile]  # a default value, which stands in the signature
    save_file(load_file(path), path, metadata(path) | {"network": json.dumps(data)})
    loaded = dspfx.load(path)
    assert [p.default for p in inspect.signature(loaded.forward).parameters.values()] == [hostile]
    assert [n.args for n in loaded.graph.nodes if n.name == "note"] == [(True, hostile)]
    assert loaded(torch.ones(1, 3, 2, 2)).shape == (1, 8)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"node": "later"}, "'later' is not an earlier node"),
        ({"node": ["x"]}, "['x'] is not an earlier node"),
        ({"dtype": "load"}, "'load' is not a dtype"),
        ({"memory_format": "float32"}, "'float32' is not a memory format"),
        ({"float": "1e400"}, "{'float': '1e400'} is no stored value"),
        ({"object": "os.system"}, "{'object': 'os.system'} is no stored value"),
        ({"slice": [0, 1]}, "{'slice': [0, 1]} is no stored value"),
        ({"tuple": [], "node": "x"}, "{'tuple': [], 'node': 'x'} is no stored value"),
        (2**63, f"{2**63} is no stored value"),
        ({}, "{} is no stored value"),
    ],
)
def test_values_outside_the_encoding_are_refused(path: Path, value: Any, message: str) -> None:
    data = network(path)
    node(data, "call_function")[3] = [value]
    refused(path, data, message)


@pytest.mark.parametrize(
    "kind", ["Transformer", "torch.nn.Transformer", "builtins.eval", "eval", "torch.nn.Module", None]
)
def test_layers_outside_the_table_are_refused(path: Path, kind: Any) -> None:
    data = network(path)
    data["layers"][0][1] = kind
    refused(path, data, f"{kind!r} is not a storable layer")


@pytest.mark.parametrize("target", ["", ".", "conv.", "__class__", "conv.__init__", "forward", "graph", "other", None])
def test_paths_of_no_layer_are_refused(path: Path, target: Any) -> None:
    whole = network(path)
    for op, what in (("call_module", "a layer of this network"), ("get_attr", "a tensor of this network")):
        data = copy.deepcopy(whole)
        node(data, op)[2] = target
        refused(path, data, f"{target!r} is not {what}")


@pytest.mark.parametrize(
    "name", ["", "a.", ".a", "a..b", "__class__", "a.__dict__", "if", 'a"); f("', "conv.weight", "a b"]
)
def test_names_of_layers_and_constants_are_checked(path: Path, name: str) -> None:
    data = network(path)
    data["constants"][name] = "buffer"
    refused(path, data, f"{name!r} is no path of a layer or tensor")


def test_names_that_modules_use_themselves_are_refused(path: Path) -> None:
    data = network(path)
    data["constants"]["forward"] = "buffer"
    refused(path, data, "\"attribute 'forward' already exists\"")


def test_arguments_of_layers_are_checked(path: Path) -> None:
    options = network(path)["layers"][0][2]
    group = {"in_channels": 10**12, "out_channels": 10**12, "kernel_size": 1}
    far = {"tuple": [{"tuple": [[0], [0, 10**12]]}]}
    for kind, values, message in (
        ("torch.nn.Conv2d", options | {"device": "cpu"}, "'device' is not an argument of torch.nn.Conv2d"),
        ("torch.nn.Conv2d", options | {"__class__": 1}, "'__class__' is not an argument of torch.nn.Conv2d"),
        ("dspfx.GroupConv2d", group | {"groups": far}, f"a group convolution reads channels outside its {2**20}"),
        (
            "dspfx.GroupConv2d",
            group | {"groups": {"tuple": [{"tuple": [[0], [0]]}]}},
            f"a group convolution's {10**12} filters are not those of its groups",
        ),
        ("dspfx.PaddedGroupConv2d", group | {"groups": far}, f"a group convolution reads channels outside its {2**20}"),
        (
            "dspfx.PaddedGroupConv2d",
            group | {"groups": {"tuple": [{"tuple": [[0, -1], [0]]}]}},
            f"a group convolution's {10**12} filters are not those of its groups",
        ),
        (
            "dspfx.PaddedGroupConv2d",
            group | {"out_channels": 2, "groups": {"tuple": [{"tuple": [[0, 10**12], [0]]}]}},
            "a group convolution's 2 filters are not those of its groups",
        ),
        (
            "dspfx.PaddedGroupConv2d",
            group | {"out_channels": 2, "groups": {"tuple": [{"tuple": [[0, "x"], [0]]}]}},
            "a group convolution's 2 filters are not those of its groups",
        ),
        (
            "dspfx.GroupConv2d",
            group | {"in_channels": 3, "out_channels": 2, "groups": {"tuple": [{"tuple": [[0, 2], [0]]}]}},
            "a group convolution's 2 filters are not those of its groups",
        ),
        (
            "torch.nn.Conv2d",
            options | {"out_channels": 4},
            "conv.weight is torch.float32 (2, 3, 1, 1), its layer (4, 3, 1, 1)",
        ),
        ("torch.nn.Identity", {}, "its tensors and its layers disagree about conv.bias"),
    ):
        data = network(path)
        data["layers"][0][1:] = [kind, values]
        refused(path, data, message)


def test_graphs_that_are_none_are_refused(path: Path) -> None:
    data = network(path)
    output = data["nodes"][-1]
    for nodes, message in (
        ([], "its graph does not end in its one output"),
        (data["nodes"][:-1], "its graph does not end in its one output"),
        ([*data["nodes"], data["nodes"][0]], "two nodes are called x"),
        ([*data["nodes"], ["again", *output[1:]]], "its graph does not end in its one output"),
        ([["x", "call_code", "x", [], {}]], "'call_code' is no kind of node"),
        ([["x", "placeholder", "x", []]], "a node is ['x', 'placeholder', 'x', []]"),
        ([["x", "placeholder", "x", {}, {}]], "the arguments of x is {}"),
        ({}, "the list of nodes is {}"),
    ):
        refused(path, data | {"nodes": nodes}, message)
    refused(path, [], "the network is []")
    refused(path, {}, "the list of layers is None")


def test_a_shared_tensor_must_be_in_the_file(path: Path) -> None:
    save_file(load_file(path), path, metadata(path) | {"shared": '{"conv.bias": "elsewhere"}'})
    with pytest.raises(StorageError, match="'elsewhere' is not a tensor of this file"):
        dspfx.load(path)


def test_json_that_nests_too_deep_is_refused(path: Path) -> None:
    save_file(load_file(path), path, metadata(path) | {"network": "[" * 100_000})
    with pytest.raises(StorageError, match=r"is damaged, or was not written by dspfx\.save: "):
        dspfx.load(path)


def test_nothing_but_tensor_arithmetic_is_in_the_tables() -> None:
    allowed = ("torch.", "torch.nn.functional.", "torch.fft.", "torchvision.ops.", "torchvision.swin.", "operator.")
    assert {name for name in allow_list.FUNCTIONS if not name.startswith(allowed)} == {"getattr", "dspfx.expect"}
    forbidden = re.compile("load|save|file|eval|exec|import|compile|script|hook|apply|numpy|storage|attrgetter|method")
    names = {*allow_list.FUNCTIONS, *allow_list.METHODS, *allow_list.LAYERS}
    assert [name for name in names if forbidden.search(name)] == []
    assert not any(name.startswith("_") for name in allow_list.METHODS | allow_list.ATTRIBUTES)


def test_every_operation_with_a_rule_can_be_stored() -> None:
    tables = (ops.POINTWISE, ops.BINARY, ops.POOLS, ops.REDUCTIONS, ops.IDENTITIES)
    known = {k for table in (*tables, moves.FUNCTIONS, moves.METHODS) for k in table}
    lost = [k for k in known if not (k in allow_list.METHODS if isinstance(k, str) else k in allow_list.FUNCTION_NAMES)]
    assert lost == []
    layers = {*ops.POINTWISE_MODULES, *ops.POOL_MODULES, *ops.IDENTITY_MODULES, *moves.MODULES}
    assert layers <= set(allow_list.LAYER_NAMES)


def test_damaged_bytes_raise_storage_errors_only(path: Path) -> None:
    content, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    outcomes = {"loaded": 0, "refused": 0}
    for trial in range(300):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 1, 3))):
            place = draw.randrange(header if trial % 3 else len(content))
            damaged[place] = draw.choice((draw.randrange(256), damaged[place] ^ (1 << draw.randrange(8))))
        path.write_bytes(damaged if trial % 5 else damaged[: draw.randrange(len(content))])
        outcomes[_outcome(path)] += 1
    assert outcomes["refused"] > 100
    assert sum(outcomes.values()) == 300


def test_exchanged_parts_of_the_network_raise_storage_errors_only(path: Path) -> None:
    whole, tensors, texts, draw = network(path), load_file(path), metadata(path), random.Random(1)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(150):
        data = copy.deepcopy(whole)
        spots = list(_spots(data))
        (owner, key), (other, place) = draw.choice(spots), draw.choice(spots)
        owner[key] = draw.choice((copy.deepcopy(other[place]), None, -1, [], {}, "torch", {"node": "x"}))
        save_file(tensors, path, texts | {"network": json.dumps(data)})
        outcomes[_outcome(path)] += 1
    assert outcomes["refused"] > 50
    assert sum(outcomes.values()) == 150


def _spots(value: Any) -> Any:
    items = list(enumerate(value)) if isinstance(value, list) else list(value.items())
    for key, item in items:
        yield value, key
        if isinstance(item, (list, dict)):
            yield from _spots(item)


def _outcome(path: Path) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dspfx.load(path)
    except StorageError:
        return "refused"
    return "loaded"


def test_decoding_builds_on_the_meta_device_alone(path: Path) -> None:
    data = network(path)
    data["layers"][0][2] |= {"in_channels": 10**6, "out_channels": 10**6}
    root, _ = decode_network(data)
    assert {p.device.type for p in root.parameters()} == {"meta"}
