"""GroupLearning in Hugging Face's Trainer: the groups of a plain loop, resumed as uninterrupted, closed, logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dspfx
from dspfx.errors import ModelError
from tests.integrations import loops

transformers = pytest.importorskip("transformers", reason="needs transformers: the extra dspfx[integrations]")
pytest.importorskip("accelerate", reason="needs accelerate: the extra dspfx[integrations]")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step.*"),
]


class WithLoss(nn.Module):
    """What the Trainer wants of a model that is not its own."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = loops.prepared() if net is None else net

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


def learning(**options: Any) -> Any:
    from dspfx.integrations.transformers import GroupLearning

    return GroupLearning(**options)


class InOrder(transformers.Trainer):  # type: ignore[name-defined]
    """Takes the samples in their order, as the plain loop does."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model: nn.Module, callbacks: list[Any], folder: Path, make: loops.Make = loops.sgd, **options: Any) -> Any:
    arguments = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        **options,
    }
    data = [{"pixel_values": x, "labels": y} for x, y in loops.samples()]
    optimizer = make(model)
    schedule = arguments.pop("schedule", None) or torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    return InOrder(
        model,
        transformers.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=data,
        callbacks=callbacks,
        optimizers=(optimizer, schedule),
    )


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
    "clipping": ({"max_grad_norm": 0.05}, {"clip": 0.05}),
    "bf16": ({"bf16": True}, {"autocast": torch.bfloat16}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_learns_what_a_plain_loop_learns(name: str, tmp_path: Path) -> None:
    theirs, ours = OPTIONS[name]
    model, callback, reference = WithLoss(), learning(), loops.prepared()
    trainer(model, [callback], tmp_path, **theirs).train()
    state = loops.plain(reference, **ours)
    loops.assert_same(reference, model.net)
    loops.assert_same_state(state, callback.learner.state_dict())
    assert callback.learner.total_steps == state["steps"]
    callback.learner._optimizer.step()
    assert callback.learner.steps == state["steps"]  # closed


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.01)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("step", [4, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(step: int, restore: bool, tmp_path: Path) -> None:
    """Also in the middle of an epoch, and where the Trainer makes the callback anew."""
    options: dict[str, Any] = {
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_strategy": "steps",
    }
    options |= {"logging_steps": 1, "restore_callback_states_from_checkpoint": restore}
    straight, callback = WithLoss(), learning()
    first = trainer(straight, [callback], tmp_path, adamw, **options)
    first.train()
    again = learning() if restore else learning(seed=9)
    model = WithLoss()
    second = trainer(model, [again], tmp_path, adamw, **options)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    (resumed,) = [c for c in second.callback_handler.callbacks if type(c) is type(callback)]
    loops.assert_same(straight.net, model.net)
    loops.assert_same_state(callback.learner.state_dict(), resumed.learner.state_dict())
    logs = [[entry for entry in t.state.log_history if "groups_penalty" in entry] for t in (first, second)]
    assert [entry["step"] for entry in logs[0]] == list(range(1, 9))
    keys = ("step", "loss", "groups_penalty", "groups_entropy", "groups_steps")
    assert [[e[k] for k in keys] for e in logs[0]] == [[e[k] for k in keys] for e in logs[1]]
    assert logs[0][-1]["groups_steps"] == 8


def test_a_checkpoint_without_a_learner_starts_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(WithLoss(), [], tmp_path, **options).train()
    callback = learning()
    resumed = trainer(WithLoss(), [callback], tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.learner.steps == 2


def test_a_second_run_starts_anew(tmp_path: Path) -> None:
    callback = learning()
    runs = trainer(WithLoss(), [callback], tmp_path)
    runs.train()
    first = callback.learner
    runs.train()
    assert callback.learner is not first
    assert (first.steps, callback.learner.steps) == (loops.STEPS, loops.STEPS)


def test_a_model_of_transformers_is_prepared_behind_its_logits(tmp_path: Path) -> None:
    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.model(pixel_values=pixel_values).logits

    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    images = loops.batch(0)[0]
    model = Logits(transformers.ResNetForImageClassification(config))
    net = dspfx.prepare(model, images)
    assert torch.equal(net.eval()(images), model.eval()(images))
    callback = learning()
    trainer(WithLoss(net), [callback], tmp_path).train()
    assert callback.learner.steps == loops.STEPS
    dspfx.prune(net, dspfx.Budget(flops=0.5))
    small = dspfx.lower(net, tune=None)
    expected = net.eval()(images).detach()
    assert torch.allclose(small(images), expected, atol=1e-5 * float(expected.abs().max()))


def test_a_model_without_a_prepared_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        trainer(WithLoss(loops.Tiny()), [learning()], tmp_path).train()
    assert str(caught.value) == "WithLoss holds no prepared network; put what dspfx.prepare returns into it first."
