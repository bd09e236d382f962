"""A TensorRT engine from a lowered network or an ONNX file, compared before it is put in its place.

build_tensorrt(small, "small.engine", precision="fp16", batch=(1, 8, 32))
fast = TensorRTModule("small.engine")
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.deploy.agree import disagreement
from dspfx.deploy.export import announce, export_onnx
from dspfx.deploy.exported import TOLERANCES, Exported, need
from dspfx.deploy.onnx_file import in_float32, read_graph, read_metadata, start_file
from dspfx.deploy.staging import staged, write_file
from dspfx.deploy.tensorrt_build import BuildOptions, batch_profile, build_engine, load_tensorrt, network_inputs
from dspfx.deploy.tensorrt_file import SUFFIXES, check_gpu, this_machine, write_engine
from dspfx.deploy.tensorrt_module import TensorRTModule
from dspfx.errors import ConfigError, MismatchError
from dspfx.graph.inputs import realise
from dspfx.graph.samples import with_samples


def build_tensorrt(
    small_or_onnx: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    precision: str | None = None,
    example_inputs: Any = None,
    *,
    batch: tuple[int, int, int] = (1, 8, 32),
    calibration: Iterable[Any] | None = None,
    timing_cache: str | os.PathLike[str] | None = None,
    workspace: int | None = None,
    aux_streams: int | None = None,
    tolerance: float | None = None,
    verbose: bool = False,
) -> Exported:
    """Builds an engine for this machine's GPU, runs it beside the ONNX file that it is made of, and writes it.

    The network is strongly typed: its precision is that of the ONNX file, in TensorRT 10 and 11 alike.

    Args:
        small_or_onnx: a lowered network, exported as `export_onnx` does, or an ONNX file, ideally one of that function.
        path: ends in .engine or .plan.
        precision: "fp32" (without TensorFloat32), "fp16", "bf16" or "int8"; by default "fp16" for a network. An ONNX
            file has its own, and another one is refused.
        example_inputs: for a network, see `export_onnx`.
        calibration: for a network, see `export_onnx`.
        batch: the smallest, the usual (what it is tuned for) and the largest batch.
        timing_cache: a file of measurements, used and added to, that makes the next build faster.
        workspace: bytes of scratch memory; all of the GPU's by default.
        aux_streams: streams for parallel branches, beside the one of the call; 0 for none.
        tolerance: as for `export_onnx`; the engine is compared with the ONNX file on ONNX Runtime, and the file of a
            network with the network before.
        verbose: print what TensorRT says, and the result.

    Raises:
        ConfigError: TensorRT or the GPU is missing, too old, or a setting is wrong.
        RuntimeBuildError: TensorRT does not start, refuses the file (every error, with its node), or builds nothing.
        MismatchError: the engine computes something else.
        ModelError, InputError, StorageError: as `export_onnx` does.
    """
    trt = load_tensorrt()
    check_gpu("build_tensorrt")
    need("build_tensorrt", ("onnx", "onnxscript", "onnxruntime"), "onnx")
    with tempfile.TemporaryDirectory(prefix="dspfx-") as folder:
        if isinstance(small_or_onnx, nn.Module):
            file = Path(folder) / "network.onnx"
            export_onnx(
                *(small_or_onnx, file, example_inputs),
                precision=precision or "fp16",
                calibration=calibration,
                tolerance=tolerance,
                verbose=verbose,
            )
        else:
            file = Path(small_or_onnx)
        metadata = read_metadata(file)
        found = precision_of(file)
        if precision not in (None, found):
            raise ConfigError(
                f"precision is {precision!r}, and {file} is in {found}, which an engine takes over; export it so: "
                f"dspfx.export_onnx(small, {str(file)!r}, precision={precision!r})."
            )
        options = BuildOptions(found == "fp32", workspace, aux_streams, verbose)
        profile = batch_profile(network_inputs(file), batch)
        cache = Path(timing_cache) if timing_cache is not None else None
        with staged(path, SUFFIXES) as part:
            known = cache.read_bytes() if cache is not None and cache.is_file() else b""
            engine, timings = build_engine(file, profile, options, known)
            if cache is not None:
                write_file(cache, timings)
            metadata |= {"dspfx.precision": found} | this_machine(str(trt.__version__))
            metadata |= {"cuda.version": str(torch.version.cuda), "dspfx.engine_batch": ",".join(map(str, batch))}
            write_engine(part, engine, metadata)
            allowed = TOLERANCES[found] if tolerance is None else tolerance
            reference = file if found != "bf16" else in_float32(file, Path(folder))
            error, batches = _compare(reference, part, batch if profile else None, allowed)
            told = {"compared": "onnxruntime", "max_error": f"{error:.3e}", "tolerance": f"{allowed:.3e}"}
            metadata |= {f"dspfx.{key}": value for key, value in told.items()}
            write_engine(part, engine, metadata)
    kind = f"TensorRT engine on tensorrt {trt.__version__}, {metadata['gpu.name']}"
    result = Exported(Path(path), kind, found, error, allowed, batches, (), metadata, "its ONNX file")
    return announce(result, verbose)


def precision_of(file: Path) -> str:
    """What an ONNX file computes in: what it says, or else what its weights and operations are."""
    told = read_metadata(file).get("dspfx.precision")
    if told:
        return told
    graph = read_graph(file).graph
    if any(node.op_type == "QuantizeLinear" for node in graph.node):
        return "int8"
    kinds = {tensor.data_type for tensor in graph.initializer}
    return "fp16" if 10 in kinds else "bf16" if 16 in kinds else "fp32"  # of onnx.TensorProto


def _compare(
    file: Path, engine: Path, batch: tuple[int, int, int] | None, allowed: float
) -> tuple[float, tuple[int, ...]]:
    """(the largest difference of the engine from its ONNX file, the batches compared); NaN where that says not how.

    Raises MismatchError where it is more than allowed.
    """
    fast = TensorRTModule(engine)
    nesting = fast.nesting
    if nesting is None:
        return math.nan, ()
    slow = start_file(file, nesting)
    worst, place = 0.0, ""
    several = sorted(set(batch)) if batch else [0]
    for count in several:
        inputs = with_samples(nesting.inputs, count) if count else nesting.inputs
        args, kwargs = realise(nn.Module(), inputs)
        expected = slow(*args, **kwargs)
        found = _moved(fast, Inputs(*args, **kwargs))
        error = disagreement(found, expected)
        worst, place = max((worst, place), error, key=lambda one: (one[0] != one[0], one[0]))
    if not worst <= allowed:
        raise MismatchError(
            f"the engine of {file.name} differs from it on ONNX Runtime by {worst:.1e} of the largest value of "
            f"{place}, and {allowed:.1e} is allowed; give a higher precision, or tolerance=... if that is good enough."
        )
    return worst, tuple(several) if batch else (1,)


def _moved(call: Callable[..., Any], inputs: Inputs) -> Any:
    """What the call returns, on the CPU, for inputs on the GPU."""

    def move(value: Any, device: str) -> Any:
        return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)

    args, kwargs = move((inputs.args, inputs.kwargs), TensorRTModule.device_type)
    return move(call(*args, **kwargs), "cpu")
