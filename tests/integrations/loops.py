"""A tiny network, its data, and the plain loop that every other loop is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import dspfx
from dspfx.modules import GatedLayer

STEPS = 4
Make = Callable[[nn.Module], torch.optim.Optimizer]


class Tiny(nn.Module):
    """Two gated convolutions, a batch norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x)))
        return self.head(F.relu(self.c(F.relu(self.b(x)))).mean((2, 3)))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.randint(4, (4,), generator=generator)


def samples(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    """The images of `batch(0)`, `batch(1)`, ... one by one, for data loaders that make batches of four."""
    return [pair for seed in range(steps) for pair in zip(*batch(seed), strict=True)]


def loader(data: list[tuple[Tensor, Tensor]] | None = None) -> DataLoader[Any]:
    """Batches of four in their order."""
    return DataLoader(cast(Any, data or samples()), batch_size=4)


def prepared() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return dspfx.prepare(Tiny(), batch(0)[0])


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def plain(
    gm: Any,
    make: Make = sgd,
    steps: int = STEPS,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    autocast: torch.dtype | None = None,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    learn: bool = True,
    total_steps: int | None = None,
) -> dict[str, Any]:
    """`steps` batches in a loop of plain PyTorch; returns the learner's state."""
    optimizer = make(gm)
    scheduler = schedule(optimizer) if schedule else None
    learner = dspfx.GroupLearner(gm, optimizer, total_steps or steps // accumulate) if learn else None
    gm.train()
    for step in range(steps):
        x, y = batch(step)
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            output = gm(x)
        (F.cross_entropy(output.float(), y) / accumulate).backward()
        if (step + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(gm.parameters(), clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
    if learner is None:
        return {}
    learner.close()
    return learner.state_dict()


def tensors(gm: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in gm.state_dict().items()}


def assert_same(left: nn.Module, right: nn.Module) -> None:
    """Every weight, statistic and logit, bit for bit; and it was learned, so that the comparison means something."""
    assert any(m.is_learned for m in left.modules() if isinstance(m, GatedLayer))
    expected, found = tensors(left), tensors(right)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def assert_close(left: nn.Module, right: nn.Module, tolerance: float) -> None:
    """Every weight, statistic and logit, to `tolerance` of the tensor's largest value."""
    found = tensors(right)
    for key, value in tensors(left).items():
        scale = float(value.abs().max()) if value.is_floating_point() else 0.0
        assert float((value.double() - found[key].double()).abs().max()) <= tolerance * max(scale, 1e-3), key


def assert_same_state(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Two learner states, bit for bit."""
    assert left["steps"] == right["steps"] > 0
    assert torch.equal(left["generator"], right["generator"])
    assert left["layers"].keys() == right["layers"].keys()
    for name, layer in left["layers"].items():
        for key, value in layer.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right["layers"][name][key])), (name, key)
