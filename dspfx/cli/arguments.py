"""The options of `python -m dspfx compress`: what is not given stays None, and `DEFAULTS` says what that means."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from dspfx.cli import data, models, record
from dspfx.config import Budget
from dspfx.deploy.runtimes import RUNTIMES

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULTS: dict[str, Any] = {
    "model": "resnet20",
    "data": "digits",
    "checkpoint": None,
    "fork": None,
    "budget": ["flops=0.35"],
    "runtime": "eager",
    "groups": 4,
    "mode": "fused",
    "strength": "auto",
    "one_shot": False,
    "dense_control": False,
    "cycles": 1,
    "unify": 0.0,
    "prune_blocks": 0.0,
    "block": "4x4",
    "bits": 4.0,
    "distill": 0.0,
    "temperature": 4.0,
    "lr": 0.05,
    "weight_decay": 5e-4,
    "label_smoothing": 0.0,
    "seed": 0,
    "limit_train": None,
    "val_fraction": 0.1,
    "image_size": None,
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
    "flip": True,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares every option of `compress`."""
    _add_what(parser.add_argument_group("what"))
    _add_how(parser.add_argument_group("how far and how"))
    _add_size(parser.add_argument_group("a small file: blocks of weights that are alike (weight unification)"))
    _add_training(parser.add_argument_group("training"))
    _add_images(parser.add_argument_group("images"))
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    machine.add_argument("--threads", type=int, help="of the CPU (default: all cores)")
    machine.add_argument("--workers", type=int, default=2, help="processes that decode large images (default: 2)")
    dry = parser.add_argument_group("before anything is trained")
    dry.add_argument(
        "--dry-run",
        action="store_true",
        default=None,
        help="only tell what would be pruned, what budgets would leave, and how long training would take",
    )
    record.add_argument(dry)


def _add_what(what: argparse._ArgumentGroup) -> None:
    what.add_argument("--model", help=f"{models.HELP} {_default('model')}")
    what.add_argument("--data", help=f"{data.HELP} {_default('data')}")
    what.add_argument("--checkpoint", metavar="FILE", help="trained weights: safetensors, or a torch.save'd state_dict")
    what.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results and checkpoints")
    what.add_argument(
        "--fork",
        metavar="DIR",
        help="the --out of another run, whose learning is finished: starts from its dense and its learned network, "
        "with its settings, and leaves it as it is. What comes after learning may be given anew (--budget, --runtime, "
        "--epochs-tune, --lr-tune, --cycles, --distill, --temperature, --one-shot, --dense-control): groups that were "
        "learned once serve many budgets",
    )


def _add_how(how: argparse._ArgumentGroup) -> None:
    how.add_argument(
        "--budget",
        nargs="+",
        type=share,
        metavar="WHAT=SHARE",
        help="what remains of the dense network, all that are given at once: flops=0.35, params=0.5, latency=0.5 "
        "(measured, on --runtime) (default: flops=0.35)",
    )
    how.add_argument(
        "--runtime", help=f"where the network is to be fast at batch 1: {', '.join(RUNTIMES)} {_default('runtime')}"
    )
    how.add_argument("--groups", type=int, help=f"groups a convolution {_default('groups')}")
    how.add_argument("--mode", choices=("fused", "exact"), help=f"how groups learn {_default('mode')}")
    how.add_argument(
        "--strength",
        type=_strength,
        help="of the group regulariser: a number, auto (540 / number of parameters), or steered, which begins as auto "
        "and changes it while groups are learned, so that pruning to --budget would drop about "
        f"3%% of each group's energy {_default('strength')}",
    )
    how.add_argument(
        "--one-shot",
        action="store_true",
        default=None,
        help="no learning and no fine-tuning: filters are clustered, pruned, and batch norms measured anew. Wants a "
        "trained network (--checkpoint, or --epochs-dense above 0) and a gentle budget",
    )
    how.add_argument(
        "--dense-control",
        action="store_true",
        default=None,
        help="also train the dense network for as many epochs, without pruning or a teacher, to compare",
    )


def _add_size(size: argparse._ArgumentGroup) -> None:
    size.add_argument(
        "--unify",
        type=float,
        metavar="SHARE",
        help="of all blocks get one absolute value each, after fine-tuning; compressed.safetensors is the file "
        f"{_default('unify')}",
    )
    size.add_argument(
        "--prune-blocks", type=float, metavar="SHARE", help=f"of all blocks become zero {_default('prune_blocks')}"
    )
    size.add_argument("--block", metavar="AxB", help=f"filters x input channels {_default('block')}")
    size.add_argument(
        "--bits",
        type=float,
        help="of a value in the file, about, from 0.5 to 8: few values, which --epochs-unify train; 32: exactly as "
        f"trained {_default('bits')}",
    )
    size.add_argument(
        "--epochs-unify",
        type=int,
        metavar="N",
        help="towards blocks that are alike, and as many with them, at --lr-tune (default: digits 5, otherwise 30)",
    )


def _add_training(train: argparse._ArgumentGroup) -> None:
    train.add_argument(
        "--epochs-dense",
        type=int,
        metavar="N",
        help="before learning; 0 without --checkpoint is training from scratch: groups are learned from random weights "
        "on (give --epochs-learn enough, and --dense-control for a dense network to compare with; the table's own "
        "stays untrained) (default: 0 with --checkpoint, digits 10, otherwise 120)",
    )
    train.add_argument(
        "--epochs-learn", type=int, metavar="N", help="learning groups (default: digits 6, otherwise 60)"
    )
    train.add_argument(
        "--epochs-tune", type=int, metavar="N", help="fine-tuning what is left (default: digits 10, otherwise 60)"
    )
    train.add_argument(
        "--cycles",
        type=int,
        metavar="N",
        help="prune in N steps instead of one, each followed by its part of --epochs-tune in a cosine cycle of its "
        "own; budgets fall geometrically, with 3 to flops=0.35 by 0.70, 0.50, 0.35. The authors use 5 (default: 1)",
    )
    train.add_argument(
        "--distill",
        type=float,
        metavar="SHARE",
        help="while fine-tuning, this share of the loss is not about the labels but about the dense network's answers, "
        "such as 0.5; a forward pass of it at every step is the price (default: 0)",
    )
    train.add_argument(
        "--temperature", type=float, help=f"that softens answers with --distill {_default('temperature')}"
    )
    train.add_argument("--batch-size", type=int, help="(default: digits 64, otherwise 128)")
    train.add_argument("--lr", type=float, help=f"dense training and learning {_default('lr')}")
    train.add_argument("--lr-tune", type=float, help="fine-tuning (default: digits 0.1, otherwise 0.05)")
    train.add_argument("--weight-decay", type=float, help=_default("weight_decay"))
    train.add_argument("--label-smoothing", type=float, help=_default("label_smoothing"))
    train.add_argument("--seed", type=int, help=f"of every random choice {_default('seed')}")


def _add_images(images: argparse._ArgumentGroup) -> None:
    images.add_argument("--limit-train", type=int, metavar="N", help="use N training images, validation included")
    images.add_argument("--val-fraction", type=float, help=f"held out of train {_default('val_fraction')}")
    images.add_argument("--image-size", type=int, help="(default: as they are up to 64 pixels, else the network's)")
    images.add_argument("--mean", type=float, nargs=3, help="of the colours (default: ImageNet's)")
    images.add_argument("--std", type=float, nargs=3, help="of the colours (default: ImageNet's)")
    images.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, help="mirror training images, never digits (default: yes)"
    )


def _default(name: str) -> str:
    return f"(default: {DEFAULTS[name]})"


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
    if text in ("auto", "steered"):
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'auto', 'steered' nor a number") from None
