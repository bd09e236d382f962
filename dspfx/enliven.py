"""Makes a random network respond to its inputs as trained ones do, so that comparing its outputs proves something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx.config import Inputs
from dspfx.graph.inputs import materialise
from dspfx.graph.samples import samples
from dspfx.graph.traced import Network, TracedModule, all_graphs, parts_of
from dspfx.graph.tracer import LEAF_TYPES

_ANY_NORM = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_MOMENTUM = 6  # its place among the arguments of F.batch_norm
_TINY = 1e-3


def revive(gm: Network) -> None:
    """Random scales and shifts for every batch norm, and life for parameters that begin as zero or next to it.

    Most shifts are positive, as in trained networks: units that are mostly on pass the input's changes through,
    while a random network of units that are mostly off is chaotic and blows float32's rounding up a hundredfold.
    A zero head, a last norm's zero scale or a layer scale of 1e-6 would let nothing through at all.
    """
    for norm in _norms(gm):
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.25, 1.0)
    with torch.no_grad():
        for module in gm.modules():
            for name, value in module.named_parameters(recurse=False):
                is_bias = isinstance(module, LEAF_TYPES) and value.dim() == 1 and name != "weight"
                if is_bias or not value.is_floating_point() or not value.numel() or float(value.abs().max()) > _TINY:
                    continue
                if value.numel() == max(value.shape, default=1):  # a gain for each channel, or for all
                    nn.init.uniform_(value, 0.5, 1.5)
                else:
                    value.normal_(0, (value.numel() / value.shape[0]) ** -0.5)


def calibrate(gm: Network) -> None:
    """Gives every batch norm of every traced part the statistics of what random inputs make it see."""
    for part in parts_of(gm).values():
        _calibrate(part, 8 if part is gm else max(2, min(8, samples(part.meta["inputs"]))))


def _calibrate(part: TracedModule, batch: int) -> None:
    norms = _norms(part)
    if not any(isinstance(m, _ANY_NORM) for m in part.modules()):
        _scale_layers(part)
    modes = [(m, m.training) for m in part.modules()]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        # A cumulative average over the batches; a forward of the user's own may need a number: the last batch counts.
        norm.momentum = None if type(norm).forward.__module__.startswith("torch.") else 1.0
    with _last_batch_counts(part), torch.no_grad():
        part.train()
        for norm in norms:
            norm.train()  # also where the user's own train() keeps it frozen
        for _ in range(2 if norms else 0):
            args, kwargs = random_inputs(part, batch)
            part(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    part.train(modes[0][1])
    for module, mode in modes:
        module.training = mode


@contextmanager
def _last_batch_counts(part: TracedModule) -> Iterator[None]:
    """Inside, norms that were traced into (whose momentum is a number in the graph) take a batch's own statistics."""
    nodes = [n for graph in all_graphs(part) for n in graph.nodes if n.target is F.batch_norm]
    before = [(n.args, n.kwargs) for n in nodes]
    for node in nodes:
        if len(node.args) > _MOMENTUM:
            node.update_arg(_MOMENTUM, 1.0)
        else:
            node.kwargs = {**node.kwargs, "momentum": 1.0}
    part.recompile()
    yield
    for node, (args, kwargs) in zip(nodes, before, strict=True):
        node.args, node.kwargs = args, kwargs
    part.recompile()


def _scale_layers(part: TracedModule) -> None:
    """Without any norm, every layer's output is brought to a spread of one, or biases would drown the input."""

    def scale(layer: Any, args: Any, out: Tensor) -> Tensor:
        spread = out.std(correction=0)
        if not 0 < float(spread) < float("inf"):
            return out
        for value in (layer.weight, layer.bias):
            if value is not None:
                value.div_(spread)
        return out / spread

    layers = [m for m in part.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    args, kwargs = random_inputs(part, max(2, samples(part.meta["inputs"])))
    with torch.no_grad():
        part(*args, **kwargs)
    for hook in hooks:
        hook.remove()


def _norms(gm: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in gm.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def random_inputs(gm: TracedModule, batch: int) -> tuple[Any, Any]:
    """(args, kwargs) like the network's example inputs, of another batch size, from the global RNG."""
    inputs: Inputs = gm.meta["inputs"]
    leaves = [x for x in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(x, Tensor)]
    old = leaves[0].shape[0]
    dtype = next((p.dtype for p in gm.parameters()), torch.float32)

    def resize(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = (batch, *x.shape[1:]) if x.dim() and x.shape[0] == old else x.shape
        return torch.empty(shape, dtype=dtype if x.is_floating_point() else x.dtype, device="meta")

    resized = Inputs(*pytree.tree_map(resize, inputs.args), **pytree.tree_map(resize, inputs.kwargs))
    args, kwargs = materialise(gm, resized)

    def noise(x: Any) -> Any:
        return torch.randn_like(x) if isinstance(x, Tensor) and x.is_floating_point() else x

    return pytree.tree_map(noise, args), pytree.tree_map(noise, kwargs)
