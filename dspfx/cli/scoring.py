"""How good a network is on a split, its batch norms made to fit it, and lines that say so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dspfx import ranks
from dspfx.cli.images import Batch, Split


@dataclass(frozen=True)
class Score:
    """Mean cross entropy, share of right answers, number of images."""

    loss: float
    accuracy: float
    images: int

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, accuracy {self.accuracy:.2%}"


class Tally:
    """Sums of loss and right answers, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.right: Tensor | int = 0
        self.images = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Counts a batch with its mean loss."""
        self.loss = self.loss + loss.detach().double() * len(labels)
        self.right = self.right + (logits.argmax(1) == labels).sum()
        self.images += len(labels)

    def score(self) -> Score:
        """The means so far, of this process's images."""
        return Score(float(self.loss) / self.images, int(self.right) / self.images, self.images)

    def joint(self) -> Score:
        """The means over all processes, which all have to ask."""
        device = self.loss.device if isinstance(self.loss, Tensor) else torch.device("cpu")
        sums = torch.tensor([float(self.loss), int(self.right), self.images], dtype=torch.float64, device=device)
        loss, right, images = ranks.total(sums).tolist()
        return Score(loss / images, right / images, int(images))


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int) -> Score:
    """The score of `model` over a split in eval mode and full precision; leaves it in the mode it was in."""
    was_training = model.training
    model.eval()
    tally = Tally()
    steps = -(-len(split) // batch_size)
    part = ranks.rank(), ranks.count()
    for images, labels in progress_bar(split.in_order(batch_size, part), steps, "evaluating"):
        logits = model(images)
        tally.add(F.cross_entropy(logits, labels), logits, labels)
    model.train(was_training)
    return tally.joint()


@torch.no_grad()
def recalibrate(model: nn.Module, split: Split, batch_size: int, batches: int = 20) -> None:
    """Afterwards the batch norms hold the statistics of the first images of `split`, everything else is as it was."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.track_running_stats]
    before = [(norm.training, norm.momentum) for norm in norms]
    was_training = model.training
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    for images, _ in islice(split.in_order(batch_size), batches):
        model(images)
    model.train(was_training)
    for norm, (training, momentum) in zip(norms, before, strict=True):
        norm.momentum = momentum
        norm.train(training)


def progress_bar(batches: Iterator[Batch], steps: int, title: str) -> tqdm[Batch]:
    """A bar on a terminal, nothing elsewhere: a log gets the one line an epoch that `say` prints."""
    return tqdm(batches, total=steps, desc=title, leave=False, disable=not sys.stderr.isatty() or ranks.rank() > 0)


def say(line: str) -> None:
    """Prints a line at once, above any progress bar; of several processes the first one does."""
    if ranks.rank() == 0:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
