"""What a GroupLearner and a Unifier refuse before they begin."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dspfx.errors import ConfigError, MismatchError


def check_arguments(total_steps: int, strength: float | str, mode: str, lr: float, start: str) -> None:
    """Raises ConfigError for an argument out of its range."""
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ConfigError(
            f"GroupLearner got total_steps={total_steps!r}; give the number of optimizer steps of the run, at least 1."
        )
    if mode not in ("fused", "exact"):
        raise ConfigError(f"GroupLearner got mode={mode!r}; give 'fused' or 'exact'.")
    if start not in ("clusters", "zeros"):
        raise ConfigError(f"GroupLearner got start={start!r}; give 'clusters' or 'zeros'.")
    if strength != "auto" and not (_is_number(strength) and float(strength) >= 0):
        raise ConfigError(f"GroupLearner got strength={strength!r}; give 'auto' or a number of at least 0.")
    if not (_is_number(lr) and lr > 0):
        raise ConfigError(f"GroupLearner got lr={lr!r}; give a positive number (the paper uses 1e-3).")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_optimizer(optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor]) -> None:
    """Raises MismatchError or ConfigError for an optimizer that cannot be followed; `weights` are by layer."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    missing = [name for name, weight in trained.items() if id(weight) not in owned]
    if missing:
        raise MismatchError(
            f"The optimizer does not own {missing[0] + '.weight'!r} ({len(missing)} of {len(trained)} trainable "
            "weights are missing); build it from the parameters of this very network (what dspfx.prepare returned is "
            "another one than the model), or freeze those weights with requires_grad_(False)."
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ConfigError("The optimizer has maximize=True, and a loss is minimised here: negate it instead.")
    if any(group.get("lr") is None for group in optimizer.param_groups):
        raise ConfigError(
            f"A parameter group of {type(optimizer).__name__} has no learning rate (lr is None), and weights are "
            "changed in steps of that size; give the optimizer one."
        )
