"""How tests compare networks: outputs as flat lists, bitwise or by the outputs' scale, and fingerprints of models."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dspfx import pipeline
from dspfx.config import Budget, GateConfig
from dspfx.forms import Form
from dspfx.graph.traced import TracedModule
from dspfx.modules import GatedConv2d
from dspfx.passes.choose_form import LowerOptions
from dspfx.pipeline import prepare, prune
from tests.zoo import ZooEntry


def leaves(output: Any) -> list[Tensor]:
    """Every tensor of a nested output, in order."""
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]


def run(model: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> list[Tensor]:
    """The outputs, with the global RNG at `seed`."""
    torch.manual_seed(seed)
    return leaves(model(*inputs))


def gradients(model: nn.Module, inputs: tuple[Tensor, ...], seed: int = 0) -> dict[str, Tensor | None]:
    """The gradients of a fixed random projection of the outputs: by parameter name, and of each input."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    model.zero_grad(set_to_none=True)
    outputs = run(model, inputs, seed)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]
    torch.autograd.backward(outputs, weights)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"input {i}": x.grad for i, x in enumerate(inputs)}
    model.zero_grad(set_to_none=True)
    return found


def same(a: Iterable[Tensor | None], b: Iterable[Tensor | None]) -> bool:
    """Bitwise equality, shapes and dtypes included."""
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        (x is None and y is None) or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(a, b, strict=True)
    )


def error(a: Iterable[Tensor], b: Iterable[Tensor]) -> float:
    """The largest difference, of the scale of the output it is in."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        worst = max(worst, float((x - y).detach().abs().max()) / max(float(x.detach().abs().max()), 1e-30))
    return worst


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that a call could change in a model that is not its own: values, identities, modes, hooks, gradients."""
    parts: dict[str, Any] = {"rng": torch.get_rng_state().clone()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        grad = None if parameter.grad is None else parameter.grad.clone()
        parts[f"parameter {name}"] = (id(parameter), parameter.detach().clone(), parameter.requires_grad, grad)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        parts[f"buffer {name}"] = (id(buffer), buffer.clone())
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        parts[f"module {name}"] = (id(module), type(module), module.training, hooks, tuple(module.__dict__))
    return parts


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """True for equal fingerprints."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, tuple):
            return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, Tensor):
            return isinstance(b, Tensor) and (a.is_meta or torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)))
        return bool(a == b)

    return list(before) == list(after) and all(equal(before[key], after[key]) for key in before)


def pruned(entry: ZooEntry) -> TracedModule:
    """A copy of the entry in float64, prepared at batch 3, with random groups and 60% of its FLOPs left; training."""
    return copy.deepcopy(_pruned(entry))


@cache  # every invariant starts here, and tracing is what takes the time
def _pruned(entry: ZooEntry) -> TracedModule:
    gm = prepare(entry.build().double(), entry.inputs(3, dtype=torch.float64), GateConfig(groups=3))
    generator = torch.Generator().manual_seed(3)
    gates = [m for m in gm.modules() if isinstance(m, GatedConv2d)]
    for gate in gates:
        gate.gate_logits.normal_(generator=generator)
    if gates:
        prune(gm, Budget(flops=0.6))
    return gm


def forced(
    model: nn.Module, form: str = "branches", multiple: int = 1, fold: bool = True, example_inputs: Any = None
) -> Any:
    """`model` lowered with every layer in `form` that can take it, and widths in multiples."""
    gm = pipeline._plain(model, example_inputs)
    options = LowerOptions(multiple, lambda case: 1.0 if case.form == form else 2.0, (cast(Form, form),))
    return pipeline._carried_out(gm, pipeline._planned(gm, options), fold)
