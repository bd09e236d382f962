"""Where the real images and trained networks lie: in shared/data beside the repository; tests skip without them.

@needs(CIFAR_LOSSLESS, DSP_RESNET20)
def test_published_network_keeps_its_accuracy() -> None: ...
"""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"

CIFAR_JPEG = DATA / "cifar10-jpeg.tar.xz"
"""All 60,000 CIFAR-10 images as JPEG: train/CLASS/*.jpg, test/CLASS/*.jpg."""

CIFAR_LOSSLESS = DATA / "cifar10-lossless-1k.npz"
"""The first 1,017 lossless test images: x uint8 [1017, 3, 32, 32], y."""

DSP_RESNET20 = DATA / "dsp_resnet20_g4.safetensors"
"""The DSP authors' pruned ResNet20 of four groups, dense with zeros; 92.3% on the lossless images."""

RESNET20 = DATA / "resnet20_cifar10.safetensors"
"""A trained dense ResNet20 with parameter-free shortcuts; 91.6% on the lossless images."""

RESNET56 = DATA / "resnet56_cifar10.safetensors"
"""A trained dense ResNet56 with parameter-free shortcuts; 92.7% on the lossless images."""


def needs(*files: Path) -> pytest.MarkDecorator:
    """Skips a test, with a reason, where one of `files` is absent."""
    missing = [file.name for file in files if not file.is_file()]
    return pytest.mark.skipif(bool(missing), reason=f"absent beside the repository: shared/data/{', '.join(missing)}")
