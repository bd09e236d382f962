"""Networks with native chains compute what they computed before, on the zoo and on random networks."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, note
from torch import Tensor, nn

from dspfx import pipeline
from dspfx.config import Budget, GateConfig
from dspfx.deploy.runtimes import TOLERANCE
from dspfx.errors import BudgetError
from dspfx.kernels.library import library_or_none
from dspfx.modules import GatedConv2d
from dspfx.native import NativeChain
from dspfx.passes.fuse_native import fuse_native
from tests.compare import error, forced, run
from tests.random_networks import SIZES, Program, programs
from tests.test_random_networks import images
from tests.zoo import ZOO, ZooEntry

pytestmark = pytest.mark.skipif(library_or_none() is None, reason="the native kernels need a C++ compiler")
each_entry = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)


def thinned(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    """`model` prepared and pruned with random groups, as far as it goes; one without gates as it is."""
    gm = pipeline.prepare(model, inputs, GateConfig(groups=3))
    generator = torch.Generator().manual_seed(3)
    gates = [m for m in gm.modules() if isinstance(m, GatedConv2d)]
    for gate in gates:
        gate.gate_logits.normal_(generator=generator)
    for share in (0.6, 0.8) if gates else ():
        try:
            pipeline.prune(gm, Budget(flops=share))
        except BudgetError:
            continue
        break
    return gm


def chains(network: nn.Module) -> list[NativeChain]:
    return [m for m in network.modules() if isinstance(m, NativeChain)]


def check_same(network: nn.Module, exact: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """In float32 as near to float64 as plain torch comes, or as any runtime has to."""
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        expected, found = run(exact, wide), run(network, inputs)
        plain = copy.deepcopy(exact).float()
        rounding = error(expected, run(plain, inputs))
    assert all(y.dtype == torch.float32 for y in found if y.is_floating_point())
    assert error(expected, found) <= max(TOLERANCE, 10 * rounding)


@each_entry
def test_native_network_equals_the_plain_one(entry: ZooEntry) -> None:
    gm = thinned(entry.build(), entry.inputs(3))
    plain = forced(gm, "dense")
    network = fuse_native(copy.deepcopy(plain))
    for batch, size in ((3, entry.sizes()[0]), (1, entry.sizes()[-1])):
        check_same(network, copy.deepcopy(plain).double(), entry.inputs(batch, *size, seed=batch))
    for chain in chains(network):
        assert not any(type(m) is NativeChain for m in chain.plain.modules())


@given(programs())
def test_native_random_network_equals_the_plain_one(program: Program) -> None:
    note(program.source())
    plain = forced(thinned(program.build(), (images(2, SIZES[0]),)), "dense")
    network = fuse_native(copy.deepcopy(plain))
    for batch, size in ((3, SIZES[1]), (1, SIZES[0])):
        check_same(network, copy.deepcopy(plain).double(), (images(batch, size),))
