"""What a network costs: FLOPs in fvcore's convention, parameters and bytes, layer by layer."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.graph.inputs import describe_inputs, guess_inputs, materialise, tensors_of
from dspfx.graph.samples import with_samples
from dspfx.graph.traced import network_meta
from dspfx.native import NativeChain
from dspfx.plans import Plan


@dataclass(frozen=True)
class LayerProfile:
    """One module's own share, without its children's.

    Attributes:
        name: its qualified name; empty for what the network itself computes or owns.
        kind: its class.
        weight: the shape of its weight; empty where it has none.
        flops: of all its calls, at batch 1.
        params: its parameters; one shared with an earlier layer counts there.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    flops: int
    params: int


@dataclass(frozen=True)
class Profile(Plan):
    """The costs of a network in eval mode at batch 1.

    Attributes:
        inputs: the shapes of the example inputs it was measured with.
        layers: every module that computes or owns something itself; their FLOPs and parameters add up to the totals.
        flops: in fvcore's convention, where a multiply-add is one FLOP.
        params: number of parameters.
        bytes: of parameters and buffers.
        uncounted: operations that fvcore has no count for (additions, activations).
    """

    inputs: tuple[tuple[int, ...], ...]
    layers: tuple[LayerProfile, ...]
    flops: int
    params: int
    bytes: int
    uncounted: tuple[str, ...]

    def __str__(self) -> str:
        rows = [
            (row.name or "(itself)", row.kind, "x".join(map(str, row.weight)), f"{row.flops:,}", f"{row.params:,}")
            for row in self.layers
        ]
        headers = ["layer", "type", "weight", "FLOPs", "parameters"]
        table = tabulate(rows, headers, colalign=("left", "left", "left", "right", "right"), disable_numparse=True)
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.inputs)
        lines = [
            table,
            f"{self.flops:,} FLOPs (multiply-adds, fvcore's convention), {self.params:,} parameters, {self.bytes:,} "
            f"bytes, for an input of {shapes}",
        ]
        if self.uncounted:
            lines.append(f"not counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)


def profile(model: nn.Module, example_inputs: Any = None) -> Profile:
    """FLOPs, parameters and bytes of any model: ordinary, prepared or lowered; it is left as it was.

    A prepared or pruned network counts as the dense network that it still is; lower it to see what is saved. What runs
    in native kernels counts without the multiply-adds with zeros that these leave out.

    Args:
        model: any module; it runs in eval mode, on a copy.
        example_inputs: a tensor, list or dict is the one positional argument, a tuple the positional arguments,
            `dspfx.Inputs` also keywords. The first dimension is taken for the batch and reduced to 1, a list of images
            to one. May be omitted where the network remembers its inputs or an image of the first layer's width does.

    Raises:
        InputError: no example inputs could be guessed, or the model does not run on those given.
    """
    if example_inputs is None:
        example_inputs = network_meta(model).get("inputs") or guess_inputs(model)
    inputs = describe_inputs(model, with_samples(Inputs.of(example_inputs), 1))
    network = copy.deepcopy(model).eval()  # fvcore puts hooks on what it counts, and leaves them there if it fails
    flops, uncounted = _count(network, inputs)
    for name, native in network.named_modules():
        for inner, share in native.computed().items() if isinstance(native, NativeChain) else ():
            flops[f"{name}.plain.{inner}"] = round(flops[f"{name}.plain.{inner}"] * share)
    seen: set[int] = set()
    layers = []
    for name, module in network.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        seen.update(map(id, own))
        params = sum(p.numel() for p in own)
        if params or flops[name]:
            weight = getattr(module, "weight", None)
            shape = tuple(weight.shape) if isinstance(weight, Tensor) else ()
            layers.append(LayerProfile(name, type(module).__name__, shape, flops[name], params))
    return Profile(
        inputs=tuple(tuple(x.shape) for x in tensors_of(inputs)),
        layers=tuple(layers),
        flops=sum(flops.values()),
        params=sum(layer.params for layer in layers),
        bytes=sum(x.numel() * x.element_size() for x in chain(network.parameters(), network.buffers())),
        uncounted=uncounted,
    )


class _Flat(nn.Module):
    """The model as fvcore wants it: tensors in, a tuple of tensors out, whatever the model takes and gives."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        leaves, self.spec = pytree.tree_flatten(materialise(model, inputs))
        self.tensors = tuple(x for x in leaves if isinstance(x, Tensor))
        self.others = [None if isinstance(x, Tensor) else (x,) for x in leaves]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten([next(given) if x is None else x[0] for x in self.others], self.spec)
        return tuple(x for x in pytree.tree_leaves(self.model(*args, **kwargs)) if isinstance(x, Tensor))


def _count(network: nn.Module, inputs: Inputs) -> tuple[dict[str, int], tuple[str, ...]]:
    """(every module's own FLOPs by name, the operations fvcore does not count)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of the TorchScript functions that fvcore is made of
        from fvcore.nn import FlopCountAnalysis
        from fvcore.nn.jit_handles import conv_flop_count, get_shape

    def named_padding(args: list[Any], results: list[Any]) -> Any:
        return conv_flop_count(get_shape(args[0]), get_shape(args[1]), get_shape(results[0]))

    flat = _Flat(network, inputs)
    analysis = FlopCountAnalysis(flat, flat.tensors)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    # fvcore knows a convolution by its numbers; padding="same" makes another operation of it.
    analysis.set_op_handle("aten::_convolution_mode", named_padding)
    cuda = {x.device for x in flat.tensors if x.is_cuda}
    with torch.no_grad(), torch.random.fork_rng(devices=list(cuda)):
        totals = {name: int(count) for name, count in analysis.by_module().items()}
    own = dict(totals)
    for name, count in totals.items():
        if name:
            own[name.rpartition(".")[0]] -= count
    flops = {name: own.get(f"model.{name}" if name else "model", 0) for name, _ in network.named_modules()}
    return flops, tuple(sorted(analysis.unsupported_ops()))
