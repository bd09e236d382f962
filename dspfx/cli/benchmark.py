"""`python -m dspfx benchmark`: how long networks take beside each other, in every runtime and batch size asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import nn

import dspfx
from dspfx.cli import networks, record
from dspfx.config import Inputs
from dspfx.deploy.benchmark import Results, describe_shapes
from dspfx.deploy.runtimes import RUNTIMES, describe_runtime, find_runtime
from dspfx.errors import DspfxError, MismatchError, RuntimeBuildError
from dspfx.graph.samples import samples

Value = TypeVar("Value")
DESCRIPTION = """\
Times networks beside each other, in interleaved rounds after a warm-up: the median milliseconds of a call, the median
of its ratios to the first network's, and their spread (interquartile range):
python -m dspfx benchmark resnet20 runs/demo/network.safetensors --runtime eager,onnxruntime --batch 1,8,64"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `benchmark` to the command line."""
    parser = commands.add_parser("benchmark", help="time networks beside each other", description=DESCRIPTION)
    parser.add_argument("networks", nargs="+", metavar="network", help=f"{networks.HELP}; the first is the reference")
    parser.add_argument(
        "--runtime",
        type=several(str),
        default=["eager"],
        metavar="NAME[,NAME]",
        help=f"of {', '.join(RUNTIMES)} (default: eager)",
    )
    parser.add_argument(
        "--batch",
        type=several(networks.count),
        metavar="N[,N]",
        help="samples of a call (default: those of the input, 1)",
    )
    networks.add_arguments(parser)
    parser.add_argument("--lowered", action="store_true", help="also time what dspfx.lower makes of each network there")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each network (default: %(default)s)")
    record.add_argument(parser)
    parser.set_defaults(run=run, interrupted="nothing was changed")


def run(args: argparse.Namespace) -> None:
    """Prints a table for each runtime and batch size, and writes the record; raises DspfxError.

    A network that a runtime rejects ends the run, or, where other runtimes were asked for, leaves a note in its place.
    """
    for runtime in args.runtime:
        find_runtime(runtime)
    record.check_target(args.json)
    opened = networks.open_networks(args.networks, args.classes)
    named = dict(zip(networks.told_apart(args.networks), opened, strict=True))
    results: list[dict[str, Any]] = []
    rejections: list[DspfxError] = []
    for runtime in args.runtime:
        for batch in args.batch or [None]:
            inputs = networks.random_inputs(args.networks, opened, args.input, batch)
            what = {"runtime": runtime, "version": describe_runtime(runtime), "batch": samples(inputs)}
            what["input"] = describe_shapes(inputs)
            try:
                found = measure(named, inputs, runtime, args)
            except (RuntimeBuildError, MismatchError) as error:
                if len(args.runtime) == 1:
                    raise
                rejections.append(error)
                reason = " ".join(str(error).splitlines())
                results.append(what | {"rejected": reason})
                text = f"input {what['input']} on {runtime} is left out: {reason}"
            else:
                rows = {name: asdict(result) for name, result in found.items()}
                results.append(what | {"setting": found.setting, "networks": rows})
                text = str(found)
            if args.json != "-":
                print(f"{text}\n", flush=True)
    if len(rejections) == len(results):
        raise rejections[0]
    machine = record.describe_machine(torch.device("cpu"), args.threads)
    content = {"machine": machine, "versions": record.versions(), "threads": args.threads, "rounds": args.rounds}
    record.write(args.json, content | {"results": results})


def measure(named: dict[str, nn.Module], inputs: Inputs, runtime: str, args: argparse.Namespace) -> Results:
    """Times the networks, with --lowered each one's lowered form behind it."""
    timed = dict(named)
    if args.lowered:
        timed = {}
        for name, network in named.items():
            small = dspfx.lower(network, inputs, runtime, threads=args.threads)
            timed |= {name: network, f"{name}, lowered": small}
    return dspfx.benchmark(timed, inputs, runtime=runtime, rounds=args.rounds, threads=args.threads)


def several(kind: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """The type of an option that takes values separated by commas."""

    def parse(text: str) -> list[Value]:
        return [kind(part) for part in text.split(",")]

    return parse
