"""Packing is exact, the reference is the sum over the structure's indices, and no bad index gets through."""

from __future__ import annotations

import itertools
import re
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dspfx.errors import ConfigError, DspfxError, InputError
from dspfx.kernels.structure import ACTIVATIONS, Structure, output_shape, pack, reference, unpack
from dspfx.plans import Group

UNEVEN = (Group((4, 0), (1, 3, 2)), Group((), (0,)), Group((1,), ()), Group((3,), (2,)))  # filters 2 and 5 in none


@st.composite
def groups_of(draw: st.DrawFn, out_channels: int, in_channels: int) -> tuple[Group, ...]:
    """Any groups: none, empty ones, of one filter or channel, overlapping, in any order, with filters left over."""
    count = draw(st.integers(0, 4))
    owner = draw(st.lists(st.integers(-1, count - 1), min_size=out_channels, max_size=out_channels))
    order = draw(st.permutations(range(out_channels)))
    channels = st.lists(st.integers(0, in_channels - 1), unique=True, max_size=in_channels)
    return tuple(Group(tuple(o for o in order if owner[o] == g), tuple(draw(channels))) for g in range(count))


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of a call in float64, without the packing: `weight` and `groups` instead."""
    o, c, n = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(1, 3))
    kernel, stride, padding, dilation = (
        (draw(st.integers(low, high)), draw(st.integers(low, high))) for low, high in ((1, 3), (1, 3), (0, 2), (1, 2))
    )
    height, width = ((k - 1) * d + draw(st.integers(1, 6)) for k, d in zip(kernel, dilation, strict=True))
    groups = draw(groups_of(o, c))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = random(n, c, height, width)
    call: dict[str, Any] = {"input": x, "weight": random(o, c, *kernel), "groups": groups}
    call |= {"stride": stride, "padding": padding, "dilation": dilation}
    shape = output_shape(x.shape, Structure(o, c, kernel, groups), stride, padding, dilation)
    call["bias"] = random(o) if draw(st.booleans()) else None
    call["residual"] = random(*shape) if draw(st.booleans()) else None
    return call | {"activation": draw(st.sampled_from(sorted(ACTIVATIONS)))}


def packed_call(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `reference`."""
    rest = {name: value for name, value in call.items() if name not in ("weight", "groups")}
    packed, structure = pack(call["weight"], call["groups"])
    return rest | {"packed": packed, "structure": structure}


def by_hand(call: dict[str, Any]) -> Tensor:
    """The same, one output pixel after the other."""
    x, weight, (sh, sw), (dh, dw) = call["input"], call["weight"], call["stride"], call["dilation"]
    (ph, pw), (o_count, _, kh, kw) = call["padding"], weight.shape
    x = F.pad(x, (pw, pw, ph, ph))
    height, width = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = torch.zeros(len(x), o_count, height, width, dtype=torch.float64)
    reads = {o: group.channels for group in call["groups"] for o in group.filters}
    for o, h, w in itertools.product(range(o_count), range(height), range(width)):
        for c in reads.get(o, ()):
            patch = x[:, c, h * sh : h * sh + dh * (kh - 1) + 1 : dh, w * sw : w * sw + dw * (kw - 1) + 1 : dw]
            y[:, o, h, w] += (patch * weight[o, c]).sum((1, 2))
    y += 0 if call["bias"] is None else call["bias"][:, None, None]
    y += 0 if call["residual"] is None else call["residual"]
    formulas = {"none": y, "relu": y.clamp(min=0), "relu6": y.clamp(0, 6), "silu": y / (1 + torch.exp(-y))}
    formulas["hardswish"] = y * (y + 3).clamp(0, 6) / 6
    return formulas[call["activation"]]


@given(calls())
def test_reference_is_the_sum_over_the_indices(call: dict[str, Any]) -> None:
    torch.testing.assert_close(reference(**packed_call(call)), by_hand(call), rtol=1e-12, atol=1e-12)


@given(calls())
def test_packed_and_read_it_is_the_same(call: dict[str, Any]) -> None:
    weight, groups = call["weight"], call["groups"]
    packed, structure = pack(weight, groups)
    known = Structure.read(structure)
    assert known == Structure(weight.shape[0], weight.shape[1], tuple(weight.shape[2:]), groups)
    assert torch.equal(known.encode(), structure)
    assert len(packed) == known.weights
    mask = torch.zeros_like(weight)
    for group in groups:
        for o, c in itertools.product(group.filters, group.channels):
            mask[o, c] = 1
    dense = unpack(packed, structure)
    assert torch.equal(dense, weight * mask)
    assert known.rest == tuple(o for o in range(weight.shape[0]) if not mask[o].any())
    again = pack(dense, groups)
    assert torch.equal(again[0], packed)
    assert torch.equal(again[1], structure)


def test_layout_is_as_documented() -> None:
    weight = torch.arange(6 * 4 * 1 * 2, dtype=torch.bfloat16).view(6, 4, 1, 2)
    packed, structure = pack(weight, UNEVEN)
    head, sizes = [6, 4, 1, 2, 4], [2, 3, 0, 1, 1, 0, 1, 1]
    assert structure.tolist() == [*head, *sizes, 4, 0, 1, 3, 2, 0, 1, 3, 2]
    assert structure.dtype == torch.int32
    assert packed.dtype == torch.bfloat16
    pairs = [(4, 1), (4, 3), (4, 2), (0, 1), (0, 3), (0, 2), (3, 2)]
    assert packed.tolist() == [x for o, c in pairs for x in weight[o, c].flatten().tolist()]
    assert Structure.read(structure).rest == (1, 2, 5)


def test_no_group_at_all_leaves_the_bias() -> None:
    packed, structure = pack(torch.randn(2, 3, 1, 1), ())
    bias = torch.tensor([1.5, -2.0])
    y = reference(torch.randn(1, 3, 2, 2), packed, bias, structure, activation="relu")
    assert len(packed) == 0
    assert y.tolist() == [[[[1.5, 1.5], [1.5, 1.5]], [[0.0, 0.0], [0.0, 0.0]]]]


def test_gradients_flow_to_input_weight_and_bias() -> None:
    torch.manual_seed(0)
    weight, bias, x, residual = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((6, 4, 2, 1), (6,), (2, 4, 4, 3), (2, 6, 3, 3))
    )

    def function(weight: Tensor, bias: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        packed, structure = pack(weight, UNEVEN)
        return reference(x, packed, bias, structure, residual=residual, activation="silu")

    assert torch.autograd.gradcheck(function, (weight, bias, x, residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_dtypes_keep_theirs(dtype: torch.dtype) -> None:
    packed, structure = pack(torch.randn(6, 4, 3, 3, dtype=dtype), UNEVEN)
    x, bias = torch.randn(1, 4, 5, 5, dtype=dtype), torch.randn(6, dtype=dtype)
    y = reference(x, packed, bias, structure, padding=(1, 1))
    exact = reference(x.double(), packed.double(), bias.double(), structure, padding=(1, 1))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def check_refusal(kind: type[DspfxError], message: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_channels": 0}, "the structure's out_channels is 0; give an integer from 1 to 2147483647."),
        ({"in_channels": 2**31}, "the structure's in_channels is 2147483648; give an integer from 1 to 2147483647."),
        ({"in_channels": True}, "the structure's in_channels is True; give an integer from 1 to 2147483647."),
        ({"kernel": (3, 0)}, "the structure's kernel is (3, 0); give two integers from 1 to 2147483647."),
        ({"kernel": (3,)}, "the structure's kernel is (3,); give two integers from 1 to 2147483647."),
        (
            {"groups": (Group((0,), (0,)), Group((1, 0), (1,)))},
            "filter 0 is in group 0 and in group 1; leave it in one of them.",
        ),
        ({"groups": (Group((1, 0, 1), (0,)),)}, "group 0 holds filter 1 twice; leave it in once."),
        ({"groups": (Group((0,), (2, 1, 2)),)}, "group 0 holds channel 2 twice; leave it in once."),
        ({"groups": (Group((6,), (0,)),)}, "group 0 holds filter 6; the layer's filters are 0 to 5."),
        ({"groups": (Group((-1,), ()),)}, "group 0 holds filter -1; the layer's filters are 0 to 5."),
        (
            {"groups": (Group((), ()), Group((), (0, 4)))},
            "group 1 holds channel 4; the layer's channels are 0 to 3.",
        ),
        ({"groups": (Group((0,), (-1,)),)}, "group 0 holds channel -1; the layer's channels are 0 to 3."),
        ({"groups": (Group((0,), (cast(int, 1.0),)),)}, "group 0 holds channel 1.0; the layer's channels are 0 to 3."),
        ({"groups": (Group((False,), (1,)),)}, "group 0 holds filter False; the layer's filters are 0 to 5."),
    ],
)
def test_indices_that_make_no_structure_are_refused(options: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"out_channels": 6, "in_channels": 4, "kernel": (3, 3), "groups": UNEVEN}
    with check_refusal(ConfigError, message):
        Structure(**(sizes | options))


WANTED = "it has to be 1-D, torch.int32 and on the CPU, as pack makes it."


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(5, dtype=torch.int64), f"the structure is 1-D, torch.int64 and on cpu; {WANTED}"),
        (torch.zeros(1, 5, dtype=torch.int32), f"the structure is 2-D, torch.int32 and on cpu; {WANTED}"),
        (torch.zeros((), dtype=torch.int32), f"the structure is 0-D, torch.int32 and on cpu; {WANTED}"),
        (
            torch.zeros(5, dtype=torch.int32, device="meta"),
            f"the structure is 1-D, torch.int32 and on meta; {WANTED}",
        ),
        ([2, 2, 1, 1], "the structure has 4 numbers; its head alone has 5: O, C, kh, kw, G."),
        ([], "the structure has 0 numbers; its head alone has 5: O, C, kh, kw, G."),
        (
            [2, 2, 1, 1, 2, 0, 0],
            "the structure names 2 groups, and holds 2 numbers behind its head; every group has two sizes there.",
        ),
        (
            [2, 2, 1, 1, -1],
            "the structure names -1 groups, and holds 0 numbers behind its head; every group has two sizes there.",
        ),
        ([2, 2, 1, 1, 2, 1, 1, -2, 1, 0, 0], "group 1 has -2 filters; 0 is the least."),
        ([2, 2, 1, 1, 2, 1, -1, 0, 1, 0, 0], "group 0 has -1 channels; 0 is the least."),
        (
            [2, 2, 1, 1, 1, 2, 1, 0, 1],
            "the structure has 9 numbers, and its 1 groups need 10: a head of 5, 2 sizes and 3 indices.",
        ),
        (
            [2, 2, 1, 1, 1, 1, 1, 0, 1, 1],
            "the structure has 10 numbers, and its 1 groups need 9: a head of 5, 2 sizes and 2 indices.",
        ),
    ],
)
def test_tensors_that_are_no_structure_are_refused(tensor: Tensor | list[int], message: str) -> None:
    tensor = torch.tensor(tensor, dtype=torch.int32) if isinstance(tensor, list) else tensor
    with check_refusal(InputError, message):
        Structure.read(tensor)


def test_numbers_of_a_tensor_are_checked_like_any_others() -> None:
    with check_refusal(ConfigError, "group 0 holds filter 2; the layer's filters are 0 to 1."):
        Structure.read(torch.tensor([2, 2, 1, 1, 1, 1, 1, 2, 0], dtype=torch.int32))


@given(calls(), st.integers(0, 40), st.one_of(st.integers(-2, 8), st.integers(-(2**31), 2**31 - 1)), st.booleans())
def test_whatever_is_read_is_safe_to_index_with(call: dict[str, Any], place: int, value: int, is_cut: bool) -> None:
    values = packed_call(call)["structure"].tolist()
    values[place % len(values)] = value
    values = values[: place if is_cut else None]
    try:
        known = Structure.read(torch.tensor(values, dtype=torch.int32))
    except (InputError, ConfigError):
        return
    filters = [o for g in known.groups for o in g.filters]
    assert known.encode().tolist() == values
    assert len(set(filters)) == len(filters)
    assert all(0 <= o < known.out_channels for o in filters)
    assert all(0 <= c < known.in_channels for g in known.groups for c in g.channels)
    assert all(len(set(g.channels)) == len(g.channels) for g in known.groups)


def valid() -> dict[str, Any]:
    call = {"input": torch.randn(2, 4, 5, 6), "weight": torch.randn(6, 4, 3, 3), "groups": UNEVEN}
    return packed_call(call) | {"bias": torch.randn(6)}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            InputError,
            {"input": torch.randn(4, 5, 6)},
            "the input has shape (4, 5, 6); this convolution reads [N, 4, H, W].",
        ),
        (
            InputError,
            {"input": torch.randn(2, 3, 5, 6)},
            "the input has shape (2, 3, 5, 6); this convolution reads [N, 4, H, W].",
        ),
        (
            InputError,
            {"input": torch.zeros(2, 4, 5, 6, dtype=torch.int64)},
            "group_conv2d got an input of torch.int64; give one of a float dtype.",
        ),
        (
            InputError,
            {"packed": torch.zeros(62)},
            "the packed weight has shape (62,), and its structure needs [63]; give the two that one call of pack made.",
        ),
        (
            InputError,
            {"packed": torch.zeros(63, 1)},
            "the packed weight has shape (63, 1), and its structure needs [63]; give the two that one call of pack "
            "made.",
        ),
        (
            InputError,
            {"packed": torch.zeros(63, dtype=torch.float64)},
            "the packed weight is 1-D, torch.float64 and on cpu, the input 4-D, torch.float32 and on cpu; convert one "
            "of them with .to(...).",
        ),
        (InputError, {"bias": torch.zeros(5)}, "the bias has shape (5,); this call needs (6,)."),
        (
            InputError,
            {"bias": torch.zeros(6, device="meta")},
            "the bias is 1-D, torch.float32 and on meta, the input 4-D, torch.float32 and on cpu; convert one of them "
            "with .to(...).",
        ),
        (
            InputError,
            {"residual": torch.zeros(2, 6, 3, 1)},
            "the residual has shape (2, 6, 3, 1); this call needs (2, 6, 3, 4).",
        ),
        (
            ConfigError,
            {"activation": "gelu"},
            "activation is 'gelu', which group_conv2d does not know; give one of 'none', 'relu', 'relu6', 'hardswish', "
            "'silu'.",
        ),
        (ConfigError, {"stride": (0, 1)}, "stride is (0, 1); give two integers of at least 1."),
        (ConfigError, {"padding": (0, -1)}, "padding is (0, -1); give two integers of at least 0."),
        (ConfigError, {"dilation": (1,)}, "dilation is (1,); give two integers of at least 1."),
        (
            InputError,
            {"dilation": (2, 3)},
            "the input has 5x6 pixels, too few for a kernel of 3x3 with padding (0, 0) and dilation (2, 3).",
        ),
        (InputError, {"structure": torch.zeros(5)}, f"the structure is 1-D, torch.float32 and on cpu; {WANTED}"),
    ],
)
def test_calls_whose_arguments_do_not_fit_are_refused(
    kind: type[DspfxError], options: dict[str, Any], message: str
) -> None:
    assert reference(**valid()).shape == (2, 6, 3, 4)
    with check_refusal(kind, message):
        reference(**(valid() | options))


def test_pack_and_unpack_name_what_does_not_fit() -> None:
    with check_refusal(InputError, "pack got a weight of shape (6, 4, 3); it has to be [O, C, kh, kw]."):
        pack(torch.zeros(6, 4, 3), UNEVEN)
    with check_refusal(ConfigError, "group 0 holds channel 3; the layer's channels are 0 to 2."):
        pack(torch.zeros(6, 3, 1, 1), UNEVEN)
    packed, structure = pack(torch.zeros(6, 4, 1, 1), UNEVEN)
    message = "the packed weight has shape (6,), and its structure needs [7]; give the two that one call of pack made."
    with check_refusal(InputError, message):
        unpack(packed[1:], structure)
