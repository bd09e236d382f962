"""A lowered network as OpenVINO's own format: NAME.xml with the graph, NAME.bin with the weights."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dspfx.deploy.engines import OpenVino, _core, _keep_reorderings
from dspfx.deploy.export import announce, describe_file
from dspfx.deploy.exported import TOLERANCES, Exported, need, subject_of, write_and_compare
from dspfx.deploy.onnx import Nesting, write_onnx
from dspfx.deploy.staging import staged
from dspfx.errors import ConfigError

PRECISIONS = ("fp32", "fp16")


def export_openvino(
    small: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    precision: str = "fp32",
    tolerance: float | None = None,
    verbose: bool = True,
) -> Exported:
    """Writes a lowered (or any other ungated) network as OpenVINO IR, for every batch where its graph allows that.

    It is compared with the network in PyTorch on OpenVINO's CPU plugin, in float32, before it is put in its place. What
    it says of itself stands in the model's runtime information, under "dspfx".

    Args:
        small: a lowered network, as for `export_onnx`.
        example_inputs: as for `export_onnx`.
        tolerance: as for `export_onnx`.
        verbose: print the result.
        path: ends in .xml; the weights go beside it, into a file that ends in .bin.
        precision: "fp32", or "fp16" for weights stored in half the bytes; the device chooses what it computes in.

    Raises what `export_onnx` raises.
    """
    version = need("export_openvino", ("onnx", "onnxscript", "openvino"), "openvino")
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision is {precision!r}; an OpenVINO file takes one of {', '.join(map(repr, PRECISIONS))}."
        )
    subject = subject_of(small, example_inputs, precision)
    kind = f"OpenVINO IR on openvino {version}"
    allowed = TOLERANCES[precision] if tolerance is None else tolerance
    with staged(path, (".xml",)) as part:
        source = part.with_suffix(".onnx")

        def write(nesting: Nesting) -> None:
            write_onnx(subject.network, nesting, source)
            _save(source, part, precision, {})

        written = write_and_compare(subject, kind, allowed, write, lambda nesting: start_openvino(part, nesting))
        metadata = describe_file(subject, written, kind, allowed)
        _save(source, part, precision, metadata)
        for file in part.parent.glob(f"{source.name}*"):
            file.unlink()
    result = Exported(Path(path), kind, precision, written.max_error, allowed, written.batches, (), metadata)
    return announce(result, verbose)


def start_openvino(path: Path, nesting: Nesting, threads: int = 1) -> Any:
    """The function that calls the file on the CPU as the network is called."""
    engine = OpenVino(path, [f"input{i}" for i in range(len(nesting.tensors))], threads)

    def call(*args: Any, **kwargs: Any) -> Any:
        arrays = [x.detach().contiguous().numpy() for x in nesting.flatten_inputs(args, kwargs)]
        return nesting.nest_outputs([torch.from_numpy(x) for x in engine(arrays)])

    return call


def read_openvino_metadata(path: Path) -> dict[str, str]:
    """What the file says of itself."""
    model = _core().read_model(path)
    if not model.has_rt_info(["dspfx"]):
        return {}
    return {
        key.replace("_", ".", 1): value.astype(str) for key, value in model.get_rt_info(["dspfx"]).astype(dict).items()
    }


def _save(source: Path, path: Path, precision: str, metadata: Mapping[str, str]) -> None:
    openvino = importlib.import_module("openvino")
    model = _core().read_model(source)
    _keep_reorderings(model, importlib.import_module("openvino.opset13"))
    for key, value in metadata.items():
        model.set_rt_info(value, ["dspfx", key.replace(".", "_", 1)])
    openvino.save_model(model, path, compress_to_fp16=precision == "fp16")
