"""trace_parts: what does not trace whole keeps its own forward, and its traceable parts do bit for bit the same."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.errors import InputError, TraceError
from dspfx.graph.parts import put_parts, trace_parts, why_untraced
from dspfx.graph.traced import TracedModule, network_meta, parts_of
from tests.compare import fingerprint, gradients, leaves, run, same, unchanged
from tests.nets.parts import conv_bn_relu
from tests.nets.untraceable import Backbone, BoxHead, DenseHead, Detector, Refiner


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes or ((16, 16), (12, 20))]


def batch(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 16, 16), generator=torch.Generator().manual_seed(2))


def reasons(network: nn.Module) -> dict[str, str]:
    found: dict[str, str] = network_meta(network)["untraced"]
    return found


def test_a_model_that_traces_is_traced_whole() -> None:
    network = trace_parts(Backbone(), batch())
    assert isinstance(network, TracedModule)
    assert isinstance(network, Backbone)
    assert list(parts_of(network)) == [""]


def test_a_loop_on_values_keeps_its_parts() -> None:
    model = Refiner()
    before = fingerprint(model)
    network = trace_parts(model, batch())
    assert unchanged(before, fingerprint(model))
    assert type(network) is Refiner
    assert list(parts_of(network)) == ["stem", "body", "head"]
    assert list(reasons(network)) == [""]
    assert "if float(x.detach().mean()) < 1e-6:" in reasons(network)[""]
    assert why_untraced(network, "last") == reasons(network)[""]
    for training in (True, False):
        for x in (batch(), batch(5, 3, 24, 32)):
            model.train(training)
            network.train(training)
            assert same(run(network, (x,)), run(model, (x,)))
    ours, theirs = (gradients(m.train(), (batch(),)) for m in (network, model))
    assert list(ours) == list(theirs)
    assert same(ours.values(), theirs.values())


def test_a_part_called_at_several_scales_knows_its_work() -> None:
    parts = parts_of(trace_parts(Refiner(), batch()))
    assert parts["head"].meta["inputs"].args[0].shape == (2, 8, 16, 16)
    assert parts["head"].meta["work"] == 1 + 1 / 4 + 1 / 16
    assert parts["stem"].meta["work"] == 1
    assert parts["body"].meta["work"] == 3


def test_a_detector_finds_and_learns_as_before() -> None:
    model = Detector()
    network: Any = trace_parts(model, images())
    parts = parts_of(network)
    assert {name: type(part).__mro__[3] for name, part in parts.items()} == {
        "backbone": Backbone,
        "head": DenseHead,
        "box_head": BoxHead,
    }
    assert network.backbone.out_channels == 8
    targets = [torch.tensor(0), torch.tensor(2)]
    for pictures in (images(), images((20, 28), (24, 16)), images((9, 9))):
        model.eval()
        network.eval()
        assert same(leaves(network(pictures)), leaves(model(pictures)))
        model.train()
        network.train()
        losses, expected = network(pictures, targets[: len(pictures)]), model(pictures, targets[: len(pictures)])
        assert same(losses.values(), expected.values())
    for m in (model, network):
        m.zero_grad()
        sum(m(images(), targets).values()).backward()
    ours, theirs = ({n: p.grad for n, p in m.named_parameters()} for m in (network, model))
    assert list(ours) == list(theirs)
    assert same(ours.values(), theirs.values())
    assert all(grad is not None for grad in ours.values())


def test_no_detections_are_a_batch_of_two() -> None:
    model = Detector(threshold=1e9).eval()
    network = trace_parts(model, images())
    part = parts_of(network)["box_head"]
    assert part.meta["inputs"].args[0].shape == (2, 8, 4, 4)
    assert part.meta["work"] == 1
    assert same(leaves(network(images())), leaves(model(images())))


def test_the_state_dict_fits_both_ways_and_copies_are_whole() -> None:
    model = Detector()
    network = trace_parts(model, images())
    assert list(network.state_dict()) == list(model.state_dict())
    other = Detector()
    network.load_state_dict(other.state_dict(), strict=True)
    twin = copy.deepcopy(network).eval()
    assert list(parts_of(twin)) == list(parts_of(network))
    assert network_meta(twin)["untraced"] == reasons(network)
    assert same(leaves(twin(images())), leaves(other.eval()(images())))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in network.parameters()}


def test_traced_parts_are_only_copied() -> None:
    network = trace_parts(Refiner(), batch())
    twin = trace_parts(network)
    assert twin is not network
    assert list(parts_of(twin)) == list(parts_of(network))


def test_parts_are_put_in_again_without_a_run() -> None:
    model = Detector()
    inputs = {name: part.meta["inputs"] for name, part in parts_of(trace_parts(model, images())).items()}
    network = put_parts(model, inputs).eval()
    assert list(parts_of(network)) == list(inputs)
    assert same(leaves(network(images())), leaves(model.eval()(images())))
    with pytest.raises(TraceError, match=r"^Refiner has no submodule 'backbone' to trace: .*\.$"):
        put_parts(Refiner(), inputs)


def test_two_images_in_a_list_are_guessed() -> None:
    inputs = network_meta(trace_parts(Detector()))["inputs"]
    assert [x.shape for x in inputs.args[0]] == [(3, 32, 512)] * 2
    assert all(x.is_meta for x in inputs.args[0])
    (image_batch,) = network_meta(trace_parts(Refiner()))["inputs"].args
    assert image_batch.shape == (2, 3, 224, 224)


class Strict(Refiner):
    """Control flow on values, and a demand on the input that no fake tensor meets first."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.detach().sum()) == 0.0 or x.shape[2] != 10:
            raise ValueError(f"no image of height {x.shape[2]}")
        return super().forward(x)


def test_inputs_that_the_model_refuses() -> None:
    message = (
        r"^Strict does not run on example inputs of shape \[\(2, 3, 16, 16\)\]: ValueError: no image of height 16\. "
        r"Give example_inputs that the model accepts\.$"
    )
    model = Strict()
    before = fingerprint(model)
    with pytest.raises(InputError, match=message):
        trace_parts(model, batch())
    message = (
        r"^no example inputs were given, and Strict runs on none of those that its first layer suggests \(lists and "
        r"batches of images\)\. Call again with example_inputs=\.\.\. that the model accepts; the first guess failed "
        r"so: Strict does not run on example inputs of shape \[\(3, 32, 512\), \(3, 32, 512\)\]: .*$"
    )
    with pytest.raises(InputError, match=message):
        trace_parts(model)
    assert unchanged(before, fingerprint(model))
    assert list(parts_of(trace_parts(model, batch(2, 3, 10, 16)))) == ["stem", "body", "head"]


class Around(nn.Module):
    """What the cases below have in common: control flow on values around `first` and `second`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 8))
        self.second = nn.Sequential(conv_bn_relu(8, 8), conv_bn_relu(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.after(x if float(x.detach().sum()) > 0 else -x)

    def after(self, x: Tensor) -> Tensor:
        return self.second(x)


class Lone(Around):
    """Nothing but lone layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)  # type: ignore[assignment]


class SharedLayer(Around):
    """A convolution inside of `second` that the model also calls itself."""

    def after(self, x: Tensor) -> Tensor:
        return self.second(x) + self.second.get_submodule("0.0")(x)


class ReadsAWeight(Around):
    """A weight inside of `second` that the model also reads itself."""

    def after(self, x: Tensor) -> Tensor:
        return self.second(x) * self.second.get_parameter("1.0.weight").abs().sum()


class AsksForTheType(Around):
    """Reads no weight, only its dtype."""

    def after(self, x: Tensor) -> Tensor:
        return self.second(x.to(self.second.get_parameter("1.0.weight").dtype))


class TiedWeight(Around):
    """One parameter in both parts."""

    def __init__(self) -> None:
        super().__init__()
        self.second.get_submodule("0.0").weight = self.first.get_parameter("1.0.weight")


class Hidden(Around):
    """The model reaches `second` through a list that torch does not look into."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.second]

    def after(self, x: Tensor) -> Tensor:
        return self.hidden[0](x)


class Alias(Around):
    """`second` under two names, called by the later one."""

    def __init__(self) -> None:
        super().__init__()
        self.third = self.second

    def after(self, x: Tensor) -> Tensor:
        return self.third(x)


class TwoKinds(Around):
    """`second` with images and with single ones."""

    def after(self, x: Tensor) -> Tensor:
        return self.second(x) + torch.stack([self.second(one.relu()[None])[0] for one in x])


class ThreeAxes(Around):
    """`second` with batches and with single images."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))

    def after(self, x: Tensor) -> Tensor:
        return self.second(x) + torch.stack([self.second(one) for one in x])


class SizeBranch(nn.Module):
    """A branch on the size around two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Sequential(conv_bn_relu(8, 8), conv_bn_relu(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if x.shape[2] > 20:
            x = F.max_pool2d(x, 2)
        return self.two(x)


class Branching(Around):
    """`second` branches on its size."""

    def __init__(self) -> None:
        super().__init__()
        self.second = SizeBranch()  # type: ignore[assignment]


class Meta(nn.Sequential):
    """An attribute whose name torch.fx needs."""

    meta = "mine"


class Named(Around):
    """The name is read by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Meta(conv_bn_relu(8, 8), conv_bn_relu(8, 8))

    def after(self, x: Tensor) -> Tensor:
        return self.second(x) if self.second.meta == "mine" else x


def twice(module: nn.Sequential, x: Tensor) -> Tensor:
    """Another forward for a Sequential."""
    for layer in module:
        x = layer(x)
    return x * 2


class Replaced(Around):
    """A forward of the instance's own."""

    def __init__(self) -> None:
        super().__init__()
        self.second.forward = types.MethodType(twice, self.second)  # type: ignore[method-assign]


CASES: dict[type[Around], tuple[list[str], str]] = {
    AsksForTheType: (["first", "second"], ""),
    Alias: (["first", "second"], ""),
    SharedLayer: (["first", "second.1"], "Sequential is no part by itself: 0.0 is used from outside of it, too."),
    ReadsAWeight: (["first", "second.0"], "Sequential is no part by itself: 1.0.weight is used from outside of it, "),
    TiedWeight: (["first.0", "second.1"], "Sequential is no part by itself: 0.0.weight is used from outside of it, "),
    Hidden: (["first"], "Sequential does not work as a graph: the model reaches it by another way than its attribute."),
    TwoKinds: (["first", "second"], ""),
    ThreeAxes: (["first"], "Sequential cannot be traced by itself: its calls differ in the kind of their arguments."),
    Branching: (["first", "second.one", "second.two"], "SizeBranch does not work as a graph: InputError: "),
    Named: (["first", "second.0", "second.1"], "Meta cannot be traced: its attribute 'meta' has a name that torch.fx "),
    Replaced: (["first", "second.0", "second.1"], "Sequential cannot be traced: its forward was replaced on the "),
}


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_what_can_be_a_part(kind: type[Around]) -> None:
    names, reason = CASES[kind]
    model = kind()
    before = fingerprint(model)
    network = trace_parts(model, batch())
    assert unchanged(before, fingerprint(model))
    found = set(parts_of(network))
    assert set(names) <= found
    assert all(name in names or name.count(".") for name in found)
    assert reasons(network).get("second", "").startswith(reason)
    assert bool(reason) == ("second" in reasons(network))
    for x in (batch(), batch(3, 3, 40, 24)):
        assert same(run(network, (x,)), run(model, (x,)))


def test_lone_layers_are_no_parts() -> None:
    with pytest.raises(TraceError, match=r"^Lone cannot be traced at .*float\(x\.detach\(\)\.sum\(\)\) > 0"):
        trace_parts(Lone(), batch())


def test_models_without_values_are_traced_whole_or_not_at_all() -> None:
    with pytest.raises(TraceError, match=r"^Refiner cannot be traced at "):
        trace_parts(Refiner().to("meta"), torch.empty(2, 3, 16, 16, device="meta"))


def test_the_nearest_reason_is_given() -> None:
    network = trace_parts(SharedLayer(), batch())
    assert why_untraced(network, "second.0.0") == reasons(network)["second.0"]
    assert why_untraced(network, "second.1.5") == reasons(network)["second"]
    assert why_untraced(network, "nowhere") == reasons(network)[""]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_torchvisions_detectors(name: str) -> None:
    import torchvision

    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    network = trace_parts(model)
    expected = ["backbone", "head"] if name.startswith("ssd") else ["backbone", "rpn.head", "roi_heads.box_head"]
    assert set(expected) <= set(parts_of(network))
    pictures = [torch.rand(3, 180, 240), torch.rand(3, 200, 160)]
    boxes = torch.tensor([[10.0, 10.0, 90.0, 80.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])}, {"boxes": boxes + 9, "labels": torch.tensor([2])}]
    model.eval()
    network.eval()
    assert same(leaves(network(pictures)), leaves(model(pictures)))
    losses = []
    for m in (model.train(), network.train()):
        torch.manual_seed(3)
        found = m(pictures, targets)
        sum(found.values()).backward()
        losses.append([*found.values(), *(p.grad for p in m.parameters())])
    assert same(losses[0], losses[1])
