"""Group learning in Lightning: `Trainer(callbacks=[GroupLearning()])`, the LightningModule as it is."""

from __future__ import annotations

import math
from typing import Any, Literal

from dspfx.errors import ConfigError
from dspfx.integrations.find import find_prepared
from dspfx.learner import GroupLearner

try:
    import lightning.pytorch as pl
except ImportError as error:
    raise ConfigError(
        f"dspfx.integrations.lightning needs the package lightning, which cannot be imported ({error}); run: pip "
        'install "dspfx[integrations]"'
    ) from error


class GroupLearning(pl.Callback):
    """Learns the groups of the prepared network that a LightningModule is or holds, while `trainer.fit` trains it.

        class Classifier(L.LightningModule):
            def __init__(self, network):
                self.net = dspfx.prepare(network, images)
            ...                                                # configure_optimizers: self.parameters(), as always
        trainer = L.Trainer(max_epochs=90, callbacks=[GroupLearning()])

    Every `fit` starts a `GroupLearner` (mode="fused") when the optimizers are there and closes it at its end, also
    after an exception. Checkpoints hold its state, and `fit(ckpt_path=...)` continues as if never interrupted. Any
    precision, accumulation of gradients and clipping, of automatic as of manual optimization, are Lightning's own.
    At the end of an epoch what `GroupLearner.stats` tells is logged: `groups/penalty`, `groups/entropy`, ....

    Attributes:
        learner: the GroupLearner of the current or the last fit.

    Args:
        network: qualified name of the prepared network, where the LightningModule holds several; one callback each.
        total_steps: steps until the penalty has its full strength; by default all steps the Trainer will make.
        strength: of `GroupLearner`, as all that follow.
        lr: of the logits.
        start: where the logits begin.
        seed: of the noise.

    Raises, when `fit` begins:
        ConfigError: the Trainer does not know how many steps it will make, or the network is not determined.
        ModelError, MismatchError: as `GroupLearner` does.
    """

    def __init__(
        self,
        network: str | None = None,
        total_steps: int | None = None,
        *,
        strength: float | Literal["auto"] = "auto",
        lr: float = 1e-3,
        start: Literal["clusters", "zeros"] = "clusters",
        seed: int = 0,
    ) -> None:
        self.network, self.total_steps = network, total_steps
        self.learner: GroupLearner | None = None
        self._options: dict[str, Any] = {"strength": strength, "lr": lr, "start": start, "seed": seed}
        self._is_open = False
        self._saved: dict[str, Any] | None = None  # a checkpoint's, read before there is a learner

    @property
    def state_key(self) -> str:
        """One entry in a checkpoint for each network."""
        return self._generate_state_key(network=self.network)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._saved = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        gm = find_prepared(pl_module, self.network)
        weights = {id(p) for p in gm.parameters()}
        owners = [o for o in trainer.optimizers if any(id(p) in weights for g in o.param_groups for p in g["params"])]
        if not trainer.optimizers:
            raise ConfigError(f"{type(pl_module).__name__}.configure_optimizers returned no optimizer to learn beside.")
        total_steps = _total_steps(trainer) if self.total_steps is None else self.total_steps
        self.learner = GroupLearner(gm, (owners or trainer.optimizers)[0], total_steps, **self._options)
        self._is_open = True
        if self._saved is not None:
            self.learner.load_state_dict(self._saved)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.learner is not None and not trainer.barebones:
            prefix = f"groups/{self.network}/" if self.network else "groups/"
            pl_module.log_dict({prefix + key: float(value) for key, value in self.learner.stats().items()})

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.learner is None else self.learner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict
        if self.learner is not None and self._is_open:  # strategies that restore after the optimizers were made
            self.learner.load_state_dict(state_dict)

    def _close(self) -> None:
        self._is_open = False
        if self.learner is not None:
            self.learner.close()


def _total_steps(trainer: pl.Trainer) -> int:
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps) or steps < 1:
        raise ConfigError(
            f"The Trainer expects {steps} optimizer steps (max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps}); say over how many the penalty shall grow: GroupLearning(total_steps=N)."
        )
    return int(steps)
