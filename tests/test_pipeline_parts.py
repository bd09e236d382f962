"""Models that do not trace whole, through everything: prepare, coverage, learning, prune, lower, selfcheck, storage."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.config import Budget, GateConfig
from dspfx.errors import ModelError
from dspfx.graph.traced import network_meta, parts_of
from dspfx.modules import GatedLayer
from dspfx.selfcheck import TOLERANCE
from tests.compare import error, fingerprint, leaves, run, same, unchanged
from tests.nets.untraceable import DenseHead, Detector, Refiner


def pictures(dtype: torch.dtype = torch.float32, *sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator).to(dtype) for size in sizes or ((16, 16), (12, 20))]


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 16, 16), generator=torch.Generator().manual_seed(2))


TARGETS = [torch.tensor(0), torch.tensor(2)]
GATES = GateConfig(groups=2)


def step(network: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    sum(network(pictures(), TARGETS).values()).backward()
    optimizer.step()


def test_a_prepared_detector_is_the_detector() -> None:
    model = Detector()
    before = fingerprint(model)
    gm = dspfx.prepare(model, pictures(), GATES)
    assert unchanged(before, fingerprint(model))
    assert isinstance(gm, Detector)
    assert isinstance(gm.head, DenseHead)
    assert same(leaves(gm.eval()(pictures())), leaves(model.eval()(pictures())))
    ours, theirs = gm.train()(pictures(), TARGETS), model.train()(pictures(), TARGETS)
    assert same(ours.values(), theirs.values())
    gm.load_state_dict(Detector().state_dict(), strict=True)
    with pytest.raises(ModelError, match=r"^this model is prepared already; "):
        dspfx.prepare(gm, pictures())


def test_coverage_counts_every_call_and_says_what_lies_outside() -> None:
    found = dspfx.coverage(dspfx.prepare(Refiner(), images(), GATES))
    macs = {spec.name: spec.macs for spec in found.plan.layers}
    assert macs["stem.1.0"] == 8 * 8 * 9 * 16 * 16
    assert macs["body.0.0"] == 3 * 12 * 8 * 9 * 16 * 16  # three rounds of the loop
    assert macs["head.0.0"] == 8 * 8 * 9 * (16 * 16 + 8 * 8 + 4 * 4)  # three scales
    (last,) = [layer for layer in found.plan.skipped if layer.name == "last"]
    assert last.reason.startswith("Refiner cannot be traced at ")
    assert last.macs == 5 * 4
    assert found.inputs == ((2, 3, 16, 16),)
    assert 0.9 < found.gated < 1.0


def test_one_budget_spans_all_parts() -> None:
    gm = dspfx.prepare(Detector(), pictures(), GATES)
    plan = dspfx.prune(gm, Budget(flops=0.5))
    assert plan.flops_left <= 0.5
    assert {layer.name.split(".")[0] for layer in plan.layers} == {"backbone", "head", "box_head"}
    assert all(part.meta["masks"][1] for part in parts_of(gm).values())


def test_pruned_stays_pruned_in_training_and_in_copies() -> None:
    gm = dspfx.prepare(Detector(), pictures(), GATES).train()
    dspfx.prune(gm, Budget(flops=0.5))
    average = copy.deepcopy(gm)
    for network in (gm, average):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            step(network, optimizer)
        gates = [m for m in network.modules() if isinstance(m, GatedLayer)]
        assert any(g.is_pruned for g in gates)
        for gate in gates:
            assert not (gate.weight * gate.dropped()).any()
            assert gate.weight.any()


def test_the_learner_learns_every_parts_groups() -> None:
    gm = dspfx.prepare(Detector(), pictures(), GATES).train()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    with dspfx.GroupLearner(gm, optimizer, total_steps=2, start="zeros"):
        for _ in range(2):
            step(gm, optimizer)
    learned = {name for name, m in gm.named_modules() if isinstance(m, GatedLayer) and m.is_learned}
    assert {name.split(".")[0] for name in learned} == {"backbone", "head", "box_head"}


def test_lowered_parts_do_what_pruned_ones_do() -> None:
    gm = dspfx.prepare(Detector().double(), pictures(torch.float64), GATES)
    dspfx.prune(gm, Budget(flops=0.5))
    before = fingerprint(gm)
    small = dspfx.lower(gm)
    assert unchanged(before, fingerprint(gm))
    gm.eval()
    assert isinstance(small, Detector)
    assert not small.training
    assert not any(isinstance(m, GatedLayer) for m in small.modules())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in gm.parameters())
    assert network_meta(small)["lower_plan"].flops_run < 0.9
    for sizes in (((16, 16), (12, 20)), ((24, 20),)):
        inputs = pictures(torch.float64, *sizes)
        features, expected = small.backbone(torch.stack(inputs[:1])), gm.backbone(torch.stack(inputs[:1]))
        assert error(expected.values(), features.values()) < 1e-12
        scores, expected_scores = small.head(list(features.values())), gm.head(list(expected.values()))
        assert error([expected_scores], [scores]) < 1e-12
        found, wanted = leaves(small(inputs)), leaves(gm(inputs))
        assert error([x.double() for x in wanted if x.numel()], [x.double() for x in found if x.numel()]) < 1e-9


def test_an_unprepared_detector_can_be_lowered() -> None:
    model = Detector().eval()
    with torch.no_grad():
        model.get_parameter("head.tower.0.0.weight")[:3] = 0
        model.get_parameter("head.tower.0.1.weight")[:3] = 0
        model.get_parameter("head.tower.0.1.bias")[:3] = 0
    small = dspfx.lower(model, pictures(), tune=None)
    assert small.get_parameter("head.tower.0.0.weight").shape[0] == 5
    assert same([x for x in leaves(small(pictures())) if not x.is_floating_point()], leaves(model(pictures()))[::2])


def test_other_example_inputs_count_another_size() -> None:
    gm = dspfx.prepare(Refiner(), images(), GATES)
    shapes = [p.meta["inputs"].args[0].shape for p in parts_of(gm).values()]
    dspfx.prune(gm, Budget(flops=0.9), example_inputs=images(4, 3, 24, 32))
    assert [p.meta["inputs"].args[0].shape for p in parts_of(gm).values()] == [
        torch.Size((4, shape[1], 24, 32)) for shape in shapes
    ]
    assert network_meta(gm)["inputs"].args[0].shape == (4, 3, 24, 32)
    small = dspfx.lower(gm, images(1, 3, 20, 20), tune=None)
    assert parts_of(small)["stem"].meta["inputs"].args[0].shape == (1, 3, 20, 20)


@pytest.mark.parametrize("kind", [Detector, Refiner])
def test_selfcheck_compares_every_part(kind: type[nn.Module]) -> None:
    model = kind()
    before = fingerprint(model)
    report = dspfx.selfcheck(model, pictures() if kind is Detector else images(), GATES)
    assert unchanged(before, fingerprint(model))
    assert report.error <= TOLERANCE
    assert report.flops_left < 1
    assert report.response > 1e-3
    assert report.model == kind.__name__


def test_files_of_prepared_and_lowered_networks(tmp_path: Path) -> None:
    gm = dspfx.prepare(Detector(), pictures(), GATES)
    dspfx.prune(gm, Budget(flops=0.5))
    dspfx.save(gm, tmp_path / "gated")
    again = dspfx.load(tmp_path / "gated", Detector())
    assert dspfx.coverage(again) == dspfx.coverage(gm)
    assert same(leaves(again.eval()(pictures())), leaves(gm.eval()(pictures())))
    optimizer = torch.optim.SGD(again.train().parameters(), lr=0.1)
    step(again, optimizer)
    assert all(not (g.weight * g.dropped()).any() for g in again.modules() if isinstance(g, GatedLayer))
    small = dspfx.lower(gm)
    dspfx.save(small, tmp_path / "lowered")
    loaded = dspfx.load(tmp_path / "lowered", Detector())
    assert list(loaded.state_dict()) == list(small.state_dict())
    assert network_meta(loaded)["lower_plan"] == network_meta(small)["lower_plan"]
    for sizes in (((16, 16), (12, 20)), ((24, 20),)):
        assert same(leaves(loaded(pictures(torch.float32, *sizes))), leaves(small(pictures(torch.float32, *sizes))))
    assert same(run(dspfx.lower(loaded), (pictures(),)), run(small, (pictures(),)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_torchvisions_detectors(name: str, tmp_path: Path) -> None:
    import torchvision

    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    report = dspfx.selfcheck(model)
    assert report.error <= TOLERANCE
    assert report.flops_left < report.flops_run < 1
    gm = dspfx.prepare(model).train()
    photos = [torch.rand(3, 180, 240), torch.rand(3, 200, 160)]
    boxes = torch.tensor([[10.0, 10.0, 90.0, 80.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])}, {"boxes": boxes + 9, "labels": torch.tensor([2])}]
    optimizer = torch.optim.SGD(gm.parameters(), lr=1e-3)
    with dspfx.GroupLearner(gm, optimizer, total_steps=1):
        optimizer.zero_grad()
        sum(gm(photos, targets).values()).backward()
        optimizer.step()
    dspfx.prune(gm, Budget(flops=0.9))
    dspfx.save(gm, tmp_path / "gated")
    assert same(leaves(dspfx.load(tmp_path / "gated", model).eval()(photos)), leaves(gm.eval()(photos)))
    small = dspfx.lower(gm)
    dspfx.save(small, tmp_path / "lowered")
    assert same(leaves(dspfx.load(tmp_path / "lowered", model)(photos)), leaves(small(photos)))
