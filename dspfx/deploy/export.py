"""A lowered network as a file that other programs run, compared with PyTorch before it is put in its place.

print(export_onnx(small, "small.onnx"))
small.onnx: onnx on onnxruntime 1.31.1, fp32, any batch (compared at 2, 1, 3), differs from PyTorch by 4.1e-07 ...
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from dspfx.deploy.exported import DTYPES, TOLERANCES, Exported, Subject, Written, need, subject_of, write_and_compare
from dspfx.deploy.onnx import Nesting, write_onnx
from dspfx.deploy.onnx_chains import Kernels
from dspfx.deploy.onnx_file import check_file, in_float32, read_graph, start_file, write_metadata
from dspfx.deploy.quantize import quantize
from dspfx.deploy.staging import staged
from dspfx.deploy.tensorrt_ops import refused
from dspfx.errors import ConfigError, StorageError
from dspfx.kernels.library import FEATURES, PORTABLE, Library, build_library, can_run, processor_features
from dspfx.native import with_chains


def export_onnx(
    small: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    precision: str = "fp32",
    calibration: Iterable[Any] | None = None,
    tolerance: float | None = None,
    kernels: str | None = None,
    verbose: bool = True,
) -> Exported:
    """Writes a lowered (or any other ungated) network as ONNX, for every batch where its graph allows that.

    The file is checked by ONNX's checker with strict shape inference, run on ONNX Runtime beside the network in
    PyTorch at several batches, and only then put at `path`; a network of more than 1.9 GB gets a second file,
    `path`.data. Inputs and outputs stay float32 in every precision.

    Args:
        small: left as it was; exported in eval mode.
        path: ends in .onnx.
        example_inputs: as for `prepare`; a network of dspfx remembers its own. Images like real ones make the
            comparison mean more.
        precision: "fp32"; "fp16" or "bf16" convert the network and cast at its inputs and outputs (bf16 is compared
            with bf16's weights and float32's arithmetic, ONNX Runtime having no kernels for it on a CPU); "int8" puts
            QuantizeLinear and DequantizeLinear around convolutions and linear layers.
        calibration: for "int8", example inputs like real ones, some hundred images in all.
        tolerance: the largest error that is accepted, of the output's largest value; by default 1e-4, 2e-2 (fp16),
            1e-1 (bf16), 0.25 (int8).
        kernels: what was lowered for "onnxruntime-native" keeps dspfx's own kernels, as operators of a library that is
            written beside the file (`path` with the suffix .NAME.so) and that a session has to load, by
            `SessionOptions.register_custom_ops_library`. They are for processors of this kind ("native"), or with
            "AVX512", "AVX2" or nothing special ("portable").
        verbose: print the result.

    Raises:
        ModelError: there is a gate left; lower first.
        ConfigError: an unknown precision, "int8" without calibration, unknown kernels or such in another precision
            than fp32, or packages are missing (named).
        InputError: as for `prepare`.
        StorageError: `path` cannot be written.
        RuntimeBuildError: the exporter or ONNX Runtime rejects the network, or there is no compiler for the kernels;
            the last line says why.
        MismatchError: the file computes something else than PyTorch.
    """
    version = need("export_onnx", ("onnx", "onnxscript", "onnxruntime"), "onnx")
    check_calibration(precision, calibration)
    features = _features(kernels, precision)
    subject = subject_of(small, example_inputs, precision, features is not None)
    allowed = TOLERANCES[precision] if tolerance is None else tolerance
    kind = f"onnx on onnxruntime {version}"
    with staged(path, (".onnx",)) as part:
        if features is not None:
            kind = f"{kind} with dspfx's kernels for {features}"
            written = _write_with_kernels(subject, part, features, kind, allowed)
            subject.metadata["dspfx.kernels"] = features
        else:
            written = _write_onnx(subject, part, precision, calibration, kind, allowed)
        metadata = describe_file(subject, written, kind, allowed)
        write_metadata(part, metadata)
        lacks = refused(read_graph(part))
    return announce(
        Exported(Path(path), kind, precision, written.max_error, allowed, written.batches, lacks, metadata), verbose
    )


def check_calibration(precision: str, calibration: Iterable[Any] | None) -> None:
    """ConfigError unless there is calibration exactly where it is needed."""
    if (precision == "int8") != (calibration is not None):
        raise ConfigError(
            f"precision is {precision!r} and calibration {'missing' if calibration is None else 'given'}; int8, and "
            f"only int8, needs calibration=[images, ...], some hundred images like real ones."
        )


def describe_file(subject: Subject, written: Written, kind: str, tolerance: float) -> dict[str, str]:
    """The metadata of a file."""
    metadata = subject.metadata | {
        "dspfx.compared": kind,
        "dspfx.max_error": f"{written.max_error:.3e}",
        "dspfx.tolerance": f"{tolerance:.3e}",
        "dspfx.batches": ",".join(map(str, written.batches)),
    }
    try:
        return metadata | {"dspfx.nesting": written.nesting.to_json()}
    except StorageError:  # inputs that hold what JSON has no place for; whoever loads the file calls it with tensors
        return metadata


def announce(exported: Exported, verbose: bool) -> Exported:
    """Prints the result, if it shall be."""
    if verbose:
        print(exported)
    return exported


def _features(kernels: str | None, precision: str) -> str | None:
    """The processors that the kernels are for."""
    names = (*FEATURES, PORTABLE)
    if kernels is not None and kernels not in ("native", *names):
        raise ConfigError(f"kernels is {kernels!r}; give 'native', or one of {', '.join(map(repr, names))}.")
    if kernels is not None and precision != "fp32":
        raise ConfigError(f"kernels compute in float32, and precision is {precision!r}; leave one of the two out.")
    return processor_features() if kernels == "native" else kernels


def _clear(folder: Path) -> None:
    """Removes what an earlier attempt has written."""
    for old in folder.iterdir():
        old.unlink()


def _write_with_kernels(subject: Subject, part: Path, features: str, kind: str, allowed: float) -> Written:
    """The file and its library, compared with the plain layers; on a processor without the features, by others."""
    plain = replace(subject, network=with_chains(subject.network, lambda chain: chain.plain))

    def write(nesting: Nesting, features: str = features) -> None:
        _clear(part.parent)
        built = Library(build_library(features))
        write_onnx(subject.network, nesting, part, kernels=Kernels(built))
        shutil.copyfile(built.path, part.with_suffix(f".{features.lower()}.so"))
        check_file(part)

    def start(nesting: Nesting) -> Any:
        if can_run(features):
            return start_file(part, nesting, library=build_library(features))
        write(nesting, processor_features())  # another program, of the same layers
        call = start_file(part, nesting, library=build_library(processor_features()))
        write(nesting)
        return call

    return write_and_compare(plain, kind, allowed, write, start)


def _write_onnx(
    subject: Subject, part: Path, precision: str, calibration: Iterable[Any] | None, kind: str, allowed: float
) -> Written:
    """The file, compared; whatever else was written beside it is gone."""
    dtype = DTYPES.get(precision)
    network = subject.network if dtype is None else copy.deepcopy(subject.network).to(dtype)
    batches = list(calibration or [])

    def write(nesting: Nesting) -> None:
        _clear(part.parent)
        write_onnx(network, nesting, part, dtype)
        if precision == "int8":
            quantize(part, nesting, batches)
        check_file(part)

    def start(nesting: Nesting) -> Any:
        if precision != "bf16":
            return start_file(part, nesting)
        twin = in_float32(part, part.parent)
        call = start_file(twin, nesting)
        twin.unlink()
        return call

    return write_and_compare(subject, kind, allowed, write, start)
