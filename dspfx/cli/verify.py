"""`python -m dspfx verify`: that what runs is what was trained, link by link."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dspfx
from dspfx.cli import models
from dspfx.cli.checkpoints import SETTINGS_FILE, read_json
from dspfx.config import Inputs
from dspfx.deploy.agree import disagreement
from dspfx.deploy.export_openvino import read_openvino_metadata, start_openvino
from dspfx.deploy.export_pt2 import read_pt2_metadata
from dspfx.deploy.exported import TOLERANCES
from dspfx.deploy.onnx import Nesting
from dspfx.deploy.onnx_file import in_float32, read_metadata, start_file
from dspfx.deploy.tensorrt_file import read_engine
from dspfx.errors import ConfigError, DspfxError, MismatchError, StorageError
from dspfx.graph.inputs import realise
from dspfx.graph.samples import with_samples
from dspfx.graph.traced import Network, network_meta
from dspfx.kernels.library import build_library
from dspfx.native import with_chains

Call = Callable[..., Any]
BATCHES = (1, 2, 5)
KINDS = {".onnx": "ONNX", ".xml": "OpenVINO", ".pt2": "torch.export", ".engine": "engine", ".plan": "engine"}
DESCRIPTION = """\
Compares every form of a network with the one before it: gated = pruned = lowered = ONNX = engine, on random inputs at
several batches. Prints a line for each link and ends with an error where one differs:
python -m dspfx verify runs/demo"""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `verify` to the command line."""
    parser = commands.add_parser("verify", help="compare what runs with what was trained", description=DESCRIPTION)
    parser.add_argument("run_folder", type=Path, metavar="FOLDER", help="of a finished `compress`")
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        help=f"what was exported (default: all of {', '.join(KINDS)} in the folder, and an ONNX file made for this)",
    )
    parser.add_argument("--classes", type=int, help="of the network (default: read off the pruned network's file)")
    parser.set_defaults(run=run, interrupted="nothing was changed")


@dataclass(frozen=True)
class Form:
    """One form of the network: how a line names it, how it is called, what it may differ by, and its plan's hash."""

    name: str
    call: Call
    tolerance: float = TOLERANCES["fp32"]
    plan: str | None = None


def run(args: argparse.Namespace) -> None:
    """Prints the chain; raises MismatchError where a link differs, other DspfxErrors where there is no chain."""
    for name in ("pruned.safetensors", "network.safetensors", SETTINGS_FILE):
        if not (args.run_folder / name).is_file():
            raise ConfigError(f"{args.run_folder} has no {name}; give the folder of a finished `dspfx compress`.")
    small = dspfx.load(args.run_folder / "network.safetensors")
    network = model_of(args.run_folder, args.classes)
    gated = dspfx.load(args.run_folder / "pruned.safetensors", network).eval()
    plan = hashlib.sha256(network_meta(small)["lower_plan"].to_json().encode()).hexdigest()
    forms = [Form("gated", gated), Form("pruned", without_gates(network, gated)), Form("lowered", small, plan=plan)]
    several = [with_samples(network_meta(small)["inputs"], count) for count in BATCHES]
    inputs = [Inputs(*args_, **kwargs) for args_, kwargs in (realise(small, one) for one in several)]
    differing = [link(one, two, inputs) for one, two in itertools.pairwise(forms)]
    files = args.files or sorted(file for file in args.run_folder.iterdir() if file.suffix in KINDS)
    with tempfile.TemporaryDirectory(prefix="dspfx-") as folder:
        if not any(file.suffix == ".onnx" for file in files):
            files = [exported(small, Path(folder)), *files]
        for file in sorted(files, key=lambda file: list(KINDS).index(suffix_of(file))):
            before = forms[-1] if KINDS[file.suffix] == "engine" else forms[2]
            try:
                form = opened(file, Path(folder))
            except DspfxError as error:
                if file in args.files:
                    raise
                print(f"{before.name} = {KINDS[file.suffix]} ({file.name}): not compared: {error}", flush=True)
                continue
            differing.append(link(before, form, inputs, plan))
            if file.suffix == ".onnx":
                forms.append(form)
    failed = [text for text in differing if text]
    if failed:
        raise MismatchError(f"{len(failed)} of {len(differing)} links differ: {'; '.join(failed)}.")


def link(one: Form, two: Form, inputs: list[Inputs], plan: str | None = None) -> str:
    """Prints one line; returns what differs, or nothing."""
    if plan is not None and two.plan not in (plan, None):
        print(
            f"{one.name} = {two.name}: DIFFERS, it was made of another lowering (plan {str(two.plan)[:12]})", flush=True
        )
        return f"{one.name} and {two.name}"
    worst, place = 0.0, ""
    for example in inputs:
        with torch.no_grad():
            expected = one.call(*example.args, **example.kwargs)
            found = disagreement(like(expected, two.call(*example.args, **example.kwargs)), expected)
        worst, place = max((worst, place), found, key=lambda pair: (pair[0] != pair[0], pair[0]))
    allowed = max(one.tolerance, two.tolerance)
    verdict = "equal" if worst <= allowed else f"DIFFERS in {place}"
    print(f"{one.name} = {two.name}: {verdict}, {worst:.1e} of the output's scale, allowed {allowed:.2g}", flush=True)
    return "" if worst <= allowed else f"{one.name} and {two.name}"


def like(expected: Any, found: Any) -> Any:
    """What a file returns, nested as expected: formats have lists and dicts of their own."""
    leaves, spec = pytree.tree_leaves(found), pytree.tree_structure(expected)
    return pytree.tree_unflatten(leaves, spec) if len(leaves) == spec.num_leaves else found


def model_of(folder: Path, classes: int | None) -> nn.Module:
    """The dense network of a run, as untrained as its class makes it."""
    name = read_json(folder / SETTINGS_FILE)["model"]
    with safe_open(folder / "pruned.safetensors", framework="pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    if classes is None:
        state = models.build(name, 7).state_dict()
        found = {shapes[key][0] for key, value in state.items() if key in shapes and shapes[key] != tuple(value.shape)}
        if len(found) > 1:
            raise StorageError(f"{folder / 'pruned.safetensors'} does not fit {name}; give --classes.")
        classes = found.pop() if found else 7
    return models.build(name, classes)


def without_gates(network: nn.Module, gated: Network) -> nn.Module:
    """The dense network with the pruned one's values, zeros and all."""
    state = gated.state_dict()
    network.load_state_dict({key: state[key] for key in network.state_dict()})
    return network.eval()


def exported(small: nn.Module, folder: Path) -> Path:
    """An ONNX file made for the comparison alone."""
    path = folder / "network.onnx"
    plain = with_chains(small, lambda chain: chain.plain)
    dspfx.export_onnx(plain, path, tolerance=float("inf"), verbose=False)
    return path


def suffix_of(file: Path) -> str:
    """The suffix; ConfigError where it is no exported file's."""
    if file.suffix not in KINDS:
        raise ConfigError(f"{file} is no exported file; give some that end in {', '.join(KINDS)}.")
    return file.suffix


def opened(file: Path, folder: Path) -> Form:
    """An exported file, ready to be called; raises DspfxError where it cannot be."""
    if not file.is_file():
        raise StorageError(f"{file} does not exist.")
    name = f"{KINDS[file.suffix]} ({file.name}, {{}})"
    call: Call
    read = {".onnx": read_metadata, ".xml": read_openvino_metadata, ".pt2": read_pt2_metadata}
    metadata = read[file.suffix](file) if file.suffix in read else read_engine(file)[0]
    if "dspfx.nesting" not in metadata:
        raise StorageError(f"{file} does not say how it is called; the export functions of dspfx write files that do.")
    nesting = Nesting.from_json(metadata["dspfx.nesting"])
    if file.suffix == ".pt2":
        call = torch.export.load(file).module()
    elif file.suffix == ".onnx":
        features = metadata.get("dspfx.kernels")
        library = None if features is None else build_library(features)  # ours: one beside the file can be anybody's
        call = start_file(
            in_float32(file, folder) if metadata["dspfx.precision"] == "bf16" else file, nesting, 1, library
        )
    elif file.suffix == ".xml":
        call = start_openvino(file, nesting)
    else:
        call = on_gpu(dspfx.TensorRTModule(file))
    precision, told = metadata["dspfx.precision"], float(metadata["dspfx.tolerance"])
    tolerance = told if math.isfinite(told) else TOLERANCES[precision]
    return Form(name.format(precision), call, tolerance, metadata["dspfx.plan"] or None)


def on_gpu(fast: nn.Module) -> Call:
    """Calls an engine with inputs from the CPU."""

    def move(value: Any, device: str) -> Any:
        return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = move((args, kwargs), dspfx.TensorRTModule.device_type)
        return move(fast(*args, **kwargs), "cpu")

    return call
