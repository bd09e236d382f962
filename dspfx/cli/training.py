"""A plain training loop that resumes after `kill -9` from its last epoch, bit for bit on a CPU.

Under torchrun every process trains on its part of each batch, and all of them hold the same network.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import dspfx
from dspfx import ranks
from dspfx.cli.checkpoints import load_state, save_state
from dspfx.cli.distill import Teacher
from dspfx.cli.images import Split
from dspfx.cli.scoring import Score, Tally, evaluate, progress_bar, say
from dspfx.errors import ConfigError, ModelError

Companion = dspfx.GroupLearner | dspfx.Unifier  # what follows the optimizer, and is stored beside it
AUXILIARY_WEIGHT = 0.3  # of the heads that googlenet and inception_v3 add in training


@dataclass(frozen=True)
class Recipe:
    """How every stage trains."""

    batch_size: int
    weight_decay: float
    label_smoothing: float
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ConfigError(f"--batch-size is {self.batch_size}; give at least 2, which batch norm needs.")
        if self.batch_size % ranks.count() or self.batch_size < 2 * ranks.count():
            raise ConfigError(
                f"--batch-size is {self.batch_size}, of all {ranks.count()} processes together; give a multiple of "
                f"{ranks.count()}, with at least 2 images for each."
            )


@dataclass(frozen=True)
class Stage:
    """Epochs of training: one cosine cycle from its learning rate to zero for each (epochs, lr) of `cycles`.

    Attributes:
        name: what it is called in the log and in the name of its checkpoint.
        first_epoch: the number of its first epoch; epochs of one number see the same images in the same order.
        keep: the weights it ends with: of the last epoch, or of the one that was best on the validation split.
    """

    name: str
    cycles: tuple[tuple[int, float], ...]
    first_epoch: int = 0
    keep: Literal["best", "last"] = "best"

    @property
    def epochs(self) -> int:
        """Epochs of all cycles together."""
        return sum(epochs for epochs, _ in self.cycles)

    def lr(self, epoch: float) -> float:
        """The learning rate at a fractional epoch of this stage."""
        for epochs, top in self.cycles:
            if epoch < epochs:
                return 0.5 * top * (1 + math.cos(math.pi * epoch / epochs))
            epoch -= epochs
        return 0.0

    def title(self, epoch: int) -> str:
        """The stage and its epoch, counted from 1."""
        return f"{self.name} {epoch + 1:>{len(str(self.epochs))}}/{self.epochs}"


@dataclass
class Progress:
    """Where a stage stands: its learning curve and the best weights so far."""

    curve: list[dict[str, float]] = field(default_factory=list)
    best: tuple[float, float] = (-1.0, 0.0)  # validation accuracy, minus loss
    best_model: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Trainer:
    """Trains networks on one pair of splits; a checkpoint `STAGE.pt` in `folder` follows every epoch."""

    recipe: Recipe
    train: Split
    val: Split
    folder: Path

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return max(1, len(self.train) // self.recipe.batch_size)

    def optimizer(self, model: nn.Module) -> SGD:
        """SGD with momentum 0.9; the stage sets the learning rate before each step."""
        return SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=self.recipe.weight_decay)

    def fit(
        self,
        model: nn.Module,
        optimizer: SGD,
        stage: Stage,
        learner: Companion | None = None,
        teacher: Teacher | None = None,
    ) -> Progress:
        """Trains `model` in place from the stage's last finished epoch on; raises ModelError when the loss diverges."""
        path = self.folder / f"{stage.name}.pt"
        progress = Progress()
        state = load_state(path)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            if learner is not None:
                learner.load_state_dict(state["learner"])
            progress = Progress(**state["progress"])
            say(f"{stage.name}: {len(progress.curve)} of {stage.epochs} epochs found in {path}")
        for epoch in range(len(progress.curve), stage.epochs):
            self._epoch(model, optimizer, stage, epoch, learner, teacher, progress)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "learner": learner.state_dict() if learner is not None else {},
                "progress": vars(progress),
            }
            save_state(path, state)
        if progress.best_model:
            model.load_state_dict(progress.best_model)
        return progress

    def _epoch(
        self,
        model: nn.Module,
        optimizer: SGD,
        stage: Stage,
        epoch: int,
        learner: Companion | None,
        teacher: Teacher | None,
        progress: Progress,
    ) -> None:
        """One epoch and its validation, appended to `progress`."""
        started = time.perf_counter()
        trained = self._train(model, optimizer, stage, epoch, learner, teacher)
        ranks.copy_from_first(model.buffers())  # the last batch's statistics are each rank's own
        if not math.isfinite(trained.loss):
            raise ModelError(
                f"The loss is {trained.loss} in {stage.title(epoch)} (learning rate {stage.lr(epoch):.4g}); give a "
                "smaller --lr, --lr-tune or --strength."
            )
        scored = evaluate(model, self.val, self.recipe.batch_size)
        seconds = time.perf_counter() - started
        progress.curve.append(
            {
                "lr": stage.lr(epoch),
                "train_loss": trained.loss,
                "train_accuracy": trained.accuracy,
                "val_loss": scored.loss,
                "val_accuracy": scored.accuracy,
                "seconds": seconds,
                **_learned(learner),
            }
        )
        if stage.keep == "best" and (scored.accuracy, -scored.loss) > progress.best:
            progress.best = (scored.accuracy, -scored.loss)
            progress.best_model = {key: value.clone() for key, value in model.state_dict().items()}
        say(
            f"{stage.title(epoch)}  lr {stage.lr(epoch):.4f}  loss {trained.loss:.4f}  train {trained.accuracy:.2%}  "
            f"val {scored.accuracy:.2%}  {seconds:.1f} s"
        )

    def _train(
        self,
        model: nn.Module,
        optimizer: SGD,
        stage: Stage,
        epoch: int,
        learner: Companion | None,
        teacher: Teacher | None,
    ) -> Score:
        seed = self.recipe.seed * 100_003 + stage.first_epoch + epoch
        torch.manual_seed(seed)  # dropout and the like: an epoch is a function of the seed and its number alone
        model.train()
        call = model if ranks.count() == 1 else DistributedDataParallel(model)
        tally = Tally()
        batches = self.train.epoch(self.recipe.batch_size, seed, (ranks.rank(), ranks.count()))
        for step, (images, labels) in enumerate(bar := progress_bar(batches, self.steps, stage.title(epoch))):
            for group in optimizer.param_groups:
                group["lr"] = stage.lr(epoch + step / self.steps)
            optimizer.zero_grad()
            loss, logits = self._taught(call, teacher, images, labels)
            loss.backward()
            optimizer.step()
            if isinstance(learner, dspfx.GroupLearner) and learner.mode == "exact":
                learner.step(lambda x=images, y=labels: self._taught(call, teacher, x, y)[0])  # type: ignore[misc]
            tally.add(loss, logits, labels)
            if step % 20 == 19 and not bar.disable:  # reading the loss waits for the device
                bar.set_postfix_str(str(tally.score()))
        return tally.joint()

    def _taught(
        self, model: nn.Module, teacher: Teacher | None, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss, of whose cross entropy a teacher has its share if there is one, and the main logits."""
        loss, logits = self._loss(model, images, labels)
        if teacher is not None:
            loss = loss + teacher.share * (teacher.divergence(logits, images) - self._cross_entropy(logits, labels))
        return loss, logits

    def _loss(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, auxiliary heads included, and the main logits."""
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda):
            output = model(images)
        logits, *others = output if isinstance(output, tuple) else (output,)
        loss = self._cross_entropy(logits, labels)
        for head in others:
            if head is not None:
                loss = loss + AUXILIARY_WEIGHT * self._cross_entropy(head, labels)
        return loss, logits

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)


def _learned(learner: Companion | None) -> dict[str, float]:
    """What a GroupLearner says of itself at the end of an epoch, as far as it is a number yet."""
    if not isinstance(learner, dspfx.GroupLearner):
        return {}
    return {name: value for name, value in learner.stats().items() if name != "steps" and math.isfinite(value)}
