"""Runtimes behind one function: `build` makes of a network a module that another runtime executes.

fast = build("onnxruntime", small, images)
fast(images)  # a tensor, as small(images) is, equal to it within TOLERANCE
"""

from __future__ import annotations

import copy
import importlib
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dspfx.config import Inputs
from dspfx.deploy.agree import disagreement, tolerance_of
from dspfx.deploy.engines import Engine, OpenVino, start_onnxruntime
from dspfx.deploy.onnx import Nesting, write_onnx
from dspfx.deploy.onnx_chains import Kernels
from dspfx.deploy.quiet import quiet, reason, torch_threads
from dspfx.deploy.tensorrt import build_tensorrt
from dspfx.deploy.tensorrt_module import TensorRTModule
from dspfx.errors import ConfigError, InputError, MismatchError, RuntimeBuildError
from dspfx.graph.inputs import describe_inputs, realise
from dspfx.graph.samples import samples, with_samples
from dspfx.kernels.library import library
from dspfx.native import has_chains

Call = Callable[..., Any]
HALF_TOLERANCE = 2e-2  # for engines in half precision
TOLERANCE = 2e-5  # of an output's largest value, in float32: some 170 times the spacing of its numbers


@dataclass(frozen=True)
class Runtime:
    """What executes a network.

    Attributes:
        make: (network in eval mode, inputs, threads, whether any batch shall do) -> the function that calls it.
        tolerance: the largest difference from eager that is accepted in float32, of the output's largest value.
        packages: what has to be installed, the runtime itself last.
        extra: the extra of dspfx that installs them.
        any_batch: it is built for one image size and all batches, where the network allows that.
        devices: types of the devices that it runs on; empty for all.
    """

    make: Callable[[nn.Module, Inputs, int, bool], Call]
    tolerance: float
    packages: tuple[str, ...] = ("torch",)
    extra: str = ""
    any_batch: bool = False
    devices: tuple[str, ...] = ()


class Built(nn.Module):
    """A network in one runtime: called as the network was in `build`, returns what it returns, without gradients.

    Its copy of the weights is its own: neither what happens to the network later nor its own train() reach it.
    """

    def __init__(self, call: Call, threads: int) -> None:
        super().__init__()
        self._call = call
        self._threads = threads

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch_threads(self._threads), torch.inference_mode():
            return self._call(*args, **kwargs)


def build(runtime: str, network: nn.Module, example_inputs: Any, threads: int = 1) -> Built:
    """`network`, in eval mode, in a runtime; it is left as it was.

    "eager" is PyTorch as it is. "inductor" is `torch.compile` for static shapes: each batch size and image size is
    compiled when it is first met, PyTorch's limit being eight. "onnxruntime" and "openvino" run on the CPU what
    `torch.onnx` exports, for the image size of the example inputs and every batch (for the batch of the example only,
    where the network's graph is another one at others); OpenVINO compiles each batch size when it is first met.
    "onnxruntime-native" is ONNX Runtime with dspfx's kernels for its NativeChains.
    "tensorrt" is an engine in half precision on the GPU, for batches up to twice the example's.

    Args:
        runtime: a key of RUNTIMES.
        network: any module; a lowered one is what this is for.
        example_inputs: as for `prepare`; tensors on the meta device stand for random ones.
        threads: CPU threads of a call.

    Raises:
        ConfigError: an unknown runtime, one that is not installed, or too few threads.
        InputError: the network does not run on the inputs, or lies on a device that the runtime does not use.
        RuntimeBuildError: the exporter or the runtime rejects the network; the last line says why.
        MismatchError: on the example inputs the runtime's numbers are not those of eager mode.
    """
    kind = check_runtime(runtime, threads)
    _check_device(runtime, kind, network)
    describe_inputs(network, example_inputs)
    with quiet(), torch_threads(threads):
        twin = copy.deepcopy(network).eval()
        return _agreeing(runtime, twin, _real(twin, Inputs.of(example_inputs)), threads)


def find_runtime(name: str, is_called: bool = True) -> Runtime:
    """The runtime of this name; ConfigError where there is none, or where it is to be called and is not installed."""
    if name not in RUNTIMES:
        raise ConfigError(
            f"runtime is {name!r}, which dspfx does not know; give one of {', '.join(map(repr, RUNTIMES))}."
        )
    kind = RUNTIMES[name]
    for package in kind.packages if is_called else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(
                f"the runtime {name!r} needs the package {package}, which cannot be imported ({error}); run: "
                f'pip install "dspfx[{kind.extra}]"'
            ) from error
    return kind


def check_runtime(name: str, threads: int, is_called: bool = True) -> Runtime:
    """The runtime of this name; ConfigError where it cannot be had, or not with so few threads."""
    if threads < 1:
        raise ConfigError(f"threads is {threads}; give at least 1.")
    return find_runtime(name, is_called)


def describe_runtime(name: str) -> str:
    """The runtime with its version; PyTorch's own by name alone, since every result names PyTorch's version."""
    package = RUNTIMES[name].packages[-1]
    if package == "torch":
        return name
    return f"{name} {str(importlib.import_module(package).__version__).partition('-')[0]}"


def _agreeing(runtime: str, network: nn.Module, inputs: Inputs, threads: int) -> Built:
    """The network in the runtime, compared with eager mode; for every batch if that can be had."""
    kind = RUNTIMES[runtime]
    is_single = samples(inputs) == 1
    other = _real(network, with_samples(inputs, 2 if is_single else 1))
    if kind.any_batch and _runs(network, other):
        grown = other if is_single else inputs  # the exporter makes a batch of one a constant
        try:
            built = Built(kind.make(network, grown, threads, True), threads)
            for sample in (inputs, other):
                _check_equal(runtime, built, network, sample)
        except Exception:
            pass  # another graph at another batch, perhaps; the error that counts is the one for this batch alone
        else:
            return built
    try:
        built = Built(kind.make(network, inputs, threads, False), threads)
        _check_equal(runtime, built, network, inputs)
    except MismatchError:
        raise
    except Exception as error:
        raise RuntimeBuildError(
            f"{runtime} cannot run this {type(network).__name__}; use another runtime ('eager' runs everything), or "
            f"change in the model what the reason names:\n{reason(error)}"
        ) from error
    return built


def _check_equal(runtime: str, built: Built, network: nn.Module, inputs: Inputs) -> None:
    """MismatchError unless the built network returns on the inputs what the network does."""
    if RUNTIMES[runtime].tolerance == 0:
        return  # it is the network
    with torch.inference_mode():
        expected = network(*inputs.args, **inputs.kwargs)
    worst, place = disagreement(built(*inputs.args, **inputs.kwargs), expected)
    allowed = tolerance_of(expected, RUNTIMES[runtime].tolerance)
    if not worst <= allowed:
        raise MismatchError(
            f"this {type(network).__name__} on {runtime} differs from eager mode by {worst:.1e} of the largest value "
            f"of {place}, and {allowed:.1e} is allowed; use another runtime, or give example inputs like real ones."
        )


def _real(network: nn.Module, inputs: Inputs) -> Inputs:
    args, kwargs = realise(network, inputs)
    return Inputs(*args, **kwargs)


def _runs(network: nn.Module, inputs: Inputs) -> bool:
    try:
        with torch.inference_mode():
            network(*inputs.args, **inputs.kwargs)
    except Exception:
        return False
    return True


def _check_device(runtime: str, kind: Runtime, network: nn.Module) -> None:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    if kind.devices and device.type not in kind.devices:
        raise InputError(
            f"{runtime} runs on {' and '.join(kind.devices)} here, and the network is on {device}; move it and the "
            f"inputs with .to({kind.devices[0]!r})."
        )


def _eager(network: nn.Module, inputs: Inputs, threads: int, any_batch: bool) -> Call:
    return lambda *args, **kwargs: network(*args, **kwargs)  # no submodule, so that train() does not reach it


def _inductor(network: nn.Module, inputs: Inputs, threads: int, any_batch: bool) -> Call:
    def call(*args: Any, **kwargs: Any) -> Any:
        return network(*args, **kwargs)

    # PyTorch counts compilations by code object, so each network gets one of its own, or the ninth would run eagerly.
    code = call.__code__.replace(co_name=f"call_{id(network)}")
    own = types.FunctionType(code, globals(), closure=call.__closure__)
    compiled: Call = torch.compile(own, dynamic=False)
    return compiled


def _from_onnx(
    start: Callable[[Path, list[str], int], Engine],
    network: nn.Module,
    inputs: Inputs,
    threads: int,
    any_batch: bool,
    kernels: Kernels | None = None,
) -> Call:
    nesting = Nesting(network, inputs, any_batch)
    with tempfile.TemporaryDirectory(prefix="dspfx-") as folder:
        path = Path(folder) / "network.onnx"
        engine = start(path, write_onnx(network, nesting, path, kernels=kernels), threads)

    def call(*args: Any, **kwargs: Any) -> Any:
        arrays = [np.ascontiguousarray(x.detach().numpy()) for x in nesting.flatten_inputs(args, kwargs)]
        return nesting.nest_outputs([torch.from_numpy(x) for x in engine(arrays)])

    return call


def _onnxruntime_native(network: nn.Module, inputs: Inputs, threads: int, any_batch: bool) -> Call:
    if not has_chains(network):
        return _from_onnx(start_onnxruntime, network, inputs, threads, any_batch)
    own = library()
    start = partial(start_onnxruntime, library=own.path)
    return _from_onnx(start, network, inputs, threads, any_batch, Kernels(own, threads))


def _tensorrt(network: nn.Module, inputs: Inputs, threads: int, any_batch: bool) -> Call:
    """An engine in half precision, as it is deployed; for batches up to twice that of the inputs."""
    usual = samples(inputs)
    with tempfile.TemporaryDirectory(prefix="dspfx-") as folder:
        path = Path(folder) / "network.engine"
        build_tensorrt(network, path, "fp16", inputs, batch=(1, usual, 2 * usual))
        fast = TensorRTModule(path)
    return lambda *args, **kwargs: fast(*args, **kwargs)


RUNTIMES: dict[str, Runtime] = {
    "eager": Runtime(_eager, tolerance=0.0),
    "inductor": Runtime(_inductor, tolerance=TOLERANCE),
    "onnxruntime": Runtime(
        partial(_from_onnx, start_onnxruntime),
        tolerance=TOLERANCE,
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        any_batch=True,
        devices=("cpu",),
    ),
    "onnxruntime-native": Runtime(
        _onnxruntime_native,
        tolerance=TOLERANCE,
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        any_batch=True,
        devices=("cpu",),
    ),
    "openvino": Runtime(
        partial(_from_onnx, OpenVino),
        tolerance=TOLERANCE,
        packages=("onnx", "onnxscript", "openvino"),
        extra="openvino",
        any_batch=True,
        devices=("cpu",),
    ),
    "tensorrt": Runtime(
        _tensorrt,
        tolerance=HALF_TOLERANCE,
        packages=("onnx", "onnxscript", "onnxruntime", "tensorrt"),
        extra="tensorrt",
        any_batch=True,
        devices=("cuda",),
    ),
}
