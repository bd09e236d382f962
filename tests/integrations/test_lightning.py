"""GroupLearning in Lightning: the same groups as a plain loop, resumed as uninterrupted, closed, logged, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dspfx
from dspfx.errors import ConfigError, ModelError
from tests.integrations import loops

L = pytest.importorskip("lightning.pytorch", reason="needs lightning: the extra dspfx[integrations]")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed.*"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*"),
]


class Lit(L.LightningModule):  # type: ignore[name-defined]
    """Holds a prepared network in an attribute, as a user would."""

    def __init__(self, make: loops.Make = loops.sgd, automatic: bool = True) -> None:
        super().__init__()
        self.net = loops.prepared()
        self.make = make
        self.automatic_optimization = automatic

    def training_step(self, pair: tuple[Tensor, Tensor], index: int) -> Tensor | None:
        x, y = pair
        loss = F.cross_entropy(self.net(x).float(), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return self.make(self)


def fit(
    module: Any,
    callbacks: list[Any],
    folder: Path,
    data: list[tuple[Tensor, Tensor]] | None = None,
    ckpt: Path | None = None,
    **options: Any,
) -> Any:
    options = {"max_epochs": 1, "enable_checkpointing": False, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, loops.loader(data), ckpt_path=ckpt, weights_only=True)
    return trainer


def learning(**options: Any) -> Any:
    from dspfx.integrations.lightning import GroupLearning

    return GroupLearning(**options)


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "clipping": ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
    "bf16": ({"precision": "bf16-mixed"}, {"autocast": torch.bfloat16}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_learns_what_a_plain_loop_learns(name: str, tmp_path: Path) -> None:
    theirs, ours = OPTIONS[name]
    module, callback, reference = Lit(), learning(), loops.prepared()
    fit(module, [callback], tmp_path, **theirs)
    state = loops.plain(reference, **ours)
    loops.assert_same(reference, module.net)
    loops.assert_same_state(state, callback.state_dict())
    assert callback.learner.total_steps == state["steps"]


def test_a_learner_takes_lightnings_optimizer(tmp_path: Path) -> None:
    """Without the callback: as in a loop of one's own, with what `self.optimizers()` returns."""

    class Own(Lit):
        def on_train_start(self) -> None:
            self.learner = dspfx.GroupLearner(self.net, self.optimizers(), loops.STEPS)

    module, reference = Own(), loops.prepared()
    fit(module, [], tmp_path)
    loops.assert_same_state(loops.plain(reference), module.learner.state_dict())
    loops.assert_same(reference, module.net)


def test_manual_optimization(tmp_path: Path) -> None:
    module, callback, reference = Lit(automatic=False), learning(), loops.prepared()
    fit(module, [callback], tmp_path)
    loops.plain(reference)
    loops.assert_same(reference, module.net)


def test_the_module_itself_may_be_the_prepared_network(tmp_path: Path) -> None:
    class Whole(Lit):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, pair: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self(pair[0]), pair[1])

    module = Whole()
    torch.manual_seed(3)
    module.net = loops.Tiny()
    module = dspfx.prepare(module, loops.batch(0)[0])
    callback, reference = learning(), loops.prepared()
    fit(module, [callback], tmp_path)
    loops.plain(reference)
    loops.assert_same(reference, module.net)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize("steps", [3, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(steps: int, tmp_path: Path) -> None:
    """Also in the middle of an epoch, with an optimizer that has state of its own, and a schedule."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def make(net: nn.Module) -> Any:
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    data = loops.samples(1) * 3  # Lightning does not skip what an interrupted epoch has seen: let all batches be one
    straight, callback = Lit(make), learning()

    def keeper() -> Any:
        return ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=steps, save_top_k=-1)

    fit(straight, [callback, keeper()], tmp_path, data, max_epochs=2, enable_checkpointing=True)
    state = callback.state_dict()
    second, again = Lit(make), learning(seed=9)
    path = tmp_path / f"step={steps}.ckpt"
    fit(second, [again, keeper()], tmp_path, data, path, max_epochs=2, enable_checkpointing=True)
    loops.assert_same(straight.net, second.net)
    loops.assert_same_state(state, again.state_dict())


def test_a_checkpoint_without_a_learner_starts_one(tmp_path: Path) -> None:
    trainer = fit(Lit(), [], tmp_path)
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    callback = learning()
    fit(Lit(), [callback], tmp_path, ckpt=tmp_path / "dense.ckpt", max_epochs=2)
    assert callback.learner.steps == loops.STEPS


def test_a_second_fit_starts_anew_and_a_validated_checkpoint_is_not_taken_for_a_resumed_one(tmp_path: Path) -> None:
    callback = learning()
    trainer = fit(Lit(), [callback], tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    first = callback.learner
    callback.load_state_dict(callback.state_dict())  # what trainer.validate(ckpt_path=...) does
    fit(Lit(), [callback], tmp_path)
    assert callback.learner is not first
    assert callback.learner.steps == loops.STEPS


def test_it_is_closed_after_an_exception_too(tmp_path: Path) -> None:
    class Failing(Lit):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("the disk is full")

    module, callback = Failing(), learning()
    with pytest.raises(RuntimeError, match="the disk is full"):
        fit(module, [callback], tmp_path)
    assert callback.learner.steps == 1
    optimizer = module.trainer.optimizers[0]
    optimizer.step()
    assert callback.learner.steps == 1


def test_the_statistics_are_logged(tmp_path: Path) -> None:
    callback = learning()
    trainer = fit(Lit(), [callback], tmp_path)
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    stats = callback.learner.stats()
    assert logged.keys() == {f"groups/{key}" for key in stats}
    assert logged["groups/penalty"] == pytest.approx(stats["penalty"])
    assert logged["groups/steps"] == loops.STEPS


def test_an_average_of_weights_beside_it_changes_nothing_that_is_learned(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    callback, reference = learning(), loops.prepared()
    fit(Lit(), [EMAWeightAveraging(decay=0.5), callback], tmp_path)
    loops.assert_same_state(loops.plain(reference), callback.state_dict())


def test_an_average_copied_into_a_pruned_network_leaves_its_gates(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = Lit()
    fit(module, [learning()], tmp_path)
    dspfx.prune(module.net, dspfx.Budget(flops=0.4))
    gates = [key for key in module.net.state_dict() if key.endswith(("gate_group", "gate_keep"))]
    before = loops.tensors(module.net)
    fit(module, [EMAWeightAveraging(use_buffers=False, decay=0.9)], tmp_path, max_epochs=2)
    after = loops.tensors(module.net)
    assert all(torch.equal(before[key], after[key]) for key in gates)
    assert not torch.equal(before["b.weight"], after["b.weight"])
    x, _ = loops.batch(9)
    expected = module.net.eval()(x).detach()
    small = dspfx.lower(module.net, tune=None)
    assert torch.allclose(small(x), expected, atol=1e-5 * float(expected.abs().max()))


def two() -> Any:
    module = Lit()
    module.other = loops.prepared()
    return module


def test_of_several_networks_one_is_named(tmp_path: Path) -> None:
    module, reference = two(), loops.prepared()
    with pytest.raises(ConfigError) as caught:
        fit(module, [learning()], tmp_path)
    assert str(caught.value) == (
        "Lit holds 2 prepared networks (net, other); name the one that is meant: network='net'."
    )
    callbacks = [learning(network="net"), learning(network="other")]
    fit(module, callbacks, tmp_path)
    loops.plain(reference)
    loops.assert_same(reference, module.net)
    assert {layer["steps"] for layer in callbacks[1].state_dict()["layers"].values()} == {0}  # they see no gradient


def test_of_several_optimizers_the_one_that_owns_the_network_is_hooked(tmp_path: Path) -> None:
    class Pair(Lit):
        def training_step(self, pair: tuple[Tensor, Tensor], index: int) -> None:
            other, own = self.optimizers()
            own.zero_grad()
            self.manual_backward(F.cross_entropy(self.net(pair[0]), pair[1]))
            own.step()
            other.step()

        def configure_optimizers(self) -> Any:
            return [loops.sgd(self.other), loops.sgd(self.net)]

    module, callback, reference = Pair(automatic=False), learning(network="net"), loops.prepared()
    module.other = loops.Tiny()
    callback.total_steps = loops.STEPS
    fit(module, [callback], tmp_path)
    loops.plain(reference)
    loops.assert_same(reference, module.net)


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    module = Lit()
    module.net = loops.Tiny()
    with pytest.raises(ModelError) as caught:
        fit(module, [learning()], tmp_path)
    assert str(caught.value) == "Lit holds no prepared network; put what dspfx.prepare returns into it first."
    with pytest.raises(ConfigError) as refused:
        fit(Lit(), [learning()], tmp_path, max_epochs=-1)
    assert str(refused.value) == (
        "The Trainer expects inf optimizer steps (max_epochs=-1, max_steps=-1); say over how many the penalty shall "
        "grow: GroupLearning(total_steps=N)."
    )
    with pytest.raises(ConfigError) as wrong:
        fit(Lit(), [learning(network="backbone")], tmp_path)
    assert str(wrong.value) == "Lit has no module 'backbone' (Lit has no attribute `backbone`)."
