"""fold_batchnorm: ops before and after, equal outputs, and what it has to leave alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dspfx.graph.trace import trace
from dspfx.graph.traced import TracedModule, eval_only
from dspfx.passes.fold_batchnorm import fold_batchnorm
from dspfx.pipeline import lower
from tests.compare import error, run
from tests.zoo import ZOO


def norms(gm: TracedModule) -> int:
    """Calls of batch norms."""
    called = [gm.get_submodule(str(n.target)) for n in gm.graph.nodes if n.op == "call_module"]
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in called)


def folded(model: nn.Module, *inputs: Tensor) -> tuple[int, int, float]:
    """(norms before, norms after, error)."""
    gm = eval_only(trace(model.double(), inputs))
    before = copy.deepcopy(gm)
    assert fold_batchnorm(gm) is gm
    gm.graph.lint()
    held = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in gm.modules())
    assert held <= norms(gm)
    return norms(before), norms(gm), error(run(before, inputs), run(gm, inputs))


# name -> (batch norms, those that stay: they follow something else than the only reading of one layer)
COUNTS = {
    "plain": (3, 0),
    "resnet_projection": (8, 0),
    "inverted_residual": (8, 0),
    "preactivation": (5, 3),
    "dense_block": (4, 4),
    "shared_conv": (4, 2),
    "functional_layers": (2, 0),
    "vgg_flatten": (0, 0),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str) -> None:
    before, after, difference = folded(ZOO[name].build(), *ZOO[name].inputs(3, dtype=torch.float64))
    assert (before, after) == COUNTS[name]
    assert difference < 1e-13


class ReadTwice(nn.Module):
    """The convolution's own output is read as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class SharedNorm(nn.Module):
    """One norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.norm(self.a(x))))


def hooked() -> nn.Module:
    conv = nn.Conv2d(3, 4, 1)
    conv.register_forward_hook(lambda module, args, out: out * 2)
    return nn.Sequential(conv, nn.BatchNorm2d(4))


def without_statistics() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))


def without_affine() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False))


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4))


@pytest.mark.parametrize(
    ("build", "counts"),
    [
        (ReadTwice, (1, 1)),
        (SharedNorm, (2, 2)),
        (hooked, (1, 1)),
        (without_statistics, (1, 1)),
        (without_affine, (1, 0)),
        (transposed, (1, 1)),
    ],
)
def test_what_is_left_alone(build: Callable[[], nn.Module], counts: tuple[int, int]) -> None:
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_()
            assert module.running_var is not None
            module.running_var.uniform_(0.5, 2)
    before, after, difference = folded(model, torch.randn(3, 3, 5, 5, dtype=torch.float64))
    assert (before, after) == counts
    assert difference < 1e-13


def test_linear_layers_are_folded_over_rows_only() -> None:
    rows = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    assert folded(rows, torch.randn(3, 5, dtype=torch.float64))[:2] == (1, 0)
    sequences = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(6))  # [N, 6, 4]: it normalises another axis
    assert folded(sequences, torch.randn(3, 6, 5, dtype=torch.float64))[:2] == (1, 1)


def test_a_norm_with_a_hook_keeps_doing_what_the_hook_does() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].register_forward_hook(lambda module, args, out: out + 1)
    x = torch.randn(2, 3, 5, 5)
    small = lower(model, x, tune=None)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-6)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in small.modules()) == 1
