"""What a user calls, as lists of passes that read from top to bottom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from dspfx.config import DEFAULT_GATES, Budget, GateConfig
from dspfx.errors import ModelError
from dspfx.graph.analyse import analyse
from dspfx.graph.inputs import propagate
from dspfx.graph.parts import describe_parts, trace_parts, why_untraced
from dspfx.graph.traced import Network, is_traced_in_parts, network_meta, parts_of, settle_eval
from dspfx.method.importance import Importance, resolve
from dspfx.modules import GatedLayer
from dspfx.passes.apply_masks import apply_masks
from dspfx.passes.fold_batchnorm import fold_batchnorm
from dspfx.passes.insert_gates import insert_gates
from dspfx.passes.lay_out import lay_out
from dspfx.passes.lift_layers import lift_layers
from dspfx.passes.lower_convs import lower_convs
from dspfx.passes.plan_gates import plan_gates
from dspfx.passes.plan_lower import plan_lower
from dspfx.passes.plan_prune import plan_prune
from dspfx.passes.remove_gates import remove_gates
from dspfx.passes.shrink_channels import shrink_channels
from dspfx.plans import GatePlan, PrunePlan


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
    gm = trace_parts(model, example_inputs)
    plan = plan_gates(gm, analyse(gm), config)
    return insert_gates(gm, _explained(gm, plan))


def _explained(gm: Network, plan: GatePlan) -> GatePlan:
    """The plan with what it cannot know of layers that lie in no traced part: why, and their multiply-adds."""
    if not is_traced_in_parts(gm):
        return plan
    inside = {f"{name}.{layer}" for name, part in parts_of(gm).items() for layer, _ in part.named_modules()}
    macs = network_meta(gm)["macs"]
    return replace(
        plan,
        skipped=tuple(
            s if s.name in inside else replace(s, reason=why_untraced(gm, s.name), macs=macs.get(s.name, s.macs))
            for s in plan.skipped
        ),
    )


def prune(gm: nn.Module, budget: Budget, importance: str | Importance = "l2", example_inputs: Any = None) -> PrunePlan:
    """Prunes a prepared network in place to `budget` and returns the plan; what is dropped stays zero in training.

    Groups are those learned; where the gates never learned, filters are clustered by their channel energies. May be
    called again later to prune further.

    Args:
        gm: what `prepare` returned, perhaps trained since.
        budget: fractions of the dense network that remain.
        importance: "l2", or a function from a weight [O, C, *kernel] to energies [O, C], none negative.
        example_inputs: only where the budget should count another input size than the one prepared with.

    Raises:
        ModelError: `gm` is not prepared, or holds weights that are not finite.
        BudgetError: the budget is below the floor this network can reach; names the floor. Nothing was changed.
    """
    if "gate_plan" not in network_meta(gm) or not any(isinstance(m, GatedLayer) for m in gm.modules()):
        raise ModelError(f"{type(gm).__name__} has no gated convolution; call gm = dspfx.prepare(model) first.")
    energy = resolve(importance)
    if example_inputs is not None:
        describe_parts(gm, example_inputs)
    channels = analyse(gm)
    plan = plan_prune(gm, channels, budget, energy)
    apply_masks(gm, plan, channels)
    return plan


def lower(model: nn.Module, example_inputs: Any = None, *, fold: bool = True, width_multiple: int = 1) -> Network:
    """A smaller network of plain torch parts, in eval mode, equal to `model.eval()`; `model` is left as it was.

    A model that does not trace whole keeps its class and its forward: only its traced parts are rewritten.

    Works on a pruned network, and on any model with zeros in its weights. Channels that nobody needs are removed,
    through residual streams where every producer and reader agrees; batch norms are folded; wide convolutions on
    small maps are split into branches, all others stay one dense convolution. Channels are laid out so that branches
    read ranges where they can. The plan of a network traced whole is
    in `meta["lower_plan"]`.

    Args:
        model: a pruned network or any other model.
        example_inputs: as for `prepare`; a prepared network remembers its own.
        fold: fold batch norms into convolutions; False keeps them, for further training.
        width_multiple: keep layer widths a multiple of this where they can be (8 suits ONNX Runtime).

    Raises:
        InputError, TraceError: as for `prepare`.
        ModelError: a weight is not finite.
    """
    gm = settle_eval(trace_parts(model, example_inputs))
    remove_gates(gm)
    lift_layers(gm)
    channels = analyse(gm)
    plan = plan_lower(gm, channels, width_multiple)
    plan = lay_out(gm, channels, plan)
    shrink_channels(gm, channels, plan)
    if fold:
        fold_batchnorm(gm)
    lower_convs(gm, plan)
    network_meta(gm)["lower_plan"] = plan
    for part in parts_of(gm).values():
        propagate(part, part.meta["inputs"])
    return gm
