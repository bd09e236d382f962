"""Proof on a user's own model that pruning and lowering keep the function: random structure, float64, two batches."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dspfx.config import DEFAULT_GATES, GateConfig, Inputs
from dspfx.errors import InputError, MismatchError
from dspfx.graph.analyse import analyse
from dspfx.graph.inputs import materialise
from dspfx.graph.samples import samples
from dspfx.graph.traced import Network, TracedModule, network_meta, parts_of
from dspfx.graph.tracer import LEAF_TYPES
from dspfx.modules import GatedLayer
from dspfx.passes.apply_masks import apply_masks
from dspfx.passes.plan_prune import Search
from dspfx.pipeline import lower, prepare

TOLERANCE = 1e-9
_SHARE_DROPPED = 0.6
_ANY_NORM = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_BATCHES = (1, 5)
_TINY = 1e-3


@dataclass(frozen=True)
class SelfcheckReport:
    """What `selfcheck` measured.

    Attributes:
        model: class name.
        gated: number of gated convolutions.
        flops_left: remaining fraction of MACs under the random plan.
        flops_run: fraction of MACs that the lowered network executes.
        error: largest difference masked against lowered in float64, relative to the output's scale.
        float_error: the same in float32; NaN for a model whose code branches on its precision.
        rounding: what float32 alone makes of the masked network: its distance from float64, as above.
        response: relative change of the output between two random inputs; near zero the comparison proves little.
        batches: batch sizes compared, of each traced part.
    """

    model: str
    gated: int
    flops_left: float
    flops_run: float
    error: float
    float_error: float
    rounding: float
    response: float
    batches: tuple[int, ...]

    def __str__(self) -> str:
        dull = "" if self.response > 1e-3 else " (the outputs hardly respond to the input: this proves little)"
        batches = ", ".join(map(str, self.batches))
        return (
            f"{self.model}: {self.gated} gated convolutions, random plan with {self.flops_left:.1%} of FLOPs left, "
            f"lowered runs {self.flops_run:.1%}; masked = lowered within {self.error:.1e} (float64), "
            f"{self.float_error:.1e} (float32, whose own rounding is {self.rounding:.1e}) at batches "
            f"{batches}; outputs change by {self.response:.1e} between inputs{dull}"
        )


def selfcheck(
    model: nn.Module, example_inputs: Any = None, config: GateConfig = DEFAULT_GATES, seed: int = 0
) -> SelfcheckReport:
    """Prunes a copy of `model` at random, lowers it, and compares both in float64; `model` and RNG are untouched.

    Batch norms are given random scales and shifts and calibrated on random inputs first, since a freshly
    initialised network hardly responds to its input and would agree with anything. Of a model that does not trace
    whole, each traced part is compared on random inputs of its own: never what follows, such as the boxes that a
    threshold leaves.

    Raises:
        MismatchError: outputs differ by more than 1e-9 of their scale, or nothing was pruned though something could.
        InputError, TraceError, ModelError, ConfigError: as for `prepare`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with _Double():
            checked = _check(model, example_inputs, config)
        try:
            float_error, rounding = _compare_floats(checked.pairs)
        except InputError:  # the model branches on its own precision
            float_error = rounding = float("nan")
    return SelfcheckReport(float_error=float_error, rounding=rounding, **checked.figures)


@dataclass(frozen=True)
class _Checked:
    """What float64 told, and what float32 is still to be asked about."""

    pairs: list[tuple[TracedModule, TracedModule, list[tuple[Any, Any]], list[list[Tensor]]]]
    figures: dict[str, Any]


class _Double(TorchFunctionMode):
    """Whatever asks for float32 gets float64: models that call `.float()` themselves run in float64 too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wider = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        call: Any = Tensor.double if func is Tensor.float else func
        return call(*map(wider, args), **{key: wider(value) for key, value in (kwargs or {}).items()})


def _check(model: nn.Module, example_inputs: Any, config: GateConfig) -> _Checked:
    double = copy.deepcopy(model).double()
    gm = prepare(double, None if example_inputs is None else _as_double(Inputs.of(example_inputs)), config)
    revive(gm)
    gates = [m for m in gm.modules() if isinstance(m, GatedLayer)]
    for gate in gates:
        gate.gate_logits.normal_()
    channels = analyse(gm)
    left = 1.0
    if gates:
        search = Search(gm, channels, lambda weight: torch.rand(weight.shape[:2]))
        dropped = _connected(search, int(_SHARE_DROPPED * search.total))
        plan = search.plan(dropped)
        left = plan.flops_left
        apply_masks(gm, plan, channels)
        if search.total and left == 1.0:
            raise MismatchError(
                f"{type(model).__name__}: of {search.total} structures none could be pruned without cutting the "
                f"network in two; nothing was compared."
            )
    calibrate(gm)
    gm.eval()
    small = lower(gm)
    lowered = parts_of(small)
    error, response = 0.0, float("inf")
    pairs = []
    for name, part in parts_of(gm).items():
        for batch in _BATCHES:
            worst, change = _compare(part, lowered[name], batch)
            error, response = max(error, worst), min(response, change)
        if error > TOLERANCE:
            raise MismatchError(
                f"{type(model).__name__}: the lowered {name or 'network'} differs from the masked one by {error:.2e} "
                f"of the output's scale, allowed is {TOLERANCE:.0e} in float64. Please report this model; do not use "
                f"its lowered form."
            )
        inputs = [random_inputs(part, batch) for batch in _BATCHES]
        pairs.append((part, lowered[name], inputs, [_run(part, one) for one in inputs]))
    figures = {"model": type(model).__name__, "gated": len(gates), "flops_left": left, "error": error}
    figures |= {"flops_run": network_meta(small)["lower_plan"].flops_run, "response": response, "batches": _BATCHES}
    return _Checked(pairs, figures)


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
    part.train()
    for norm in norms:
        norm.train()  # also where the user's own train() keeps it frozen
    with torch.no_grad():
        for _ in range(2 if norms else 0):
            args, kwargs = random_inputs(part, batch)
            part(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    part.train(modes[0][1])
    for module, mode in modes:
        module.training = mode


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
    _run(part, random_inputs(part, max(2, samples(part.meta["inputs"]))))
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


def _compare(masked: TracedModule, small: TracedModule, batch: int) -> tuple[float, float]:
    """(difference masked to lowered, change between two inputs), largest over all outputs and of their scale."""
    one, two = random_inputs(masked, batch), random_inputs(masked, batch)
    expected = _run(masked, one)
    return _distance(expected, _run(small, one)), _distance(expected, _run(masked, two))


def _compare_floats(pairs: list[Any]) -> tuple[float, float]:
    """(difference masked to lowered, masked to its float64 self) in float32; the networks are float32 afterwards."""
    error = rounding = 0.0
    for masked, small, inputs, exact in pairs:
        masked.float()
        small.float()
        for one, truth in zip(inputs, exact, strict=True):
            one = pytree.tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x, one)
            found = _run(masked, one)
            error = max(error, _distance(found, _run(small, one)))
            rounding = max(rounding, _distance(truth, found))
    return error, rounding


def _run(network: nn.Module, inputs: tuple[Any, Any]) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(network(*inputs[0], **inputs[1]))


def _distance(expected: list[Tensor], found: list[Tensor]) -> float:
    pairs = zip(expected, found, strict=True)
    return max((float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)) for x, y in pairs), default=0.0)


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]


def _as_double(inputs: Inputs) -> Inputs:
    def double(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    return Inputs(*pytree.tree_map(double, inputs.args), **pytree.tree_map(double, inputs.kwargs))


def _connected(search: Search, dropped: int) -> int:
    """The largest number of dropped structures, halving from `dropped`, that leaves the outputs responsive."""
    while dropped and not search.keep(dropped).is_connected:
        dropped //= 2
    return dropped
