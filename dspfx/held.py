"""What a module prepares from its weights and keeps while they stay as they are, and the number it is known by."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn


class Held:
    """The tensors of a module as they are now; `holds` until one is another one or is changed in place.

    Changes of tensors that torch gives no version, those made in inference mode, are not seen.
    """

    def __init__(self, root: nn.Module) -> None:
        owners = [owner for module in root.modules() for owner in (module._parameters, module._buffers)]
        held = [(owner, name, tensor) for owner in owners for name, tensor in owner.items() if tensor is not None]
        self._places: list[tuple[dict[str, Any], str]] = [(owner, name) for owner, name, _ in held]
        self.tensors = [tensor for _, _, tensor in held]
        self._versions = [_version(tensor) for tensor in self.tensors]

    def holds(self) -> bool:
        """Whether all of them are as they were."""
        return all(
            owner[name] is tensor and _version(tensor) == version
            for (owner, name), tensor, version in zip(self._places, self.tensors, self._versions, strict=True)
        )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def is_recorded(device: torch.device) -> bool:
    """Whether an export or a trace looks on, or autocast changes types there: then plain layers shall run."""
    return (
        torch.compiler.is_exporting()
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled(device.type)
    )


_living: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def handle_of(module: nn.Module) -> int:
    """A new number by which an operation of torch.ops, which takes no modules, finds it as long as it lives."""
    number = next(_numbers)
    _living[number] = module
    return number


def module_of(handle: int) -> Any:
    """The living module with this number."""
    return _living[handle]
