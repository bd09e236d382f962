"""Plans travel as JSON without loss, refuse what is no plan, and print every layer."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from dspfx.config import GateConfig
from dspfx.errors import StorageError
from dspfx.pipeline import Budget, lower, prepare, prune
from dspfx.plans import GatePlan, Group, LoweredLayer, LowerPlan, Plan, PrunePlan
from tests.zoo import ZOO

NAMES = ("resnet_padded", "inverted_residual", "shared_head", "single_conv")


@cache  # plans are frozen
def plans(name: str) -> tuple[GatePlan, PrunePlan | None, LowerPlan]:
    """The three plans of a network; nothing can be pruned where nothing is gated."""
    config = GateConfig(groups=2, tau=0.7, noise="authors", cost="params")
    gm = prepare(ZOO[name].build(), ZOO[name].inputs(), config)
    gates: GatePlan = gm.meta["gate_plan"]
    pruned = prune(gm, Budget(flops=0.6)) if gates.layers else None
    return gates, pruned, lower(gm).meta["lower_plan"]


@pytest.mark.parametrize("name", NAMES)
def test_json_round_trip(name: str) -> None:
    for plan in plans(name):
        if plan is not None:
            text = plan.to_json()
            assert type(plan).from_json(text) == plan
            assert type(plan).from_json(text).to_json() == text
            assert "\n" not in text
            assert isinstance(json.loads(text), dict)


def test_pruning_to_infinity_is_no_json_trick() -> None:
    plan = plans("resnet_padded")[1]
    assert plan is not None
    data = json.loads(plan.to_json(), parse_constant=pytest.fail)  # no NaN or Infinity
    assert data["beta"] == plan.beta


@pytest.mark.parametrize("name", NAMES)
def test_printing_names_every_layer(name: str) -> None:
    gates, pruned, lowered = plans(name)
    text = str(gates)
    assert all(layer.name in text for layer in gates.layers)
    assert all(layer.name in text and layer.reason in text for layer in gates.skipped)
    if pruned is not None:
        assert all(f"{layer.out_channels}x{layer.in_channels}" in str(pruned) for layer in pruned.layers)
        assert str(pruned).splitlines()[-1].startswith(f"whole network: {pruned.flops_left:.1%} of FLOPs and ")
    assert all(layer.name in str(lowered) for layer in lowered.layers)
    assert str(lowered).endswith(f"the lowered network runs {lowered.flops_run:.1%} of the FLOPs")


def test_a_dead_layer_prints_as_dead() -> None:
    plan = plans("resnet_padded")[1]
    assert plan is not None
    data = json.loads(plan.to_json())
    for group in data["layers"][0]["groups"]:
        group["filters"], group["channels"] = [], []
    assert "(all dead)" in str(PrunePlan.from_json(json.dumps(data)))


def change(plan: Plan, **fields: Any) -> str:
    """The plan's JSON with some fields replaced; None removes one."""
    data = {**json.loads(plan.to_json()), **fields}
    return json.dumps({key: value for key, value in data.items() if value is not None})


@pytest.mark.parametrize("kind", [GatePlan, PrunePlan, LowerPlan])
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"plan"', '{"layers":[]', '{"layers":3}', '{"odd":1}'])
def test_what_is_no_plan_is_refused(kind: type[Plan], text: str) -> None:
    with pytest.raises(StorageError, match=rf"^This is not the JSON of a {kind.__name__}: .+\.$"):
        kind.from_json(text)


def test_wrong_fields_are_named() -> None:
    gates, pruned, lowered = plans("resnet_padded")
    assert pruned is not None
    cases: list[tuple[type[Plan], str, str]] = [
        (GatePlan, change(gates, extra=1), "unknown field 'extra'"),
        (PrunePlan, change(pruned, beta="high"), "expected float, found 'high'"),
        (PrunePlan, change(pruned, layers=[{"name": 3}]), "expected str, found 3"),
        (PrunePlan, change(pruned, layers=[{"name": "a", "macs": True}]), "expected int, found True"),
        (LowerPlan, change(lowered, layers=[{"shape": "round"}]), "unknown field 'shape'"),
        (
            LowerPlan,
            change(lowered, layers=[{"form": "round"}]),
            "expected one of 'dense', 'branches', 'grouped', 'kernel', 'native', found 'round'",
        ),
        (GatePlan, change(gates, config={"groups": 0}), r"GateConfig\.groups is 0; give an integer .*"),
    ]
    for kind, text, reason in cases:
        with pytest.raises(StorageError, match=rf"^This is not the JSON of a {kind.__name__}: {reason}\.$"):
            kind.from_json(text)
    lacking: list[tuple[type[Plan], str]] = [
        (PrunePlan, change(pruned, beta=None)),
        (GatePlan, change(gates, config=None)),
    ]
    for kind, text in lacking:
        with pytest.raises(StorageError, match=rf"^This is not the JSON of a {kind.__name__}: .*missing 1 required"):
            kind.from_json(text)


def test_the_share_run_is_that_of_all_layers() -> None:
    layers = (
        LoweredLayer("a", "dense", (0,), (0,), (), macs=100, macs_left=10, macs_run=50),
        LoweredLayer("b", "branches", (0, 1), (0,), (Group((0, 1), (0,)),), macs=300, macs_left=20, macs_run=30),
    )
    assert LowerPlan(layers).flops_run == 80 / 400
    assert LowerPlan(()).flops_run == 1.0
