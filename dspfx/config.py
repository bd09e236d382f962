"""What a user chooses, checked where it is written: one frozen dataclass a stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from dspfx.errors import BudgetError, ConfigError


@dataclass(frozen=True)
class GateConfig:
    """How convolutions are gated and how their groups are learned (DSP, section 3).

    Attributes:
        groups: groups a layer, G; clamped to what a layer can hold.
        tau: temperature of the Gumbel softmax over groups.
        noise: "textbook" divides logits and Gumbel noise by tau; "authors" divides the logits only, as their
            released code does.
        cost: "flops" weighs a layer's regulariser by the size of its input activation, "params" does not.
        linear: gate linear layers too (as 1x1 convolutions of one position), such as the MLPs of transformers.
        skip: qualified names of layers that get no gate.
        balanced: equal groups, and in each of a layer's groups the same number of channels, a multiple of 8 where the
            layer holds two: what one grouped convolution runs without waste. Dead filters and channels, which go
            too, can leave less in a group.
    """

    groups: int = 4
    tau: float = 0.5
    noise: Literal["textbook", "authors"] = "textbook"
    cost: Literal["flops", "params"] = "flops"
    linear: bool = False
    skip: tuple[str, ...] = ()
    balanced: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.groups, bool) or not isinstance(self.groups, int) or self.groups < 1:
            raise ConfigError(f"GateConfig.groups is {self.groups!r}; give an integer of at least 1 (2 to 4 is usual).")
        if not (isinstance(self.tau, (int, float)) and math.isfinite(self.tau) and self.tau > 0):
            raise ConfigError(f"GateConfig.tau is {self.tau!r}; give a positive number (the paper uses 0.5).")
        if self.noise not in ("textbook", "authors"):
            raise ConfigError(f"GateConfig.noise is {self.noise!r}; give 'textbook' or 'authors'.")
        if self.cost not in ("flops", "params"):
            raise ConfigError(f"GateConfig.cost is {self.cost!r}; give 'flops' or 'params'.")
        for name in ("linear", "balanced"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"GateConfig.{name} is {getattr(self, name)!r}; give True or False.")
        if isinstance(self.skip, str):
            raise ConfigError(f"GateConfig.skip is the string {self.skip!r}; give a tuple of names: ({self.skip!r},).")
        object.__setattr__(self, "skip", tuple(self.skip))


DEFAULT_GATES = GateConfig()


@dataclass(frozen=True)
class Budget:
    """Fractions of the dense network that REMAIN, each in (0, 1]; all those given hold at once.

    Attributes:
        flops: multiply-adds of convolutions and linear layers, over the whole network.
        params: weights of convolutions and linear layers, over the whole network.
        latency: measured time of the lowered network on a runtime, to that of the dense network there.
    """

    flops: float | None = None
    params: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise BudgetError(
                    f"Budget.{field.name} is {value!r}; give the fraction that remains, in (0, 1]: "
                    f"Budget({field.name}=0.35) keeps 35%."
                )
        if self.flops is None and self.params is None and self.latency is None:
            raise BudgetError("Budget() names nothing to meet; give at least one fraction, such as Budget(flops=0.35).")

    def __str__(self) -> str:
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return f"Budget({', '.join(f'{name}={value}' for name, value in given if value is not None)})"


class Inputs:
    """Example inputs with keywords: `Inputs(image, mask=m)` calls `model(image, mask=m)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.kwargs = kwargs

    @classmethod
    def of(cls, example_inputs: Any) -> Inputs:
        """Reads the contract's shorthand: a tuple is the positional arguments, anything else is the only one."""
        if isinstance(example_inputs, Inputs):
            return example_inputs
        return cls(*example_inputs) if isinstance(example_inputs, tuple) else cls(example_inputs)
