"""Which optimizer really steps, below what training libraries and meta-optimizers wrap around it."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dspfx.errors import ConfigError

# Where wrappers keep it: Accelerate and SAM implementations, Lightning, timm's Lookahead.
_INSIDE = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer")


class Follower:
    """Something that hooks on an optimizer until `close()`, or the end of a `with`."""

    _optimizer: Optimizer
    _hooks: list[RemovableHandle]

    def close(self) -> None:
        """Takes the hooks off the optimizer; what they did stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def is_skipped(optimizer: Optimizer) -> bool:
    """In a hook after `optimizer.step()`: whether nothing was done, since gradients overflowed.

    With fused=True GradScaler calls step() even on overflow and leaves the decision to the kernel, which also writes
    the unscaled gradients back. An ordinary optimizer's step() is not called at all then.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def stepping_optimizer(optimizer: Any) -> Optimizer:
    """The innermost optimizer of the same parameters, whose `step()` runs torch's step hooks once for every step.

    A wrapper's own hooks need not run: Accelerate's has none, Lookahead never calls what would install them, and SAM
    is mostly stepped through other methods than `step()`.

    Raises:
        ConfigError: not a torch optimizer, or one whose class passes torch's hooks by.
    """
    found = optimizer
    while (inner := _inside(found)) is not None:
        found = inner
    if not isinstance(found, Optimizer):
        raise ConfigError(
            f"{type(found).__name__} is no optimizer that could be followed; give a torch.optim.Optimizer."
        )
    if not getattr(type(found).step, "hooked", False):  # torch's own mark, set by Optimizer.__init__
        raise ConfigError(
            f"The steps of {type(found).__name__} cannot be seen: its class never called torch.optim.Optimizer."
            "__init__, which makes step() run hooks. Give the optimizer that it wraps."
        )
    return found


def _inside(optimizer: Any) -> Optimizer | None:
    for name in _INSIDE:
        inner = getattr(optimizer, "__dict__", {}).get(name)
        if isinstance(inner, Optimizer) and inner is not optimizer and _owned(inner) == _owned(optimizer):
            return inner
    return None


def _owned(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
