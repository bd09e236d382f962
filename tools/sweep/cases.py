"""What one model of the sweep is: how it is built, on what it runs, and where it is smaller than the original."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        name: as its library lists it.
        suite: "torchvision" or "timm".
        kind: the table it stands in (classification, ..., or timm's file).
        size: the example inputs' shape, as the row prints it.
        make: builds the model, with random weights.
        example: makes the example inputs in the form that `dspfx.prepare` takes.
        classes: width of the outputs that no pruning may touch.
        note: what makes it another model than the library's default; empty where nothing does.
        targets: makes what a training step passes beside the inputs; None where the inputs are enough.
    """

    name: str
    suite: str
    kind: str
    size: str
    make: Callable[[], nn.Module]
    example: Callable[[], Any]
    classes: int = 1000
    note: str = ""
    targets: Callable[[], Any] | None = None

    def build(self) -> nn.Module:
        """The model, with the same random weights every time, none of them silenced by its initial value."""
        torch.manual_seed(0)
        model = self.make()
        enliven(model)
        return model

    def inputs(self) -> Any:
        """The example inputs, the same ones every time."""
        torch.manual_seed(1)
        return self.example()


def images(*shape: int) -> Callable[[], Tensor]:
    """Makes a batch of random images (or clips) of shape [C, ...]."""
    return lambda: torch.rand(BATCH, *shape)


def printed(shape: tuple[int, ...]) -> str:
    """3x64x64."""
    return "x".join(map(str, shape))


def enliven(model: nn.Module) -> None:
    """Makes every parameter random that starts as a constant near zero.

    A head or a scale that starts at zero (ViT's, ConvNeXt's) keeps the outputs from responding to the input: anything
    would agree with anything, and no gradient would arrive.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            first = parameter.flatten()[0]
            if parameter.is_floating_point() and first.abs() < 1e-2 and bool((parameter == first).all()):
                parameter.normal_(std=0.05)
