"""How fast networks run beside each other: interleaved rounds, so that a machine that slows down slows them all."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.deploy.machine import describe_machine
from dspfx.deploy.quiet import torch_threads
from dspfx.deploy.runtimes import build, describe_runtime, find_runtime
from dspfx.errors import ConfigError, InputError, MismatchError, RuntimeBuildError

WARM_UP = 3  # calls of each network before anything counts
SAMPLE_SECONDS = 0.005  # a fast network is called more than once a sample, or the clock would be what is measured


@dataclass(frozen=True)
class Result:
    """The time of one network.

    Attributes:
        median_ms: milliseconds of a call, the median over rounds.
        ratio: to the first network, the median of the ratios within a round; below 1 is faster.
        spread: the interquartile range of those ratios.
    """

    median_ms: float
    ratio: float
    spread: float


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
        runtime: "eager", "inductor", "onnxruntime" or "openvino", see `dspfx.deploy.runtimes.build`.
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
        samples = _measure({name: _call(network, inputs, device) for name, network in built.items()}, rounds)
    shapes = [tuple(x.shape) for x in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor)]
    shape = ", ".join("x".join(map(str, s)) for s in shapes)
    setting = f"input {shape}, {rounds} rounds; {describe_runtime(runtime)}, {describe_machine(device, threads)}"
    return Results(compare(samples), setting)


def compare(samples: Mapping[str, list[float]]) -> dict[str, Result]:
    """Results from each network's seconds, round by round; the first network is the reference."""
    reference = next(iter(samples.values()))
    results = {}
    for name, seconds in samples.items():
        ratios = [ours / theirs for ours, theirs in zip(seconds, reference, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        results[name] = Result(1e3 * statistics.median(seconds), middle, high - low)
    return results


def _build(runtime: str, name: str, model: nn.Module, inputs: Inputs, threads: int) -> nn.Module:
    """See `build`; an error about the model says which one it is."""
    try:
        return build(runtime, model, inputs, threads)
    except (RuntimeBuildError, MismatchError) as error:
        raise type(error)(f"{name}: {error}") from error


def _measure(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call, by name, a list over rounds."""
    repeats = {}
    for name, call in calls.items():
        seconds = min(_time(call, 1) for _ in range(WARM_UP))
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / max(seconds, 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            samples[name].append(_time(calls[name], repeats[name]))
    return samples


def _time(call: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _call(model: nn.Module, inputs: Inputs, device: torch.device) -> Callable[[], None]:
    """One complete forward pass."""

    def call() -> None:
        model(*inputs.args, **inputs.kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def _device(models: Mapping[str, nn.Module]) -> torch.device:
    """The one device of all networks."""
    devices = {name: _first_device(model) for name, model in models.items()}
    first = next(iter(devices))
    for name, device in devices.items():
        if device != devices[first]:
            raise InputError(
                f"benchmark compares networks on one device, and {first} is on {devices[first]}, {name} on {device}; "
                f"move one of them with .to(...)."
            )
    return devices[first]


def _first_device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
