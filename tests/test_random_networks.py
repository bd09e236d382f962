"""Random networks: prepared = original bit for bit, and masked = lowered, whatever the operations are.

50 examples here; a thousand with

    python -m pytest tests/test_random_networks.py --hypothesis-profile=nightly
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import event, given, note
from torch import Tensor, nn

from dspfx.config import GateConfig
from dspfx.graph.traced import TracedModule
from dspfx.passes import choose_form
from dspfx.pipeline import lower, prepare
from dspfx.selfcheck import TOLERANCE, selfcheck
from tests.compare import error, run, same
from tests.random_networks import CHANNELS, SIZES, Program, programs


def images(batch: int, size: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, CHANNELS, *size, generator=generator, dtype=torch.float64).to(dtype)


def check_prepared(model: nn.Module, gm: TracedModule) -> None:
    """Outputs and what the forward passes leave in the buffers, in both modes, at two batch and image sizes."""
    for training in (True, False):
        model.train(training)
        gm.train(training)
        for batch, size in ((3, SIZES[1]), (5 if training else 1, SIZES[0])):
            assert same(run(gm, (images(batch, size),)), run(model, (images(batch, size),)))
    state = gm.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def check_zeros(model: nn.Module) -> None:
    """Zeros in the weights as they came are all that lowering needs, and it keeps the function."""
    model = model.double().eval()
    image = images(2, SIZES[1], torch.float64)
    small = lower(prepare(model, images(2, SIZES[0], torch.float64), GateConfig(groups=2)).eval())
    assert error(run(model, (image,)), run(small, (image,))) <= TOLERANCE


def check_lowered(model: nn.Module, program: Program) -> None:
    report = selfcheck(model, images(2, SIZES[0]), GateConfig(groups=2), seed=program.seed)
    assert report.error <= TOLERANCE
    assert report.float_error <= max(1e-5, 10 * report.rounding)
    event("pruned" if report.flops_left < 1 else "nothing pruned")


@given(programs())
def test_prepared_equals_original_and_masked_equals_lowered(program: Program) -> None:
    note(program.source())
    model = program.build()
    with torch.no_grad():
        check_prepared(program.build(), prepare(model, images(2, SIZES[0]), GateConfig(groups=2)))
        if program.zeros:
            check_zeros(program.build())
    check_lowered(model, program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose_form, "BRANCH_WIDTH", 1)
        patch.setattr(choose_form, "BRANCH_POSITIONS", 10**9)
        patch.setattr(choose_form, "BRANCH_SHARE", 1.01)
        check_lowered(model, program)
