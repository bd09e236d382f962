"""The networks that a command is about, files or names, and the inputs that it gives them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import dspfx
from dspfx.cli import models
from dspfx.config import Inputs
from dspfx.errors import ConfigError, StorageError
from dspfx.graph.inputs import realise
from dspfx.graph.samples import samples, with_samples
from dspfx.graph.traced import network_meta
from dspfx.storage.compressed import compressed_index

HELP = f"a file that dspfx.save or write_compressed wrote, or {models.HELP}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares --input and --classes."""
    parser.add_argument("--input", type=_shape, metavar="1,3,H,W", help="(default: the size the network is made for)")
    parser.add_argument("--classes", type=int, help="of named networks (default: 10 if built in, torchvision's 1000)")


def open_networks(names: Sequence[str], classes: int | None) -> list[nn.Module]:
    """The networks of these names and files; what needs its class, pruned or compressed, is read into the first named.

    Raises ConfigError or StorageError for what is not there.
    """
    known = _known(names)
    return [
        _open(name, known, classes or (10 if known[:1] and known[0] in models.BUILT_IN else 1000)) for name in names
    ]


def example_image(names: Sequence[str], shape: tuple[int, ...] | None) -> torch.Tensor | None:
    """The shape asked for, else an image for the first named network; None where all are files: these remember theirs.

    On the meta device: its values do not matter.
    """
    known = _known(names)
    if shape is None and known:
        size = models.default_image_size(known[0])
        shape = (1, 3, size, size)
    return None if shape is None else torch.empty(shape, device="meta")


def random_inputs(
    names: Sequence[str], networks: Sequence[nn.Module], shape: tuple[int, ...] | None, batch: int | None
) -> Inputs:
    """Random inputs for the first of the networks: as asked for, else those that a file remembers, one sample of them
    where there are named networks too, else an image for the first of these."""
    metas = [network_meta(network) for name, network in zip(names, networks, strict=True) if Path(name).is_file()]
    remembered = next((meta["inputs"] for meta in metas if "inputs" in meta), None)
    if shape is None and remembered is not None:
        inputs, usual = remembered, 1 if _known(names) else samples(remembered)
    else:
        inputs = Inputs.of(example_image(names, shape))
        usual = samples(inputs)
    args, kwargs = realise(networks[0], with_samples(inputs, batch or usual))
    return Inputs(*args, **kwargs)


def told_apart(names: Sequence[str]) -> list[str]:
    """The names, numbered where one comes again: resnet20, resnet20 (2)."""
    found: list[str] = []
    for name in names:
        count, unique = 1, name
        while unique in found:
            count += 1
            unique = f"{name} ({count})"
        found.append(unique)
    return found


def count(text: str) -> int:
    """The type of --batch."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of samples; give 1 or more")
    return int(text)


def _known(names: Sequence[str]) -> list[str]:
    """Those that are names, not files."""
    return [name for name in names if not Path(name).is_file()]


def _open(name: str, known: Sequence[str], classes: int) -> nn.Module:
    if Path(name).is_file():
        try:
            return dspfx.load(name)
        except StorageError:
            if not known:
                raise
        dense = models.build(known[0], classes)
        return dspfx.read_compressed(name, dense) if _is_compressed(name) else dspfx.load(name, dense)
    if "/" in name or name.endswith(".safetensors"):
        raise ConfigError(f"{name} is not a file; give one that dspfx.save wrote, or the name of a network.")
    return models.build(name, classes)


def _is_compressed(name: str) -> bool:
    try:
        compressed_index(name)
    except StorageError:
        return False
    return True


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; give sizes such as 1,3,224,224")
    return shape
