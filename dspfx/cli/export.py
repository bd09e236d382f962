"""`python -m dspfx export`: from a saved network to files that other programs run, compared and timed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn

import dspfx
from dspfx.cli import networks, record
from dspfx.cli.benchmark import several
from dspfx.cli.data import DataConfig, load_data
from dspfx.config import Inputs
from dspfx.deploy.benchmark import Results, first_device
from dspfx.deploy.exported import TOLERANCES, Exported
from dspfx.deploy.runtimes import find_runtime
from dspfx.errors import ConfigError, DspfxError, InputError
from dspfx.graph.samples import with_samples

DESCRIPTION = """\
Writes a saved network as files that other programs run, each compared with PyTorch before it is put in its place, and
times it there, beside the dense network where one is named:
python -m dspfx export runs/demo/network.safetensors --against resnet20 --to onnx,openvino,pt2,tensorrt"""
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2", "tensorrt": ".engine"}
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "pt2": "eager", "tensorrt": "tensorrt"}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `export` to the command line."""
    parser = commands.add_parser("export", help="write a network for other programs", description=DESCRIPTION)
    parser.add_argument("network", help=networks.HELP)
    parser.add_argument(
        "--to", type=several(str), default=["onnx"], metavar="KIND[,KIND]", help=f"of {', '.join(SUFFIXES)}"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="(default: where the network's file is, or here)")
    parser.add_argument(
        "--precision", default="fp32", choices=list(TOLERANCES), help="bf16, int8: onnx and tensorrt (default: fp32)"
    )
    parser.add_argument(
        "--kernels", metavar="NAME", help="dspfx's own in ONNX Runtime: native, AVX512, AVX2 or portable"
    )
    parser.add_argument("--calibration", metavar="DATA", help="images for int8, as for `compress --data`")
    parser.add_argument("--images", type=networks.count, default=256, help="of them (default: %(default)s)")
    parser.add_argument("--against", metavar="NETWORK", help="the dense network to time it beside, a name or a file")
    networks.add_arguments(parser)
    parser.add_argument("--batch", type=several(networks.count), default=[1, 8, 32], help="of an engine: 1,8,32")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="of TensorRT, used and added to")
    parser.add_argument("--aux-streams", type=int, metavar="N", help="of TensorRT, for parallel branches")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU, while timing (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="of timing; 0 for none (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="print what TensorRT says")
    record.add_argument(parser)
    parser.set_defaults(run=run, interrupted="what was not finished left nothing behind")


def run(args: argparse.Namespace) -> None:
    """Writes the files, and prints what became of each; raises DspfxError."""
    check(args)
    names = [args.network] if args.against is None else [args.network, args.against]
    opened = networks.open_networks(names, args.classes)
    named = {"ours": opened[0]} if args.against is None else {"dense": opened[1], "ours": opened[0]}
    inputs = networks.random_inputs(names, opened, args.input, 2)
    rows, lines = [], []
    for kind in args.to:
        found = write(kind, opened[0], inputs, args)
        timed = measure(kind, named, inputs, args) if args.rounds else None
        numbers = (f"{size(found.path) / 1e6:.2f}", f"{found.max_error:.1e}", *columns(timed))
        rows.append((kind, found.path.name, found.precision, *numbers))
        line = {"kind": kind, "file": str(found.path), "precision": found.precision, "max_error": found.max_error}
        line |= {"batches": found.batches, "bytes": size(found.path), "metadata": found.metadata}
        if timed is not None:
            line |= {"setting": timed.setting, "networks": {name: vars(result) for name, result in timed.items()}}
        lines.append(line)
        if args.json != "-":
            print(found, flush=True)
    headers = ["kind", "file", "precision", "MB", "error", "ours ms", "dense ms", "ratio"]
    if args.json != "-":
        align = ("left", "left", "left", *("right",) * 5)
        print(f"\n{tabulate(rows, headers, colalign=align, disable_numparse=True)}")
        for setting in sorted({line["setting"] for line in lines if "setting" in line}):
            print(f"times: {setting}")
    machine = record.describe_machine(torch.device("cpu"), args.threads)
    record.write(args.json, {"machine": machine, "versions": record.versions(), "files": lines})


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError or StorageError for options that cannot be, and fills in where the files go."""
    for kind in args.to:
        if kind not in SUFFIXES:
            raise ConfigError(f"--to {kind!r} is not known; give some of {', '.join(SUFFIXES)}.")
        if args.precision in ("bf16", "int8") and kind in ("openvino", "pt2"):
            raise ConfigError(f"--precision {args.precision} is for onnx and tensorrt; leave {kind} out of --to.")
        find_runtime(RUNTIMES[kind])
    if (args.precision == "int8") != (args.calibration is not None):
        raise ConfigError("--calibration goes with --precision int8, and only with that; give both or neither.")
    if len(args.batch) != 3:
        raise ConfigError(f"--batch names {len(args.batch)} sizes; give the smallest, usual and largest: 1,8,32.")
    record.check_target(args.json)
    if args.out is None:
        args.out = Path(args.network).parent if Path(args.network).is_file() else Path()


def write(kind: str, network: nn.Module, inputs: Inputs, args: argparse.Namespace) -> Exported:
    """Writes one file, named as the network is."""
    path = args.out / (Path(args.network).name.removesuffix(".safetensors") + SUFFIXES[kind])
    images = calibration(args, inputs) if args.calibration else None
    makers: dict[str, Callable[[], Exported]] = {
        "onnx": lambda: dspfx.export_onnx(
            network, path, inputs, precision=args.precision, calibration=images, kernels=args.kernels, verbose=False
        ),
        "openvino": lambda: dspfx.export_openvino(network, path, inputs, precision=args.precision, verbose=False),
        "pt2": lambda: dspfx.export_pt2(network, path, inputs, verbose=False),
        "tensorrt": lambda: dspfx.build_tensorrt(
            *(network, path, args.precision, inputs),
            batch=tuple(args.batch),
            calibration=images,
            timing_cache=args.timing_cache,
            aux_streams=args.aux_streams,
            verbose=args.verbose,
        ),
    }
    return makers[kind]()


def calibration(args: argparse.Namespace, inputs: Inputs) -> Iterator[Tensor]:
    """Batches of training images, presented as in the run that the network comes from."""
    run_of = Path(args.network).parent / "settings.json"
    known = json.loads(run_of.read_text()) if run_of.is_file() else {}
    mean, std = (tuple(known.get(key, IMAGENET[key])) for key in ("mean", "std"))
    shape = inputs.args[0].shape if inputs.args and isinstance(inputs.args[0], Tensor) else ()
    if len(shape) != 4 or shape[2] != shape[3]:
        raise InputError(
            f"--calibration gives square images, and the network takes {tuple(shape)}; export from Python."
        )
    config = DataConfig(args.calibration, shape[2], mean, std, False, None, 0.1, 0)
    split = load_data(config, shape[2], torch.device("cpu"), 0).train
    left = args.images
    for images, _ in split.in_order(min(32, args.images)):
        if left <= 0:
            return
        yield images[:left]
        left -= len(images)


def measure(kind: str, named: dict[str, nn.Module], inputs: Inputs, args: argparse.Namespace) -> Results | None:
    """The networks' times at batch 1 in the runtime that the file is for; None where one of them does not run there."""
    runtime = "onnxruntime-native" if kind == "onnx" and args.kernels else RUNTIMES[kind]
    one = with_samples(inputs, 1)
    if runtime == "tensorrt":
        named = {name: network.cuda() for name, network in named.items()}
        device = first_device(next(iter(named.values())))
        one = Inputs(*(x.to(device) if isinstance(x, Tensor) else x for x in one.args), **one.kwargs)
    try:
        return dspfx.benchmark(named, one, runtime=runtime, rounds=args.rounds, threads=args.threads)
    except DspfxError as error:
        if len(named) == 1:
            raise
        print(f"{kind}: no times, {error}")
        return None


def columns(timed: Results | None) -> tuple[str, str, str]:
    """Ours, dense, ratio, as far as they were measured."""
    if timed is None:
        return "", "", ""
    if "dense" not in timed:
        return f"{timed['ours'].median_ms:.3f}", "", ""
    return f"{timed['ours'].median_ms:.3f}", f"{timed['dense'].median_ms:.3f}", f"{timed['ours'].ratio:.3f}"


def size(path: Path) -> int:
    """Bytes of a file and of the weights beside it."""
    companions = (path.with_name(f"{path.name}.data"), path.with_suffix(".bin") if path.suffix == ".xml" else path)
    return sum(file.stat().st_size for file in {path, *companions} if file.is_file())
