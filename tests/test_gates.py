"""Gates on every kind of dense layer: convolutions of one to three dimensions, transposed ones, linear layers."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dspfx.config import Budget, GateConfig
from dspfx.learner import GroupLearner
from dspfx.modules import GATED, GatedLayer
from dspfx.pipeline import lower, prepare, prune
from tests.compare import error, gradients, run, same

KINDS = tuple(GATED)
each_kind = pytest.mark.parametrize("kind", KINDS)


def layer(kind: Any, channels: int, filters: int) -> Any:
    return kind(channels, filters) if kind is nn.Linear else kind(channels, filters, 1)


def image(kind: Any, batch: int, channels: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    rank = 0 if kind is nn.Linear else int(kind.__name__[-2])
    return torch.randn(batch, channels, *[4] * rank, generator=torch.Generator().manual_seed(batch), dtype=dtype)


def net(kind: Any) -> nn.Module:
    torch.manual_seed(0)
    widths = (5, 8, 12, 3)
    parts: list[nn.Module] = []
    for channels, filters in itertools.pairwise(widths):
        parts += [layer(kind, channels, filters), nn.ReLU()]
    return nn.Sequential(*parts[:-1]).double()


@each_kind
def test_a_gate_is_the_layer_over_its_own_parameters(kind: Any) -> None:
    plain = layer(kind, 5, 6).eval()
    gate = GatedLayer.gate(plain, 2)
    assert type(gate) is GATED[kind]
    assert gate.weight is plain.weight
    assert gate.bias is plain.bias
    assert (gate.filters, gate.channels, gate.gate_groups, gate.training) == (6, 5, 2, False)
    inputs = (image(kind, 3),)
    assert same(run(gate, inputs), run(plain, inputs))
    assert same(gradients(gate, inputs).values(), gradients(plain, inputs).values())
    back = gate.ungated()
    assert type(back) is kind
    assert list(back.state_dict()) == list(plain.state_dict())
    assert repr(back) == repr(plain)
    gate.load_state_dict(plain.state_dict(), strict=True)
    assert "gate_keep" not in plain._buffers


@each_kind
def test_what_a_gate_drops_are_its_filters_and_channels(kind: Any) -> None:
    gate = GatedLayer.gate(layer(kind, 5, 6), 2)
    gate.gate_group.copy_(torch.tensor([0, 0, 1, -1, 1, 0]))
    gate.gate_keep.copy_(torch.tensor([[True, False, True, True, False], [False, True, False, True, True]]))
    with torch.no_grad():
        gate.weight.masked_fill_(gate.dropped(), 0)
    weight = gate.by_filter(gate.weight)
    assert weight.shape == (6, 5, 1)
    for o in range(6):
        for c in range(5):
            group = int(gate.gate_group[o])
            assert bool(weight[o, c].any()) == (group >= 0 and bool(gate.gate_keep[group, c]))


@each_kind
def test_masked_equals_lowered(kind: Any) -> None:
    model = net(kind)
    x = image(kind, 2, dtype=torch.float64)
    gm = prepare(model, x, GateConfig(groups=2, linear=True))
    gates = [name for name, m in gm.named_modules() if isinstance(m, GatedLayer)]
    assert gates == ["2", "4"]
    plan = prune(gm, Budget(flops=0.5))
    assert plan.flops_left <= 0.5
    small = lower(gm)
    for batch in (1, 5):
        inputs = (image(kind, batch, dtype=torch.float64),)
        assert error(run(gm.eval(), inputs), run(small, inputs)) < 1e-13
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert not any(isinstance(m, GatedLayer) for m in small.modules())


class Fan(nn.Module):
    """The same numbers as a linear layer, as a 1x1 convolution, or as a transposed one."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        generator = torch.Generator().manual_seed(4)
        self.stem, self.body = (torch.randn(o, c, generator=generator).double() for o, c in ((8, 5), (6, 8)))
        self.first, self.second = layer(kind, 5, 8), layer(kind, 8, 6)
        for module, weight in ((self.first, self.stem), (self.second, self.body)):
            turned = weight.T if "Transpose" in kind.__name__ else weight
            module.weight = nn.Parameter(turned.reshape(module.weight.shape).clone())
            module.bias = nn.Parameter(torch.zeros(len(weight), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@each_kind
@pytest.mark.parametrize("mode", ["fused", "exact"])
def test_the_learner_learns_the_same_whatever_the_kind(kind: Any, mode: Any) -> None:
    """Against the two-dimensional convolution, whose steps tests/test_learner.py holds against autograd."""

    def learned(kind: Any) -> Tensor:
        points = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = points if kind is nn.Linear else points.reshape(7, 5, *[1] * int(kind.__name__[-2]))
        gm = prepare(Fan(kind), x, GateConfig(groups=2, linear=True, cost="params"))
        optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
        learner = GroupLearner(gm, optimizer, total_steps=4, strength=0.1, mode=mode, lr=0.01)

        def loss() -> Tensor:
            value: Tensor = gm(x).square().mean()
            return value

        for _ in range(4):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
            if mode == "exact":
                learner.step(loss)
        gate = gm.get_submodule("second")
        assert isinstance(gate, GatedLayer)
        return torch.cat([gate.gate_logits.flatten().double(), gate.by_filter(gate.weight.detach()).flatten()])

    assert error([learned(nn.Conv2d)], [learned(kind)]) < 1e-6  # logits are float32


def test_a_copy_of_a_gate_is_its_own() -> None:
    gate = GatedLayer.gate(nn.Conv1d(3, 4, 1), 2)
    twin = copy.deepcopy(gate)
    twin.gate_logits.fill_(1)
    assert not gate.is_learned
    assert twin.is_learned
    assert type(twin) is type(gate)
