"""The DSP authors' own pruned network through `lower`: nothing but its cost may change."""

from __future__ import annotations

import pytest
import torch

import dspfx
from tests.data import CIFAR_LOSSLESS, DSP_RESNET20, needs
from tests.nets.published import load_images, load_published, logits


@needs(CIFAR_LOSSLESS, DSP_RESNET20)
def test_the_published_resnet20_keeps_every_prediction() -> None:
    model = load_published(DSP_RESNET20)
    images, labels = load_images(CIFAR_LOSSLESS)
    small = dspfx.lower(model, images[:2], tune=None)
    expected, found = logits(model, images), logits(small, images)
    assert len(images) == 1017
    assert float((expected.argmax(1) == labels).double().mean()) == pytest.approx(0.923, abs=5e-4)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert float((found - expected).abs().max()) <= 1e-4


@needs(DSP_RESNET20)
def test_the_published_resnet20_gets_cheaper() -> None:
    model = load_published(DSP_RESNET20)
    image = torch.zeros(1, 3, 32, 32)
    dense, lowered = dspfx.profile(model, image), dspfx.profile(dspfx.lower(model, image, tune=None))
    assert lowered.flops < dense.flops
    assert lowered.params < dense.params
