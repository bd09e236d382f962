"""The zoo itself: reproducible, alive, and true to what its entries say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.zoo import ZOO, ZooEntry

each_entry = pytest.mark.parametrize("entry", ZOO.values(), ids=ZOO)


def leaves(outputs: object) -> list[Tensor]:
    return pytree.tree_leaves(outputs)


@each_entry
def test_builds_are_equal_and_leave_the_global_rng_alone(entry: ZooEntry) -> None:
    before = torch.get_rng_state()
    first, second = entry.build().state_dict(), entry.build().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


@each_entry
def test_outputs_respond_to_the_input_in_evaluation(entry: ZooEntry) -> None:
    model = entry.build().eval()
    with torch.no_grad():
        here, there = leaves(model(*entry.inputs())), leaves(model(*entry.inputs(seed=1)))
    for a, b in zip(here, there, strict=True):
        assert (a - b).abs().max() > 0.05 * a.abs().max()


@each_entry
def test_every_size_and_batch_is_accepted_in_both_modes(entry: ZooEntry) -> None:
    model = entry.build()
    for training in (True, False):
        model.train(training)
        for height, width in entry.sizes():
            for batch in (2, 5) if training else (1, 5):
                outputs = leaves(model(*entry.inputs(batch, height, width)))
                assert all(out.shape[0] == batch and out.isfinite().all() for out in outputs)


@each_entry
def test_every_parameter_gets_a_gradient_in_training(entry: ZooEntry) -> None:
    model = entry.build()
    torch.stack([out.square().sum() for out in leaves(model(*entry.inputs()))]).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@each_entry
def test_random_numbers_are_drawn_where_the_entry_says_so(entry: ZooEntry) -> None:
    model = entry.build()
    before = torch.get_rng_state()
    model(*entry.inputs())
    assert torch.equal(torch.get_rng_state(), before) != entry.has_rng
