"""What a layer is: the names of its tensors and what it does with them, be it a module or a functional call.

conv (nn.Conv2d)                              Layer("body.conv", "Conv2d", "conv", weight="body.conv.weight", ...)
F.conv2d(x, self.w, self.b, groups=2)         Layer("body.w", "F.conv2d", "conv", weight="body.w", groups=2, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torchvision.ops import FrozenBatchNorm2d

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
TENSORS = ("weight", "bias", "mean", "var")

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_BATCH_NORM = ("input", "mean", "var", "weight", "bias", "training", "momentum", "eps")
# Functional layers: their arguments in order, as Layer names the tensors.
FUNCTIONAL: dict[Any, tuple[str, ...]] = {
    F.conv1d: _CONV,
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    F.conv_transpose1d: _CONV_TRANSPOSE,
    F.conv_transpose2d: _CONV_TRANSPOSE,
    F.conv_transpose3d: _CONV_TRANSPOSE,
    F.linear: ("input", "weight", "bias"),
    F.batch_norm: _BATCH_NORM,
    F.instance_norm: ("input", "mean", "var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
}
_RENAMED = {"running_mean": "mean", "running_var": "var"}


@dataclass(frozen=True)
class Layer:
    """One layer by the qualified names of its tensors; "" where it has no such tensor.

    Attributes:
        name: of the module; of a functional call, its weight's name without ".weight".
        kind: torch's name for it, for people.
        family: "conv" (weight [O, C / groups, ...]; transposed [C, O / groups, ...]), "linear" (weight [O, C]),
            "norm" (every channel by itself) or "coupled" (channels are normalised together, in `groups` groups).
        axis: where the input's channels stand.
        mean, var: running statistics; "" where those of the batch are used.
    """

    name: str
    kind: str
    family: Literal["conv", "linear", "norm", "coupled"]
    weight: str = ""
    bias: str = ""
    mean: str = ""
    var: str = ""
    axis: int = 1
    groups: int = 1
    transposed: bool = False
    eps: float = 0.0

    def tensor(self, model: nn.Module, key: str) -> Tensor | None:
        """The tensor called `key` ("weight", "bias", "mean", "var") in `model`."""
        path = getattr(self, key)
        return attribute(model, path) if path else None

    def by_filter(self, weight: Tensor) -> Tensor:
        """A weight of this layer as [O, C / groups, kernel], a view where groups is 1 or it is not transposed."""
        if self.transposed and self.groups > 1:
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        elif self.transposed:
            weight = weight.transpose(0, 1)
        return weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)


def layer_of(part: nn.Module, node: fx.Node, prefix: str = "") -> Layer | None:
    """The layer that `node` computes, named from the model that has `part` under `prefix`; None where it is none.

    A module with hooks, parametrizations or a forward of its own is none.
    """
    if node.op == "call_module":
        name = str(node.target)
        return _of_module(part.get_submodule(name), prefix + name)
    names = FUNCTIONAL.get(node.target) if node.op == "call_function" else None
    return _of_call(part, node, prefix, names) if names else None


def _of_module(module: Any, name: str) -> Layer | None:
    def path(key: str) -> str:
        return f"{name}.{key}" if getattr(module, key, None) is not None else ""

    kind = type(module).__name__.removeprefix("Gated")
    paths: dict[str, Any] = {"weight": path("weight"), "bias": path("bias")}
    if is_plain(module, (*CONVS, *TRANSPOSED)):
        transposed = isinstance(module, TRANSPOSED)
        return Layer(name, kind, "conv", **paths, groups=module.groups, transposed=transposed)
    if is_plain(module, (nn.Linear,)):
        return Layer(name, kind, "linear", **paths, axis=-1)
    if is_plain(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        paths |= {"mean": path("running_mean"), "var": path("running_var")}
        return Layer(name, kind, "norm", **paths, eps=module.eps)
    if is_plain(module, (nn.GroupNorm,)):
        return Layer(name, kind, "coupled", **paths, groups=module.num_groups, eps=module.eps)
    if is_plain(module, (nn.LayerNorm,)) and len(module.normalized_shape) == 1:
        return Layer(name, kind, "coupled", **paths, axis=-1, eps=module.eps)
    return None


def _of_call(part: nn.Module, node: fx.Node, prefix: str, names: tuple[str, ...]) -> Layer | None:
    given = arguments(node, names)
    paths: dict[str, Any] = {}
    for key in TENSORS:
        source = given.get(key)
        if source is None:
            continue
        if not (isinstance(source, fx.Node) and source.op == "get_attr" and _is_tensor(part, str(source.target))):
            return None  # computed by the model itself
        paths[key] = prefix + str(source.target)
    kind = f"F.{node.target.__name__}"  # type: ignore[union-attr]
    name = (paths.get("weight") or paths.get("mean") or prefix + node.name).removesuffix(".weight")
    if node.graph.find_nodes(op="call_module", target=name.removeprefix(prefix)):  # a second use of a layer's weight
        name = prefix + node.name
    groups, eps = given.get("groups", 1), given.get("eps", 1e-5)
    steered = {"input", *TENSORS, "training", "use_input_stats", "momentum"}
    literals = [value for key, value in given.items() if key not in steered]
    if any(isinstance(leaf, fx.Node) for leaf in pytree.tree_leaves(literals)):
        return None
    if node.target in (F.batch_norm, F.instance_norm):
        batch = given.get("use_input_stats", True) if node.target is F.instance_norm else given.get("training", False)
        if batch is True:
            paths.pop("mean", None), paths.pop("var", None)
        return Layer(name, kind, "norm", **paths, eps=eps)
    if node.target is F.group_norm:
        return Layer(name, kind, "coupled", **paths, groups=given["num_groups"], eps=eps)
    if node.target is F.layer_norm:
        return Layer(name, kind, "coupled", **paths, axis=-1, eps=eps) if len(given["normalized_shape"]) == 1 else None
    if "weight" not in paths:
        return None
    if node.target is F.linear:
        return Layer(name, kind, "linear", **paths, axis=-1)
    if "output_padding" in names:
        return Layer(f"{name}_transposed", kind, "conv", **paths, groups=groups, transposed=True)
    return Layer(name, kind, "conv", **paths, groups=groups)


def evaluated(value: Any, read: Callable[[fx.Node], Any]) -> Any:
    """An argument of a node with its nodes read, in plain lists and dicts: torch.fx's own cannot be changed in place,
    as a function may do."""
    if isinstance(value, fx.Node):
        return read(value)
    if type(value) is tuple:
        return tuple(evaluated(v, read) for v in value)
    if isinstance(value, list):
        return [evaluated(v, read) for v in value]
    if isinstance(value, dict):
        return {key: evaluated(v, read) for key, v in value.items()}
    return fx.map_arg(value, read)


def arguments(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The node's arguments by Layer's names for them."""
    named = {_RENAMED.get(key, key): value for key, value in node.kwargs.items()}
    return dict(zip(names, node.args, strict=False)) | named


def _is_tensor(part: nn.Module, path: str) -> bool:
    return isinstance(attribute(part, path), Tensor)


def is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """True for a layer that computes what its torch class computes: no override, hook or parametrization."""
    base = next((k for k in kinds if isinstance(module, k)), None)
    if base is None or hasattr(module, "parametrizations"):
        return False
    return not (overrides(module, base) or has_hooks(module))


def overrides(module: nn.Module, base: type[nn.Module]) -> bool:
    """True where the module's class, or the module itself, replaces what `base` computes."""
    names = [name for name in ("forward", "_conv_forward") if hasattr(base, name)]
    return any(getattr(type(module), n) is not getattr(base, n) or n in module.__dict__ for n in names)


def has_hooks(module: nn.Module) -> bool:
    """True where calling the module may do more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def is_constant(node: fx.Node) -> bool:
    """True where the node's value depends on stored tensors and literals alone."""
    pending, seen = [node], set()
    while pending:
        one = pending.pop()
        if one.op in ("placeholder", "call_module"):
            return False
        seen.add(one)
        pending += [n for n in one.all_input_nodes if n not in seen]
    return True


def stored(part: nn.Module, node: Any) -> Tensor | None:
    """The parameter or buffer that a get_attr node reads."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = attribute(part, str(node.target))
    return value if isinstance(value, torch.Tensor) else None


def attribute(root: nn.Module, path: str) -> Any:
    """`root.a.b.c` for the path "a.b.c"."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value
