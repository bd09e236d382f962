"""lower and prune where they measure: what competes, on what, and what comes of it; the times are the test's own."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import nn

import dspfx
from dspfx import pipeline
from dspfx.config import Budget, GateConfig, Inputs
from dspfx.deploy import machine, runtimes
from dspfx.deploy.compete import Contest, Entrant
from dspfx.deploy.settle import SLACK
from dspfx.deploy.timing import Result
from dspfx.errors import BudgetError, ConfigError
from dspfx.forms import FormCase
from dspfx.graph.traced import TracedModule
from dspfx.modules import GatedConv2d, GroupConv2d
from dspfx.pipeline import lower, prepare, prune
from dspfx.plans import LowerPlan
from tests.compare import error, fingerprint, pruned, run, unchanged
from tests.zoo import ZOO

BLOCK = 4
IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


class Stage:
    """Stands in for the table of costs and for the contest: clock(case) -> ms, ratio(plan) -> measured."""

    def __init__(self) -> None:
        self.clock: Callable[[FormCase], float] = lambda case: 1.0
        self.ratio: Callable[[LowerPlan], float] = lambda plan: plan.flops_run
        self.tables: list[tuple[Any, ...]] = []
        self.asked: list[tuple[str, Inputs, int]] = []
        self.entrants: dict[str, Entrant] = {}
        self.networks: dict[str, TracedModule] = {}

    def table(self, *setting: Any) -> Any:
        self.tables.append(setting)
        stage = self

        class Table:
            device, dtype = torch.device("cpu"), torch.float32

            def __call__(self, case: FormCase) -> float:
                return stage.clock(case)

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *error: object) -> None:
                pass

        return Table()

    def compete(
        self, runtime: str, entrants: Iterable[Entrant], inputs: Inputs, threads: int = 1
    ) -> tuple[nn.Module, Contest]:
        self.asked.append((runtime, inputs, threads))
        self.entrants = {entrant.name: entrant for entrant in entrants}
        self.networks = {name: entrant.make() for name, entrant in self.entrants.items()}  # type: ignore[misc]
        ratios = {name: self.ratio(network.meta["lower_plan"]) for name, network in self.networks.items()}
        winner = min(ratios, key=lambda name: ratios[name])
        results = {name: Result(ratio, ratio / ratios["dense"], 0.0) for name, ratio in ratios.items()}
        return self.networks[winner], Contest(winner, results, setting="on a stage")


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    found = Stage()
    monkeypatch.setattr(pipeline, "CostTable", found.table)
    monkeypatch.setattr(pipeline, "compete", found.compete)
    monkeypatch.setattr(machine, "block_width", lambda: BLOCK)
    return found


def macs(case: FormCase) -> float:
    """(filter, channel) pairs over all positions."""
    if case.form == "grouped":
        return 1e9
    pairs = sum(b.filters * b.channels for b in case.branches) or case.filters * case.channels // case.groups
    positions = case.shape[2] * case.shape[3] if len(case.shape) == 4 else 1
    return 1e-6 * pairs * positions * (case.kernel[0] ** 2 if case.kernel else 1)


def halves() -> nn.Module:
    """Channels 14 and 15 of the first layer are dead; the second has two groups that read apart."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    with torch.no_grad():
        for half in (0, 1):
            model.get_parameter("2.weight")[half::2, half::2] = 0
        model.get_parameter("2.weight")[:, 14:] = 0
    return model.eval()


@pytest.mark.parametrize("tune", ["fast", "Measure", True, 0])
def test_an_unknown_tune_is_refused(tune: Any, stage: Stage) -> None:
    message = f"tune is {tune!r}; give 'auto', 'measure', or None for a rule without measurements."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        lower(halves(), IMAGE, tune=tune)
    assert stage.asked == []


def test_auto_measures_where_example_inputs_are_given(stage: Stage) -> None:
    gm = prepare(halves(), IMAGE)
    for example, tune, measures in (
        (None, "auto", False),
        (None, None, False),
        (IMAGE, None, False),
        (IMAGE, "auto", True),
        (IMAGE, "measure", True),
        (None, "measure", True),
    ):
        for model in (gm, halves()):
            stage.asked.clear()
            small = lower(model, example, tune=tune)  # type: ignore[arg-type]
            assert len(stage.asked) == measures
            assert ("contest" in small.meta) == measures
    lower(gm, IMAGE)
    assert stage.asked[-1][1].args[0] is IMAGE
    lower(gm, tune="measure")
    assert [tuple(x.shape) for x in stage.asked[-1][1].args] == [tuple(IMAGE.shape)]


def test_what_is_measured_is_what_was_asked_for(stage: Stage) -> None:
    lower(halves().double(), IMAGE.double(), "onnxruntime", threads=3)
    assert [(runtime, threads) for runtime, _, threads in stage.asked] == [("onnxruntime", 3)]
    assert stage.tables == [("onnxruntime", torch.device("cpu"), 3, torch.float64)]


def test_only_measure_prints(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    lower(halves(), IMAGE)
    lower(halves(), IMAGE, tune=None)
    assert tuple(capsys.readouterr()) == ("", "")
    small = lower(halves(), IMAGE, tune="measure")
    contest = small.meta["contest"]
    assert isinstance(contest, Contest)
    assert tuple(capsys.readouterr()) == (f"{contest}\n", "")


def test_the_networks_that_compete_stand_in_the_order_of_their_risk(stage: Stage) -> None:
    stage.clock = macs
    model = halves()
    before = fingerprint(model)
    small = lower(model, IMAGE)
    assert unchanged(before, fingerprint(model))
    names = ["dense", "dead channels removed", next(n for n, made in stage.networks.items() if made is small)]
    assert list(stage.entrants)[:2] == names[:2]
    dense, fewer, fastest = (stage.networks[name] for name in names)
    assert [m.weight.shape[0] for m in dense.modules() if isinstance(m, nn.Conv2d)] == [16, 16, 4]
    assert [m.weight.shape[0] for m in fewer.modules() if isinstance(m, nn.Conv2d)] == [14, 16, 4]
    assert isinstance(fastest.get_submodule("2"), GroupConv2d)
    times = [stage.entrants[name].expected_ms for name in names]
    sizes = [16 * 16, 14 * 16, 2 * 7 * 8]
    for ms, pairs, first in zip(times, sizes, (16, 14, 14), strict=True):
        positions = 8 * 8, 6 * 6, 4 * 4
        assert ms == pytest.approx(1e-6 * (3 * first * 9 * positions[0] + 9 * pairs * positions[1] + 64 * positions[2]))
    for network in stage.networks.values():
        assert error(run(model, (IMAGE,)), run(network, (IMAGE,))) < 1e-5


def test_equal_plans_compete_once(stage: Stage) -> None:
    lower(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)), IMAGE)
    assert [name for name in stage.entrants if name != "native kernels"] == ["dense"]


def test_batch_norms_stay_where_they_shall(stage: Stage) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    for fold in (True, False):
        lower(model, IMAGE, fold=fold)
        found = [any(isinstance(m, nn.BatchNorm2d) for m in net.modules()) for net in stage.networks.values()]
        assert set(found) == {not fold}


@pytest.mark.parametrize("name", ["resnet_bottleneck", "group_norm", "shufflenet_v2"])
def test_every_network_that_competes_equals_the_masked_one(name: str, stage: Stage) -> None:
    stage.clock = macs
    gm, inputs = pruned(ZOO[name]), ZOO[name].inputs(2, dtype=torch.float64)
    small = lower(gm, inputs)
    assert len(stage.networks) >= 3
    for network in stage.networks.values():
        assert error(run(gm.eval(), inputs), run(network, inputs)) < 1e-12
    assert small.meta["lower_plan"].flops_run == min(n.meta["lower_plan"].flops_run for n in stage.networks.values())


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime"])
def test_measured_in_earnest_it_is_the_same_network(runtime: str, tmp_path: Path) -> None:
    model = halves()
    before = fingerprint(model)
    small = lower(model, IMAGE, runtime)
    assert unchanged(before, fingerprint(model))  # the state of the random numbers, too
    contest = small.meta["contest"]
    assert contest.winner in contest.results
    assert list(contest.results)[:2] == ["dense", "dead channels removed"]
    assert all(result.median_ms > 0 for result in contest.results.values())
    assert all(ms > 0 for ms in contest.expected_ms.values())
    assert error(run(model, (IMAGE,)), run(small, (IMAGE,))) < 1e-5
    dspfx.save(small, tmp_path / "small")
    assert error(run(small, (IMAGE,)), run(dspfx.load(tmp_path / "small"), (IMAGE,))) == 0


def test_a_runtime_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    load = importlib.import_module

    def absent(name: str) -> Any:
        if name == "openvino":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name)

    monkeypatch.setattr(runtimes.importlib, "import_module", absent)
    message = (
        "the runtime 'openvino' needs the package openvino, which cannot be imported (No module named 'openvino'); "
        'run: pip install "dspfx[openvino]"'
    )
    for tune in ("auto", "measure"):
        with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
            lower(halves(), IMAGE, "openvino", tune)
    assert lower(halves(), IMAGE, "openvino", None)(IMAGE).shape == halves()(IMAGE).shape  # nothing is measured there
    gm = prepare(halves(), IMAGE)
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        prune(gm, Budget(latency=0.5), runtime="openvino")


def test_tensorrt_gets_whole_blocks_where_it_is_not_installed_too() -> None:
    assert machine.block_widths("tensorrt") == (8, 32)
    model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 4, 1)).eval()
    with torch.no_grad():
        model.get_parameter("2.weight")[:, 13:] = 0
    widths = {r: lower(model, IMAGE, r, None).get_submodule("0").out_channels for r in ("eager", "tensorrt")}
    assert widths == {"eager": 13, "tensorrt": 16}


def network() -> TracedModule:
    """A chain in float64, prepared."""
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 4, 1)]
    return prepare(nn.Sequential(*layers).double(), IMAGE.double(), GateConfig(groups=2))


def test_a_latency_is_met_by_what_is_measured(stage: Stage) -> None:
    def sluggish(plan: LowerPlan) -> float:
        return 0.2 + 0.8 * plan.flops_run

    stage.clock, stage.ratio = macs, sluggish
    gm, inputs = network(), (IMAGE.double(),)
    plan = prune(gm, Budget(latency=0.6), runtime="onnxruntime", threads=2)
    assert plan.latency_left is not None
    assert 0.4 < plan.latency_left <= SLACK * 0.6  # a block of four of so few channels is much at once
    assert plan.latency_left == pytest.approx(0.2 + 0.8 * plan.flops_left, abs=0.02)
    assert str(plan).endswith(f"measured latency: {plan.latency_left:.1%} of the dense network's")
    assert type(plan).from_json(plan.to_json()) == plan
    assert {(runtime, threads) for runtime, _, threads in stage.asked} == {("onnxruntime", 2)}
    assert any(m.is_pruned for m in gm.modules() if isinstance(m, GatedConv2d))
    assert error(run(gm.eval(), inputs), run(lower(gm, tune=None), inputs)) < 1e-12


def test_several_budgets_hold_at_once(stage: Stage) -> None:
    stage.clock = macs
    gm = network()
    alone = prune(copy.deepcopy(gm), Budget(latency=0.7), runtime="eager")
    assert alone.params_left > 0.4
    both = prune(gm, Budget(latency=0.7, params=0.4), runtime="eager")
    assert both.params_left <= 0.4
    assert both.latency_left == alone.latency_left
    for less, more in zip(both.layers, alone.layers, strict=True):
        kept = [{(o, c) for g in layer.groups for o in g.filters for c in g.channels} for layer in (less, more)]
        assert kept[0] <= kept[1]
    assert prune(network(), Budget(flops=0.9)).latency_left is None


def test_a_latency_is_that_of_the_example_inputs(stage: Stage) -> None:
    stage.clock = macs
    images = torch.zeros(7, 3, 9, 10, dtype=torch.float64)
    prune(network(), Budget(latency=0.8), example_inputs=images, runtime="eager")
    assert {tuple(inputs.args[0].shape) for _, inputs, _ in stage.asked} == {(7, 3, 9, 10)}


@pytest.mark.parametrize("budget", [Budget(latency=0.05), Budget(latency=0.8, flops=0.001)])
def test_nothing_changes_where_a_budget_cannot_be_met(budget: Budget, stage: Stage) -> None:
    stage.clock, stage.ratio = macs, lambda plan: 0.2 + 0.8 * plan.flops_run
    gm = network()
    before = fingerprint(gm)
    with pytest.raises(BudgetError, match="is below what this network can reach"):
        prune(gm, budget, runtime="eager")
    assert unchanged(before, fingerprint(gm))


def test_a_latency_without_a_runtime_is_refused() -> None:
    message = (
        "Budget(latency=0.5) has a latency and no runtime to measure it on; name the one that the network is for: "
        'prune(gm, budget, runtime="onnxruntime").'
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        prune(network(), Budget(latency=0.5))


@pytest.mark.parametrize("latency", [0, 1.5, -1, True, "0.5", float("nan")])
def test_latencies_are_fractions(latency: Any) -> None:
    message = (
        f"Budget.latency is {latency!r}; give the fraction that remains, in (0, 1]: Budget(latency=0.35) keeps 35%."
    )
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$"):
        Budget(latency=latency)


@pytest.mark.filterwarnings("ignore:.*this machine is busy")
def test_pruned_to_a_measured_latency_in_earnest() -> None:
    """The whole time is met whatever the machine does meanwhile: the dense network's ratio to itself is 1."""
    gm, inputs = network(), (IMAGE.double(),)
    plan = prune(gm, Budget(latency=1.0, flops=0.7), runtime="eager")
    assert plan.latency_left is not None
    assert 0 < plan.latency_left <= 1
    assert plan.flops_left <= 0.7
    assert error(run(gm.eval(), inputs), run(lower(gm, inputs), inputs)) < 1e-12


def test_a_network_without_parameters_is_measured_too() -> None:
    model = nn.Sequential(nn.ReLU())
    assert torch.equal(lower(model, -torch.ones(1, 3, 4, 4))(-torch.ones(1, 3, 4, 4)), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize("tune", ["auto", None])
def test_too_few_threads_are_refused(tune: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    image = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ConfigError, match=r"^threads is 0; give at least 1\.$"):
        lower(model, image, tune=tune, threads=0)
    with pytest.raises(ConfigError, match=r"^threads is 0; give at least 1\.$"):
        prune(prepare(model, image), Budget(latency=0.5), runtime="eager", threads=0)
