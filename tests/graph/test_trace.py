"""trace: one module for both modes, with the user's attributes, methods, buffers and copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.config import Inputs
from dspfx.errors import InputError
from dspfx.graph.trace import trace
from dspfx.graph.traced import all_graphs, eval_graph, eval_only
from tests.compare import run, same
from tests.zoo import ZOO


class Rich(nn.Module):
    """Attributes, a method, a property, a static method, a buffer that is not saved, keyword inputs."""

    classes = ("cat", "dog")
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.scale = 2.5
        self.register_buffer("table", torch.arange(4.0).view(1, 4, 1, 1), persistent=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, *, shift: Tensor, flag: bool = True) -> dict[str, Tensor]:
        y = self.conv(x) * self.scale + self.table
        return {"out": F.dropout(y, 0.5, self.training) + shift if flag else y}

    def describe(self, word: str) -> str:
        return f"{word} {self.scale}"

    @property
    def width(self) -> int:
        return self.conv.out_channels

    @staticmethod
    def three() -> int:
        return 3


def rich() -> tuple[Rich, Any, tuple[Tensor, Tensor]]:
    model, x, shift = Rich(), torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    return model, trace(model, Inputs(x, shift=shift)), (x, shift)


def test_the_users_own_parts_stay_reachable() -> None:
    model, gm, _ = rich()
    assert gm.describe("is") == "is 2.5"
    assert (gm.width, gm.three(), gm.classes, gm.scale) == (4, 3, ("cat", "dog"), 2.5)
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        _ = gm.nothing_of_this_name
    assert list(gm.state_dict()) == list(model.state_dict())  # unused modules stay, unsaved buffers stay unsaved
    assert "table" in dict(gm.named_buffers())


def test_one_graph_follows_the_mode() -> None:
    model, gm, (x, shift) = rich()
    assert len(all_graphs(gm)) == 1
    for training in (True, False, True):
        model.train(training)
        gm.train(training)
        torch.manual_seed(5)
        expected = model(x, shift=shift)["out"]
        torch.manual_seed(5)
        assert torch.equal(gm(x, shift=shift)["out"], expected)


@pytest.mark.parametrize("name", ["auxiliary_tuple", "auxiliary_dict", "stochastic_depth"])
def test_two_graphs_where_the_structure_differs(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    gm = trace(model, entry.inputs())
    assert len(all_graphs(gm)) == 2
    assert gm.graph is gm.meta["graphs"]["train"]
    gm.eval()
    assert gm.graph is eval_graph(gm) is gm.meta["graphs"]["eval"]
    gm.train()
    twin = copy.deepcopy(gm).eval()
    assert twin.graph is twin.meta["graphs"]["eval"]
    assert twin.meta["graphs"]["eval"] is not gm.meta["graphs"]["eval"]
    assert gm.graph is gm.meta["graphs"]["train"]
    model.eval()
    assert same(run(twin, entry.inputs()), run(model, entry.inputs()))


def test_a_traced_module_is_only_copied() -> None:
    gm = trace(ZOO["plain"].build(), ZOO["plain"].inputs())
    twin = trace(gm)
    assert twin is not gm
    assert [str(n) for n in twin.graph.nodes] == [str(n) for n in gm.graph.nodes]
    assert trace(gm, ZOO["plain"].inputs(5, 20, 24)).meta["inputs"].args[0].shape == (5, 3, 20, 24)
    assert gm.meta["inputs"].args[0].shape == (2, 3, 16, 16)
    assert all(x.is_meta for x in gm.meta["inputs"].args)


def test_eval_only_keeps_what_runs_and_no_class_of_the_users() -> None:
    _, gm, (x, shift) = rich()
    lean = eval_only(gm)
    assert not lean.training
    assert set(lean.state_dict()) == {"conv.weight", "conv.bias"}
    assert not hasattr(lean, "describe")
    assert list(lean.meta) == ["inputs"]
    assert torch.equal(lean(x, shift=shift)["out"], gm(x, shift=shift)["out"])


def test_moving_and_casting_takes_constants_along() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.offset = torch.ones(4, 1, 1)  # neither parameter nor buffer

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.offset

    model = Constant()
    gm = trace(model, torch.zeros(1, 3, 4, 4))
    assert list(gm.state_dict()) == list(model.state_dict())
    assert gm.double()(torch.zeros(1, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64
    assert gm.offset.dtype == torch.float64
    assert model.offset.dtype == torch.float32


def test_batch_counters_are_not_advanced_by_tracing() -> None:
    model = ZOO["plain"].build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gm = trace(model, ZOO["plain"].inputs())
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())


def test_keywords_that_do_not_fit_are_refused() -> None:
    message = (
        r"^Rich does not run on example inputs of shape \[\(2, 3, 5, 5\)\]: TypeError: .*missing 1 required "
        r"keyword-only argument: 'shift'\. Give example_inputs that the model accepts\.$"
    )
    with pytest.raises(InputError, match=message):
        trace(Rich(), torch.zeros(2, 3, 5, 5))


class Optional(nn.Module):
    """Arguments with defaults that Python looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, features: bool = False, *, power: int = 2) -> Any:
        x = self.conv(x)
        if mask is not None:
            x = x * mask
        x = x**power
        return [x, x.mean((2, 3))] if features else x.mean((2, 3))


def test_defaults_are_those_of_the_model_and_another_value_is_refused() -> None:
    model, x, mask = Optional(), torch.randn(2, 3, 4, 4), torch.rand(2, 1, 4, 4)
    gm = trace(model, x)
    assert same(run(gm, (x,)), run(model, (x,)))
    assert same(run(gm, (x, None, False)), run(model, (x,)))
    for given, name, was in (((x, mask), "mask", "None"), ((x, None, True), "features", "False")):
        with pytest.raises(InputError, match=rf"^the argument {name} was {was} with the traced example inputs and is "):
            gm(*given)
    masked = trace(model, (x, mask))
    assert same(run(masked, (x, mask)), run(model, (x, mask)))
    both = trace(model, Inputs(x, features=True, power=3))
    assert same(both(x, features=True, power=3), model(x, features=True, power=3))
