"""What trained a network trains the lowered one on: stepped and lowered = lowered and stepped, state included."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import LBFGS, SGD, Adadelta, Adafactor, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop, Rprop
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import dspfx
from dspfx import pipeline
from dspfx.config import Budget, GateConfig
from dspfx.errors import MismatchError, ModelError
from dspfx.graph.analyse import analyse
from dspfx.graph.traced import network_meta
from dspfx.grouped import PaddedGroupConv2d
from dspfx.modules import GroupConv2d
from dspfx.passes.apply_masks import find_masks
from tests.compare import error, forced, leaves, pruned, run
from tests.nets.untraceable import Refiner
from tests.zoo import OTHERS, ZOO, ZooEntry

Make = Callable[[Iterable[Any]], Optimizer]
# The gradient of a bias in front of a batch norm is rounding alone; a small eps would make steps of it.
OPTIMIZERS: dict[str, Make] = {
    "sgd": partial(SGD, lr=0.01, momentum=0.9, weight_decay=1e-2),
    "nesterov": partial(SGD, lr=0.01, momentum=0.9, nesterov=True),
    "adam": partial(Adam, lr=1e-3, eps=1e-5),
    "amsgrad": partial(AdamW, lr=1e-3, eps=1e-5, weight_decay=1e-2, amsgrad=True),
    "fused": partial(AdamW, lr=1e-3, eps=1e-5, fused=True),
    "rmsprop": partial(RMSprop, lr=1e-3, eps=1e-3, momentum=0.9),
    "adagrad": partial(Adagrad, lr=1e-2, eps=1e-5),
    "nadam": partial(NAdam, lr=1e-3, eps=1e-5),
    "rprop": partial(Rprop, lr=1e-3),
    "adadelta": partial(Adadelta, lr=1.0),
}
# Networks whose training outputs are other ones than those in evaluation, which alone are lowered.
AUXILIARY = {"auxiliary_tuple", "auxiliary_dict"}
STEPPED = {n: e for n, e in (ZOO | OTHERS).items() if not e.has_rng and n not in AUXILIARY and e.kind != "named"}
# Residuals, depthwise and grouped convolutions, concatenation, shuffles, shared layers, group and layer norms,
# transposed and functional layers, free parameters, linear layers that read pixels; each with an optimizer and a form.
QUICK = [
    ("resnet_padded", "sgd", "branches"),
    ("resnet_bottleneck", "nesterov", "grouped"),
    ("inverted_residual", "adam", "dense"),
    ("resnext", "amsgrad", "branches"),
    ("dense_block", "rmsprop", "branches"),
    ("channel_shuffle", "adagrad", "grouped"),
    ("shared_head", "adam", "branches"),
    ("group_norm", "sgd", "branches"),
    ("layer_norm", "fused", "dense"),
    ("transposed", "nadam", "dense"),
    ("functional_layers", "adam", "branches"),
    ("free_scales", "adadelta", "branches"),
    ("vgg_flatten", "rprop", "grouped"),
    ("activations", "sgd", "dense"),
]


def train(network: nn.Module, optimizer: Optimizer, entry: ZooEntry, steps: int, seed: int = 5) -> None:
    """Steps towards a random projection of the outputs, on batches that differ."""
    network.train()
    for step in range(seed, seed + steps):
        optimizer.zero_grad()
        outputs = run(network, entry.inputs(4, seed=step, dtype=torch.float64))
        generator = torch.Generator().manual_seed(step)
        loss: Any = 0.0
        for out in outputs:
            loss = loss + (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).mean()
        loss.backward()
        optimizer.step()


def lowered_alike(gm: nn.Module, small: nn.Module) -> Any:
    """`gm` lowered by the plan of `small`."""
    return pipeline._carried_out(pipeline._plain(gm, None), network_meta(small)["lower_plan"], fold=False)


def kept(gm: nn.Module, small: nn.Module) -> dict[str, Tensor]:
    """Name in `small` -> where it holds what pruning kept, found by lowering ones."""
    ones = copy.deepcopy(gm)
    masks = find_masks(gm, analyse(gm))
    with torch.no_grad():
        for name, parameter in ones.named_parameters():
            parameter.fill_(1.0)
            if name in masks:
                parameter.masked_fill_(masks[name], 0.0)
    return {name: p != 0 for name, p in lowered_alike(ones, small).named_parameters()}


def check_commutes(entry: ZooEntry, make: Make, form: str, tolerance: float = 1e-12) -> nn.Module:
    """Steps, lowers and steps again; the last step before lowering gives the same weights and the same state."""
    gm = pruned(entry)
    optimizer = make(gm.parameters())
    train(gm, optimizer, entry, 3)
    small: nn.Module = forced(gm, form, fold=False)
    moved = dspfx.remap_optimizer(optimizer, gm, small)
    assert type(moved) is type(optimizer)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    train(gm, optimizer, entry, 1, seed=9)
    train(small, moved, entry, 1, seed=9)
    expected, where = lowered_alike(gm, small), kept(gm, small)
    wanted, again = dict(expected.named_parameters()), dspfx.remap_optimizer(optimizer, gm, small)
    assert wanted.keys() == before.keys()
    trained = 0
    for name, parameter in small.named_parameters():
        assert parameter.shape == wanted[name].shape
        chosen = where[name]
        trained += int((parameter.detach() != before[name])[chosen].sum())
        assert torch.allclose(parameter[chosen], wanted[name][chosen], rtol=0, atol=tolerance), name
        for key, value in again.state[parameter].items():
            found = moved.state[parameter][key]
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                assert value.dtype == found.dtype
                assert value.stride() == parameter.stride()
                value, found = value[chosen], found[chosen]
            assert torch.allclose(torch.as_tensor(found), torch.as_tensor(value), rtol=0, atol=tolerance), (name, key)
    assert trained > 0
    return small


@pytest.mark.parametrize(("name", "optimizer", "form"), QUICK)
def test_a_step_commutes_with_lowering(name: str, optimizer: str, form: str) -> None:
    small = check_commutes(STEPPED[name], OPTIMIZERS[optimizer], form)
    kinds = {"branches": GroupConv2d, "grouped": PaddedGroupConv2d}
    if form in kinds and name not in ("vgg_flatten",):
        assert any(isinstance(m, kinds[form]) for m in small.modules())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "branches", "grouped"])
@pytest.mark.parametrize("name", STEPPED)
def test_a_step_commutes_with_lowering_everywhere(name: str, form: str) -> None:
    check_commutes(STEPPED[name], OPTIMIZERS["amsgrad"], form)
