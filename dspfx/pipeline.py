"""What a user calls, as lists of passes that read from top to bottom."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from dspfx import ranks
from dspfx.config import DEFAULT_GATES, Budget, GateConfig, Inputs
from dspfx.deploy.compete import Contest, Entrant, compete
from dspfx.deploy.costs import CostTable
from dspfx.deploy.machine import block_widths
from dspfx.deploy.runtimes import check_runtime
from dspfx.deploy.settle import settle
from dspfx.errors import BudgetError, ConfigError, ModelError, RuntimeBuildError
from dspfx.forms import split_forms
from dspfx.gates import gated_tensors
from dspfx.graph.analyse import analyse
from dspfx.graph.inputs import propagate
from dspfx.graph.parts import describe_parts, trace_parts
from dspfx.graph.traced import Network, network_meta, parts_of, settle_eval
from dspfx.kernels.library import library_or_none
from dspfx.method.importance import Importance, resolve
from dspfx.modules import GatedLayer
from dspfx.passes.apply_masks import apply_masks, check_dropped
from dspfx.passes.choose_form import LowerOptions, confirm_forms
from dspfx.passes.fold_batchnorm import fold_batchnorm
from dspfx.passes.fuse_native import fuse_native
from dspfx.passes.insert_gates import insert_gates
from dspfx.passes.lay_out import lay_out
from dspfx.passes.lift_layers import lift_layers
from dspfx.passes.lower_convs import lower_convs
from dspfx.passes.plan_gates import plan_gates
from dspfx.passes.plan_latency import plan_latency
from dspfx.passes.plan_lower import plan_lower
from dspfx.passes.plan_prune import plan_prune
from dspfx.passes.remove_gates import remove_gates
from dspfx.passes.score_structures import Energy
from dspfx.passes.shrink_channels import shrink_channels
from dspfx.plans import LowerPlan, PrunePlan

NATIVE = ("eager", "inductor", "onnxruntime-native")  # the runtimes that call the native kernels
HOPEFUL = 1.1  # of the best predicted time: what is predicted to take longer is not worth building


def prepare(model: nn.Module, example_inputs: Any = None, config: GateConfig = DEFAULT_GATES) -> Network:
    """A traced copy of `model` with a gate in every convolution that can have one; `model` is left as it was.

    Outputs and gradients are identical, every batch and spatial size that the model accepts is accepted, `train()`
    and `eval()` are followed, and the model's own state_dict loads with `strict=True`. The copy is a GraphModule and
    of the model's class where the model traces as one graph. Where it does not (a detector), it is of the model's
    class, with its own forward, and the largest submodules that trace are GraphModules, each of its own class, too.

    Args:
        model: any module.
        example_inputs: a tensor, list or dict is the one positional argument, a tuple the positional arguments,
            `dspfx.Inputs` also keywords. May be omitted where an image of the first layer's width, or a list of two,
            does.
        config: groups, temperature, and layers to skip.

    Raises:
        InputError: no example inputs could be guessed, or the model does not run on those given.
        TraceError: the model's control flow depends on tensor values, and no submodule of more than a layer can be
            traced by itself.
        ModelError: there is no convolution and no linear layer.
        ConfigError: `config` does not fit the model.
    """
    if any(isinstance(m, GatedLayer) for m in model.modules()):
        raise ModelError("this model is prepared already; prune it, or prepare the original model.")
    ranks.require_whole(model, "prepare")
    gm = trace_parts(model, example_inputs)
    return insert_gates(gm, plan_gates(gm, analyse(gm), config))


def prune(
    gm: nn.Module,
    budget: Budget,
    importance: str | Importance = "auto",
    example_inputs: Any = None,
    runtime: str | None = None,
    *,
    threads: int = 1,
    distributed: bool = True,
) -> PrunePlan:
    """Prunes a prepared network in place to `budget` and returns the plan; what is dropped stays zero in training.

    Groups are those learned or, without learning, filters clustered by channel energies. May be called once more.
    A latency is met by measuring: the layers' times on the runtime, kept in the user's cache folder, say what is worth
    removing, and the whole network, lowered and timed beside the dense one, says how much of it. Other budgets are met
    afterwards, by removing more. On a terminal a bar shows how far it is.

    In a distributed training it is to be called on every rank: rank 0 decides, all of them carry it out.

    Args:
        gm: what `prepare` returned, perhaps trained since.
        budget: fractions of the dense network that remain.
        importance: "fisher", what a learner found group channels to be worth; "l2", the paper's; "auto", the first
            where it is known; or a function from a weight [O, C, *kernel] to energies [O, C], none negative.
        example_inputs: where the budget should count another input size than the one prepared with; a latency is that
            of their batch.
        runtime: where a latency is measured, see `lower`.
        threads: CPU threads of a call there.
        distributed: where torch.distributed is initialised, all ranks hold one network; False: each its own.

    Raises:
        ModelError: `gm` is not prepared, or holds weights that are not finite.
        BudgetError: the budget is below the floor this network can reach, names the floor; or a latency comes without
            a runtime. Nothing was changed.
        ConfigError, RuntimeBuildError, MismatchError: for a latency, as for `lower`.
        MismatchError: the ranks hold different weights.
    """
    if "gate_plan" not in network_meta(gm) or not any(isinstance(m, GatedLayer) for m in gm.modules()):
        raise ModelError(f"{type(gm).__name__} has no gated convolution; call gm = dspfx.prepare(model) first.")
    energy = resolve(importance, all(m.is_weighed for m in gm.modules() if isinstance(m, GatedLayer)))
    if budget.latency is not None and runtime is None:
        raise BudgetError(
            f"{budget} has a latency and no runtime to measure it on; name the one that the network is for: "
            f'prune(gm, budget, runtime="onnxruntime").'
        )
    if budget.latency is not None:
        ranks.require_whole(gm, f"prune to {budget}")
    if runtime is not None:
        check_runtime(runtime, threads)
    describe_parts(gm, example_inputs)

    def decide() -> PrunePlan:
        return _pruned_to(gm, budget, energy, runtime, threads)

    with ranks.gathered(gm):
        if distributed and ranks.count() > 1:
            ranks.check_same(gated_tensors(gm))
            plan = PrunePlan.from_json(ranks.decided_by_first(lambda: decide().to_json()))
        else:
            plan = decide()
    apply_masks(gm, plan, analyse(gm))
    return plan


def _pruned_to(gm: Network, budget: Budget, energy: Energy, runtime: str | None, threads: int) -> PrunePlan:
    """The plan that meets every part of the budget."""
    work, plan = gm, None
    if budget.latency is not None and runtime is not None:
        plan = _plan_latency(gm, budget.latency, energy, runtime, threads)
        work = _masked(gm, plan)  # the user's network stays as it was until all budgets are met
    if budget.flops is not None or budget.params is not None:
        latency = plan.latency_left if plan else None
        plan = replace(plan_prune(work, analyse(work), budget, energy), latency_left=latency)
    assert plan is not None
    return plan


def _plan_latency(gm: Network, latency: float, energy: Energy, runtime: str, threads: int) -> PrunePlan:
    """The plan that meets a latency, found by measuring."""
    channels, inputs, block = analyse(gm), network_meta(gm)["inputs"], block_widths(runtime)[0]

    def measure(plan: PrunePlan) -> float:
        contest = _tuned(_plain(_masked(gm, plan), None), inputs, runtime, threads, True)[1]
        if "dense" not in contest.results:
            raise RuntimeBuildError(f"there is no dense network to compare with: {contest.notes[0]}")
        for note in contest.notes:
            warnings.warn(f"pruning to a latency of {latency}: {note}", stacklevel=6)
        return contest.ratio

    with _costs(gm, runtime, threads) as table:
        return settle(latency, lambda share: plan_latency(gm, channels, share, energy, table, block), measure)


def _masked(gm: Network, plan: PrunePlan) -> Network:
    """A copy of a prepared network with a plan applied."""
    twin = copy.deepcopy(gm)
    apply_masks(twin, plan, analyse(twin))
    return twin


def lower(
    model: nn.Module,
    example_inputs: Any = None,
    runtime: str = "eager",
    tune: Literal["auto", "measure"] | None = "auto",
    *,
    threads: int = 1,
    fold: bool = True,
) -> Network:
    """A smaller network of plain torch parts, in eval mode, equal to `model.eval()`; `model` is left as it was.

    A model that does not trace whole keeps its class and its forward: only its traced parts are rewritten.
    Works on a pruned network, and on any model with zeros in its weights. Channels that nobody needs are removed,
    through residual streams where every producer and reader agrees; batch norms are folded; every convolution takes
    the form (`LoweredLayer.form`) that suits the runtime. `meta["lower_plan"]` of a network traced whole is the plan.

    What suits the runtime is measured where example inputs are given: each layer's forms from a table that is kept in
    the user's cache folder, then whole networks against each other in interleaved rounds. The result is then never
    slower, beyond noise, than the dense network and than plain removal of dead channels; what was compared is in
    `meta["contest"]`, and printed for tune="measure".

    Args:
        model: a pruned network or any other model.
        example_inputs: as for `prepare`, with the batch and size to be fast at; a prepared network remembers its own.
        runtime: "eager", "inductor", "onnxruntime", "onnxruntime-native" (with dspfx's kernels, see `export_onnx`),
            "openvino" or "tensorrt": where it is to be fast. `dspfx.deploy.runtimes.build` runs the result there.
        tune: "measure" measures, None takes a rule, "auto" measures where example inputs are given here.
        threads: CPU threads of a call while measuring.
        fold: fold batch norms into convolutions; False keeps them, for further training.

    Raises:
        InputError, TraceError: as for `prepare`.
        ModelError: a weight is not finite, or one that was pruned is not zero.
        ConfigError: an unknown `tune`, a runtime that is unknown or, measuring, not installed, or too few threads.
        RuntimeBuildError, MismatchError: measuring, and the runtime rejects every form of the network.
    """
    if tune not in ("auto", "measure", None):
        raise ConfigError(f"tune is {tune!r}; give 'auto', 'measure', or None for a rule without measurements.")
    is_measured = tune == "measure" or (tune == "auto" and example_inputs is not None)
    check_runtime(runtime, threads, is_measured)
    ranks.require_whole(model, "lower")
    gm = _plain(model, example_inputs)
    if not is_measured:
        return _carried_out(gm, _planned(gm, LowerOptions(1 if runtime == "eager" else block_widths(runtime)[0])), fold)
    inputs = network_meta(gm)["inputs"] if example_inputs is None else Inputs.of(example_inputs)
    small, contest = _tuned(gm, inputs, runtime, threads, fold)
    network_meta(small)["contest"] = contest
    if tune == "measure":
        print(contest)
    return small


def _tuned(gm: Network, inputs: Inputs, runtime: str, threads: int, fold: bool) -> tuple[Network, Contest]:
    """The fastest form of a plain network, and how it was found."""
    return compete(runtime, _entrants(gm, runtime, threads, fold), inputs, threads)


def _entrants(gm: Network, runtime: str, threads: int, fold: bool) -> Iterator[Entrant]:
    """The forms of a whole network that are worth timing, safest first; of equal plans, the first."""
    block, *wider = block_widths(runtime)
    with _costs(gm, runtime, threads) as table:
        splits = split_forms(runtime, table.device, table.dtype)
        plans: dict[str, LowerPlan] = {}
        for name, options in (
            ("dense", LowerOptions(0, table, splits=())),
            ("dead channels removed", LowerOptions(1, table, splits=())),
            (f"widths in blocks of {block}", LowerOptions(block, table, splits=())),
            ("clearly faster forms, in blocks", LowerOptions(block, table, splits, margin=0.8)),
            ("fastest forms, in blocks", LowerOptions(block, table, splits)),
            ("fastest forms", LowerOptions(1, table, splits)),
            *((f"widths in blocks of {w}", LowerOptions(w, table, splits=())) for w in wider),
        ):
            plan = _planned(gm, options)
            if plan.layers not in [other.layers for other in plans.values()]:
                plans[name] = plan
    best = min(plan.ms or 0.0 for plan in plans.values())
    for index, (name, plan) in enumerate(plans.items()):
        if index < 2 or (plan.ms or 0.0) <= HOPEFUL * best:  # what is not slower has to be shown for the first two
            yield Entrant(name, partial(_carried_out, copy.deepcopy(gm), plan, fold), plan.ms)
    is_ours = all(p.is_cpu and p.dtype == torch.float32 for p in gm.parameters())  # what the kernels are for
    if fold and runtime in NATIVE and is_ours and library_or_none() is not None:
        plan = plans.get("dead channels removed", plans["dense"])
        make = partial(_carried_out, copy.deepcopy(gm), plan, fold)
        yield Entrant("native kernels", lambda: fuse_native(make()), is_checked=True)


def _costs(gm: Network, runtime: str, threads: int) -> CostTable:
    """The table of what layers like this network's take."""
    parameter = next(iter(gm.parameters()), torch.empty(0))
    return CostTable(runtime, parameter.device, threads, parameter.dtype)


def _plain(model: nn.Module, example_inputs: Any) -> Network:
    """A copy of the model in eval mode whose layers are torch's own, without gates."""
    check_dropped(model)
    gm = settle_eval(trace_parts(model, example_inputs))
    remove_gates(gm)
    return lift_layers(gm)


def _planned(gm: Network, options: LowerOptions) -> LowerPlan:
    """What is kept, in which forms and in which order."""
    channels = analyse(gm)
    plan = lay_out(gm, channels, plan_lower(gm, channels, options))
    return confirm_forms(gm, plan, options)


def _carried_out(gm: Network, plan: LowerPlan, fold: bool) -> Network:
    """The plan, carried out on `gm` in place."""
    channels = analyse(gm)
    shrink_channels(gm, channels, plan)
    if fold:
        fold_batchnorm(gm)
    lower_convs(gm, plan)
    network_meta(gm)["lower_plan"] = plan
    for part in parts_of(gm).values():
        propagate(part, part.meta["inputs"])
    return gm
