"""The public calls: whole error messages, a network unchanged after each, and guards where the model branches."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dspfx.config import Budget, GateConfig, Inputs
from dspfx.errors import BudgetError, ConfigError, DspfxError, InputError, ModelError, TraceError
from dspfx.graph.traced import TracedModule, network_meta
from dspfx.modules import GatedConv2d
from dspfx.pipeline import lower, prepare, prune
from dspfx.selfcheck import selfcheck
from tests.compare import error, fingerprint, run, same, unchanged
from tests.nets.parts import conv_bn_relu, head
from tests.zoo import ZOO


class Small(nn.Module):
    """conv1 (the model's input) -> conv2 -> conv3 -> linear; `forward` of subclasses adds what goes wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 8, 3, padding=1)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.conv3(torch.relu(self.conv2(self.conv1(x))))).mean((2, 3)))


class LooksAtData(Small):
    """Control flow on values."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        if y.sum() > 0:
            y = -y
        return super().forward(x) + y.mean()


class Listed(Small):
    """A value taken out of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        scale = float(self.conv1(x).max())
        return super().forward(x) * scale


class Wide(Small):
    """Two inputs, so that no image alone is accepted."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


def image(batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, 10, 10, generator=torch.Generator().manual_seed(0))


def raises(model: nn.Module, kind: type[DspfxError], message: str, call: Callable[[], Any]) -> None:
    """The whole message, and a model that is as it was."""
    before = fingerprint(model)
    with pytest.raises(kind, match=rf"^{message}$") as caught:
        call()
    assert type(caught.value) is kind
    assert unchanged(before, fingerprint(model))


def line_of(text: str) -> int:
    """The number of the first line of this file that holds `text`."""
    with open(__file__) as file:
        return next(i for i, line in enumerate(file, 1) if text in line)


REMEDY = r"Make that line independent of tensor values, or wrap the function with torch\.fx\.wrap\."
CALLS: tuple[Callable[[nn.Module, Any], Any], ...] = (prepare, lower, selfcheck)
each_call = pytest.mark.parametrize("call", CALLS, ids=["prepare", "lower", "selfcheck"])


@each_call
def test_control_flow_on_values_names_the_line(call: Callable[..., Any]) -> None:
    place = re.escape(f"{__file__}:{line_of('if y.sum() > 0:')} (if y.sum() > 0:)")
    message = (
        rf"LooksAtData cannot be traced at {place}: the model needs the Python value of conv1\.sum\(\) > 0, a "
        rf"tensor, while it is traced: its control flow depends on tensor data\. {REMEDY}"
    )
    model = LooksAtData()
    raises(model, TraceError, message, lambda: call(model, image()))


def test_a_number_read_from_a_tensor_names_the_line() -> None:
    place = re.escape(f"{__file__}:{line_of('scale = float(')} (scale = float(self.conv1(x).max()))")
    message = (
        rf"Listed cannot be traced at {place}: the model needs the Python value of conv1\.max\(\), a tensor, while "
        rf"it is traced: its control flow depends on tensor data\. {REMEDY}"
    )
    model = Listed()
    raises(model, TraceError, message, lambda: prepare(model, image()))


@pytest.mark.parametrize("call", [prepare, selfcheck], ids=["prepare", "selfcheck"])
def test_nothing_to_prune(call: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))
    message = r"Sequential has no convolution and no linear layer among its modules: there is nothing to prune\."
    raises(model, ModelError, message, lambda: call(model, image()))


def test_a_network_without_gates_is_no_error() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(300, 4))
    gm = prepare(model, image())
    assert [s.reason for s in gm.meta["gate_plan"].skipped] == [
        "linear layers are gated only with GateConfig(linear=True)"
    ]
    assert same(run(lower(model, image(), tune=None), (image(),)), run(model.eval(), (image(),)))


@each_call
def test_example_inputs_of_the_wrong_shape(call: Callable[..., Any]) -> None:
    model = Small()
    message = (
        r"Small does not run on example inputs of shape \[\(2, 5, 10, 10\)\]: .*expected input\[2, 5, 10, 10\] to have "
        r"3 channels, but got 5 channels instead\. Give example_inputs that the model accepts\."
    )
    raises(model, InputError, message, lambda: call(model, image(channels=5)))


@each_call
def test_inputs_that_cannot_be_guessed(call: Callable[..., Any]) -> None:
    model = Wide()
    message = (
        r"no example inputs were given, and Wide accepts none of the shapes \[\(2, 3, 224, 224\), .*\] that its first "
        r"layer suggests\. Call again with example_inputs=torch\.randn\(\.\.\.\) of a shape the model accepts\."
    )
    raises(model, InputError, message, lambda: call(model, None))
    assert isinstance(prepare(model, Inputs(image(), y=image())), TracedModule)


def test_inputs_are_guessed_from_the_first_layer() -> None:
    (shape,) = (x.shape for x in prepare(ZOO["resnet_padded"].build()).meta["inputs"].args)
    assert tuple(shape) == (2, 3, 224, 224)


@each_call
def test_a_model_on_another_device(call: Callable[..., Any]) -> None:
    model = Small().to("meta")
    message = r"the example input \(2, 3, 10, 10\) is on cpu, the model on meta; move one of them with \.to\(\.\.\.\)\."
    raises(model, InputError, message, lambda: call(model, image()))


@pytest.mark.parametrize("value", [0, 1.5, -0.1, True, float("nan")])
@pytest.mark.parametrize("field", ["flops", "params"])
def test_a_budget_outside_its_range(field: str, value: float) -> None:
    remedy = rf"give the fraction that remains, in \(0, 1\]: Budget\({field}=0\.35\) keeps 35%\."
    message = rf"Budget\.{field} is {value!r}; {remedy}"
    with pytest.raises(BudgetError, match=f"^{message}$"):
        Budget(**{field: value})


def test_an_empty_budget() -> None:
    message = r"Budget\(\) names nothing to meet; give at least one fraction, such as Budget\(flops=0\.35\)\."
    with pytest.raises(BudgetError, match=f"^{message}$"):
        Budget()


def test_an_infeasible_budget_names_a_floor_that_can_be_reached() -> None:
    gm = prepare(Small(), image(), GateConfig(groups=2))
    message = (
        r"Budget\(flops=0\.01\) is below what this network can reach: keeping one channel a group leaves "
        r"(0\.\d{4}) of the FLOPs and 0\.\d{4} of the parameters \(layers without a gate count in full\)\. Raise the "
        r"budget, use more groups, or gate more layers\."
    )
    raises(gm, BudgetError, message, lambda: prune(gm, Budget(flops=0.01)))
    with pytest.raises(BudgetError) as caught:
        prune(gm, Budget(flops=0.01))
    found = re.fullmatch(message, str(caught.value))
    assert found is not None
    floor = float(found[1]) + 5e-5
    assert prune(gm, Budget(flops=floor)).flops_left <= floor


@pytest.mark.parametrize("groups", [0, -1, 1.5, True])
def test_groups_that_are_no_count(groups: Any) -> None:
    message = rf"GateConfig\.groups is {groups!r}; give an integer of at least 1 \(2 to 4 is usual\)\."
    with pytest.raises(ConfigError, match=f"^{message}$"):
        GateConfig(groups=groups)


def test_skipping_what_is_not_there() -> None:
    model = Small()
    message = r"GateConfig\.skip names 'conv9'; the model's layers are conv1, conv2, conv3, linear\."
    raises(model, ConfigError, message, lambda: prepare(model, image(), GateConfig(skip=("conv9",))))
    gm = prepare(model, image(), GateConfig(skip=("conv2",)))
    assert {s.name: s.reason for s in gm.meta["gate_plan"].skipped} == {
        "conv1": "it reads the model's input",
        "conv2": "GateConfig.skip names it",
        "linear": "linear layers are gated only with GateConfig(linear=True)",
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    gm = prepare(Small(), image())
    with torch.no_grad():
        gm.get_parameter("conv2.weight")[3, 2, 1, 1] = value
    message = r"conv2 holds weights or energies that are not finite \(NaN or infinity\); restore a sound one\."
    raises(gm, ModelError, message, lambda: prune(gm, Budget(flops=0.5)))
    message = r"conv2\.weight holds NaN or infinity; restore finite weights before lowering\."
    raises(gm, ModelError, message, lambda: lower(gm))


def test_pruning_what_is_not_prepared_and_preparing_twice() -> None:
    model = Small()
    message = r"Small has no gated convolution; call gm = dspfx\.prepare\(model\) first\."
    raises(model, ModelError, message, lambda: prune(model, Budget(flops=0.5)))
    gm = prepare(model, image())
    message = r"this model is prepared already; prune it, or prepare the original model\."
    raises(gm, ModelError, message, lambda: prepare(gm, image()))


def test_an_importance_that_does_not_fit() -> None:
    gm = prepare(Small(), image())
    message = (
        r"the importance function gave shape \(12,\) for conv2; it must give one energy a \(filter, input channel\) "
        r"pair, \(12, 8\)\."
    )
    raises(gm, ModelError, message, lambda: prune(gm, Budget(flops=0.5), lambda w: w.abs().sum((1, 2, 3))))
    message = "importance is 'l3'; give one of 'auto', 'fisher', 'l2', or a function from a weight .*"
    raises(gm, ConfigError, message, lambda: prune(gm, Budget(flops=0.5), "l3"))
    assert not any(m.is_pruned for m in gm.modules() if isinstance(m, GatedConv2d))


class Branches(nn.Module):
    """Control flow on the height, the batch and a computed size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv_bn_relu(3, 8), conv_bn_relu(8, 8), head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if x.shape[2] // 2 >= 8:
            x = x[:, :, ::2, ::2]
        return self.head(self.conv2(x))


@pytest.mark.parametrize(
    ("model", "traced", "met", "text", "values"),
    [
        (ZOO["shape_branch"].build(), 16, 24, "conv1_2.shape[2] > 16 in the model", "False ... True"),
        (ZOO["shape_branch"].build(), 24, 12, "conv1_2.shape[2] > 16 in the model", "True ... False"),
        (Branches(), 12, 18, "conv1_2.shape[2] // 2 >= 8 in the model", "False ... True"),
    ],
)
def test_the_other_side_of_a_branch_is_refused(model: nn.Module, traced: int, met: int, text: str, values: str) -> None:
    gm = prepare(model.eval(), torch.randn(2, 3, traced, 16))
    before, now = values.split(" ... ")
    message = re.escape(
        f"{text} was {before} with the traced example inputs and is {now} now; the model branches on it in Python, so "
        f"this network holds only the traced branch. Give inputs of the traced kind, or prepare the model again with "
        f"such example inputs."
    )
    for network in (gm, lower(gm)):
        with pytest.raises(InputError, match=f"^{message}$"):
            network(torch.randn(3, 3, met, 20))
    inputs = (torch.randn(3, 3, traced + 1 if traced > 16 else traced - 1, 20),)
    assert same(run(gm, inputs), run(model, inputs))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.bfloat16, 0.05)])
def test_a_network_that_was_cast_is_pruned_and_lowered_in_its_new_type(dtype: torch.dtype, allowed: float) -> None:
    entry = ZOO["plain"]
    gm = prepare(entry.build(), entry.inputs(2)).to(dtype)
    prune(gm, Budget(flops=0.6))
    small = lower(gm)
    inputs = tuple(x.to(dtype) for x in entry.inputs(2))
    with torch.no_grad():
        expected, found = gm.eval()(*inputs), small(*inputs)
    assert found.dtype == dtype
    assert error([expected], [found]) <= allowed


def test_one_image_whose_last_maps_are_one_pixel() -> None:
    """Batch norm refuses it in training; the graph of training is described with two."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 2), nn.BatchNorm2d(8))
    gm = prepare(model, torch.randn(2, 3, 5, 5))
    prune(gm, Budget(flops=0.5), example_inputs=torch.randn(1, 3, 5, 5))
    assert network_meta(gm)["inputs"].args[0].shape == (1, 3, 5, 5)
    image = torch.randn(1, 3, 5, 5)
    assert torch.allclose(lower(gm, tune=None)(image), gm.eval()(image), atol=1e-6)
