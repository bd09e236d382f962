"""torch.ops.dspfx.group_conv2d: equal to its reference, seen through by torch.compile and torch.export, and safe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspfx.errors import ConfigError, InputError
from dspfx.kernels import op
from dspfx.kernels.op import group_conv2d
from dspfx.kernels.structure import ACTIVATIONS, pack, reference
from dspfx.plans import Group
from tests.compare import error

GROUPS = (Group((0, 3), (0, 1, 4)), Group((5,), (2,)), Group((1,), ()), Group((), (3,)))
ROUNDING = 3e-6


def case(seed: int = 0) -> dict[str, Any]:
    """A call with everything: bias, residual, groups that are empty, a filter in none."""
    generator = torch.Generator().manual_seed(seed)
    packed, structure = pack(torch.randn(6, 5, 3, 3, generator=generator), GROUPS)
    return {
        "input": torch.randn(2, 5, 9, 11, generator=generator),
        "packed": packed,
        "bias": torch.randn(6, generator=generator),
        "structure": structure,
        "stride": (2, 1),
        "padding": (1, 2),
        "dilation": (1, 2),
        "residual": torch.randn(2, 6, 5, 11, generator=generator),
        "activation": "relu",
    }


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in arguments.items()}


@given(st.integers(0, 2**31), st.sampled_from(sorted(ACTIVATIONS)), st.booleans(), st.booleans())
def test_equals_the_reference_in_float64(seed: int, activation: str, has_bias: bool, adds: bool) -> None:
    arguments = case(seed) | {"activation": activation}
    arguments |= {} if has_bias else {"bias": None}
    arguments |= {} if adds else {"residual": None}
    assert error([reference(**in_double(arguments))], [group_conv2d(**arguments)]) <= ROUNDING


def test_other_types_take_the_reference() -> None:
    arguments = in_double(case())
    assert torch.equal(group_conv2d(**arguments), reference(**arguments))


def test_changed_weights_are_seen() -> None:
    arguments = case()
    group_conv2d(**arguments)
    for name in ("packed", "bias"):
        arguments[name].mul_(2)
        assert error([reference(**in_double(arguments))], [group_conv2d(**arguments)]) <= ROUNDING


def test_what_belongs_to_a_weight_goes_with_it() -> None:
    arguments = case()
    before = len(op._engines)
    group_conv2d(**arguments)
    del arguments
    assert len(op._engines) <= before


class Layer(torch.nn.Module):
    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.options = arguments
        self.register_buffer("packed", arguments.pop("packed"))
        self.register_buffer("bias", arguments.pop("bias"))
        self.structure = arguments.pop("structure")

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        size, options = [6, 3, 3], [list(self.options[k]) for k in ("stride", "padding", "dilation")]
        called = torch.ops.dspfx.group_conv2d(
            x, self.packed, self.bias, self.structure, size, *options, residual, "relu"
        )
        return called + 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_and_export_keep_it_one_operation() -> None:
    arguments = case()
    expected = reference(**in_double(arguments)) + 1
    x, residual = arguments.pop("input"), arguments.pop("residual")
    layer = Layer(arguments)
    compiled = torch.compile(layer, fullgraph=True)
    assert error([expected], [compiled(x, residual)]) <= ROUNDING
    exported = torch.export.export(layer, (x, residual))
    assert [str(n.target) for n in exported.graph.nodes].count("dspfx.group_conv2d.default") == 1
    assert error([expected], [exported.module()(x, residual)]) <= ROUNDING


def test_the_registration_is_sound() -> None:
    a = case()
    window = [list(a[name]) for name in ("stride", "padding", "dilation")]
    arguments = (a["input"], a["packed"], a["bias"], a["structure"], [6, 3, 3], *window, a["residual"], "relu")
    assert set(torch.library.opcheck(torch.ops.dspfx.group_conv2d.default, arguments).values()) == {"SUCCESS"}


def test_bad_indices_are_refused_before_anything_native() -> None:
    arguments = case()
    for place, value in ((-1, 99), (-2, -5)):
        structure = arguments["structure"].clone()
        structure[place] = value
        with pytest.raises(ConfigError):
            group_conv2d(**arguments | {"structure": structure})
    duplicate = arguments["structure"].clone()
    duplicate[15] = duplicate[16]
    with pytest.raises(ConfigError, match="twice"):
        group_conv2d(**arguments | {"structure": duplicate})


def test_tensors_that_do_not_fit_are_refused() -> None:
    arguments = case()
    group_conv2d(**arguments)
    for name, value in (
        ("input", torch.randn(2, 4, 9, 11)),
        ("residual", torch.randn(2, 6, 5, 10)),
        ("bias", torch.randn(5)),
        ("packed", torch.randn(7)),
        ("structure", arguments["structure"][:3]),
        ("structure", arguments["structure"].long()),
    ):
        with pytest.raises((InputError, ConfigError)):
            group_conv2d(**arguments | {name: value})
