"""Liveness against brute force: channels are perturbed in a running network, and what it says must be what happens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dspfx.graph.analyse import analyse
from dspfx.graph.channels import ChannelGraph, Step
from dspfx.graph.layers import Layer
from dspfx.graph.liveness import Liveness, Reads, liveness, unique_rows
from dspfx.graph.trace import trace
from dspfx.graph.traced import TracedModule
from tests.compare import leaves
from tests.nets.residual import SliceAndPad, Sum
from tests.zoo import ZOO

SPARSE = (
    *("plain", "resnet_projection", "resnet_padded", "inverted_residual", "depth_multiplier", "squeeze_excite"),
    *("preactivation", "three_way_sum", "subtract_and_multiply", "dense_block", "inception", "unequal_split"),
    *("doubled_concat", "padded_average", "conv_options", "affine", "shared_conv", "unet", "global_mean", "rolled"),
)


def sparse(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode with whole filters, whole inputs and single kernels at zero."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.data
            for share, shape in ((0.35, (len(weight), 1, 1, 1)), (0.35, (1, weight.shape[1], 1, 1))):
                weight *= torch.rand(shape, generator=generator) > share
            weight *= torch.rand(*weight.shape[:2], 1, 1, generator=generator) > 0.3
            if module.bias is not None:
                module.bias.data *= torch.rand(len(weight), generator=generator) > 0.5
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean *= torch.rand(module.num_features, generator=generator) > 0.5  # type: ignore[operator]
            module.bias.data *= torch.rand(module.num_features, generator=generator) > 0.5
            module.weight.data *= torch.rand(module.num_features, generator=generator) > 0.1
    return model


def read_of(gm: nn.Module, step: Step) -> Reads:
    return Reads.of_weight(step, gm.get_parameter(f"{step.name}.weight"))


def understand(model: nn.Module, *inputs: Tensor) -> tuple[TracedModule, ChannelGraph, Liveness]:
    gm = trace(model, inputs)
    channels = analyse(gm)
    reads = {step.name: read_of(gm, step) for step in channels.steps if step.kind == "conv"}
    return gm, channels, liveness(channels, reads, gm)


class Watch(fx.Interpreter):
    """Runs a graph; notes every value and may add noise to some channels of one node's output."""

    def __init__(self, gm: TracedModule, node: fx.Node | None = None, channels: Tensor | None = None) -> None:
        super().__init__(gm)
        self.node, self.channels = node, channels
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n is self.node and self.channels is not None:
            value = value.clone()
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(7), dtype=value.dtype)
            value[:, self.channels] += 10 * noise[:, self.channels]
        self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def outputs(gm: TracedModule, inputs: tuple[Tensor, ...], node: fx.Node, channels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return leaves(Watch(gm, node, channels).run(*inputs))


def watched(channels: ChannelGraph) -> list[Step]:
    """Steps whose output is one vector of channels along dimension 1."""
    found = []
    for step in channels.steps:
        value = step.node.meta["val"]
        if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == len(step.out):
            found.append(step)
    return found


@pytest.mark.parametrize("name", SPARSE)
def test_constants_are_constant_and_what_is_not_needed_changes_nothing(name: str) -> None:
    entry = ZOO[name]
    inputs = [entry.inputs(2, dtype=torch.float64, seed=seed) for seed in range(3)]
    gm, channels, live = understand(sparse(entry.build()), *inputs[0])
    runs = []
    for given in inputs:
        watch = Watch(gm)
        with torch.no_grad():
            expected = leaves(watch.run(*given))
        runs.append(watch.values)
    constants = unneeded = 0
    for step in watched(channels):
        said = live.values[step.out]
        constant = (~said.isnan()).nonzero().flatten()
        constants += len(constant)
        for values in runs:
            seen = values[step.node].transpose(0, 1).flatten(1)[constant]
            assert torch.allclose(seen, said[constant, None].expand_as(seen), rtol=1e-12, atol=1e-12), step.node
        # A constant may go because what is made of it is zero, which noise would hide: only what varies is perturbed.
        idle = (~live.needed[step.out] & said.isnan()).nonzero().flatten()
        unneeded += len(idle)
        if len(idle):
            for a, b in zip(expected, outputs(gm, inputs[-1], step.node, idle), strict=True):
                assert torch.allclose(a, b, rtol=1e-11, atol=1e-11), f"{step.node}: channels {idle.tolist()}"
    assert constants > 0
    assert unneeded > 0


def chain() -> nn.Module:
    return nn.Sequential(
        *[nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.SiLU()],
        *[nn.Conv2d(10, 12, 3, padding=1, groups=1), nn.SiLU(), nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.SiLU()],
        *[nn.Conv2d(12, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)],
    )


def residual() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(8, 10, 3, padding=1), nn.SiLU(), nn.Conv2d(10, 8, 3, padding=1))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Sum(body, act=F.silu), nn.Conv2d(8, 6, 1))


def padded() -> nn.Module:
    body = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(12, 12, 3, padding=1))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Sum(body, SliceAndPad(4), F.silu), nn.Conv2d(12, 6, 1))


class Excited(nn.Module):
    """A gate a channel, of activations that are nowhere flat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tail = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.down, self.up = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        return self.tail(x * torch.sigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1))))))


class Concatenated(nn.Module):
    """Two producers, one of them read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 7, 1)
        self.tail = nn.Conv2d(17, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.silu(self.a(x)), F.silu(self.b(x))
        return self.tail(torch.cat([a, b, -a], 1))


@pytest.mark.parametrize("build", [chain, residual, padded, Excited, Concatenated])
def test_every_channel_whose_change_nobody_sees_is_found(build: Callable[[], nn.Module]) -> None:
    """What varies is needed exactly where perturbing it alone changes an output; what is zero is known to be."""
    torch.manual_seed(1)
    model = sparse(build(), seed=2)
    inputs = (torch.randn(2, 3, 6, 6, dtype=torch.float64),)
    gm, channels, live = understand(model, *inputs)
    watch = Watch(gm)
    with torch.no_grad():
        expected = leaves(watch.run(*inputs))
    values, found = watch.values, 0
    for step in watched(channels):
        for index in range(len(step.out)):
            got = outputs(gm, inputs, step.node, torch.tensor([index]))
            is_seen = any(bool((a - b).abs().max() > 1e-9) for a, b in zip(expected, got, strict=True))
            is_zero = bool(values[step.node][:, index].abs().max() < 1e-12)
            value, is_needed = float(live.values[step.out[index]]), bool(live.needed[step.out[index]])
            assert (value == 0) == is_zero, f"{step.node} channel {index}"
            if value != value:
                assert is_needed == is_seen, f"{step.node} channel {index}"
            found += not is_seen
    assert found > 0


@pytest.mark.parametrize("name", ["resnet_padded", "inverted_residual", "dense_block", "shuffle_unit", "unequal_split"])
def test_removable_classes_are_whole_and_unpinned(name: str) -> None:
    entry = ZOO[name]
    _, channels, live = understand(sparse(entry.build()), *entry.inputs(dtype=torch.float64))
    removable = live.removable(channels)
    assert bool(removable.any())
    assert not bool((removable & channels.pinned()).any())
    assert not bool((removable & live.needed).any())
    assert torch.equal(removable, removable[channels.root])


def test_a_dead_filter_is_zero_when_pruning_and_its_bias_when_lowering() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    gm = trace(model, torch.zeros(1, 3, 4, 4))
    channels = analyse(gm)
    steps = {step.name: step for step in channels.steps if step.name}
    with torch.no_grad():
        gm.get_parameter("0.weight")[1] = 0
        gm.get_parameter("0.bias")[:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    reads = {name: read_of(gm, steps[name]) for name in ("0", "2", "4")}
    exact, planned = liveness(channels, reads, gm), liveness(channels, reads)
    assert float(exact.values[steps["0"].out[1]]) == 2.0
    assert float(planned.values[steps["0"].out[1]]) == 0.0
    assert bool(exact.needed[steps["0"].out[1]])  # its bias reaches the next layer
    assert not bool(planned.needed[steps["0"].out[1]])


def test_rows_are_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(40, 9, generator=generator) > 0.5
    matrix = torch.cat([matrix, matrix.flip(0), torch.zeros(2, 9, dtype=torch.bool)])
    keep, row = unique_rows(matrix)
    assert torch.equal(keep[row], matrix)
    assert len({tuple(r) for r in matrix.tolist()}) == len(keep)
    assert row.unique_consecutive()[0] == 0
    layer = Layer("one", "Conv2d", "conv")
    step = Step("conv", fx.Graph().placeholder("x"), torch.arange(len(matrix)), (torch.arange(9),), layer)
    read = Reads.of_weight(step, matrix.double()[:, :, None, None])
    assert torch.equal(read.pairs(), matrix)
    assert (read.row == -1).tolist() == (~matrix.any(1)).tolist()
    assert copy.copy(Reads.dense(3, 2)).pairs().all()
