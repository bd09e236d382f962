"""`python -m dspfx profile`: FLOPs and parameters of each layer, of one network or of dense against compressed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from tabulate import tabulate

import dspfx
from dspfx.cli import networks
from dspfx.profiler import LayerProfile, Profile

DESCRIPTION = """\
FLOPs (multiply-adds, fvcore's convention) and parameters of each layer; with --against, of two networks side by side:
python -m dspfx profile resnet20 --against runs/demo/network.safetensors"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `profile` to the command line."""
    parser = commands.add_parser("profile", help="count FLOPs and parameters per layer", description=DESCRIPTION)
    parser.add_argument("network", help=networks.HELP)
    parser.add_argument("--against", metavar="NETWORK", help="the compressed network, a name or a file likewise")
    networks.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run, interrupted="nothing was changed")


def run(args: argparse.Namespace) -> None:
    """Prints the profile of `args.network`, or of it and `args.against`; raises DspfxError."""
    names = [args.network] if args.against is None else [args.network, args.against]
    example = networks.example_image(names, args.input)  # a saved network knows its own
    profiles = [dspfx.profile(network, example) for network in networks.open_networks(names, args.classes)]
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
