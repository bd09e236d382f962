"""The prepared network inside of what a training library holds."""

from __future__ import annotations

from typing import Any

from torch import nn

from dspfx.errors import ConfigError, ModelError
from dspfx.graph.traced import Network, network_meta


def find_prepared(module: nn.Module, name: str | None = None) -> Network:
    """The one prepared network that `module` is or holds, or the one at the qualified `name`.

    Raises:
        ModelError: there is none.
        ConfigError: there are several and no name was given; they are listed.
    """
    if name is not None:
        try:
            module = module.get_submodule(name)
        except AttributeError as error:
            raise ConfigError(f"{type(module).__name__} has no module {name!r} ({error}).") from error
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        inside = any(path.startswith(f"{outer}.") or not outer for outer in found)
        if not inside and "gate_plan" in network_meta(part):
            found[path] = part
    if not found:
        raise ModelError(
            f"{type(module).__name__} holds no prepared network; put what dspfx.prepare returns into it first."
        )
    if len(found) > 1:
        raise ConfigError(
            f"{type(module).__name__} holds {len(found)} prepared networks ({', '.join(found)}); name the one that is "
            f"meant: network={next(iter(found))!r}."
        )
    return next(iter(found.values()))
