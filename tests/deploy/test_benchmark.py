"""Benchmark: its arithmetic, the order of its calls by a clock of the test's own, and networks left as they were."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dspfx
from dspfx.deploy import timing as module
from dspfx.deploy.benchmark import benchmark
from dspfx.deploy.timing import Result, compare
from dspfx.errors import ConfigError, InputError, RuntimeBuildError
from tests.compare import fingerprint, unchanged
from tests.zoo import ZOO

IMAGE = torch.zeros(2, 3, 8, 8)


class Clock:
    """Time that passes only in the calls that are given a cost."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def layer(self, name: str, seconds: Callable[[int], float]) -> nn.Module:
        """A network whose n-th call takes `seconds(n)`; it notes its mode and gradient setting."""
        clock = self

        class Timed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.count = 0

            def forward(self, x: Tensor) -> Tensor:
                if not isinstance(x, torch._subclasses.FakeTensor):
                    assert not self.training
                    assert torch.is_inference_mode_enabled()
                    clock.now += seconds(self.count)
                    clock.calls.append(name)
                    self.count += 1
                return x

        return Timed()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(module.time, "perf_counter", lambda: found.now)
    return found


def test_ratios_are_paired_round_by_round() -> None:
    seconds = {"dense": [1.0, 2.0, 4.0, 1.0, 2.0], "ours": [0.5, 1.0, 1.0, 0.6, 1.8]}
    # ratios 0.5, 0.5, 0.25, 0.6, 0.9: quartiles 0.5, 0.5 and 0.6
    assert compare(seconds) == {
        "dense": Result(2000.0, 1.0, 0.0),
        "ours": Result(1000.0, 0.5, pytest.approx(0.1)),  # type: ignore[arg-type]
    }


def test_rounds_interleave_and_alternate(clock: Clock) -> None:
    models = {name: clock.layer(name, lambda _: 1.0) for name in ("a", "b", "c")}
    benchmark(models, IMAGE, rounds=4)
    assert clock.calls == [*"aaabbbccc", *"abc", *"cba", *"abc", *"cba"]


def test_a_machine_that_slows_down_leaves_the_ratio_alone(clock: Clock) -> None:
    models = {
        "dense": clock.layer("dense", lambda n: 1.0 + n),
        "ours": clock.layer("ours", lambda n: 0.5 * (1.0 + n)),
    }
    found = benchmark(models, IMAGE, rounds=5)
    assert found["dense"] == Result(pytest.approx(6000.0), 1.0, 0.0)  # type: ignore[arg-type]
    assert found["ours"] == Result(pytest.approx(3000.0), pytest.approx(0.5), pytest.approx(0.0))  # type: ignore[arg-type]


def test_fast_networks_are_called_more_than_once_a_sample(clock: Clock) -> None:
    models = {"slow": clock.layer("slow", lambda _: 1.0), "fast": clock.layer("fast", lambda _: 0.002)}
    found = benchmark(models, IMAGE, rounds=2)
    assert clock.calls == ["slow"] * 3 + ["fast"] * 3 + ["slow"] + ["fast"] * 3 + ["fast"] * 3 + ["slow"]
    assert found["fast"].ratio == pytest.approx(0.002)


def test_networks_and_threads_are_left_as_they_were() -> None:
    before_threads = torch.get_num_threads()
    entry = ZOO["auxiliary_tuple"]
    model = entry.build()
    frozen = dspfx.prepare(model, entry.inputs())
    frozen.get_submodule("conv1").eval()
    code, states = frozen.code, {key: value.clone() for key, value in frozen.state_dict().items()}
    modes = [[m.training for m in network.modules()] for network in (model, frozen)]
    found = benchmark({"model": model, "prepared": frozen}, entry.inputs(), rounds=2, threads=2)
    assert list(found) == ["model", "prepared"]
    assert [[m.training for m in network.modules()] for network in (model, frozen)] == modes
    assert frozen.code == code
    assert all(torch.equal(value, states[key]) for key, value in frozen.state_dict().items())
    assert torch.get_num_threads() == before_threads


def test_modes_and_threads_come_back_after_a_failure() -> None:
    class Failing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, torch._subclasses.FakeTensor):
                raise RuntimeError("no way")
            return x

    before, model = torch.get_num_threads(), Failing(nn.ReLU())
    with pytest.raises(RuntimeError, match="no way"):
        benchmark({"model": model}, IMAGE, threads=2)
    assert torch.get_num_threads() == before
    assert [m.training for m in model.modules()] == [True, True]


def test_it_prints_a_table_and_names_the_machine(clock: Clock) -> None:
    models = {"dense": clock.layer("dense", lambda _: 0.5), "ours": clock.layer("ours", lambda _: 0.25)}
    lines = str(benchmark(models, IMAGE, rounds=2)).splitlines()
    assert lines[0].split("  ")[0] == "network"
    assert lines[2].split() == ["dense", "500.000", "1.000", "0.000"]
    assert lines[3].split() == ["ours", "250.000", "0.500", "0.000"]
    assert re.fullmatch(r"input 2x3x8x8, 2 rounds; eager, .+, 1 thread, \w+ \w+, torch .+", lines[4])


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_other_runtimes_are_timed_and_named_with_their_version(runtime: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    before = fingerprint(model)
    found = benchmark({"dense": model, "same": model}, IMAGE, runtime=runtime, rounds=2, threads=2)
    assert list(found) == ["dense", "same"]
    assert all(result.median_ms > 0 for result in found.values())
    assert re.fullmatch(
        rf"input 2x3x8x8, 2 rounds; {runtime} \d+\.\d+\.\d+, .+, 2 threads, .+, torch .+", found.setting
    )
    assert unchanged(before, fingerprint(model))


def test_a_network_that_the_runtime_rejects_is_named() -> None:
    class Fancy(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    message = (
        "fancy: onnxruntime cannot run this Fancy; use another runtime ('eager' runs everything), or change in the "
        "model what the reason names:\n"
    )
    with pytest.raises(RuntimeBuildError, match=f"^{re.escape(message)}DispatchError: No ONNX function found for .+$"):
        benchmark({"plain": nn.ReLU(), "fancy": Fancy()}, IMAGE, runtime="onnxruntime")


def test_an_unknown_runtime_is_refused() -> None:
    message = (
        "runtime is 'fast', which dspfx does not know; give one of 'eager', 'inductor', 'onnxruntime', "
        "'onnxruntime-native', 'openvino', 'tensorrt'."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        benchmark({"model": nn.ReLU()}, IMAGE, runtime="fast")


def test_nothing_to_time_is_refused() -> None:
    message = 'benchmark got no network; give at least one by name: {"dense": model}.'
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        benchmark({}, IMAGE)


@pytest.mark.parametrize(("rounds", "threads"), [(1, 1), (5, 0)])
def test_too_few_rounds_or_threads_are_refused(rounds: int, threads: int) -> None:
    message = f"benchmark got rounds={rounds} and threads={threads}; give at least 2 rounds and 1 thread."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        benchmark({"model": nn.ReLU()}, IMAGE, rounds=rounds, threads=threads)


def test_networks_on_different_devices_are_refused() -> None:
    message = (
        "benchmark compares networks on one device, and here is on cpu, there on meta; move one of them with .to(...)."
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        benchmark({"here": nn.Linear(2, 2), "there": nn.Linear(2, 2, device="meta")}, torch.zeros(1, 2))


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=re.escape("Linear does not run on example inputs of shape [(1, 3)]: ")):
        benchmark({"model": nn.Linear(2, 2)}, torch.zeros(1, 3))
