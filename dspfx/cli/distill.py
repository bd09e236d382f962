"""Knowledge distillation: the dense network's soft answers as a part of the loss (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dspfx.errors import ConfigError


@dataclass(frozen=True)
class Distill:
    """The share of the cross entropy that a teacher's answers replace, and the temperature that softens both sides."""

    share: float
    temperature: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"--distill is {self.share}; give the teacher's share of the loss, in [0, 1].")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"--temperature is {self.temperature}; give a positive number.")


class Teacher:
    """A trained network, in eval mode from here on, that is asked without gradients and never changes.

        loss = (1 - share) * cross entropy + share * teacher.divergence(logits, images)

    The factor T^2 keeps the gradient's size whatever the temperature. Only the main logits have a teacher: heads that
    exist in training alone give no answers in eval mode. Not to be wrapped for a distributed training, in which every
    rank asks its own copy about its own images.
    """

    def __init__(self, network: nn.Module, config: Distill) -> None:
        self.network = network.eval()
        self.share, self.temperature = config.share, config.temperature

    def divergence(self, logits: Tensor, images: Tensor) -> Tensor:
        """T^2 * KL(teacher || student), both softened by T: the mean over the images."""
        with torch.no_grad(), torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda):
            answers = self.network(images)
        student, teacher = (F.log_softmax(x.float() / self.temperature, dim=1) for x in (logits, answers))
        return self.temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
