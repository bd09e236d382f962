"""What `python -m dspfx compress` was told, checked and completed with defaults."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from dspfx.cli import forks, models
from dspfx.cli.arguments import DEFAULTS, share
from dspfx.cli.data import DataConfig
from dspfx.cli.distill import Distill
from dspfx.cli.training import Recipe, Stage
from dspfx.config import BlockConfig, Budget, GateConfig
from dspfx.deploy.runtimes import find_runtime
from dspfx.errors import ConfigError


@dataclass(frozen=True)
class Epochs:
    """Epochs of each stage: the dense network, learning its groups, fine-tuning what is left, unifying (twice)."""

    dense: int
    learn: int
    tune: int
    unify: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(f"--epochs-{field.name} is {getattr(self, field.name)}; give 0 or more.")


# What depends on the data; digits take minutes on two cores.
QUICK = {"epochs_dense": 10, "epochs_learn": 6, "epochs_tune": 10, "epochs_unify": 5, "batch_size": 64, "lr_tune": 0.1}
FULL = {
    "epochs_dense": 120,
    "epochs_learn": 60,
    "epochs_tune": 60,
    "epochs_unify": 30,
    "batch_size": 128,
    "lr_tune": 0.05,
}


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers of a run depend on, the machine excepted; a run resumes only with the same ones."""

    fork: str | None
    model: str
    checkpoint: str | None
    data: DataConfig
    recipe: Recipe
    epochs: Epochs
    lr: float
    lr_tune: float
    cycles: int
    blocks: BlockConfig
    bits: float
    distill: Distill
    gates: GateConfig
    budget: Budget
    runtime: str
    mode: Literal["fused", "exact"]
    strength: float | Literal["auto", "steered"]
    one_shot: bool
    dense_control: bool

    def __post_init__(self) -> None:
        models.check_name(self.model)
        find_runtime(self.runtime)
        for name in ("lr", "lr_tune"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give a positive number.")
        if self.one_shot and self.dense_control:
            raise ConfigError(
                "--dense-control trains the dense network as long as the pruned one, and --one-shot trains none; "
                "leave one of them out."
            )
        if self.cycles < 1 or (self.cycles > 1 and self.epochs.tune < self.cycles):
            raise ConfigError(
                f"--cycles is {self.cycles}, with {self.epochs.tune} epochs of fine-tuning; give at least 1, and an "
                "epoch (--epochs-tune) for each."
            )
        if self.bits != 32 and not 0.5 <= self.bits <= 8:
            raise ConfigError(f"--bits is {self.bits:g}; give 0.5 to 8, or 32 for values as they were trained.")
        if self.distill.share > 0 and self.epochs.tune == 0:
            raise ConfigError("--distill is for fine-tuning, and there is none; give --epochs-tune, or leave it out.")
        if self.distill.share > 0 and not self.is_dense_trained:
            raise ConfigError(
                "--distill needs a trained dense network to learn from, and this one is random; give --checkpoint or "
                "--epochs-dense."
            )

        if self.strength == "steered" and self.steered_by is None and self.fork is None:
            raise ConfigError("--strength steered needs flops or params in --budget to steer by; add one of them.")

    @property
    def trains_values(self) -> bool:
        """Whether the few values of --bits are found before the last epochs and train in them, not only rounded to."""
        return self.epochs.unify > 0 and self.bits != 32

    @property
    def steered_by(self) -> Budget | None:
        """What the strength is steered by: of the budget, what is counted and not measured."""
        return self.counted if self.strength == "steered" else None

    @property
    def counted(self) -> Budget | None:
        """Of the budget what is counted and not measured, if anything."""
        is_counted = self.budget.flops is not None or self.budget.params is not None
        return replace(self.budget, latency=None) if is_counted else None

    @property
    def is_dense_trained(self) -> bool:
        """False where the dense network is one of random weights."""
        return self.checkpoint is not None or self.epochs.dense > 0

    @property
    def is_unified(self) -> bool:
        """Whether blocks of weights become alike."""
        return self.blocks.unify + self.blocks.prune > 0

    def stage(self, name: str) -> Stage:
        """The stage called dense, learn or control; control sees what all after the dense training see."""
        learn = (self.epochs.learn, self.lr)
        after = [stage for _, stage in self.tuning()] + (self.unifying() if self.epochs.unify else [])
        tuning = tuple(cycle for stage in after for cycle in stage.cycles)
        return {
            "dense": Stage("dense", ((self.epochs.dense, self.lr),)),
            "learn": Stage("learn", (learn,), keep="last"),
            "control": Stage("control", (learn, *tuning)),
        }[name]

    def tuning(self) -> list[tuple[Budget, Stage]]:
        """(what to prune to, the epochs that follow) for each cycle.

        The budgets fall geometrically from 1 to the one asked for: every cycle takes the same share of what the one
        before has left. Epochs that do not divide go to the last cycles, which have the most to repair.
        """
        found, first = [], self.epochs.learn
        for number in range(1, self.cycles + 1):
            shares = {name: value ** (number / self.cycles) for name, value in asdict(self.budget).items() if value}
            budget = self.budget if number == self.cycles else Budget(**shares)
            epochs = (self.epochs.tune + number - 1) // self.cycles
            name = "tune" if self.cycles == 1 else f"tune-{number}"
            found.append((budget, Stage(name, ((epochs, self.lr_tune),), first_epoch=first)))
            first += epochs
        return found

    def unifying(self) -> list[Stage]:
        """Towards blocks that are alike, and with them."""
        first, cycle = self.epochs.learn + self.epochs.tune, (self.epochs.unify, self.lr_tune)
        return [
            Stage("unify", (cycle,), first_epoch=first, keep="last"),
            Stage("settle", (cycle,), first_epoch=first + self.epochs.unify),
        ]

    def flat(self) -> dict[str, Any]:
        """Option -> value, for the files of a run."""
        result: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name == "epochs":
                result |= {f"epochs_{stage}": count for stage, count in value.items()}
            elif name == "budget":
                result["budget"] = [f"{what}={share}" for what, share in value.items() if share is not None]
            elif name == "gates":
                result["groups"] = value["groups"]
            elif name == "blocks":
                a, b = value["shape"]
                result |= {"unify": value["unify"], "prune_blocks": value["prune"], "block": f"{a}x{b}"}
            elif name == "distill":
                result |= {"distill": value["share"], "temperature": value["temperature"]}
            elif name in ("data", "recipe"):
                result |= value
            else:
                result[name] = value
        result["data"] = result.pop("spec")
        return result


def block_shape(text: str) -> tuple[int, int]:
    """The type of --block: "4x4" -> (4, 4)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ConfigError(f"--block is {text!r}; give filters x input channels, such as 4x4 or 16x1.")
    return int(parts[0]), int(parts[1])


def read_settings(args: argparse.Namespace) -> Settings:
    """The checked settings; raises ConfigError or BudgetError that names the option."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "fork" in given:
        found = DEFAULTS | forks.inherited(given) | given
    else:
        found = DEFAULTS | (QUICK if given.get("data", DEFAULTS["data"]) == "digits" else FULL) | given
        if found["checkpoint"] is not None and "epochs_dense" not in given:
            found["epochs_dense"] = 0
        if found["one_shot"]:
            found["epochs_learn"] = 0
    return Settings(
        fork=found["fork"],
        model=found["model"],
        checkpoint=found["checkpoint"],
        data=DataConfig(
            spec=found["data"],
            image_size=found["image_size"],
            mean=tuple(found["mean"]),
            std=tuple(found["std"]),
            flip=found["flip"],
            limit_train=found["limit_train"],
            val_fraction=found["val_fraction"],
            seed=found["seed"],
        ),
        recipe=Recipe(found["batch_size"], found["weight_decay"], found["label_smoothing"], found["seed"]),
        epochs=Epochs(
            found["epochs_dense"],
            found["epochs_learn"],
            0 if found["one_shot"] else found["epochs_tune"],
            0 if found["one_shot"] or not found["unify"] + found["prune_blocks"] else found["epochs_unify"],
        ),
        lr=found["lr"],
        lr_tune=found["lr_tune"],
        cycles=found["cycles"],
        blocks=BlockConfig(block_shape(found["block"]), found["prune_blocks"], found["unify"]),
        bits=found["bits"],
        distill=Distill(found["distill"], found["temperature"]),
        gates=GateConfig(groups=found["groups"]),
        budget=Budget(**dict(share(part) if isinstance(part, str) else part for part in found["budget"])),
        runtime=found["runtime"],
        mode=found["mode"],
        strength=found["strength"],
        one_shot=found["one_shot"],
        dense_control=found["dense_control"],
    )
