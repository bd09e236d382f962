"""What `python -m dspfx compress` can be told, checked and completed with defaults."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from dspfx.cli import data, models
from dspfx.cli.data import DataConfig
from dspfx.cli.training import Recipe, Stage
from dspfx.config import Budget, GateConfig
from dspfx.deploy.runtimes import RUNTIMES, find_runtime
from dspfx.errors import ConfigError

Value = TypeVar("Value", int, float)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Epochs:
    """Epochs of each stage: the dense network, learning its groups, fine-tuning what is left."""

    dense: int
    learn: int
    tune: int

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(f"--epochs-{field.name} is {getattr(self, field.name)}; give 0 or more.")


@dataclass(frozen=True)
class Defaults:
    """What depends on the data."""

    epochs: Epochs
    batch_size: int
    lr_tune: float


QUICK = Defaults(Epochs(dense=10, learn=6, tune=10), batch_size=64, lr_tune=0.1)  # digits: minutes on two cores
FULL = Defaults(Epochs(dense=120, learn=60, tune=60), batch_size=128, lr_tune=0.05)


@dataclass(frozen=True)
class Settings:
    """Everything that the numbers of a run depend on, the machine excepted; a run resumes only with the same ones."""

    model: str
    checkpoint: str | None
    data: DataConfig
    recipe: Recipe
    epochs: Epochs
    lr: float
    lr_tune: float
    gates: GateConfig
    budget: Budget
    runtime: str
    mode: Literal["fused", "exact"]
    strength: float | Literal["auto"]
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

    def stage(self, name: str) -> Stage:
        """The stage called dense, learn, tune or control; control sees what learn and then tune see."""
        learn, tune = (self.epochs.learn, self.lr), (self.epochs.tune, self.lr_tune)
        return {
            "dense": Stage("dense", ((self.epochs.dense, self.lr),)),
            "learn": Stage("learn", (learn,), keep="last"),
            "tune": Stage("tune", (tune,), first_epoch=self.epochs.learn),
            "control": Stage("control", (learn, tune)),
        }[name]

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
            elif name in ("data", "recipe"):
                result |= value
            else:
                result[name] = value
        result["data"] = result.pop("spec")
        return result


@dataclass(frozen=True)
class Machine:
    """Where a run takes place; may change between one start and the next."""

    device: torch.device
    workers: int

    def timed_on(self, runtime: str) -> torch.device:
        """Where networks are timed: on this device, or on the one that the runtime is for."""
        devices = find_runtime(runtime).devices
        return self.device if not devices or self.device.type in devices else torch.device(devices[0])

    def __str__(self) -> str:
        return f"device {self.device}, CPU threads: {torch.get_num_threads()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares every option of `compress`."""
    what = parser.add_argument_group("what")
    what.add_argument("--model", default="resnet20", help=f"{models.HELP} (default: %(default)s)")
    what.add_argument("--data", default="digits", help=f"{data.HELP} (default: %(default)s)")
    what.add_argument("--checkpoint", metavar="FILE", help="trained weights: safetensors, or a torch.save'd state_dict")
    what.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results and checkpoints")
    how = parser.add_argument_group("how far and how")
    how.add_argument(
        "--budget",
        nargs="+",
        type=share,
        default=[("flops", 0.35)],
        metavar="WHAT=SHARE",
        help="what remains of the dense network, all that are given at once: flops=0.35, params=0.5, latency=0.5 "
        "(measured, on --runtime) (default: flops=0.35)",
    )
    how.add_argument(
        "--runtime",
        default="eager",
        help=f"where the network is to be fast at batch 1: {', '.join(RUNTIMES)} (default: %(default)s)",
    )
    how.add_argument("--groups", type=int, default=4, help="groups a convolution (default: %(default)s)")
    how.add_argument("--mode", choices=("fused", "exact"), default="fused", help="how groups learn (default: fused)")
    how.add_argument("--strength", type=_strength, default="auto", help="of the group regulariser (default: auto)")
    how.add_argument("--one-shot", action="store_true", help="no learning, no fine-tuning: cluster, prune, recalibrate")
    how.add_argument(
        "--dense-control", action="store_true", help="also train the dense network for as many epochs, to compare"
    )
    train = parser.add_argument_group("training")
    train.add_argument(
        "--epochs-dense",
        type=int,
        metavar="N",
        help="before learning (default: 0 with --checkpoint, digits 10, otherwise 120)",
    )
    train.add_argument(
        "--epochs-learn", type=int, metavar="N", help="learning groups (default: digits 6, otherwise 60)"
    )
    train.add_argument(
        "--epochs-tune", type=int, metavar="N", help="fine-tuning what is left (default: digits 10, otherwise 60)"
    )
    train.add_argument("--batch-size", type=int, help="(default: digits 64, otherwise 128)")
    train.add_argument("--lr", type=float, default=0.05, help="dense training and learning (default: %(default)s)")
    train.add_argument("--lr-tune", type=float, help="fine-tuning (default: digits 0.1, otherwise 0.05)")
    train.add_argument("--weight-decay", type=float, default=5e-4, help="(default: %(default)s)")
    train.add_argument("--label-smoothing", type=float, default=0.0, help="(default: %(default)s)")
    train.add_argument("--seed", type=int, default=0, help="of every random choice (default: %(default)s)")
    images = parser.add_argument_group("images")
    images.add_argument("--limit-train", type=int, metavar="N", help="use N training images, validation included")
    images.add_argument("--val-fraction", type=float, default=0.1, help="held out of train (default: %(default)s)")
    images.add_argument("--image-size", type=int, help="(default: as they are up to 64 pixels, else the network's)")
    images.add_argument(
        "--mean", type=float, nargs=3, default=IMAGENET_MEAN, help="of the colours (default: ImageNet's)"
    )
    images.add_argument("--std", type=float, nargs=3, default=IMAGENET_STD, help="of the colours (default: ImageNet's)")
    images.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror training images (never digits)"
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    machine.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    machine.add_argument("--workers", type=int, default=2, help="processes that decode large images (default: 2)")


def read_settings(args: argparse.Namespace) -> Settings:
    """The checked settings; raises ConfigError or BudgetError that names the option."""
    default = QUICK if args.data == "digits" else FULL
    data_config = DataConfig(
        spec=args.data,
        image_size=args.image_size,
        mean=tuple(args.mean),
        std=tuple(args.std),
        flip=args.flip,
        limit_train=args.limit_train,
        val_fraction=args.val_fraction,
        seed=args.seed,
    )
    batch_size = _given(args.batch_size, default.batch_size)
    epochs = Epochs(
        dense=_given(args.epochs_dense, 0 if args.checkpoint else default.epochs.dense),
        learn=0 if args.one_shot else _given(args.epochs_learn, default.epochs.learn),
        tune=0 if args.one_shot else _given(args.epochs_tune, default.epochs.tune),
    )
    return Settings(
        model=args.model,
        checkpoint=args.checkpoint,
        data=data_config,
        recipe=Recipe(batch_size, args.weight_decay, args.label_smoothing, args.seed),
        epochs=epochs,
        lr=args.lr,
        lr_tune=_given(args.lr_tune, default.lr_tune),
        gates=GateConfig(groups=args.groups),
        budget=Budget(**dict(args.budget)),
        runtime=args.runtime,
        mode=args.mode,
        strength=args.strength,
        one_shot=args.one_shot,
        dense_control=args.dense_control,
    )


def set_machine(args: argparse.Namespace) -> Machine:
    """Sets the number of threads and picks the device; raises ConfigError for a device that is not there."""
    if args.threads is not None:
        if args.threads < 1:
            raise ConfigError(f"--threads is {args.threads}; give at least 1.")
        torch.set_num_threads(args.threads)
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        if device.index is not None:
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"--device {name} cannot be used ({reason}); give cpu, or cuda where there is one."
        ) from error
    return Machine(device, args.workers)


def _given(value: Value | None, default: Value) -> Value:
    return default if value is None else value


def share(text: str) -> tuple[str, float]:
    """The type of --budget: (field of Budget, its value)."""
    name, _, value = text.partition("=")
    known = [field.name for field in fields(Budget)]
    try:
        if name in known:
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no budget; give {' or '.join(f'{name}=0.35' for name in known)}")


def _strength(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'auto' nor a number") from None
