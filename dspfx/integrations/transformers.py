"""Group learning in Hugging Face's Trainer: `Trainer(callbacks=[GroupLearning()])`, and nothing else changes."""

from __future__ import annotations

import base64
from typing import Any, Literal

import torch
from safetensors.torch import load, save
from torch import nn

from dspfx.errors import ConfigError
from dspfx.integrations.find import find_prepared
from dspfx.learner import GroupLearner

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ConfigError(
        f"dspfx.integrations.transformers needs the package transformers, which cannot be imported ({error}); run: pip "
        'install "dspfx[integrations]"'
    ) from error

_MOMENTS = ("exp_avg", "exp_avg_sq")


class GroupLearning(TrainerCallback, ExportableState):
    """Learns the groups of the prepared network that the Trainer's model is or holds, while `trainer.train()` runs.

        model.net = dspfx.prepare(model.net, images)
        trainer = Trainer(model, args, train_dataset=..., callbacks=[GroupLearning()])

    `train()` starts a `GroupLearner` (mode="fused") and closes it at its end. Its state stands in every checkpoint's
    trainer_state.json, and `train(resume_from_checkpoint=...)` continues as if never interrupted. The Trainer's log
    gains what `GroupLearner.stats` tells, groups_penalty, groups_entropy, ..., beside every training loss.

    Attributes:
        learner: the GroupLearner of the current or the last run.

    Args:
        network: qualified name of the prepared network, where the model holds several; one callback in a Trainer.
        total_steps: steps until the penalty has its full strength; by default all steps the Trainer will make.
        strength: of `GroupLearner`, as all that follow.
        lr: of the logits.
        start: where the logits begin.
        seed: of the noise.

    Raises, when training begins, what `GroupLearner` and `find_prepared` raise.
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

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **kwargs: Any,
    ) -> None:
        if self.learner is not None:
            self.learner.close()  # of a run that an exception ended
        total_steps = state.max_steps if self.total_steps is None else self.total_steps
        self.learner = GroupLearner(find_prepared(model, self.network), optimizer, total_steps, **self._options)
        # The Trainer itself gives a callback its state back only on demand; a checkpoint made without us has none.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0 and saved["attributes"]:
            self.learner.load_state_dict(_from_json(saved["attributes"]["saved"]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.learner is None or not logs or "loss" not in logs:
            return
        stats = {f"groups_{key}": float(value) for key, value in self.learner.stats().items()}
        logs.update(stats)
        state.log_history[-1].update(stats)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.learner is not None:
            self.learner.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: the arguments, and the learner's state once there is one."""
        args = {"network": self.network, "total_steps": self.total_steps, **self._options}
        return {"args": args, "attributes": {"saved": _to_json(self.learner.state_dict())} if self.learner else {}}


def _to_json(state: dict[str, Any]) -> dict[str, Any]:
    layers = state["layers"]
    tensors = {f"{name}.{key}": value[key].cpu() for name, value in layers.items() for key in _MOMENTS}
    return {
        "version": state["version"],
        "steps": state["steps"],
        "layers": {name: value["steps"] for name, value in layers.items()},
        "tensors": base64.b64encode(save({**tensors, "generator": state["generator"]})).decode(),
    }


def _from_json(saved: dict[str, Any]) -> dict[str, Any]:
    tensors = load(base64.b64decode(saved["tensors"]))
    return {
        "version": saved["version"],
        "steps": saved["steps"],
        "generator": tensors["generator"],
        "layers": {
            name: {"steps": steps, **{key: tensors[f"{name}.{key}"] for key in _MOMENTS}}
            for name, steps in saved["layers"].items()
        },
    }
