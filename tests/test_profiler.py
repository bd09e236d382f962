"""Profile: counts written as arithmetic, fvcore's own totals, and a model that is left as it was."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dspfx
from dspfx.errors import InputError
from dspfx.graph.parts import trace_parts
from dspfx.profiler import LayerProfile, Profile, profile
from tests.nets.untraceable import Detector
from tests.zoo import ZOO


class Tiny(nn.Module):
    """A convolution, a norm, a parameter of the network's own, a functional and a real linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False))
        self.matrix = nn.Parameter(torch.ones(5, 4))
        self.linear = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        x = self.body(self.norm(self.conv(x))).flatten(2).sum(2)
        return {"logits": [self.linear(F.linear(x, self.matrix) + 1)]}


def test_counts_are_the_arithmetic_of_the_layers() -> None:
    found = profile(Tiny(), torch.zeros(6, 3, 10, 8))
    pixels = 5 * 4
    assert found.layers == (
        LayerProfile("", "Tiny", (), 5 * 4, 5 * 4),
        LayerProfile("conv", "Conv2d", (8, 3, 3, 3), 8 * 3 * 9 * pixels, 8 * 3 * 9 + 8),
        LayerProfile("norm", "BatchNorm2d", (8,), 2 * 8 * pixels, 8 + 8),
        LayerProfile("body.1", "Conv2d", (4, 8, 1, 1), 4 * 8 * pixels, 4 * 8),
        LayerProfile("linear", "Linear", (2, 5), 2 * 5, 2 * 5 + 2),
    )
    assert found.inputs == ((1, 3, 10, 8),)
    assert found.flops == sum(layer.flops for layer in found.layers)
    assert found.params == sum(layer.params for layer in found.layers)
    assert found.bytes == 4 * (found.params + 8 + 8) + 8  # float32, running statistics, one int64 batch counter
    assert found.uncounted == ("aten::add", "aten::sum")


def test_a_shared_layer_counts_its_calls_and_its_weights_once() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    (layer,) = profile(nn.Sequential(conv, nn.ReLU(), conv), torch.zeros(2, 4, 6, 6)).layers
    assert layer == LayerProfile("0", "Conv2d", (4, 4, 3, 3), 2 * 4 * 4 * 9 * 36, 4 * 4 * 9)


def test_a_convolution_with_named_padding_is_counted() -> None:
    named, numbered = (nn.Sequential(nn.Conv2d(3, 8, 3, padding=padding)) for padding in ("same", 1))
    image = torch.zeros(1, 3, 7, 7)
    assert profile(named, image) == profile(numbered, image)


def test_the_total_is_fvcores() -> None:
    from fvcore.nn import FlopCountAnalysis

    for name in ("resnet_bottleneck", "inverted_residual", "transposed", "siamese"):
        model, inputs = ZOO[name].build().eval(), ZOO[name].inputs(batch=1)
        expected = FlopCountAnalysis(model, inputs).unsupported_ops_warnings(False).total()
        assert profile(model, inputs).flops == expected


def test_prepared_counts_as_the_original_and_lowered_counts_less() -> None:
    model = ZOO["resnet_projection"].build()
    dense = profile(model, ZOO["resnet_projection"].inputs())
    gm = dspfx.prepare(model, ZOO["resnet_projection"].inputs())
    prepared = profile(gm)
    assert (prepared.flops, prepared.params, prepared.inputs) == (dense.flops, dense.params, dense.inputs)
    assert prepared.bytes > dense.bytes  # the gates
    dspfx.prune(gm, dspfx.Budget(flops=0.5))
    lowered = profile(dspfx.lower(gm))
    assert lowered.flops < dense.flops
    assert lowered.params < dense.params
    assert lowered.bytes < dense.bytes


def test_keywords_and_integers_reach_the_model() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 3)
            self.linear = nn.Linear(3, 2)

        def forward(self, index: Tensor, *, scale: float, bias: Tensor) -> Tensor:
            return self.linear(self.table(index)) * scale + bias

    inputs = dspfx.Inputs(torch.tensor([6, 1]), scale=2.0, bias=torch.ones(1))
    assert profile(Scaled(), inputs).flops == 2 * 3


def test_inputs_are_guessed_from_the_first_layer() -> None:
    assert profile(nn.Sequential(nn.Conv2d(3, 4, 1))).inputs == ((1, 3, 224, 224),)
    assert profile(nn.Sequential(nn.Linear(5, 4))).inputs == ((1, 5),)


def test_the_model_and_the_rng_are_left_as_they_were() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.norm(self.conv(x)), 0.5, training=True)

    model = Noisy()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    profile(model, torch.ones(2, 3, 8, 8))
    assert torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert model.conv.weight.grad is None


def test_it_prints_and_travels_as_json() -> None:
    found = profile(Tiny(), torch.zeros(1, 3, 10, 8))
    assert Profile.from_json(found.to_json()) == found
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "type", "weight", "FLOPs", "parameters"]
    assert lines[2].split() == ["(itself)", "Tiny", "20", "20"]
    assert lines[3].split() == ["conv", "Conv2d", "8x3x3x3", "4,320", "224"]
    assert lines[-2:] == [
        "5,310 FLOPs (multiply-adds, fvcore's convention), 304 parameters, 1,288 bytes, for an input of 1x3x10x8",
        "not counted: aten::add, aten::sum",
    ]


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=re.escape("Tiny does not run on example inputs of shape [(1, 5, 8, 8)]: ")):
        profile(Tiny(), torch.zeros(2, 5, 8, 8))


def test_a_detector_counts_one_image_of_a_list() -> None:
    model, images = Detector(threshold=1e9), [torch.zeros(3, 16, 16), torch.zeros(3, 12, 20)]
    found = profile(model, images)
    assert found.inputs == ((3, 16, 16),)
    stem = next(layer for layer in found.layers if layer.name == "backbone.stem.0.0")
    assert stem.flops == 8 * 3 * 9 * 16 * 16
    assert profile(trace_parts(model, images)).layers == found.layers
