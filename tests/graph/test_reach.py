"""How far a dead channel is followed: conv -> what is under test -> conv, widths by hand, outputs equal in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspfx.errors import ConfigError
from dspfx.graph.analyse import analyse
from dspfx.graph.ops import RULES, register_rule
from dspfx.graph.trace import trace
from dspfx.norms import SparseNorm
from dspfx.pipeline import lower
from tests.compare import error, run

DEAD = (0, 3)


class Between(nn.Module):
    """a (8 filters, `dead` ones zero) -> middle -> b, which does not read what comes of the dead ones."""

    def __init__(
        self, middle: nn.Module, width: int, dead: tuple[int, ...], unread: tuple[int, ...], rank: int = 4
    ) -> None:
        super().__init__()
        kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[rank]
        self.a, self.middle, self.b = kind(3, 8, 1), middle, kind(width, 4, 1)
        with torch.no_grad():
            self.a.weight[list(dead)], self.a.bias[list(dead)] = 0, 0
            self.b.weight[:, list(unread)] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self.a(x)))


class Function(nn.Module):
    """A function of the features and of one parameter."""

    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.gamma = nn.Parameter(torch.randn(shape)) if shape else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) if self.gamma is None else self.function(x, self.gamma)


def quiet(norm: Any, dead: tuple[int, ...] = DEAD) -> Any:
    """A norm as pruning leaves it: alive, without scale and shift where its input is dead."""
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.uniform_(-0.5, 1.0)
        norm.weight[list(dead)], norm.bias[list(dead)] = 0, 0
    return norm


class LastNorm(nn.Module):
    """LayerNorm over the channels of each pixel (ConvNeXt)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = quiet(nn.LayerNorm(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """A linear layer over the pixels, the same for every channel (MLP-Mixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(36, 36, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.flatten(2)).unflatten(2, (6, 6))


def grouped(dead: tuple[int, ...]) -> nn.Conv2d:
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=2)
    with torch.no_grad():
        conv.bias[[2 * c + i for c in dead for i in range(2)]] = 0  # type: ignore[index]
    return conv


def transposed() -> nn.ConvTranspose2d:
    conv = nn.ConvTranspose2d(8, 8, 2, stride=2)
    with torch.no_grad():
        conv.weight[:, [1, 5]], conv.bias[[1, 5]] = 0, 0  # type: ignore[index]
    return conv


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def radix(x: Tensor) -> Tensor:
    return x.view(x.shape[0], 2, 4, *x.shape[2:]).sum(1)


@dataclass(frozen=True)
class Case:
    """middle: what is under test; width: its channels; dead, unread: of a, of b; left: what a and b keep."""

    middle: Callable[[], nn.Module]
    width: int = 8
    dead: tuple[int, ...] = DEAD
    unread: tuple[int, ...] = DEAD
    left: tuple[int, int] = (6, 6)
    rank: int = 4


HALF = (0, 1, 2, 3)
CASES: dict[str, Case] = {
    "group norm": Case(lambda: quiet(nn.GroupNorm(2, 8))),
    "group norm, a group dead": Case(lambda: quiet(nn.GroupNorm(2, 8), HALF), 8, HALF, HALF, (4, 4)),
    "group norm of one group": Case(lambda: quiet(nn.GroupNorm(1, 8))),
    "group norm in one dimension": Case(lambda: quiet(nn.GroupNorm(4, 8)), rank=3),
    "layer norm": Case(LastNorm),
    "instance norm": Case(lambda: quiet(nn.InstanceNorm2d(8, affine=True))),
    "instance norm without scale": Case(lambda: nn.InstanceNorm2d(8)),
    "batch norm in one dimension": Case(lambda: quiet(nn.BatchNorm1d(8)), rank=3),
    "batch norm in three dimensions": Case(lambda: quiet(nn.BatchNorm3d(8)), rank=5),
    "pixel shuffle": Case(lambda: nn.PixelShuffle(2), 2, HALF, (0,), (4, 1)),
    "pixel shuffle, half a channel dead": Case(lambda: nn.PixelShuffle(2), 2, (0, 1), (), (8, 2)),
    "pixel unshuffle": Case(lambda: nn.PixelUnshuffle(2), 32, DEAD, (*range(4), *range(12, 16)), (6, 24)),
    "layer scale": Case(lambda: Function(torch.mul, 8, 1, 1)),
    "scale of four axes": Case(lambda: Function(torch.mul, 1, 8, 1, 1)),
    "viewed scale": Case(lambda: Function(lambda x, g: x * g.view(1, -1, 1, 1), 8)),
    "indexed scale": Case(lambda: Function(lambda x, g: g[:, None, None] * x, 8)),
    "scale a pixel": Case(lambda: Function(torch.mul, 6, 6)),
    "scale a pixel and channel": Case(lambda: Function(torch.mul, 8, 6, 6)),
    "one scale": Case(lambda: Function(torch.mul, 1)),
    "slopes": Case(lambda: nn.PReLU(8)),
    "functional slopes": Case(lambda: Function(F.prelu, 8)),
    "grouped, one group dead": Case(lambda: grouped(HALF), 16, HALF, tuple(range(8)), (4, 8)),
    "grouped, parts of groups dead": Case(lambda: grouped(DEAD), 16, DEAD, (), (8, 16)),
    "transposed": Case(transposed, 8, DEAD, (1, 5), (6, 6)),
    "channel shuffle": Case(lambda: Function(shuffled), 8, DEAD, (0, 6), (6, 6)),
    "channel shuffle twice": Case(lambda: nn.Sequential(Function(shuffled), nn.ReLU(), Function(shuffled)), unread=()),
    "channel shuffle module": Case(lambda: nn.ChannelShuffle(2), 8, DEAD, (0, 6), (6, 6)),
    "every second channel": Case(lambda: Function(lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1)), 8, DEAD, (0, 5)),
    "sum of two": Case(lambda: Function(radix), 4, (0, 4), (0,), (6, 3)),
    "tokens": Case(Tokens),
    "normalised": Case(lambda: Function(lambda x: F.pad(x, (1, 1)) * 2)),
    "padded with ones": Case(lambda: Function(lambda x: F.pad(x, (1, 1), value=1.0)), 8, DEAD, (), (8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_dead_channels_go_as_far_as_they_reach(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    model = Between(case.middle(), case.width, case.dead, case.unread, case.rank).double().eval()
    size = (6,) * (case.rank - 2)
    small = lower(model, torch.zeros(2, 3, *size, dtype=torch.float64), fold=False, tune=None)
    width = small.get_submodule("a").weight.shape[0], small.get_submodule("b").weight.shape[1]
    assert width == case.left
    for batch in (1, 5):
        inputs = (torch.randn(batch, 3, *size, dtype=torch.float64),)
        assert error(run(model, inputs), run(small, inputs)) < 1e-13


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d, nn.Linear])
def test_every_dense_layer_loses_both_sides(kind: Any) -> None:
    first, last = (kind(4, 6, 1), kind(6, 3, 1)) if kind is not nn.Linear else (kind(4, 6), kind(6, 3))
    model = nn.Sequential(first, nn.ReLU(), last).double().eval()
    filters = 1 if "Transpose" in kind.__name__ else 0
    with torch.no_grad():
        first.weight.select(filters, 2).zero_()
        first.bias[2] = 0
    shape = (2, 4, *[5] * (first.weight.dim() - 2))
    small = lower(model, torch.zeros(shape, dtype=torch.float64), tune=None)
    assert [small.get_parameter(f"{i}.weight").shape[filters] for i in (0, 2)] == [5, 3]
    inputs = (torch.randn(shape, dtype=torch.float64),)
    assert error(run(model, inputs), run(small, inputs)) < 1e-14


@pytest.mark.parametrize(("groups", "dead"), [(1, (2,)), (4, (0, 1, 5)), (2, (0, 1, 2, 3))])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_sparse_norm_is_the_norm_of_what_was_there(groups: int, dead: tuple[int, ...], scale: float) -> None:
    norm = quiet(nn.GroupNorm(groups, 8), dead).double()
    kept = [c for c in range(8) if c not in dead]
    x = torch.randn(3, 8, 4, 5, dtype=torch.float64) * scale + 7
    x[:, list(dead)] = 0
    expected = norm(x)[:, kept]
    norm.weight, norm.bias = nn.Parameter(norm.weight[kept]), nn.Parameter(norm.bias[kept])
    sparse = SparseNorm.of(norm, kept, torch.arange(8) // (8 // groups))
    assert error([expected], [sparse(x[:, kept])]) < 1e-13
    assert error([expected], [sparse.float()(x[:, kept].float())]) < 1e-4


def softsign_of(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


torch.fx.wrap("softsign_of")


class Wrapped(nn.Module):
    """A function that torch.fx does not look into."""

    def forward(self, x: Tensor) -> Tensor:
        return softsign_of(x)


class Opaque(nn.Module):
    """A module whose forward cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x


@pytest.fixture
def rules() -> Iterator[dict[Any, Any]]:
    before = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(before)


def test_an_unknown_operation_says_where_it_is_and_what_would_free_it(rules: dict[Any, Any]) -> None:
    model = Between(Wrapped(), 8, DEAD, DEAD).double().eval()
    image = torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    channels = analyse(trace(model, image))
    (pin,) = {pin for pin in channels.pins.values() if "no rule" in pin.reason}
    assert (pin.node, pin.reason) == ("softsign_of", "no rule knows what softsign_of() does to channels")
    assert pin.where.startswith("test_reach.py:")
    assert pin.where.endswith(": return softsign_of(x)")
    assert pin.remedy == (
        "If every element or channel is treated alone: from tests.graph.test_reach import softsign_of; "
        'dspfx.register_rule(softsign_of, "elementwise")  # or "channelwise", "movement"'
    )
    assert lower(model, image, tune=None).get_parameter("a.weight").shape[0] == 8
    register_rule(softsign_of, "elementwise")
    assert not any("no rule" in pin.reason for pin in analyse(trace(model, image)).pins.values())


def test_a_registered_module_is_not_traced_into(rules: dict[Any, Any]) -> None:
    register_rule(Opaque, "elementwise")
    model = Between(Opaque(), 8, DEAD, DEAD)
    gm = trace(model, torch.zeros(2, 3, 6, 6))
    assert [str(n.target) for n in gm.graph.nodes if n.op == "call_module"] == ["a", "middle", "b"]
    assert not any("no rule" in pin.reason for pin in analyse(gm).pins.values())


@pytest.mark.parametrize(
    ("operation", "rule", "message"),
    [
        (3, "elementwise", r"register_rule got 3; give a function, the name of a tensor method or a module class\."),
        (int, "elementwise", r"register_rule got <class 'int'>; give a function, .* or a module class\."),
        (
            torch.relu,
            "free",
            r"register_rule got the rule 'free'; give one of 'elementwise', 'channelwise', 'movement'\.",
        ),
    ],
)
def test_what_is_no_rule_is_refused(operation: Any, rule: Any, message: str, rules: dict[Any, Any]) -> None:
    before = dict(rules)
    with pytest.raises(ConfigError, match=f"^{message}$"):
        register_rule(operation, rule)
    assert rules == before


class Reordered(nn.Module):
    """Channels in an order that a buffer holds."""

    order: Tensor

    def __init__(self, is_indexed: bool) -> None:
        super().__init__()
        self.is_indexed = is_indexed
        self.register_buffer("order", torch.tensor([7, 0, 3, 2, 2, 5]))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order] if self.is_indexed else x.index_select(1, self.order)


@pytest.mark.parametrize("is_indexed", [True, False])
def test_a_stored_order_is_followed_and_rewritten(is_indexed: bool) -> None:
    model = Between(Reordered(is_indexed), 6, (0, 3, 4), (1, 2)).double().eval()
    image = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    once = lower(model, image, tune=None)
    assert once.get_parameter("a.weight").shape[0] == 3  # 2, 5 and 7 are read
    with torch.no_grad():
        once.get_parameter("b.weight")[:, 1:3] = 0  # both copies of channel 2
        once.get_parameter("a.weight")[0] = 0
        once.get_parameter("a.bias")[0] = 0
    twice = lower(once)
    assert twice.get_parameter("a.weight").shape[0] == 2
    assert error(run(once, (image,)), run(twice, (image,))) < 1e-13
