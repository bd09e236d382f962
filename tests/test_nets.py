"""What holds for networks that not every invariant of the zoo applies to: prepared = original, masked = lowered."""

from __future__ import annotations

import pytest
import torch

from dspfx.config import GateConfig
from dspfx.pipeline import prepare
from dspfx.selfcheck import TOLERANCE, selfcheck
from tests.compare import fingerprint, run, same, unchanged
from tests.zoo import OTHERS, ZOO, ZooEntry

each_entry = pytest.mark.parametrize("entry", OTHERS.values(), ids=OTHERS)


def test_no_network_is_in_both_lists() -> None:
    assert not set(OTHERS) & set(ZOO)


@each_entry
@torch.no_grad()
def test_prepared_equals_original(entry: ZooEntry) -> None:
    model = entry.build()
    before = fingerprint(model)
    gm = prepare(model, entry.inputs(), GateConfig(groups=3))
    assert unchanged(before, fingerprint(model))
    for training in (True, False):
        model.train(training)
        gm.train(training)
        for batch, (height, width) in zip((3, 5, 2), entry.sizes(), strict=False):
            inputs = entry.inputs(batch, height, width, seed=batch)
            assert same(run(gm, inputs), run(model, inputs))
    state = gm.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    gm.load_state_dict(entry.build().state_dict(), strict=True)


@each_entry
def test_selfcheck_passes(entry: ZooEntry) -> None:
    report = selfcheck(entry.build(), entry.inputs(), GateConfig(groups=3))
    assert report.error <= TOLERANCE
    assert report.float_error <= 1e-5
    assert report.response > 1e-3
    assert report.flops_left < 1
