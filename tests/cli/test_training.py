from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dspfx.cli.checkpoints import claim_folder, load_state, save_state
from dspfx.cli.images import Look, MemorySplit
from dspfx.cli.scoring import Tally, evaluate, recalibrate
from dspfx.cli.training import Recipe, Stage, Trainer
from dspfx.errors import ConfigError, ModelError, StorageError

STAGE = Stage("dense", ((3, 0.1), (2, 0.05)))


def make_split(count: int, size: int = 8) -> MemorySplit:
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 200, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    images[torch.arange(count), labels] += 50
    return MemorySplit(images, labels, Look(size, (0.5,) * 3, (0.25,) * 3, True, torch.device("cpu"), 0))


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *pool, nn.Dropout(0.2), nn.Linear(8, 3))


def make_trainer(folder: Path, **changes: float) -> Trainer:
    settings: dict[str, float] = {"batch_size": 16, "weight_decay": 1e-3, "label_smoothing": 0.1, "seed": 4}
    folder.mkdir(exist_ok=True)
    return Trainer(Recipe(**(settings | changes)), make_split(70), make_split(33), folder)  # type: ignore[arg-type]


class Killed(Exception):
    pass


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make_trainer(tmp_path / "whole")
    expected = make_model()
    curve = whole.fit(expected, whole.optimizer(expected), STAGE).curve

    parts = make_trainer(tmp_path / "parts")
    interrupted = make_model()
    saved = 0

    def save_twice(path: Path, state: dict[str, object]) -> None:
        nonlocal saved
        saved += 1
        if saved == 3:  # the third epoch is trained, and lost
            raise Killed
        save_state(path, state)

    with monkeypatch.context() as patched:
        patched.setattr("dspfx.cli.training.save_state", save_twice)
        with pytest.raises(Killed):
            parts.fit(interrupted, parts.optimizer(interrupted), STAGE)
    torch.rand(7)
    resumed = make_model()
    again = parts.fit(resumed, parts.optimizer(resumed), STAGE).curve
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in expected.state_dict().items())
    assert [{**e, "seconds": 0} for e in curve] == [{**e, "seconds": 0} for e in again]


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    trainer, first, second = make_trainer(tmp_path), make_model(), make_model()
    trainer.fit(first, trainer.optimizer(first), STAGE)
    before = (tmp_path / "dense.pt").stat().st_mtime_ns
    trainer.fit(second, trainer.optimizer(second), STAGE)
    assert (tmp_path / "dense.pt").stat().st_mtime_ns == before
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())


def test_the_best_epoch_on_validation_is_kept(tmp_path: Path) -> None:
    trainer, model = make_trainer(tmp_path), make_model()
    progress = trainer.fit(model, trainer.optimizer(model), STAGE)
    scores = [(epoch["val_accuracy"], -epoch["val_loss"]) for epoch in progress.curve]
    found = evaluate(model, trainer.val, 16)
    assert len(scores) == 5
    assert (found.accuracy, -found.loss) == max(scores)


def test_the_last_epoch_is_kept_where_asked(tmp_path: Path) -> None:
    trainer, model = make_trainer(tmp_path), make_model()
    progress = trainer.fit(model, trainer.optimizer(model), Stage("learn", ((4, 0.1),), keep="last"))
    assert progress.best_model == {}
    assert evaluate(model, trainer.val, 16).loss == progress.curve[-1]["val_loss"]


def test_learning_rates_follow_one_cosine_a_cycle() -> None:
    assert [STAGE.lr(epoch) for epoch in (0, 1.5, 3, 4, 5)] == pytest.approx([0.1, 0.05, 0.05, 0.025, 0.0])
    assert STAGE.lr(2.999) < 1e-6
    assert Stage("tune", ((0, 0.3), (2, 0.1))).lr(0) == 0.1


def test_epochs_of_one_number_see_the_same_images(tmp_path: Path) -> None:
    """The control's later epochs repeat the images that fine-tuning sees."""
    trainer = make_trainer(tmp_path)
    seen: dict[str, list[Tensor]] = {}

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen[name].append(x.clone())
            return super().forward(x)

    for stage in (Stage("tune", ((2, 0.1),), first_epoch=3), Stage("control", ((3, 0.1), (2, 0.1)))):
        name, model = stage.name, nn.Sequential(nn.Flatten(), Spy(192, 3))
        seen[name] = []
        trainer.fit(model, trainer.optimizer(model), stage)
    assert len(seen["control"]) == 5 * 4
    assert all(map(torch.equal, seen["tune"], seen["control"][12:]))


def test_a_diverging_loss_is_explained(tmp_path: Path) -> None:
    trainer, model = make_trainer(tmp_path), nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.Linear(64, 3))
    message = "The loss is nan in dense 1/1 (learning rate 1e+30); give a smaller --lr, --lr-tune or --strength."
    with pytest.raises(ModelError, match=re.escape(message)):
        trainer.fit(model, trainer.optimizer(model), Stage("dense", ((1, 1e30),)))
    assert not (tmp_path / "dense.pt").exists()


class WithHead(nn.Module):
    """Like googlenet: a tuple in training, a tensor otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.head = nn.Linear(192, 3), nn.Linear(192, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, None]:
        x = x.flatten(1)
        return (self.main(x), self.head(x), None) if self.training else self.main(x)


def test_auxiliary_heads_are_trained_too(tmp_path: Path) -> None:
    trainer, model = make_trainer(tmp_path), WithHead()
    before = model.head.weight.detach().clone()
    trainer.fit(model, trainer.optimizer(model), Stage("dense", ((1, 0.1),)))
    assert not torch.equal(model.head.weight, before)


def test_evaluate_counts_every_image_and_leaves_the_mode() -> None:
    split, model = make_split(33), make_model().train()
    found = evaluate(model, split, 8)
    images, labels = next(split.in_order(33))
    assert model.training
    with torch.no_grad():
        logits = model.eval()(images)
    assert found.images == 33
    assert found.accuracy == int((logits.argmax(1) == labels).sum()) / 33
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-6)


def test_tally_weighs_batches_by_their_size() -> None:
    tally = Tally()
    tally.add(torch.tensor(1.0), torch.eye(3), torch.tensor([0, 1, 2]))
    tally.add(torch.tensor(5.0), torch.eye(3)[:1], torch.tensor([2]))
    assert (tally.score().loss, tally.score().accuracy) == (2.0, 0.75)


def test_recalibrated_batch_norms_hold_the_mean_over_batches() -> None:
    split, model = make_split(40), make_model().train()
    weights = [p.detach().clone() for p in model.parameters()]
    model[1].eval()
    recalibrate(model, split, 8, batches=3)
    conv, norm = model[0], model[1]
    with torch.no_grad():
        outputs = [conv(images) for images, _ in split.in_order(8)][:3]
    mean = torch.stack([out.mean((0, 2, 3)) for out in outputs]).mean(0)
    variance = torch.stack([out.transpose(0, 1).flatten(1).var(1) for out in outputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.momentum == 0.1
    assert [norm.training, model.training, model[5].training] == [False, True, True]
    assert all(map(torch.equal, weights, model.parameters()))


def test_states_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    save_state(path, {"x": torch.ones(2), "y": (1.5, "text")})

    def half(state: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise Killed

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed):
        save_state(path, {"x": torch.zeros(2)})
    state = load_state(path)
    assert state is not None
    assert state["x"].tolist() == [1, 1]
    assert state["y"] == (1.5, "text")


def test_damaged_checkpoints_are_explained(tmp_path: Path) -> None:
    assert load_state(tmp_path / "none.pt") is None
    path = tmp_path / "a.pt"
    path.write_bytes(b"PK half")
    with pytest.raises(StorageError, match=re.escape(f"Checkpoint {path} cannot be read (")):
        load_state(path)


def test_a_folder_belongs_to_one_set_of_settings(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    assert claim_folder(out, {"lr": 0.1, "budget": ["flops=0.35"], "mean": (0.5, 0.5)}) == out / "checkpoints"
    assert claim_folder(out, {"lr": 0.1, "budget": ["flops=0.35"], "mean": (0.5, 0.5)}).is_dir()
    message = (
        f"--out {out} holds a run with --budget flops=0.35, this one has --budget flops=0.3 params=0.5; give another "
        "--out, or delete that folder to start over."
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        claim_folder(out, {"lr": 0.1, "budget": ["flops=0.3", "params=0.5"], "mean": (0.5, 0.5)})
    (out / "settings.json").write_text("{")
    with pytest.raises(StorageError, match=re.escape(f"{out}/settings.json cannot be read (")):
        claim_folder(out, {"lr": 0.1})
    with pytest.raises(ConfigError, match=re.escape(f"--out {out}/settings.json cannot be made (")):
        claim_folder(out / "settings.json", {"lr": 0.1})


def test_batches_of_one_image_are_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("--batch-size is 1; give at least 2, which batch norm needs.")):
        Recipe(batch_size=1, weight_decay=0, label_smoothing=0, seed=0)


def test_small_splits_make_one_step(tmp_path: Path) -> None:
    assert make_trainer(tmp_path).steps == 70 // 16
    trainer, model = make_trainer(tmp_path, batch_size=500), make_model()
    assert trainer.steps == 1
    assert math.isfinite(trainer.fit(model, trainer.optimizer(model), Stage("dense", ((1, 0.1),))).curve[0]["val_loss"])
