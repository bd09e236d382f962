"""`python -m dspfx profile`: FLOPs and parameters of each layer, of one network or of dense against compressed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

import dspfx
from dspfx.cli import models
from dspfx.errors import ConfigError, StorageError
from dspfx.profiler import LayerProfile, Profile

DESCRIPTION = """\
FLOPs (multiply-adds, fvcore's convention) and parameters of each layer; with --against, of two networks side by side:
python -m dspfx profile resnet20 --against runs/demo/network.safetensors"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `profile` to the command line."""
    parser = commands.add_parser("profile", help="count FLOPs and parameters per layer", description=DESCRIPTION)
    parser.add_argument("network", help=f"a file that dspfx.save wrote, or {models.HELP}")
    parser.add_argument("--against", metavar="NETWORK", help="the compressed network, a name or a file likewise")
    parser.add_argument("--input", type=_shape, metavar="1,3,H,W", help="(default: the size the network is made for)")
    parser.add_argument("--classes", type=int, help="of named networks (default: 10 if built in, torchvision's 1000)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, interrupted="nothing was changed")


def run(args: argparse.Namespace) -> None:
    """Prints the profile of `args.network`, or of it and `args.against`; raises DspfxError."""
    names = [args.network] if args.against is None else [args.network, args.against]
    known = [name for name in names if not Path(name).is_file()]
    shape = args.input
    if shape is None and known:
        size = models.default_image_size(known[0])
        shape = (1, 3, size, size)
    example = None if shape is None else torch.zeros(shape)  # a saved network knows its own
    classes = args.classes or (10 if known and known[0] in models.BUILT_IN else 1000)
    profiles = [dspfx.profile(_open(name, known[:1], classes), example) for name in names]
    if args.json:
        content = {name: json.loads(found.to_json()) for name, found in zip(names, profiles, strict=True)}
        print(json.dumps(content, indent=1))
    elif len(profiles) == 1:
        print(profiles[0])
    else:
        print(compare(*profiles))


def compare(dense: Profile, small: Profile) -> str:
    """A table with one row a layer of `dense`: its shape and costs, and those of what took its place in `small`."""
    names = [row.name for row in dense.layers]
    heirs: dict[str, list[LayerProfile]] = {name: [] for name in names}
    for row in small.layers:
        heirs.setdefault(_ancestor(row.name, names), []).append(row)
    mine = {row.name: [row] for row in dense.layers}
    rows = [
        (name or "(itself)", *_columns(mine.get(name, []), found), _left(mine.get(name, []), found))
        for name, found in heirs.items()
    ]
    total = ("total", "", _costs(dense), "", _costs(small), f"{small.flops / dense.flops:.1%}" if dense.flops else "")
    headers = ["layer", "weight", "FLOPs / parameters", "compressed", "FLOPs / parameters", "FLOPs left"]
    alignment = ("left", "left", "right", "left", "right", "right")
    table = tabulate([*rows, total], headers=headers, colalign=alignment)
    return f"{table}\n{dense.bytes:,} bytes of parameters and buffers, compressed {small.bytes:,}"


def _columns(dense: Sequence[LayerProfile], small: Sequence[LayerProfile]) -> tuple[str, str, str, str]:
    return (_weights(dense), _sum(dense), _weights(small), _sum(small))


def _weights(rows: Sequence[LayerProfile]) -> str:
    return "  ".join("x".join(map(str, row.weight)) for row in rows if row.weight) or "-"


def _sum(rows: Sequence[LayerProfile]) -> str:
    return f"{sum(row.flops for row in rows):,} / {sum(row.params for row in rows):,}"


def _left(dense: Sequence[LayerProfile], small: Sequence[LayerProfile]) -> str:
    before = sum(row.flops for row in dense)
    return f"{sum(row.flops for row in small) / before:.1%}" if before else ""


def _costs(profile: Profile) -> str:
    return f"{profile.flops:,} / {profile.params:,}"


def _ancestor(name: str, names: Sequence[str]) -> str:
    """The layer that `name` is, or is part of: the branches of layer1.0.conv1 are layer1.0.conv1.0 and so on."""
    owners = [known for known in names if known and (name == known or name.startswith(known + "."))]
    return max(owners, key=len, default=name)


def _open(name: str, known: Sequence[str], classes: int) -> nn.Module:
    """A named network, or a saved one (a pruned one is read into the network named beside it)."""
    if Path(name).is_file():
        try:
            return dspfx.load(name)
        except StorageError:
            if not known:
                raise
            return dspfx.load(name, models.build(known[0], classes))  # a pruned one needs its class
    if "/" in name or name.endswith(".safetensors"):
        raise ConfigError(f"{name} is not a file; give one that dspfx.save wrote, or the name of a network.")
    return models.build(name, classes)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; give sizes such as 1,3,224,224")
    return shape
