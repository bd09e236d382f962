"""Costs: arithmetic on a tiny network, and fvcore's own counts layer by layer on real ones."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dspfx.graph.cost import LayerCost, layer_costs
from dspfx.graph.trace import trace
from tests.zoo import ZOO

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v2": torchvision.models.mobilenet_v2,
    "densenet121": torchvision.models.densenet121,
}
NOT_COMPARED = {
    "conv_options",  # fvcore has no count for convolutions with padding="same"
    "single_conv",  # the network is itself the layer, and traced as a function
    # Layers that are no modules: test_functional_layers_cost_what_modules_do.
    *("functional_layers", "tied_autoencoder", "raw_parameters"),
}


class Tiny(nn.Module):
    """Strided, dilated, grouped, depthwise and transposed convolutions, one called twice, linear on a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.dilated = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(8, 16, 1, groups=4)
        self.depthwise = nn.Conv2d(16, 32, (1, 3), padding=(0, 1), groups=16)
        self.transposed = nn.ConvTranspose2d(32, 6, 2, stride=2, groups=2)
        self.linear = nn.Linear(6, 5)
        self.only_in_training = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.strided(x)
        x = self.dilated(self.dilated(x))
        x = self.transposed(self.depthwise(self.grouped(x)))
        x = self.linear(x.flatten(2).transpose(1, 2))
        return self.only_in_training(x) if self.training else x


def test_costs_are_the_arithmetic_of_the_layers() -> None:
    found = layer_costs(trace(Tiny(), torch.zeros(2, 3, 12, 8)))
    large, small = 12 * 8, 6 * 4
    assert found == {
        "strided": LayerCost(8, 3, 9 * small, 9, 3 * large, ((2, 3, 12, 8),)),
        "dilated": LayerCost(8, 8, 2 * 9 * small, 9, 8 * small, ((2, 8, 6, 4),) * 2),
        "grouped": LayerCost(16, 8 // 4, small, 1, 8 * small, ((2, 8, 6, 4),)),
        "depthwise": LayerCost(32, 1, 3 * small, 3, 16 * small, ((2, 16, 6, 4),)),
        "transposed": LayerCost(6, 32 // 2, 4 * small, 4, 32 * small, ((2, 32, 6, 4),)),
        "linear": LayerCost(5, 6, large, 1, 6 * large, ((2, 96, 6),)),
    }
    assert found["dilated"].macs == 2 * 8 * 8 * 9 * small
    assert found["depthwise"].macs == 32 * 3 * small
    assert found["transposed"].params == 32 * 3 * 4


def test_costs_hold_for_one_image_whatever_the_batch_and_the_mode() -> None:
    one, five, two = (
        {name: dataclasses.replace(cost, input_shapes=()) for name, cost in layer_costs(trace(tiny, images)).items()}
        for tiny, images in (
            (Tiny(), torch.zeros(1, 3, 12, 8)),
            (Tiny(), torch.zeros(5, 3, 12, 8)),
            (Tiny().eval(), torch.zeros(2, 3, 12, 8)),
        )
    )
    assert one == five == two


def fvcore_counts(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int]:
    """fvcore's FLOPs of every convolution and linear layer that it saw called."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model.eval(), inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    layers = {name for name, m in model.named_modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))}
    return {name: int(count) for name, count in analysis.by_module().items() if name in layers and count}


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_networks_cost_what_fvcore_counts(name: str) -> None:
    model, image = NETWORKS[name](), torch.zeros(1, 3, 64, 64)
    found = {layer: cost.macs for layer, cost in layer_costs(trace(model, image)).items()}
    assert found == fvcore_counts(model, (image,))


@pytest.mark.parametrize("name", [name for name in ZOO if name not in NOT_COMPARED])
def test_the_zoo_costs_what_fvcore_counts(name: str) -> None:
    model, inputs = ZOO[name].build(), ZOO[name].inputs(batch=1)
    found = {layer: cost.macs for layer, cost in layer_costs(trace(model, inputs)).items()}
    assert found == fvcore_counts(model, inputs)


class Bare(nn.Module):
    """A convolution and a linear layer over bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.matrix = nn.Parameter(torch.randn(6, 2, 3, 3)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.conv2d(x, self.kernel, padding=1, groups=2).mean((2, 3)), self.matrix)


def test_functional_layers_cost_what_modules_do() -> None:
    found = layer_costs(trace(Bare(), torch.zeros(2, 4, 5, 7)))
    assert found == {
        "kernel": LayerCost(6, 2, 9 * 35, 9, 4 * 35, ((2, 4, 5, 7),)),
        "matrix": LayerCost(5, 6, 1, 1, 6, ((2, 6),)),
    }
