"""N processes learn, prune and fine-tune as one process does with their joint batches; real processes, gloo."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.distributed import scenarios

WORLDS = (2, 4)
EQUAL = ("fused_ddp", "exact_ddp", "accumulated_ddp", "fused_fsdp", "zero_redundancy")
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch's gloo backend")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """results(world): what every scenario gave, rank by rank."""

    @cache
    def launch(world: int) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp(f"ranks{world}")
        multiprocessing.set_forkserver_preload([scenarios.__name__])  # torch is imported once for all
        multiprocessing.start_processes(scenarios.run, (world, str(folder)), nprocs=world, start_method="forkserver")
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return launch


@pytest.fixture(scope="session")
def reference() -> Any:
    """What one process learns from the joint batches, fused and exact."""
    return {mode: scenarios.learn_and_prune(scenarios.alone, mode) for mode in ("fused", "exact")}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scenario", EQUAL)
def test_ranks_learn_and_prune_as_one_process_does(results: Any, reference: Any, world: int, scenario: str) -> None:
    expected = reference["exact" if scenario == "exact_ddp" else "fused"]
    moved = max(float(value.abs().max()) for name, value in expected["learned"].items() if name.endswith("gate_logits"))
    assert moved > 0.51  # the start leans by 0.5: something was learned
    for found in (ranks[scenario] for ranks in results(world)):
        assert "error" not in found, found["error"]
        assert found["plan"] == expected["plan"]
        for part in ("learned", "tuned", "momenta"):
            assert found[part].keys() == expected[part].keys() or scenario == "zero_redundancy"
            for name, value in found[part].items():
                assert torch.allclose(value, expected[part][name], rtol=1e-9, atol=1e-11), (part, name)
        for name, value in found["stats"].items():
            assert value == pytest.approx(expected["stats"][name], rel=1e-9), name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scenario", EQUAL)
def test_what_is_pruned_stays_zero_on_every_rank(results: Any, world: int, scenario: str) -> None:
    for found in (ranks[scenario] for ranks in results(world)):
        tuned = found["tuned"]
        group, keep = tuned["a.gate_group"], tuned["a.gate_keep"]
        dropped = ~(keep[group.clamp(min=0)] & (group >= 0)[:, None])
        assert dropped.any()
        for tensor in (tuned, found["momenta"]):
            if tensor:
                assert torch.equal(tensor["a.weight"].abs().sum((2, 3)) == 0, dropped)


@pytest.mark.parametrize("world", WORLDS)
def test_the_command_line_trains_as_one_process_does(results: Any, world: int) -> None:
    expected = scenarios.command_line()
    for found in (ranks["command_line"] for ranks in results(world)):
        assert "error" not in found, found["error"]
        for ours, theirs in zip(found["curve"], expected["curve"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
        for name, value in found["learned"].items():
            assert torch.allclose(value, expected["learned"][name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("world", WORLDS)
def test_blocks_become_alike_as_on_one_process(results: Any, world: int) -> None:
    expected = scenarios.unified()
    for found in (ranks["unified"] for ranks in results(world)):
        assert "error" not in found, found["error"]
        classes = [[layer["classes"] for layer in json.loads(run["plan"])["layers"]] for run in (found, expected)]
        assert classes[0] == classes[1]
        for name, value in found["tuned"].items():
            assert torch.allclose(value, expected["tuned"][name], rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("world", WORLDS)
def test_all_ranks_refuse_what_one_of_them_cannot_do(results: Any, world: int) -> None:
    for found in (ranks["refusals"] for ranks in results(world)):
        assert "error" not in found, found["error"]
        apart = "MismatchError: a.weight on rank 1 differs from that on rank 0: the ranks do not train one network"
        assert found["other weights"].startswith(apart)
        assert found["other weights, pruned"].startswith(apart)
        assert found["other weights, each its own"] == found["pruned, each its own"] == "accepted"
        assert found["other logits"].startswith("MismatchError: a.gate_logits on rank 1 differs")
        assert re.match("BudgetError: .* is below what this network can reach", found["budget"])
        assert found["sharded, exact"].startswith("ConfigError: GroupLearner with mode='exact'")
        assert found["unified apart"].startswith("MismatchError: stem.weight on rank 1 differs")
        assert found["unified apart, each its own"] == "accepted"
        for call in ("lowered", "latency", "unified"):
            assert "is sharded over the ranks. Gather its state_dict" in found[f"sharded, {call}"]


@pytest.mark.parametrize("world", WORLDS)
def test_a_latency_is_measured_on_one_rank_and_its_plan_is_everybody_s(results: Any, world: int) -> None:
    plans = [ranks["measured_by_first"] for ranks in results(world)]
    assert all("error" not in plan for plan in plans), plans
    assert len({plan["plan"] for plan in plans}) == 1
