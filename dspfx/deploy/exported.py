"""What every export has in common: the checks before, the comparison after, and what the file says of itself."""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.metadata
import platform
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dspfx.config import Inputs
from dspfx.deploy.agree import disagreement
from dspfx.deploy.onnx import Nesting
from dspfx.deploy.quiet import quiet, reason
from dspfx.errors import ConfigError, InputError, MismatchError, ModelError, RuntimeBuildError
from dspfx.graph.inputs import describe_inputs, following, guess_inputs, realise
from dspfx.graph.samples import samples, with_samples
from dspfx.graph.traced import network_meta
from dspfx.modules import GatedLayer
from dspfx.native import has_chains

Call = Callable[..., Any]
# Of an output's largest value, against the network in float32: what is told apart from a wrong file. In int8 the error
# is a matter of the network and of the images that it was calibrated with.
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 0.25}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """A file made of a network.

    Attributes:
        path: the file.
        kind: what it is, with the version of what it was compared on: "onnx on onnxruntime 1.31.1".
        precision: "fp32", "fp16", "bf16" or "int8".
        max_error: the largest difference from the network in PyTorch (float32, eval mode), of the largest value of the
            output that it is in; of an engine, from its ONNX file, and NaN where that does not say how it is called.
        tolerance: what was allowed.
        batches: the batch sizes compared; the file takes any where it is more than one.
        outside_tensorrt: operations of an ONNX file that TensorRT's published list lacks; empty for other files.
        metadata: what the file holds about itself.
        reference: what it was compared with.
    """

    path: Path
    kind: str
    precision: str
    max_error: float
    tolerance: float
    batches: tuple[int, ...]
    outside_tensorrt: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    reference: str = "PyTorch"

    @property
    def any_batch(self) -> bool:
        """The file takes every batch size."""
        return len(self.batches) > 1

    def __str__(self) -> str:
        if not self.batches:
            return (
                f"{self.path}: {self.kind}, {self.precision}, not compared: the ONNX file does not say how it is called"
            )
        batches = ", ".join(map(str, self.batches))
        how = f"any batch (compared at {batches})" if self.any_batch else f"batch {batches} only"
        lacks = f"; TensorRT has no {', '.join(self.outside_tensorrt)}" if self.outside_tensorrt else ""
        return (
            f"{self.path}: {self.kind}, {self.precision}, {how}, differs from {self.reference} by {self.max_error:.1e} "
            f"of the output's scale, allowed {self.tolerance:.2g}{lacks}"
        )


@dataclass(frozen=True)
class Subject:
    """A network about to be exported: its own copy, on the CPU, in eval mode and float32."""

    network: nn.Module
    inputs: Inputs
    metadata: dict[str, str]
    name: str


def subject_of(network: nn.Module, example_inputs: Any, precision: str, has_kernels: bool = False) -> Subject:
    """A copy of the network ready to be exported, and the inputs that it is compared on.

    Warns where the network has chains of the native kernels, and the file will not (`has_kernels`).

    Raises:
        ModelError: there is a gate left.
        ConfigError: an unknown precision.
        InputError: there are no example inputs and none can be guessed, or the network does not run on them.
    """
    if precision not in TOLERANCES:
        raise ConfigError(f"precision is {precision!r}; give one of {', '.join(map(repr, TOLERANCES))}.")
    gated = next((name for name, module in network.named_modules() if isinstance(module, GatedLayer)), None)
    if gated is not None:
        raise ModelError(
            f"{type(network).__name__} still has gates (the first is {gated or 'the network itself'}); lower first: "
            f"small = dspfx.lower(gm), and export that."
        )
    if has_chains(network) and not has_kernels:
        warnings.warn(
            f"this {type(network).__name__} was lowered for dspfx's own kernels, which the file does not have: it will "
            f"compute the zeros, too. Lower it for the runtime that the file is for, as in lower(gm, images, "
            f"'onnxruntime'), or for 'onnxruntime-native' and export_onnx(..., kernels='native').",
            stacklevel=3,
        )
    meta = network_meta(network)
    is_remembered = example_inputs is None
    if is_remembered:
        example_inputs = meta["inputs"] if "inputs" in meta else guess_inputs(network)
    twin, inputs = copy.deepcopy(network).eval().cpu(), on_cpu(Inputs.of(example_inputs))
    is_wide = any(p.is_floating_point() and p.dtype != torch.float32 for p in twin.parameters())
    if is_wide or is_remembered:
        inputs = following(inputs, twin.float())
    describe_inputs(twin, inputs)
    args, kwargs = realise(twin, inputs)
    return Subject(twin, Inputs(*args, **kwargs), _origin(meta, precision), type(network).__name__)


def on_cpu(inputs: Inputs) -> Inputs:
    """The inputs with their tensors on the CPU; those on the meta device stay there."""
    move = lambda x: x.cpu() if isinstance(x, torch.Tensor) and not x.is_meta else x  # noqa: E731
    args, kwargs = torch.utils._pytree.tree_map(move, (inputs.args, inputs.kwargs))
    return Inputs(*args, **kwargs)


def _origin(meta: dict[str, Any], precision: str) -> dict[str, str]:
    """What is known of a file before it is made; `plan` is empty for a network that dspfx did not lower."""
    plan = meta.get("lower_plan")
    return {
        "dspfx.version": _version(),
        "dspfx.plan": hashlib.sha256(plan.to_json().encode()).hexdigest() if plan is not None else "",
        "dspfx.precision": precision,
        "torch.version": str(torch.__version__),
        "python.version": platform.python_version(),
    }


def _version() -> str:
    try:
        return importlib.metadata.version("dspfx")
    except importlib.metadata.PackageNotFoundError:  # used from its sources, without having been installed
        return "unknown"


def need(what: str, packages: tuple[str, ...], extra: str) -> str:
    """The version of the last of the packages; ConfigError where one cannot be imported."""
    module: Any = None
    for package in packages:
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f'{what} needs the package {package}, which cannot be imported ({error}); run: pip install "dspfx'
                f'[{extra}]"'
            ) from error
    return str(getattr(module, "__version__", "")).partition("-")[0]


@dataclass(frozen=True)
class Written:
    """A file that was written and compared."""

    nesting: Nesting
    max_error: float
    batches: tuple[int, ...]


def write_and_compare(
    subject: Subject, kind: str, tolerance: float, write: Callable[[Nesting], object], start: Callable[[Nesting], Call]
) -> Written:
    """Writes a file for every batch, or, where the network is another graph at others, for that of its inputs alone.

    Args:
        write: writes the network with this nesting.
        start: the function that calls what was written, as the network is called.

    Raises:
        ConfigError, InputError: `write` does, about something else than the network.
        RuntimeBuildError: the exporter or the runtime rejects the network; the last line says why.
        MismatchError: what was written computes something else.
    """
    batch = samples(subject.inputs)
    counts = dict.fromkeys((max(batch, 2), 1, 3))  # exported is the first, since a batch of 1 would become a constant
    several = [with_samples(subject.inputs, count) for count in counts]
    cases = [(inputs, output[0]) for inputs in several if (output := _output(subject.network, inputs))]
    own = [case for case in cases if samples(case[0]) == batch] or [(subject.inputs, None)]
    attempts = [(own[:1], False)]
    if len({samples(inputs) for inputs, _ in cases}) > 1 and samples(cases[0][0]) > 1:
        attempts.insert(0, (cases, True))
    with quiet():
        for inputs, any_batch in attempts:
            try:
                nesting = Nesting(subject.network, inputs[0][0], any_batch)
                if any_batch and not any(nesting.free):
                    continue
                write(nesting)
                found = _compare(start(nesting), inputs)
            except (ConfigError, InputError):
                raise  # about what was given for calibration
            except Exception as error:
                failure = error
                continue  # perhaps another graph at another batch; the error that counts is the one for this batch
            if found[0] <= tolerance:
                return Written(nesting, found[0], tuple(samples(x) for x, _ in inputs))
            failure = MismatchError(
                f"this {subject.name} as {kind} differs from PyTorch by {found[0]:.1e} of the largest value of "
                f"{found[1]}, and {tolerance:.1e} is allowed; give example inputs like real ones, a higher precision, "
                f"or tolerance=... if that is good enough."
            )
    if isinstance(failure, MismatchError):
        raise failure
    raise RuntimeBuildError(
        f"this {subject.name} cannot become {kind}; change in the model what the reason names:\n{reason(failure)}"
    ) from failure


def _compare(call: Call, cases: list[tuple[Inputs, Any]]) -> tuple[float, str]:
    """The worst disagreement of a call with the outputs that go with the inputs."""
    with torch.inference_mode():
        found = [disagreement(call(*inputs.args, **inputs.kwargs), expected) for inputs, expected in cases]
    return max(found, key=lambda one: (one[0] != one[0], one[0]))


def _output(network: nn.Module, inputs: Inputs) -> tuple[Any] | None:
    """What the network returns, alone in a tuple; nothing where it does not run on this batch."""
    try:
        with torch.inference_mode():
            return (network(*inputs.args, **inputs.kwargs),)
    except Exception:
        return None
