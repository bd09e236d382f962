"""Afterwards every layer that the graph computes from stored tensors is a module of torch's own.

F.conv2d(x, self.w, self.b)                 ->  w_layer (Conv2d)
F.conv2d(x, standardise(self.weight))       ->  conv_layer (Conv2d), its weight computed once
a parametrized layer                        ->  the layer, its weight computed once

What stays a function is what no module does in both modes: a batch norm that never trains.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from dspfx.graph.layers import FUNCTIONAL, Layer, arguments, attribute, is_constant, layer_of
from dspfx.graph.trace import has_effect
from dspfx.graph.traced import Model, TracedModule, TrainingFlag, parts_of
from dspfx.modules import replace_module, retyped

_CONVS: dict[Any, type[nn.Module]] = {
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}


def lift_layers(model: Model) -> Model:
    """Rewrites the graphs of `model`, in eval mode, in place; tensors that nobody reads any more are deleted."""
    for part in parts_of(model).values():
        _lift(part)
    return model


def _lift(gm: TracedModule) -> None:
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    for name, module in list(gm.named_modules()):
        if parametrize.is_parametrized(module):
            replace_module(gm, name, _plain(module))
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in FUNCTIONAL:
            continue
        module = _module(gm, node)
        if module is None:
            continue
        name = _free_name(gm, node)
        replace_module(gm, name, module.eval())
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(name, (arguments(node, ("input",))["input"],))
        call.meta.update(node.meta)
        node.replace_all_uses_with(call)
        gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        is_flag = node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), TrainingFlag)
        if is_flag and not node.users:
            gm.graph.erase_node(node)
            gm.delete_submodule(str(node.target))
    gm.graph.eliminate_dead_code(is_impure_node=has_effect)
    used = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    called = {str(n.target) for n in gm.graph.nodes if n.op == "call_module"}
    for path in read - used:
        parent, _, name = path.rpartition(".")
        if parent not in called:
            delattr(gm.get_submodule(parent), name)
    gm.recompile()


def _plain(module: Any) -> nn.Module:
    """A parametrized layer as its class was before, its computed tensors stored. Its present class is shared by all
    its copies, the user's model among them, so it cannot be changed."""
    kind = type(module).__mro__[1]
    plain = retyped(module, kind)
    for key in module.parametrizations:
        value = getattr(module, key)
        plain._parameters[key] = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
    del plain._modules["parametrizations"]
    return plain


def _module(gm: TracedModule, node: fx.Node) -> nn.Module | None:
    """The module that computes what a functional layer does; None where it depends on more than stored tensors."""
    given = arguments(node, FUNCTIONAL[node.target])
    layer = layer_of(gm, node)
    if layer is None:
        return _computed(gm, node, given)
    tensors = {key: layer.tensor(gm, key) for key in ("weight", "bias", "mean", "var")}
    if layer.family in ("conv", "linear"):
        return _weighted(node, given, tensors)
    shape = node.meta["val"].shape
    affine = layer.weight != "" or layer.bias != ""
    if node.target is F.batch_norm and given.get("training", False) is False:
        return None
    if layer.family == "norm":
        kinds = _BATCH_NORMS if node.target is F.batch_norm else _INSTANCE_NORMS
        kind: Any = kinds[len(shape)]
        norm = kind(shape[1], layer.eps, affine=affine, track_running_stats=layer.mean != "", device="meta")
    elif node.target is F.group_norm:
        norm = nn.GroupNorm(layer.groups, shape[1], layer.eps, affine, device="meta")
    else:
        norm = nn.LayerNorm(shape[-1:], layer.eps, affine, layer.bias != "", device="meta")
    tensors = {"running_mean": tensors.pop("mean"), "running_var": tensors.pop("var"), **tensors}
    return _filled(norm, tensors)


def _computed(gm: TracedModule, node: fx.Node, given: dict[str, Any]) -> nn.Module | None:
    """A convolution or linear layer whose weight is a function of stored tensors."""
    tensors = {key: given.get(key) for key in ("weight", "bias")}
    sources = [t for t in tensors.values() if t is not None]
    rest = [value for key, value in given.items() if key not in ("input", *tensors)]
    is_layer = node.target in _CONVS or node.target is F.linear
    if not is_layer or not all(isinstance(t, fx.Node) and is_constant(t) for t in sources):
        return None
    if any(isinstance(value, fx.Node) for value in rest):
        return None
    return _weighted(node, given, {key: _value(gm, t) for key, t in tensors.items() if t is not None})


def _weighted(node: fx.Node, given: dict[str, Any], tensors: dict[str, Any]) -> nn.Module:
    weight, has_bias = tensors["weight"], tensors.get("bias") is not None
    if node.target is F.linear:
        return _filled(nn.Linear(weight.shape[1], weight.shape[0], has_bias, device="meta"), tensors)
    kind: Any = _CONVS[node.target]
    options = {k: v for k, v in given.items() if k not in ("input", "weight", "bias")}
    groups = options.get("groups", 1)
    filters, channels = weight.shape[0], weight.shape[1] * groups
    if "output_padding" in FUNCTIONAL[node.target]:
        filters, channels = weight.shape[1] * groups, weight.shape[0]
    return _filled(kind(channels, filters, tuple(weight.shape[2:]), bias=has_bias, device="meta", **options), tensors)


def _filled(module: nn.Module, tensors: dict[str, Any]) -> nn.Module:
    """`module` over these tensors; a parameter it has none for (a norm with a bias alone) becomes what does nothing."""
    for key, held in [*module._parameters.items(), *module._buffers.items()]:
        if held is None:
            continue
        value = tensors.get(key)
        if value is None:
            like = next(t for t in tensors.values() if t is not None)
            dtype = like.dtype if held.is_floating_point() else held.dtype
            value = torch.full(held.shape, float(key == "weight"), dtype=dtype, device=like.device)
        if key in module._parameters and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
        setattr(module, key, value)
    return module


def _value(gm: TracedModule, node: fx.Node) -> Any:
    """What a constant node evaluates to."""
    if node.op == "get_attr":
        return attribute(gm, str(node.target))
    args: Any = fx.map_arg(node.args, lambda n: _value(gm, n))
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: _value(gm, n))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _free_name(gm: TracedModule, node: fx.Node) -> str:
    """A name beside the weight's, not taken yet."""
    layer: Layer | None = layer_of(gm, node)
    base = f"{layer.name}_layer" if layer else f"{node.name}_layer"
    taken, name, i = {n for n, _ in gm.named_modules()}, base, 1
    while name in taken:
        name, i = f"{base}_{i}", i + 1
    return name
