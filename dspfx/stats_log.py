"""StatsLog: what a learner says of itself, every few steps, in a file of lines or in TensorBoard."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from dspfx import ranks
from dspfx.errors import ConfigError, StorageError
from dspfx.learner import GroupLearner
from dspfx.optimizers import Follower
from dspfx.unifier import Unifier


class StatsLog(Follower):
    """Writes `learner.stats()` every few optimizer steps while a loop trains, until `close()`.

        with dspfx.StatsLog(learner, "runs/groups.jsonl"):          # {"steps": 50, "penalty": ..., "entropy": ...}
            for x, y in loader: ...
        with dspfx.StatsLog(learner, SummaryWriter("runs/board")):  # scalars dspfx/penalty, dspfx/entropy, ...
            for x, y in loader: ...

    A file of an earlier run goes on: lines of steps that are done anew, since a run was resumed from before them, are
    replaced. What is not finite is null in a line, and left out in TensorBoard. In a distributed training it is to be
    constructed on every rank; rank 0 writes.

    Args:
        learner: a GroupLearner or a Unifier.
        to: the path of a file of JSON lines, or an object with `add_scalar(tag, value, step)`, such as
            torch.utils.tensorboard.SummaryWriter.
        every: steps between records.

    Raises:
        ConfigError: `every` is below 1, or `to` is neither.
        StorageError: the file cannot be written, or holds something else.
    """

    def __init__(self, learner: GroupLearner | Unifier, to: str | os.PathLike[str] | Any, every: int = 50) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"StatsLog got every={every!r}; give a number of optimizer steps, at least 1.")
        self._path = Path(to) if isinstance(to, (str, os.PathLike)) else None
        if self._path is None and not callable(getattr(to, "add_scalar", None)):
            raise ConfigError(
                f"StatsLog got to={type(to).__name__}; give the path of a file, or an object with add_scalar, such as "
                "torch.utils.tensorboard.SummaryWriter."
            )
        self._learner, self._optimizer, self._every = learner, learner._optimizer, every
        self._board: Any = to
        self._written = -1  # the steps of the last record
        if self._path is not None and ranks.rank() == 0:
            _write(self._path, "w", _records(self._path))  # what cannot be written is said before the training
        self._hooks = [self._optimizer.register_step_post_hook(self._after_optimizer_step)]

    @torch.no_grad()
    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        steps = self._learner.steps
        if steps % self._every or steps in (0, self._written):
            return
        stats = self._learner.stats()  # on every rank: a sharded network's are gathered
        if ranks.rank() == 0:
            self._record(stats)
        self._written = steps

    def _record(self, stats: dict[str, float]) -> None:
        if self._path is None:
            for name, value in stats.items():
                if name != "steps" and math.isfinite(value):
                    self._board.add_scalar(f"dspfx/{name}", value, int(stats["steps"]))
            return
        if self._written < 0:
            _write(self._path, "w", [r for r in _records(self._path) if r["steps"] < stats["steps"]])
        _write(self._path, "a", [{name: value if math.isfinite(value) else None for name, value in stats.items()}])


def _records(path: Path) -> list[dict[str, Any]]:
    """What a file of an earlier run holds; a last line that was cut off is left out."""
    if not path.exists():
        return []
    found = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror}); give StatsLog another file.") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("steps"), int):
            found.append(record)
        elif number < len(lines):
            raise StorageError(f"line {number} of {path} is no record of a learner; give StatsLog another file.")
    return found


def _write(path: Path, mode: str, records: list[dict[str, Any]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode) as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror}); give StatsLog another file.") from error
