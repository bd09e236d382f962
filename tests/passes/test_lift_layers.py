"""lift_layers: functional, frozen and parametrized layers become torch's own modules; outputs equal, nothing left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from dspfx.graph.layers import FUNCTIONAL
from dspfx.graph.trace import trace
from dspfx.graph.traced import TracedModule, eval_only
from dspfx.passes.lift_layers import lift_layers
from dspfx.pipeline import lower
from tests.compare import error, run
from tests.graph.test_layers import Functions, Tied


class Standardised(nn.Conv2d):
    """A convolution over standardised filters (arXiv 1903.10520)."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        spread = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(input, (self.weight - mean) / (spread + 1e-5), self.bias, self.stride, self.padding)


def lifted(model: nn.Module, image: Tensor) -> TracedModule:
    model = model.double().eval()
    gm = lift_layers(eval_only(trace(model, image.double())))
    gm.graph.lint()
    inputs = (torch.randn(3, *image.shape[1:], dtype=torch.float64),)
    assert error(run(model, inputs), run(gm, inputs)) < 1e-14
    assert not any(node.target in FUNCTIONAL for node in gm.graph.nodes)
    return gm


def test_functional_layers_become_modules() -> None:
    gm = lifted(Functions(), torch.zeros(2, 3, 9, 9))
    kinds = [type(gm.get_submodule(str(n.target))) for n in gm.graph.nodes if n.op == "call_module"]
    expected = [nn.Conv2d, nn.Conv2d, nn.GroupNorm, nn.ConvTranspose2d, nn.BatchNorm2d, nn.Conv2d, nn.InstanceNorm2d]
    assert kinds == [*expected, nn.LayerNorm, nn.Linear]
    read = {f"{n.target}." for n in gm.graph.nodes if n.op == "call_module"}
    assert all(any(name.startswith(r) for r in read) for name in gm.state_dict())


def test_computed_weights_are_computed_once() -> None:
    model = nn.Sequential(Standardised(3, 6, 3, padding=1), nn.ReLU(), Standardised(6, 4, 1, bias=False))
    gm = lifted(model, torch.zeros(2, 3, 5, 5))
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "call_module", "call_module", "call_module", "output"]
    assert all(p.requires_grad for p in gm.parameters())


def test_parametrized_layers() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    gm = lifted(nn.Sequential(normed, nn.ReLU()), torch.zeros(2, 3, 5, 5))
    assert [type(m) for m in gm.children()] == [nn.Conv2d, nn.ReLU]
    assert {name: p.requires_grad for name, p in gm.named_parameters()} == {"0.weight": True, "0.bias": True}


class Frozen(nn.Module):
    """A norm that never trains, as a function, behind one that is torchvision's."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.frozen, self.body = nn.Conv2d(3, 6, 1), FrozenBatchNorm2d(6), nn.Conv2d(6, 6, 1)
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)
        for buffer in self.frozen.buffers():
            buffer.uniform_(0.5, 1.5)
        self.tail = nn.Conv2d(6, 2, 1)
        with torch.no_grad():
            self.stem.weight[:2], self.stem.bias[:2] = 0, 0  # type: ignore[index]
            self.tail.weight[:, 4:] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.frozen(self.stem(x))))
        return self.tail(F.batch_norm(x, self.mean, self.var))


@pytest.mark.parametrize("fold", [True, False])
def test_frozen_norms_lose_channels_and_stay_frozen(fold: bool) -> None:
    model = Frozen().double()
    small = lower(model, torch.zeros(2, 3, 5, 5, dtype=torch.float64), fold=fold, tune=None)
    assert small.get_parameter("body.weight").shape[0] == 4
    inputs = (torch.randn(4, 3, 5, 5, dtype=torch.float64),)
    for training in (False, True):
        assert error(run(model.train(training), inputs), run(small.train(training), inputs)) < 1e-13


def test_shared_weights_stay_shared() -> None:
    model = Tied().double().eval()
    with torch.no_grad():
        model.one.weight[:2], model.one.weight[:, :2] = 0, 0  # one weight, so one class for all that it carries
        model.one.bias[:2], model.two.bias[:2] = 0, 0  # type: ignore[index]
    small = lower(model, torch.zeros(2, 3, 5, 5, dtype=torch.float64), tune=None)
    inputs = (torch.randn(3, 3, 7, 7, dtype=torch.float64),)
    assert error(run(model, inputs), run(small, inputs)) < 1e-13
    one, two, back = (small.get_parameter(f"{n}.weight") for n in ("one", "two", "conv_transpose2d_transposed_layer"))
    assert one is two is back
    assert one.shape == (4, 4, 3, 3)
