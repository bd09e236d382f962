"""selfcheck: what it reports, that it would notice a wrong lowering, and torchvision's networks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dspfx import pipeline
from dspfx.config import GateConfig, Inputs
from dspfx.enliven import calibrate, random_inputs, revive
from dspfx.errors import MismatchError
from dspfx.graph.traced import TracedModule
from dspfx.pipeline import prepare
from dspfx.selfcheck import TOLERANCE, selfcheck
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


class Asleep(nn.Module):
    """Lets nothing through as it is made: a layer scale of 1e-6, a zero gain, a last norm's zero scale, a zero head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.scale, self.gain = nn.Parameter(torch.full((8, 1, 1), 1e-6)), nn.Parameter(torch.zeros(()))
        self.norm, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 4)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x))) * self.scale * self.gain
        return self.head(self.norm(x).mean((2, 3)))


def test_parameters_that_begin_as_zero_get_life() -> None:
    report = selfcheck(Asleep(), torch.zeros(2, 3, 8, 8), GateConfig(groups=2))
    assert report.response > 1e-3
    assert report.error <= TOLERANCE
    gm = prepare(Asleep(), torch.zeros(2, 3, 8, 8))
    biases = {name: p.clone() for name, p in gm.named_parameters() if name.endswith("bias")}
    weight = gm.get_parameter("first.weight").clone()
    revive(gm)
    assert all(torch.equal(gm.get_parameter(name), value) for name, value in biases.items())
    assert torch.equal(gm.get_parameter("first.weight"), weight)
    assert all(float(p.detach().abs().max()) > 0.1 for name, p in gm.named_parameters() if name not in biases)


class OwnNorm(nn.BatchNorm2d):
    """A batch norm whose own forward needs a number for its momentum."""

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.momentum, float)
        batch = self.training
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, batch, self.momentum)


def test_a_norm_of_the_users_own_is_calibrated_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), OwnNorm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    assert selfcheck(model, torch.zeros(2, 3, 8, 8), GateConfig(groups=2)).error <= TOLERANCE
    gm = prepare(model, torch.zeros(2, 3, 8, 8))
    calibrate(gm)
    assert gm[1].momentum == 0.1
    assert 0.01 < float(gm[1].running_var.mean()) < 0.9


class Floats(nn.Module):
    """Asks for float32 in each way there is, where it computes and where it makes a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        grid = torch.arange(x.shape[3]).float() + torch.zeros(x.shape[3], dtype=torch.float32)
        x = self.second(torch.relu(self.first(x.float())).to(torch.float32))
        return F.softmax(x + grid, dim=3, dtype=torch.float32)


def test_models_that_ask_for_float32_are_checked_in_float64() -> None:
    report = selfcheck(Floats(), torch.zeros(2, 3, 8, 8), GateConfig(groups=2))
    assert report.error < 1e-12
    assert 1e-9 < report.rounding < 1e-4  # the outputs in float64 are another, finer thing
    assert torch.zeros(2, dtype=torch.float64).float().dtype == torch.float32  # and nothing of it stays behind
