"""Operations that change a tensor in place, and who sees it under another name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from dspfx.graph.moves import is_move
from dspfx.graph.ops import IDENTITIES, IDENTITY_MODULES

_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
_SPLITS = ("chunk", "split", "unbind", "tensor_split")
# Methods and functions that may give their very input back.
_CASTS = {"to", "float", "double", "half", "bfloat16", "type", "type_as", "detach"}


def overwrites(gm: nn.Module | None, node: fx.Node) -> bool:
    """True where the node changes its first argument, a tensor given as `out`, or running statistics, in place.

    Modules are asked only where `gm`, which has them, is given.
    """
    if node.op == "call_module":
        return gm is not None and bool(getattr(gm.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or node.kwargs.get("out") is not None:
        return True
    if node.target in (F.batch_norm, F.instance_norm):
        return any(n.op == "get_attr" for n in node.all_input_nodes)
    place = _inplace_argument(node.target) if callable(node.target) else None
    flag = node.kwargs.get("inplace", node.args[place] if place is not None and len(node.args) > place else False)
    return flag is True


@cache
def _inplace_argument(function: Callable[..., Any]) -> int | None:
    """Where a function takes `inplace`."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def is_read_later(gm: nn.Module, node: fx.Node) -> bool:
    """True where the tensor that `node` overwrites is read after it under a name that existed before.

    Names of one tensor are it itself, what it is a view of, and views of that; the other parts of a split are not.
    """
    position = {other: i for i, other in enumerate(node.graph.nodes)}
    here = position[node]
    below: fx.Node | None = None
    above: Any = node.args[0] if node.args else None
    seen: set[fx.Node] = set()
    while isinstance(above, fx.Node):
        pending = [above]
        while pending:
            name = pending.pop()
            seen.add(name)
            for user in name.users:
                if position[user] > here:
                    return True
                is_sibling = name is above and below is not None and user is not below and _is_split(name)
                if user is not node and user not in seen and not is_sibling and _may_alias(gm, user):
                    pending.append(user)
        below, above = above, (above.args[0] if _may_alias(gm, above) and above.args else None)
    return False


def _is_split(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _SPLITS


def _may_alias(gm: nn.Module, node: fx.Node) -> bool:
    """True where the node's result may be its first argument's memory."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, IDENTITY_MODULES) or getattr(module, "inplace", False):
            return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _CASTS or node.target in IDENTITIES or is_move(gm, node) or overwrites(gm, node)
