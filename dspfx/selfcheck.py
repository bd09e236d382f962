"""Proof on a user's own model that pruning and lowering keep the function: random structure, float64, two batches."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from dspfx.config import DEFAULT_GATES, GateConfig, Inputs
from dspfx.enliven import calibrate, random_inputs, revive
from dspfx.errors import InputError, MismatchError
from dspfx.graph.analyse import analyse
from dspfx.graph.traced import TracedModule, network_meta, parts_of
from dspfx.modules import GatedLayer
from dspfx.passes.apply_masks import apply_masks
from dspfx.passes.plan_prune import Search
from dspfx.pipeline import lower, prepare

TOLERANCE = 1e-9
_SHARE_DROPPED = 0.6
_BATCHES = (1, 5)


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
        dropped = _connected(search, math.ceil(_SHARE_DROPPED * search.total))  # one step can be all there is
        plan = search.plan(search.keep(dropped), search.beta(dropped))
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
