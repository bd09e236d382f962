"""`python -m dspfx estimate`: what a budget would buy on a runtime, before any training."""

from __future__ import annotations

import argparse
import json

import torch

import dspfx
from dspfx.cli import networks, options, record
from dspfx.config import Budget
from dspfx.deploy.benchmark import describe_shapes
from dspfx.deploy.runtimes import RUNTIMES, describe_runtime, find_runtime
from dspfx.graph.samples import samples

DESCRIPTION = """\
What would a budget buy on a runtime? Structures drawn at random are lowered and timed there beside the dense network,
in a minute or two and before any training; where the budget is not worth it, smaller ones are tried:
python -m dspfx estimate resnet50 --runtime onnxruntime --budget flops=0.35"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `estimate` to the command line."""
    parser = commands.add_parser("estimate", help="tell what a budget would buy", description=DESCRIPTION)
    parser.add_argument("network", help=networks.HELP)
    parser.add_argument("--runtime", default="onnxruntime", help=f"one of {', '.join(RUNTIMES)} (default: %(default)s)")
    parser.add_argument(
        "--budget",
        type=options.share,
        default=("flops", 0.35),
        metavar="WHAT=SHARE",
        help="what remains of the dense network: flops, params or latency (default: flops=0.35)",
    )
    parser.add_argument("--batch", type=networks.count, metavar="N", help="samples of a call (default: the input's, 1)")
    networks.add_arguments(parser)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (default: %(default)s)")
    record.add_argument(parser)
    parser.set_defaults(run=run, interrupted="nothing was changed")


def run(args: argparse.Namespace) -> None:
    """Prints the estimate, and writes its record; raises DspfxError."""
    find_runtime(args.runtime)
    record.check_target(args.json)
    budget = Budget(**dict([args.budget]))
    (network,) = networks.open_networks([args.network], args.classes)
    inputs = networks.random_inputs([args.network], [network], args.input, args.batch)
    found = dspfx.estimate(network, inputs, args.runtime, budget, threads=args.threads)
    if args.json != "-":
        print(found)
    content = {
        "machine": record.describe_machine(torch.device("cpu"), args.threads),
        "versions": record.versions(),
        "network": args.network,
        "runtime": args.runtime,
        "version": describe_runtime(args.runtime),
        "batch": samples(inputs),
        "input": describe_shapes(inputs),
        "estimate": json.loads(found.to_json()),
    }
    record.write(args.json, content)
