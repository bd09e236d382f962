"""The native kernels beside the dense network in its fastest runtime, and beside whole-channel pruning of equal FLOPs.

    OMP_NUM_THREADS=1 python -m benchmarks.native_table --write docs/results/native.md

Networks and threads are timed in interleaved rounds of two; layers step by step, in the order of the network. With
LD_PRELOAD=./avx2_only.so (benchmarks/avx2_only.c) everything runs as on a processor without AVX-512.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

import dspfx
from dspfx.deploy.benchmark import describe_setting
from dspfx.deploy.machine import block_width
from dspfx.deploy.quiet import torch_threads
from dspfx.deploy.runtimes import build
from dspfx.deploy.timing import Result, compare, interleave
from dspfx.estimate import random_energy
from dspfx.kernels.chain import Chain, Conv
from dspfx.kernels.engine import Engine
from dspfx.kernels.library import processor_features
from dspfx.native import NativeChain
from dspfx.passes.fuse_native import fuse_native
from tests.compare import forced
from tests.data import DSP_RESNET20
from tests.nets.published import load_published

STOCK = ("onnxruntime", "openvino", "eager")
Array = np.ndarray[Any, np.dtype[np.float64]]
LARGE = 64  # pixels a side, from which on one image is timed
CALLS = 8  # in a timing of threads
LAYERS = ((64, 64, 112, 3), (128, 128, 56, 3), (256, 256, 56, 1), (512, 512, 28, 3))  # C, O, height, kernel


@dataclass(frozen=True)
class Case:
    """A network with a structure, and how much of it is left."""

    name: str
    dense: nn.Module
    pruned: nn.Module
    size: int
    share: float


def cases(only: str) -> list[Case]:
    found: list[tuple[str, Callable[[], Case]]] = []
    if DSP_RESNET20.exists():
        found.append(("published ResNet20, 4 groups", published))
    for name, groups, share in (
        ("resnet50", 2, 0.33),
        ("resnet18", 4, 0.35),
        ("vgg11_bn", 4, 0.35),
        ("mobilenet_v2", 2, 0.5),
    ):
        label = f"{name}, {groups} groups"
        found.append((label, lambda name=name, groups=groups, share=share: random_structure(name, groups, share)))
    return [make() for label, make in found if any(part in label for part in only.split(","))]


def published() -> Case:
    model = load_published(DSP_RESNET20)
    plan = forced(model, "dense").meta["lower_plan"]
    share = sum(layer.macs_left for layer in plan.layers) / sum(layer.macs for layer in plan.layers)
    return Case("published ResNet20, 4 groups", type(model)().eval(), model, 32, share)


def random_structure(name: str, groups: int, share: float) -> Case:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    return Case(f"{name}, {groups} groups", model, thinned(model, 224, groups, share), 224, share)


def thinned(model: nn.Module, size: int, groups: int, share: float) -> nn.Module:
    """`model` with random groups of random channels; one group: whole channels."""
    gm = dspfx.prepare(model, torch.zeros(1, 3, size, size), dspfx.GateConfig(groups=groups))
    dspfx.prune(gm, dspfx.Budget(flops=share), random_energy(groups))
    return gm


def native(network: nn.Module) -> nn.Module:
    """Every layer in its dense form, and all of that in the native kernels."""
    small: nn.Module = fuse_native(forced(network, "dense"))
    return small


def measure_network(case: Case, batch: int, rounds: int) -> dict[str, Any]:
    """Ratios to the dense network in its fastest runtime, which is found first; then pairs in interleaved rounds."""
    x = torch.randn(batch, 3, case.size, case.size)
    channels = thinned(case.dense, case.size, 1, case.share)
    forms = {
        "dense": (case.dense,),
        "groups": (forced(case.pruned, "dense", block_width()), forced(case.pruned, "branches", block_width())),
        "channels": (forced(channels, "dense"), forced(channels, "dense", block_width())),
    }
    calls: dict[str, Callable[[], Any]] = {}
    for runtime in STOCK:
        for kind, networks in forms.items():
            for i, network in enumerate(networks):
                built = build(runtime, network, x)
                calls[f"{kind} {runtime} {i}"] = partial(built, x)
    ours, whole = native(case.pruned), native(case.dense)
    calls |= {"native": lambda: ours(x), "native, dense": lambda: whole(x)}
    calls["native, deployed"] = partial(build("onnxruntime-native", ours, x), x)
    with torch_threads(1), torch.inference_mode():
        first = interleave(calls, max(rounds // 4, 3))
    medians = {name: statistics.median(seconds) for name, seconds in first.items()}

    def best(kind: str) -> str:
        return min((name for name in medians if name.startswith(f"{kind} ")), key=medians.__getitem__)

    def against(name: str, reference: str) -> Result:
        """Two networks by themselves: others between them would empty the caches of both."""
        with torch_threads(1), torch.inference_mode():
            samples = interleave({key: calls[key] for key in (reference, name)}, rounds)
        return compare(samples)[name]

    dense, whole_channels = best("dense"), best("channels")
    return {
        "network": f"{case.name}, {case.share:.0%}",
        "batch": batch,
        "dense": f"{1e3 * medians[dense]:.2f} ms {dense.split()[1]}",
        "stock": against(best("groups"), dense).ratio,
        "native": (found := against("native", dense)).ratio,
        "spread": found.spread,
        "deployed": against("native, deployed", dense).ratio,
        "to_channels": against("native", whole_channels).ratio,
        "channels": whole_channels.split()[1],
        "to_own_dense": against("native", "native, dense").ratio,
    }


class Steps:
    """The steps of an engine's program, to be called one by one in their order."""

    def __init__(self, engine: Engine, x: Tensor) -> None:
        self.outputs, self.engine = engine([x], 1), engine
        self.loaded, self.x = next(iter(engine.loaded.values())), x
        program, self.convolves, steps = self.loaded.program, [], []
        place = program.first
        while program.steps[place]:
            self.convolves.append(program.steps[place] == 1)
            steps.append(np.append(program.steps[place : place + program.steps[place + 1]], [0, 0]))
            place += program.steps[place + 1]
        self.array = np.concatenate([program.steps, *steps]).astype(np.int32)
        ends = np.cumsum([len(program.steps), *map(len, steps)])
        self.places = [*ends[:-1], ends[-1] - 2]  # the last one is nothing but the call
        self.seconds: list[list[float]] = []

    def time(self) -> None:
        """One more round."""
        loaded, call = self.loaded, self.loaded.spare[0]
        call.inputs[0] = self.x.data_ptr()
        for i, y in enumerate(self.outputs):
            call.outputs[i] = y.data_ptr()
        self.seconds.append([])
        for place in self.places:
            start = time.perf_counter()
            self.engine.library.run(
                ctypes.c_void_p(self.array.ctypes.data), int(place), self.engine.weights_place, call.work, call.inputs,
                call.outputs, loaded.input_sizes, loaded.output_sizes, 1, 1,
            )  # fmt: skip
            self.seconds[-1].append(time.perf_counter() - start)

    def convolutions(self) -> dict[Conv, tuple[Array, int]]:
        """Seconds of each convolution, round by round, and its multiply-adds at one position."""
        seconds = np.array(self.seconds)
        taken = np.maximum(seconds[:, :-1] - np.median(seconds[:, -1]), 1e-9)[:, self.convolves]
        engine = self.engine
        convs = [layer for layer in engine.chain.layers if isinstance(layer, Conv)]
        work = [
            sum(len(tile.filters) * len(tile.channels) for tile, _, _ in engine.packed.tiles[conv])
            * conv.kernel[0] * conv.kernel[1] for conv in convs
        ]  # fmt: skip
        return {conv: (seconds, macs) for conv, seconds, macs in zip(convs, taken.T, work, strict=True)}


def measure_layers(case: Case, rounds: int) -> dict[str, Any]:
    """Time per remaining multiply-add to that of the same kernel on the dense layer, over the network's layers."""
    x = torch.randn(1, 3, case.size, case.size)
    chains = [next(m for m in native(net).modules() if isinstance(m, NativeChain)) for net in (case.pruned, case.dense)]
    ours, dense = (Steps(chain.engine([x]), x) for chain in chains)
    for _ in range(rounds):
        ours.time()
        dense.time()
    layers = list(zip(ours.convolutions().values(), dense.convolutions().values(), strict=True))
    ratios = [float(np.median(t / dt)) / (work / all_) for (t, work), (dt, all_) in layers if work]
    taken, whole = (sum(pair[i][0] for pair in layers) for i in (0, 1))
    share = sum(np.median(dt) * work / all_ for (_, work), (dt, all_) in layers) / np.median(whole)
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "network": case.name,
        "layers": len(layers),
        "low": low,
        "median": middle,
        "high": high,
        "all": float(np.median(taken / whole) / share),
    }


def measure_threads(rounds: int) -> list[dict[str, Any]]:
    """Two threads beside one, on layers of more than a millisecond, dense and in four groups of 40% of the channels."""
    rows = []
    for channels, filters, size, kernel in LAYERS:
        for groups in (1, 4):
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(filters, channels, kernel, kernel, generator=generator)
            if groups > 1:
                reads = torch.rand(groups, channels, generator=generator) < 0.4
                weight *= reads[torch.arange(filters) % groups][:, :, None, None]
            conv = Conv(0, 1, weight.numpy(), np.zeros(filters, np.float32), (1, 1), (kernel // 2, kernel // 2))
            engine, x = Engine(Chain(1, (conv,), (1,))), torch.randn(1, channels, size, size)
            twin, y = Engine(Chain(1, (conv,), (1,))), x.clone()
            times = compare(
                interleave(
                    {
                        "1": lambda engine=engine, x=x: several(engine, x),
                        "2": lambda engine=engine, x=x: several(engine, x, 2),
                        "apart": lambda engine=engine, x=x, twin=twin, y=y: at_once(
                            lambda: several(engine, x), lambda: several(twin, y)
                        ),
                    },
                    rounds,
                )
            )
            name = f"{kernel}x{kernel} {channels}-{filters}, {size}x{size}, {groups} group{'s' if groups > 1 else ''}"
            gains = {"gain": 1 / times["2"].ratio, "apart": 2 / times["apart"].ratio}
            rows.append({"layer": name, "ms": times["1"].median_ms / CALLS} | gains)
    return rows


def several(engine: Engine, x: Tensor, threads: int = 1) -> None:
    """Some calls, so that starting threads does not count."""
    for _ in range(CALLS):
        engine([x], threads)


def at_once(first: Callable[[], None], second: Callable[[], None]) -> None:
    """Both, each on a thread of its own."""
    other = threading.Thread(target=second)
    other.start()
    first()
    other.join()


def page(networks: list[dict], layers: list[dict], threads: list[dict], command: str) -> str:
    """The tables in Markdown."""
    first = [
        (r["network"], r["batch"], r["dense"], f"{r['stock']:.2f}", f"{r['native']:.3f} ± {r['spread'] / 2:.3f}",
         f"{r['deployed']:.3f}", f"{r['to_channels']:.2f} ({r['channels']})", f"{r['to_own_dense']:.2f}")
        for r in networks
    ]  # fmt: skip
    second = [(r["network"], r["layers"], *(f"{r[k]:.2f}" for k in ("low", "median", "high", "all"))) for r in layers]
    third = [(r["layer"], f"{r['ms']:.2f}", f"{r['gain']:.2f}", f"{r['apart']:.2f}") for r in threads]
    heads = (
        [
            "network, MACs left",
            "batch",
            "fastest dense",
            "stock forms",
            "native",
            "in ONNX Runtime",
            "native to whole channels",
            "to itself, dense",
        ],
        ["network", "convolutions", "lower quartile", "median", "upper quartile", "all"],
        ["layer", "ms, one thread", "two threads are faster by", "two separate layers at once"],
    )
    tables = [
        tabulate(rows, head, "github", disable_numparse=True)
        for rows, head in zip((first, second, third), heads, strict=True)
    ]
    setting = describe_setting("eager", torch.device("cpu"), 1)
    return "\n\n".join(
        [
            f"# The native kernels ({processor_features()})",
            "Time of the whole network to that of the dense network in the fastest of ONNX Runtime, OpenVINO and "
            "PyTorch; below 1 is faster. *stock forms*: the same structure in these runtimes, without dead channels in "
            "widths of whole blocks, or in branches, the fastest of all. *native*: the network as `dspfx.lower` "
            "returns it, called from Python. *in ONNX Runtime*: the same as an operator of a file for ONNX Runtime "
            "(runtime onnxruntime-native). *native to whole channels*: to a network of the same MACs from which "
            "whole channels were pruned, in any widths or whole blocks, in its fastest runtime (in brackets). *to "
            "itself, dense*: to the dense network in the native kernels, the fraction of MACs being what it could be "
            "at best. Medians of paired ratios, two networks in interleaved rounds; ± half their interquartile range.",
            tables[0],
            "Time per remaining multiply-add of each convolution to that of the same kernel on the dense layer, batch "
            "1; *all* weighs the layers by their dense time.",
            tables[1],
            "Threads. *two separate layers at once*: as many times the work in the time of one thread, by two copies "
            "of the layer that share nothing, one on each core: what the machine allows. Where that is below 1.8, the "
            "cores wait for what they share, and no division of the work helps.",
            tables[2],
            f"Measured on: {setting}; everything else with one thread.",
            f"Made by\n\n    OMP_NUM_THREADS=1 {command}\n",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose name contains one of these, separated by commas")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--write", type=Path, help="write the page to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    networks, layers = [], []
    for case in cases(options.only):
        for batch in (1, 8) if case.size < LARGE else (1,):
            networks.append(measure_network(case, batch, options.rounds))
            print(networks[-1], flush=True)
        layers.append(measure_layers(case, options.rounds))
        print(layers[-1], flush=True)
    threads = measure_threads(options.rounds)
    prefix = f"LD_PRELOAD=./{Path(os.environ['LD_PRELOAD']).name} " if os.environ.get("LD_PRELOAD") else ""
    text = page(networks, layers, threads, f"{prefix}python -m benchmarks.native_table {shlex.join(sys.argv[1:])}")
    print(text)
    if options.write:
        options.write.write_text(text)


if __name__ == "__main__":
    main()
