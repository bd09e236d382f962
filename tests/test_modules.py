"""GatedConv2d is the convolution it replaces; GroupConv2d is the masked convolution, split."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from dspfx.errors import ConfigError
from dspfx.modules import GatedConv2d, GatedLayer, GroupConv2d, replace_module
from dspfx.plans import Group
from tests.compare import error, gradients, run, same

OPTIONS: tuple[dict[str, Any], ...] = (
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": (3, 1), "stride": 2, "padding": (1, 0), "padding_mode": "reflect"},
    {"kernel_size": 3, "dilation": 2, "padding": "same", "padding_mode": "circular"},
)
GROUPS = (Group((0, 3, 4), (1, 2, 3)), Group((1, 2), (0, 4)), Group((5,), (5,)))


def masked(options: dict[str, Any]) -> tuple[nn.Conv2d, torch.Tensor]:
    """A convolution with zeros outside GROUPS, and its mask by brute force."""
    conv = nn.Conv2d(6, 6, **options).double()
    mask = torch.zeros(6, 6, dtype=torch.bool)
    for group in GROUPS:
        for o in group.filters:
            for c in group.channels:
                mask[o, c] = True
    with torch.no_grad():
        conv.weight *= mask[:, :, None, None]
    return conv, mask


@pytest.mark.parametrize("options", OPTIONS)
def test_gated_is_the_convolution_over_its_own_parameters(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 6, **options).eval()
    conv.weight.requires_grad_(False)
    state = torch.get_rng_state()
    gated = GatedLayer.gate(conv, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert gated.weight is conv.weight
    assert gated.bias is conv.bias
    assert not gated.training
    inputs = (torch.randn(2, 4, 9, 8),)
    assert same(run(gated, inputs), run(conv, inputs))
    assert same(gradients(gated, inputs).values(), gradients(conv, inputs).values())
    assert (gated.gate_groups, gated.is_learned, gated.is_pruned) == (3, False, False)
    assert set(gated.state_dict()) - set(conv.state_dict()) == set(GatedConv2d.GATE_KEYS)


def test_a_gate_needs_a_dense_convolution() -> None:
    message = r"only dense convolutions and linear layers are gated; this is a Conv2d with groups=2\."
    with pytest.raises(ConfigError, match=f"^{message}$"):
        GatedLayer.gate(nn.Conv2d(4, 4, 3, groups=2), 2)


def test_the_mask_follows_groups_and_dead_filters() -> None:
    gated = GatedLayer.gate(nn.Conv2d(3, 4, 1), 2)
    gated.gate_group.copy_(torch.tensor([0, 1, -1, 0]))
    gated.gate_keep.copy_(torch.tensor([[True, False, True], [False, True, False]]))
    assert gated.gate_mask().int().tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 0, 1]]
    assert gated.is_pruned
    gated.gate_logits[0, 1] = 0.1
    assert gated.is_learned


def test_gates_survive_a_plain_state_dict_and_travel_in_their_own() -> None:
    gated, conv = GatedLayer.gate(nn.Conv2d(3, 4, 1), 2), nn.Conv2d(3, 4, 1)
    gated.gate_logits.normal_()
    logits = gated.gate_logits.clone()
    gated.load_state_dict(conv.state_dict())
    assert torch.equal(gated.gate_logits, logits)
    assert torch.equal(gated.weight, conv.weight)
    other = GatedLayer.gate(nn.Conv2d(3, 4, 1), 2)
    other.load_state_dict(gated.state_dict())
    assert torch.equal(other.gate_logits, logits)


@pytest.mark.parametrize("options", OPTIONS)
def test_branches_are_the_masked_convolution(options: dict[str, Any]) -> None:
    conv, _ = masked(options)
    state = torch.get_rng_state()
    split = GroupConv2d.from_conv(conv, GROUPS)
    assert torch.equal(torch.get_rng_state(), state)
    inputs = (torch.randn(2, 6, 9, 8, dtype=torch.float64),)
    assert error(run(conv, inputs), run(split, inputs)) < 1e-14
    assert split.slices == [(1, 4), None, (5, 6)]
    assert not split.is_ordered
    weights = sum(p.numel() for n, p in split.named_parameters() if n.endswith("weight"))
    assert weights == (3 * 3 + 2 * 2 + 1 * 1) * conv.weight[0, 0].numel()
    assert not {"order", "channels0"} & set(split.state_dict())
    ours, theirs = gradients(split, inputs)["input 0"], gradients(conv, inputs)["input 0"]
    assert ours is not None
    assert theirs is not None
    assert error([theirs], [ours]) < 1e-14


def test_consecutive_groups_need_neither_selection_nor_reordering() -> None:
    conv = nn.Conv2d(4, 4, 1)
    groups = (Group((0, 1), (0, 1)), Group((2, 3), (1, 2, 3)))
    split = GroupConv2d.from_conv(conv.eval(), groups)
    assert split.slices == [(0, 2), (1, 4)]
    assert split.is_ordered
    assert not split.training
    graph = torch.fx.Tracer().trace(split)
    assert not any(n.target == "index_select" for n in graph.nodes)


@pytest.mark.parametrize("bias", [None, 0.0, 1.5])
@pytest.mark.parametrize("groups", [GROUPS[:2], (Group((0, 1), (0, 2)), Group((2, 3), (1,))), (Group((1,), (0,)),)])
def test_filters_that_read_nothing_are_planes(groups: tuple[Group, ...], bias: float | None) -> None:
    """They stand behind the branches: padding where they are zero, else their bias."""
    conv = nn.Conv2d(6, 6, 3, stride=2, bias=bias is not None).double()
    rest = sorted(set(range(6)) - {o for g in groups for o in g.filters})
    mask = torch.zeros(6, 6, 1, 1)
    for group in groups:
        mask[[[o] for o in group.filters], list(group.channels)] = 1
    with torch.no_grad():
        conv.weight *= mask
        if bias is not None:
            conv.bias[rest] = bias  # type: ignore[index]
    split = GroupConv2d.from_conv(conv, groups)
    assert split.rest == tuple(rest)
    assert (split.rest_bias is None) == (not bias)
    assert split.is_ordered == (groups[0].filters == (0, 1))
    inputs = (torch.randn(2, 6, 9, 8, dtype=torch.float64),)
    assert error(run(conv, inputs), run(split, inputs)) < 1e-14
    targets = [str(n.target) for n in torch.fx.Tracer().trace(split).nodes]
    assert any("pad" in target for target in targets) == (not bias)
    assert targets.count("index_select") == (not split.is_ordered) + split.slices.count(None)


def test_groups_hold_every_filter_at_most_once() -> None:
    message = re.escape(
        "GroupConv2d needs at least one group and each of its 3 filters in at most one; the groups hold 3 filters, "
        "2 different ones."
    )
    with pytest.raises(ConfigError, match=f"^{message}$"):
        GroupConv2d(2, 3, 1, (Group((0, 1), (0,)), Group((1,), (1,))))
    with pytest.raises(ConfigError, match=r"the groups hold 0 filters, 0 different ones\.$"):
        GroupConv2d(2, 3, 1, ())


def test_frozen_weights_stay_frozen() -> None:
    conv, _ = masked(OPTIONS[0])
    conv.weight.requires_grad_(False)
    split = GroupConv2d.from_conv(conv, GROUPS)
    frozen = {name: not p.requires_grad for name, p in split.named_parameters()}
    assert frozen == {f"branches.{i}.{key}": key == "weight" for i in range(3) for key in ("weight", "bias")}


def test_replacing_reaches_nested_modules() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.ReLU())
    new = nn.Identity()
    replace_module(model, "0.1", new)
    replace_module(model, "1", new)
    assert model.get_submodule("0.1") is new
    assert model[1] is new
    assert isinstance(model.get_submodule("0.0"), nn.ReLU)
