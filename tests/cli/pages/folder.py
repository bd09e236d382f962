"""A finished run's folder, written in milliseconds: two gated layers, one of them with a name that is an attack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from dspfx.config import GateConfig
from dspfx.plans import GatePlan, GateSpec, Group, LoweredLayer, LowerPlan, PrunedLayer, PrunePlan, Skipped

EVIL = "</script><img src=x onerror=\"document.title='owned'\">&<!--"
PLAN = PrunePlan(
    layers=(
        PrunedLayer("conv1", 4, 3, (Group((0, 2), (0, 1)), Group((1,), (1,))), 1200, 500),
        PrunedLayer(EVIL, 2, 4, (Group((0, 1), (0, 1, 2, 3)),), 800, 800),
    ),
    flops_left=0.65,
    params_left=0.6,
    gated_flops_left=0.65,
    beta=0.1,
)
GATES = GatePlan(
    GateConfig(groups=2),
    (GateSpec("conv1", 2, 4, 3, 64, 1200), GateSpec(EVIL, 2, 2, 4, 64, 800)),
    (Skipped("stem", "Conv2d", f"it reads {EVIL}", 100),),
)
LOWERED = LowerPlan(
    (
        LoweredLayer("conv1", "branches", (0, 1, 2), (0, 1), PLAN.layers[0].groups, 1200, 500, 500, 0.125),
        LoweredLayer("stem", "dense", (0,), (0,), (), 100, 100, 100, 0.5),
    )
)


def _network(accuracy: float, **changes: Any) -> dict[str, Any]:
    row = {"flops_needed": 1.0, "params_needed": 1.0, "flops": 2000, "params": 100, "file_bytes": 4000}
    test = {"loss": 0.5, "accuracy": accuracy, "images": 1000}
    return row | {"test": test, "latency_ms": 2.0, "latency_ratio": 1.0, "latency_spread": 0.02} | changes


def results() -> dict[str, Any]:
    """What results.json of such a run holds."""
    epoch = {"lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5, "val_loss": 1.2, "val_accuracy": 0.45, "seconds": 1.0}
    learned = [
        epoch | {"entropy": 0.6, "penalty": 10.0, "hypergradient": 1.0},
        epoch | {"entropy": 0.05, "penalty": 9.0},
    ]
    lowered = _network(0.9, latency_ms=1.0, latency_ratio=0.5, file_bytes=1000, flops=1300)
    times = {"median_ms": 2.0, "ratio": 1.0, "spread": 0.0}
    arguments = {
        "model": "tiny", "data": "digits", "budget": ["flops=0.65"], "seed": 0, "groups": 2, "limit_train": None,
        "checkpoint": None, "epochs_dense": 1, "one_shot": False, "runtime": "eager", "fork": None,
    }  # fmt: skip
    return {
        "command": ["python", "-m", "dspfx", "compress", "--data", EVIL],
        "arguments": arguments,
        "versions": {"python": "3.11", "dspfx": "0.1.0"},
        "machine": {"processor": "P", "device": "cpu", "threads": 1},
        "networks": {"dense": _network(0.91), "pruned": _network(0.9), "lowered": lowered},
        "left": {"flops": 0.65, "params": 0.6, "gated_flops": 0.65, "latency": None},
        "runtime": "eager",
        "latency": "input 1x3x8x8, 30 rounds; eager, P",
        "contest": {
            "winner": "fastest forms",
            "results": {"dense": times, "fastest forms": times | {"median_ms": 1.0, "ratio": 0.5, "spread": 0.1}},
            "expected_ms": {"dense": 1.5, "fastest forms": 0.7},
            "is_noisy": False,
            "notes": [f"one is left out: {EVIL}"],
            "setting": "input 1x3x8x8, 12 rounds; eager, P",
        },
        "coverage": {
            "plan": {"layers": [{}, {}], "skipped": [{}]},
            "gated": 0.95,
            "prunable": 1.0,
            "pins": [
                {"reason": EVIL, "filters": 3, "nodes": ["a", "b", "c", "d"], "where": ["net.py:1"], "remedy": ""}
            ],
        },
        "difference": 2e-7,
        "curves": {"dense": [epoch], "learn": learned, "tune": [epoch, epoch | {"val_accuracy": 0.9}]},
    }


def make_run(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Writes the folder; `changes` go into results.json."""
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results() | (changes or {})))
    (folder / "plan.json").write_text(PLAN.to_json())
    gates = {
        "conv1.gate_group": torch.tensor([0, 1, 0, -1]),
        "conv1.gate_keep": torch.tensor([[True, True, False], [False, True, False]]),
        f"{EVIL}.gate_group": torch.tensor([0, 0]),
        f"{EVIL}.gate_keep": torch.tensor([[True] * 4, [False] * 4]),
    }
    safetensors.torch.save_file(gates, folder / "pruned.safetensors", {"gate_plan": GATES.to_json()})
    weights = {"x": torch.zeros(1)}
    safetensors.torch.save_file(weights, folder / "network.safetensors", {"lower_plan": LOWERED.to_json()})
    return folder
