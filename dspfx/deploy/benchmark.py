"""How fast networks run beside each other, as a user would measure it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.deploy.machine import describe_machine
from dspfx.deploy.quiet import torch_threads
from dspfx.deploy.runtimes import build, describe_runtime, find_runtime
from dspfx.deploy.timing import Call, Result, compare, complete, interleave
from dspfx.errors import ConfigError, InputError, MismatchError, RuntimeBuildError


class Results(dict[str, Result]):
    """A Result for each network, by name; prints as a table that says on what it was measured."""

    def __init__(self, results: Mapping[str, Result], setting: str) -> None:
        super().__init__(results)
        self.setting = setting

    def __str__(self) -> str:
        rows = [(name, f"{r.median_ms:.3f}", f"{r.ratio:.3f}", f"{r.spread:.3f}") for name, r in self.items()]
        headers = ["network", "median ms", f"ratio to {next(iter(self))}", "spread"]
        align = ("left", "right", "right", "right")
        return f"{tabulate(rows, headers, colalign=align, disable_numparse=True)}\n{self.setting}"


def benchmark(
    models: Mapping[str, nn.Module],
    example_inputs: Any,
    *,
    runtime: str = "eager",
    rounds: int = 30,
    threads: int = 1,
) -> Results:
    """Times networks in one runtime, in eval mode; every round calls each of them, in alternating order.

    Args:
        models: networks by name, on one device; the first is the one that the others are compared with.
        example_inputs: as for `prepare`, for all networks; the batch is what they are timed with.
        runtime: "eager", "inductor", "onnxruntime", "onnxruntime-native", "openvino" or "tensorrt", see
            `dspfx.deploy.runtimes.build`.
        rounds: samples of each network, at least 2.
        threads: CPU threads of the runtime while it measures.

    Returns:
        name -> Result, which has `.median_ms`, `.ratio` and `.spread`.

    Raises:
        ConfigError: no network, too few rounds or threads, or a runtime that is unknown or not installed.
        InputError: networks or inputs on different devices, or a network does not run on the inputs.
        RuntimeBuildError: the runtime rejects one of the networks.
        MismatchError: one of the networks computes something else in this runtime than in eager mode.
    """
    if not models:
        raise ConfigError('benchmark got no network; give at least one by name: {"dense": model}.')
    if rounds < 2 or threads < 1:
        raise ConfigError(f"benchmark got rounds={rounds} and threads={threads}; give at least 2 rounds and 1 thread.")
    find_runtime(runtime)
    device = _device(models)
    inputs = Inputs.of(example_inputs)
    built = {name: _build(runtime, name, model, inputs, threads) for name, model in models.items()}
    with torch_threads(threads), torch.inference_mode():
        samples = interleave({name: forward_pass(network, inputs, device) for name, network in built.items()}, rounds)
    setting = f"input {describe_shapes(inputs)}, {rounds} rounds; {describe_setting(runtime, device, threads)}"
    return Results(compare(samples), setting)


def describe_shapes(inputs: Inputs) -> str:
    """The shapes of all tensors, "1x3x224x224"."""
    shapes = [x.shape for x in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor)]
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def describe_setting(runtime: str, device: torch.device, threads: int) -> str:
    """Runtime with version, machine, threads."""
    return f"{describe_runtime(runtime)}, {describe_machine(device, threads)}"


def forward_pass(model: nn.Module, inputs: Inputs, device: torch.device) -> Call:
    """One complete forward pass."""
    return complete(lambda: model(*inputs.args, **inputs.kwargs), device)


def first_device(model: nn.Module) -> torch.device:
    """Where a network's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _build(runtime: str, name: str, model: nn.Module, inputs: Inputs, threads: int) -> nn.Module:
    """See `build`; an error about the model says which one it is."""
    try:
        return build(runtime, model, inputs, threads)
    except (RuntimeBuildError, MismatchError) as error:
        raise type(error)(f"{name}: {error}") from error


def _device(models: Mapping[str, nn.Module]) -> torch.device:
    """The one device of all networks."""
    devices = {name: first_device(model) for name, model in models.items()}
    first = next(iter(devices))
    for name, device in devices.items():
        if device != devices[first]:
            raise InputError(
                f"benchmark compares networks on one device, and {first} is on {devices[first]}, {name} on {device}; "
                f"move one of them with .to(...)."
            )
    return devices[first]
