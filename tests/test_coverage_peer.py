"""What is compared with Torch-Pruning's networks: the dense one with exactly the removed channels silenced."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tests.test_coverage_table import Small
from tools.sweep.peer_record import Removal


def pruned_by_hand(model: Small, gone: list[int]) -> Small:
    """The network without the first layer's filters `gone`, as any whole-channel pruner makes it."""
    small, left = copy.deepcopy(model), [i for i in range(6) if i not in gone]
    for layer, dense in ((small.first, model.first), (small.norm, model.norm)):
        for key, value in [*dense.named_parameters(), *dense.named_buffers()]:
            if value.dim():
                kept = value.detach()[left]
                setattr(layer, key, nn.Parameter(kept) if isinstance(value, nn.Parameter) else kept)
    small.second.weight = nn.Parameter(model.second.weight[:, left].clone())
    return small


def recorded(model: Small, gone: list[int], read: list[int]) -> Removal:
    """The record of the first layer's filters `gone` and the second one's input channels `read`, in two steps."""
    removal = Removal(copy.deepcopy(model))
    for index in sorted(gone, reverse=True):
        removal.note("first", False, [index], 0)
        removal.note("norm", True, [index], 0)
    removal.note("second", True, read, 1)
    return removal


def test_removed_channels_are_silenced_where_they_are_made() -> None:
    torch.manual_seed(0)
    model = Small().double().eval()
    nn.init.uniform_(model.norm.bias, 0.5, 1.0)
    model.norm.running_mean = torch.rand(6, dtype=torch.float64)
    pruned, removal = pruned_by_hand(model, [1, 4]), recorded(model, [1, 4], [1, 4])
    assert removal.explains(pruned, dict(model.state_dict())) == ""
    removal.silence()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(removal.dense(x), pruned(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(x), pruned(x), rtol=1e-3)


def test_a_record_that_does_not_fit_is_noticed_and_wrong_pruning_differs() -> None:
    torch.manual_seed(0)
    model = Small().double().eval()
    pruned = pruned_by_hand(model, [1, 4])
    assert recorded(model, [1, 4], [0, 4]).explains(pruned, dict(model.state_dict())) == "second"
    pruned.second.weight = nn.Parameter(model.second.weight[:, [1, 2, 3, 5]].clone())  # not the channels it reads
    removal = recorded(model, [1, 4], [0, 4])
    assert removal.explains(pruned, dict(model.state_dict())) == ""
    removal.silence()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert (removal.dense(x) - pruned(x)).abs().max().item() > 1e-3


def test_layer_norm_over_the_channels_left() -> None:
    torch.manual_seed(0)
    first, norm, last = nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)
    dense = nn.Sequential(first, norm, last).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    left = [0, 2, 3, 5]
    pruned = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    state = {"0.weight": first.weight[left], "0.bias": first.bias[left], "1.weight": norm.weight[left]}
    state |= {"1.bias": norm.bias[left], "2.weight": last.weight[:, left], "2.bias": last.bias}
    pruned.load_state_dict(state)
    x = torch.rand(3, 5, dtype=torch.float64)
    differences = []
    for as_pruned in (False, True):
        removal = Removal(copy.deepcopy(dense))
        for name in ("0", "1"):
            removal.note(name, False, [1, 4], 0)
        removal.note("2", True, [1, 4], 1)
        removal.silence(as_pruned)
        differences.append((removal.dense(x) - pruned(x)).abs().max().item())
    assert differences[0] > 1e-2
    assert differences[1] < 1e-12


def test_group_norm_over_the_channels_left() -> None:
    torch.manual_seed(0)
    first, norm = nn.Conv2d(3, 8, 1).double(), nn.GroupNorm(2, 8).double()
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    dense, left = nn.Sequential(first, norm), [0, 2, 5, 6]
    x = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    pruned = nn.functional.group_norm(first(x)[:, left], 2, norm.weight[left], norm.bias[left], norm.eps)
    differences = []
    for as_pruned in (False, True):
        removal = Removal(copy.deepcopy(dense))
        for name in ("0", "1"):
            removal.note(name, False, [1, 3, 4, 7], 0)
        removal.silence(as_pruned)
        found = removal.dense(x)
        assert as_pruned is False or found[:, [1, 3, 4, 7]].abs().max() == 0
        differences.append((found[:, left] - pruned).abs().max().item())
    assert differences[0] > 1e-2
    assert differences[1] < 1e-12
