"""selfcheck: what it reports, that it would notice a wrong lowering, and torchvision's networks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torchvision

from dspfx import pipeline
from dspfx.config import GateConfig, Inputs
from dspfx.errors import MismatchError
from dspfx.graph.traced import TracedModule
from dspfx.pipeline import prepare
from dspfx.selfcheck import TOLERANCE, calibrate, random_inputs, revive, selfcheck
from tests.compare import error, fingerprint, run, unchanged
from tests.zoo import ZOO

QUICK = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0")
BIG = ("resnet50", "densenet121", "googlenet")


def check(name: str, size: int) -> None:
    options: dict[str, Any] = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    report = selfcheck(model, torch.zeros(2, 3, size, size), GateConfig(groups=2))
    assert report.error <= TOLERANCE
    assert report.float_error <= 1e-5
    assert report.response > 1e-3
    assert report.flops_left < report.flops_run < 1


@pytest.mark.parametrize("name", QUICK)
def test_torchvision(name: str) -> None:
    check(name, 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
def test_torchvision_at_full_size(name: str) -> None:
    check(name, 224)


def test_the_report_prints_what_it_measured() -> None:
    report = selfcheck(ZOO["plain"].build(), ZOO["plain"].inputs())
    text = re.compile(
        r"Sequential: 2 gated convolutions, random plan with \d+\.\d% of FLOPs left, lowered runs \d+\.\d%; masked = "
        r"lowered within \d\.\de-1\d \(float64\), \d\.\de-0\d \(float32, whose own rounding is \d\.\de-0\d\) at "
        r"batches 1, 5; outputs change by \d\.\de-0\d between inputs"
    )
    assert text.fullmatch(str(report))


def test_the_seed_decides_and_the_rng_stays() -> None:
    model, inputs = ZOO["resnet_projection"].build(), ZOO["resnet_projection"].inputs()
    before = fingerprint(model)
    first, second, other = (selfcheck(model, inputs, seed=seed) for seed in (0, 0, 1))
    assert unchanged(before, fingerprint(model))
    assert first == second
    assert first != other


def test_outputs_that_ignore_the_input_are_said_to_prove_little() -> None:
    report = selfcheck(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), Silent()), torch.zeros(2, 3, 4, 4))
    assert report.response == 0
    assert str(report).endswith("between inputs (the outputs hardly respond to the input: this proves little)")


class Silent(torch.nn.Module):
    """The same output whatever the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0 + 1


def test_a_wrong_lowering_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink = pipeline.shrink_channels

    def off_by_a_little(gm: TracedModule, *args: Any) -> TracedModule:
        shrink(gm, *args)
        with torch.no_grad():
            gm.get_parameter("1.0.weight")[0, 0, 1, 1] += 1e-6
        return gm

    monkeypatch.setattr(pipeline, "shrink_channels", off_by_a_little)
    message = (
        r"Sequential: the lowered network differs from the masked one by \d\.\d\de-0\d of the output's scale, allowed "
        r"is 1e-09 in float64\. Please report this model; do not use its lowered form\."
    )
    with pytest.raises(MismatchError, match=f"^{message}$"):
        selfcheck(ZOO["plain"].build(), ZOO["plain"].inputs())


def test_nothing_gated_is_compared_all_the_same() -> None:
    report = selfcheck(ZOO["single_conv"].build(), ZOO["single_conv"].inputs())
    assert (report.gated, report.flops_left, report.flops_run) == (0, 1.0, 1.0)


def test_reviving_and_calibrating_make_outputs_respond() -> None:
    model = torchvision.models.googlenet(weights=None, init_weights=False)
    gm = prepare(model, torch.zeros(2, 3, 64, 64)).eval()
    batches = [random_inputs(gm, 4)[0] for _ in range(2)]
    assert error(run(gm, batches[0]), run(gm, batches[1])) < 1e-3
    revive(gm)
    calibrate(gm)
    assert not gm.training
    assert error(run(gm, batches[0]), run(gm, batches[1])) > 0.1


def test_random_inputs_follow_the_examples() -> None:
    gm = prepare(ZOO["siamese"].build(), Inputs(*ZOO["siamese"].inputs(4)))
    args, kwargs = random_inputs(gm, 7)
    assert [x.shape for x in args] == [(7, 3, 16, 16)] * 2
    assert not kwargs
    assert not torch.equal(*args)
