"""trace: one module for both modes, with the user's attributes, methods, buffers and copies."""

from __future__ import annotations

import abc
import copy
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dspfx.config import Inputs
from dspfx.errors import InputError, TraceError
from dspfx.graph.trace import trace, trace_shared
from dspfx.graph.traced import all_graphs, eval_graph, eval_only, parts_of, traced_modules
from tests.compare import fingerprint, leaves, run, same, unchanged
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


class Register(nn.Sequential, abc.ABC):
    """A class with all that a class can have: a register of subclasses, a metaclass, train, __call__, __setattr__."""

    known: ClassVar[list[type]] = []
    looks = 0

    def __init_subclass__(cls) -> None:
        Register.known.append(cls)

    def train(self, mode: bool = True, keep_norms: bool = True) -> Register:
        super().train(mode)
        for module in self.modules():
            if keep_norms and isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "answer":
            return 42
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def parameters(self, recurse: bool = True) -> Any:
        self.__dict__["looks"] = self.looks + 1
        return super().parameters(recurse)


def register() -> tuple[Register, Any, Tensor]:
    model = Register(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    return model, trace(model, torch.zeros(2, 3, 4, 4)), torch.randn(2, 3, 4, 4)


def test_a_traced_network_is_one_of_the_users_class() -> None:
    model, gm, x = register()
    assert isinstance(gm, Register)
    assert isinstance(gm, fx.GraphModule)
    assert Register.known == []
    assert (len(gm), gm[0], gm.answer) == (4, next(iter(gm)), 42)
    assert type(gm[:2]) is Register
    gm.train()
    assert [m.training for m in gm] == [True, False, True, True]
    gm.train(True, keep_norms=False)
    assert gm[1].training
    model.eval()
    gm.eval()
    assert torch.equal(gm(x), model(x))
    list(gm.parameters())
    assert gm.looks > 0


def test_copies_are_of_the_users_class_too() -> None:
    _, gm, x = register()
    gm.eval()
    shallow, deep = copy.copy(gm), copy.deepcopy(gm)
    shallow[0] = nn.Conv2d(3, 4, 1)
    for twin in (shallow, deep):
        assert isinstance(twin, Register)
        assert type(twin) is not type(gm)
    assert torch.equal(deep(x), gm(x))
    assert not torch.equal(shallow(x), gm(x))
    assert shallow[1] is gm[1]
    assert deep[1] is not gm[1]


def test_a_shallow_copy_follows_its_own_mode() -> None:
    entry = ZOO["auxiliary_tuple"]
    gm = trace(entry.build(), entry.inputs())
    twin = copy.copy(gm)
    twin.eval()
    assert twin.graph is gm.meta["graphs"]["eval"]
    assert gm.graph is gm.meta["graphs"]["train"]
    gm.train()
    assert len(leaves(gm(*entry.inputs()))) > len(leaves(twin(*entry.inputs())))


def test_replicas_of_data_parallel_run() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    gm, x = trace(model, torch.zeros(2, 3, 4, 4)), torch.randn(2, 3, 4, 4)
    replica = gm._replicate_for_data_parallel()
    assert replica not in traced_modules
    assert replica._parameters == {}
    assert torch.equal(replica(x), gm(x))


def test_torch_compiles_and_exports_what_was_traced() -> None:
    _, gm, x = register()
    gm.eval()
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), gm(x))
    plain = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), x).eval()
    exported = torch.export.export(plain, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    y = torch.randn(5, 3, 4, 4)
    assert torch.equal(exported.module()(y), plain(y))


def test_a_graph_module_of_the_users_is_traced_again() -> None:
    model, x = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())), torch.randn(2, 3, 4, 4)
    gm = trace(model, x)
    assert torch.equal(gm(x), model(x))
    assert torch.equal(copy.deepcopy(gm)(x), model(x))


class Sealed(type(nn.Module)):  # type: ignore[misc]
    """A metaclass that refuses subclasses."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        if any(isinstance(base, Sealed) for base in bases):
            raise TypeError("final")
        return super().__new__(mcs, name, bases, namespace)


class Final(nn.Sequential, metaclass=Sealed):
    """Has no subclass."""


def test_a_class_that_refuses_subclasses_is_named() -> None:
    message = (
        r"^Final cannot be traced: no class below it can be made \(TypeError: final\)\. Wrap the model in a plain "
        r"nn\.Module that calls it\.$"
    )
    with pytest.raises(TraceError, match=message):
        trace(Final(nn.Conv2d(3, 4, 1)), torch.zeros(2, 3, 4, 4))


class Remembers(nn.Module):
    """Its forward leaves things behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.calls = 0

    def forward(self, x: Tensor, look: bool = False) -> Tensor:
        self.calls += 1
        self.last = self.conv(x) + torch.ones(4, 1, 1)
        return -self.last if look and self.last.sum() > 0 else self.last


def test_nothing_of_the_tracing_stays_behind() -> None:
    model = Remembers()
    before = fingerprint(model)
    gm = trace(model, torch.zeros(2, 3, 4, 4))
    assert gm.calls == 0
    assert "last" not in gm.__dict__
    assert unchanged(before, fingerprint(model))
    with pytest.raises(TraceError):
        trace_shared(model, Inputs(torch.empty(2, 3, 4, 4, device="meta"), True))
    assert unchanged(before, fingerprint(model))


def test_parts_are_the_outermost_traced_modules() -> None:
    gm = trace(ZOO["plain"].build(), ZOO["plain"].inputs())
    assert parts_of(gm) == {"": gm}
    around = nn.ModuleDict({"a": nn.Sequential(gm), "b": nn.ReLU(), "c": gm})
    assert parts_of(around) == {"a.0": gm}
    assert parts_of(nn.Sequential(nn.ReLU())) == {}


class Picks(nn.Module):
    """A graph whose shapes depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten()
        return y[y > 0]


def test_inputs_are_tried_for_real_where_fake_ones_cannot_tell() -> None:
    model, x = Picks(), torch.randn(2, 3, 4, 4)
    assert torch.equal(trace(model, x)(x), model(x))
    with pytest.raises(InputError, match=r"^Picks does not run on example inputs of shape \[\(2, 5, 4, 4\)\]: "):
        trace(model, torch.randn(2, 5, 4, 4))
