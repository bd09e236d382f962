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
class BlockConfig:
    """How weights fall into blocks, and how many of these become alike (MSWU; `dspfx.Unifier`, `dspfx.unify`).

    Attributes:
        shape: of a block: filters x input channels.
        prune: the fraction of all blocks that become zero, at least.
        unify: the fraction of all blocks whose weights get one absolute value, at least, as far as pruning leaves any.
        layout: "planes" tiles the filters x channels of each kernel position, "gemm" the matrix of filters x (channels
            x positions).
        scope: "layer": the fractions hold in each layer; "network": over all layers together, where it costs least.
        skip: qualified names of layers that stay as they are.
    """

    shape: tuple[int, int] = (4, 4)
    prune: float = 0.0
    unify: float = 0.5
    layout: Literal["planes", "gemm"] = "planes"
    scope: Literal["layer", "network"] = "layer"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = self.shape
        if not (isinstance(shape, (tuple, list)) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
            raise ConfigError(f"BlockConfig.shape is {shape!r}; give filters and channels of a block, such as (4, 4).")
        for name in ("prune", "unify"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f"BlockConfig.{name} is {value!r}; give the fraction of all blocks, from 0 to 1.")
        if self.prune + self.unify > 1 + 1e-9:
            raise ConfigError(
                f"BlockConfig.prune is {self.prune} and .unify {self.unify}, more than all blocks together; both are "
                "fractions of all blocks: their sum is at most 1."
            )
        if self.layout not in ("planes", "gemm"):
            raise ConfigError(f"BlockConfig.layout is {self.layout!r}; give 'planes' or 'gemm'.")
        if self.scope not in ("layer", "network"):
            raise ConfigError(f"BlockConfig.scope is {self.scope!r}; give 'layer' or 'network'.")
        if isinstance(self.skip, str):
            raise ConfigError(f"BlockConfig.skip is the string {self.skip!r}; give a tuple of names: ({self.skip!r},).")
        object.__setattr__(self, "shape", tuple(shape))
        object.__setattr__(self, "skip", tuple(self.skip))


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
