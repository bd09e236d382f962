"""Recipes on digits of 8x8: forks of a run, pruning in cycles, distillation, training from scratch."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

import dspfx
from benchmarks.resume_kills import DIGITS
from dspfx.__main__ import main
from dspfx.cli import models
from dspfx.cli.checkpoints import load_state
from dspfx.cli.distill import Distill, Teacher
from dspfx.cli.training import Stage
from dspfx.config import Budget
from dspfx.errors import ConfigError
from tests.cli import resume
from tests.cli.resume import Kill, Server, contents, differences
from tests.cli.test_options import settings
from tests.cli.test_training import WithHead, make_model, make_trainer

MACHINE = ["--threads", "1", "--device", "cpu"]
NETWORKS = ("dense.safetensors", "pruned.safetensors", "network.safetensors")
COMMAND = [*DIGITS, "--budget", "flops=0.6"]


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", resume.build)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("source") / "out"
    assert main([*COMMAND, "--out", str(out)]) == 0
    return out


def read(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def forking(source: Path, *more: str) -> list[str]:
    return ["compress", "--fork", str(source), *MACHINE, *more]


def fork(source: Path, out: Path, *more: str) -> list[str]:
    return [*forking(source, *more), "--out", str(out)]


def compare(a: Path, b: Path) -> list[str]:
    """Where two runs differ, in what is not the name of the other run.

    Of networks the contents are compared: in which order a file holds them is a matter of each process's hashes.
    """
    found = contents(a), contents(b)
    for out, files in zip((a, b), found, strict=True):
        for name in NETWORKS:
            with safe_open(out / name, "pt") as file:
                files[name] = {"": file.metadata(), **{key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118
        files["settings.json"] = {**json.loads(files["settings.json"]), "fork": None}
        files["results.json"]["arguments"]["fork"] = None
        assert "compress" in files["results.json"].pop("command")  # it names the fork
        assert b"<html" in files.pop("report.html")  # and so does the page
    return differences(*found)


# Forks


def test_a_fork_with_everything_as_before_ends_like_its_source(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    assert main(fork(source, tmp_path / "out")) == 0
    assert compare(tmp_path / "out", source) == []
    assert differences(contents(source), before) == []


def test_a_fork_goes_on_from_what_was_learned_to_a_budget_of_its_own(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"  # a source whose tuning and results are missing
    shutil.copytree(source, half)
    for name in ("results.json", "checkpoints/tune.pt", "checkpoints/pruned.pt"):
        (half / name).unlink()
    before, out = contents(half), tmp_path / "out"
    more = ["--budget", "params=0.7", "--epochs-tune", "1", "--lr-tune", "0.01"]
    assert main(fork(half, out, *more)) == 0
    assert differences(contents(half), before) == []
    found, theirs = read(out), read(source)
    said = capsys.readouterr().out
    assert "dense: 2 of 2 epochs found in" in said
    assert "learn: 2 of 2 epochs found in" in said
    assert f"The dense and the learned network are those of {half} (--fork)." in said
    assert [len(found["curves"][name]) for name in ("dense", "learn", "tune")] == [2, 2, 1]
    assert found["curves"]["learn"] == theirs["curves"]["learn"]
    assert found["networks"]["dense"]["test"] == theirs["networks"]["dense"]["test"]
    assert found["left"]["params"] <= 0.7 < found["left"]["params"] + 0.1
    arguments = {**theirs["arguments"], "fork": str(half), "budget": ["params=0.7"], "epochs_tune": 1, "lr_tune": 0.01}
    assert found["arguments"] == arguments
    assert main(fork(half, out, *more)) == 0
    assert "This run is finished" in capsys.readouterr().out


def test_one_shot_forks_only_prune(source: Path, tmp_path: Path) -> None:
    assert main(fork(source, tmp_path / "a", "--one-shot", "--budget", "flops=0.8")) == 0
    assert [len(curve) for curve in read(tmp_path / "a")["curves"].values()] == [2, 2, 0]
    assert main(fork(tmp_path / "a", tmp_path / "b", "--epochs-tune", "1")) == 0  # a fork of a fork tunes again
    found = read(tmp_path / "b")
    assert [len(curve) for curve in found["curves"].values()] == [2, 2, 1]
    assert found["arguments"]["budget"] == ["flops=0.8"]
    assert found["arguments"]["one_shot"] is False


def test_a_fork_that_was_killed_goes_on(source: Path, tmp_path: Path) -> None:
    with Server(tmp_path, forking(source)) as server:
        for kill in (Kill("half a text"), Kill("replace", 2), Kill("replace", 3), Kill("step", 8)):
            assert server.start(tmp_path / "out", kill).signal == 9
        assert server.start(tmp_path / "out").code == 0
    assert compare(tmp_path / "out", source) == []


def refused(capsys: pytest.CaptureFixture[str], command: list[str]) -> str:
    assert main(command) == 2
    return capsys.readouterr().err.removeprefix("dspfx compress: error: ").rstrip()


def test_forks_that_cannot_be_are_explained(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half, out = tmp_path / "half", tmp_path / "out"
    assert refused(capsys, fork(tmp_path, out)) == (
        f"--fork {tmp_path} holds no settings.json; give the --out of a run of `compress`."
    )
    assert refused(capsys, fork(source, out, "--groups", "2")) == (
        f"--fork {source} has learned with --groups 4, this run has --groups 2; leave --groups out, or leave --fork "
        "out to learn anew."
    )
    assert "with --mean 0.485 0.456 0.406, this run has --mean 0.0 0.0 0.0;" in refused(
        capsys, fork(source, out, "--mean", "0", "0", "0")
    )
    assert not out.exists()
    shutil.copytree(source, half)
    state = load_state(half / "checkpoints" / "learn.pt")
    assert state is not None
    del state["progress"]["curve"][-1]
    torch.save(state, half / "checkpoints" / "learn.pt")
    advice = "start that run again, to the end of learning at least, and then this one."
    assert refused(capsys, fork(half, out)) == (
        f"--fork {half} has trained 1 of the 2 epochs of its stage 'learn'; {advice}"
    )
    (half / "checkpoints" / "dense.pt").unlink()
    assert refused(capsys, fork(half, tmp_path / "other")) == (
        f"--fork {half} has trained 0 of the 2 epochs of its stage 'dense'; {advice}"
    )
    assert "--out" in refused(capsys, fork(source, source))
    shutil.copytree(source / "checkpoints", half / "checkpoints", dirs_exist_ok=True)
    assert main(fork(half, out, "--groups", "4")) == 0  # once that is done, the same command goes on


def test_runs_of_an_older_version_can_be_forked_and_go_on(source: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(source, old)
    settings = json.loads((old / "settings.json").read_text())
    for name in ("fork", "cycles", "distill", "temperature"):
        del settings[name]
    (old / "settings.json").write_text(json.dumps(settings))
    assert main([*COMMAND, "--out", str(old)]) == 0
    assert main(fork(old, tmp_path / "out")) == 0
    assert compare(tmp_path / "out", source) == []


# Cycles


def test_budgets_fall_geometrically_and_every_cycle_has_its_epochs() -> None:
    found = settings("--cycles 3 --epochs-learn 5 --epochs-tune 8 --lr-tune 0.2 --budget flops=0.125 params=0.5")
    budgets, stages = zip(*found.tuning(), strict=True)
    assert [budget.flops for budget in budgets] == pytest.approx([0.5, 0.25, 0.125])
    assert [budget.params for budget in budgets] == pytest.approx([2 ** (-1 / 3), 2 ** (-2 / 3), 0.5])
    assert budgets[-1] == Budget(flops=0.125, params=0.5)
    assert stages == (
        Stage("tune-1", ((2, 0.2),), first_epoch=5),
        Stage("tune-2", ((3, 0.2),), first_epoch=7),
        Stage("tune-3", ((3, 0.2),), first_epoch=10),
    )
    assert found.stage("control") == Stage("control", ((5, 0.05), (2, 0.2), (3, 0.2), (3, 0.2)))


@pytest.mark.parametrize("line", ["--cycles 0", "--cycles 3 --epochs-tune 2", "--cycles 2 --one-shot"])
def test_cycles_without_epochs_are_refused(line: str) -> None:
    with pytest.raises(ConfigError, match=r"^--cycles is \d, with \d+ epochs of fine-tuning; give at least 1, and an "):
        settings(line)


def test_every_cycle_prunes_what_the_one_before_left(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(fork(source, out, "--cycles", "2", "--budget", "flops=0.5")) == 0
    first, second = (load_state(out / "checkpoints" / f"pruned-{number}.pt") for number in (1, 2))
    assert first is not None
    assert second is not None
    results = read(out)
    assert (out / "plan.json").read_text() == second["plan"]
    assert 0.6 < json.loads(first["plan"])["flops_left"] <= 0.5**0.5
    assert 0.4 < results["left"]["flops"] <= 0.5
    assert len(results["curves"]["tune"]) == 2
    gone = 0
    for key, mask in first["model"].items():
        if key.endswith("gate_keep"):
            assert not (second["model"][key] & ~mask).any()
            gone += int((mask & ~second["model"][key]).sum())
    assert gone > 0


def test_cycles_that_are_killed_go_on(source: Path, tmp_path: Path) -> None:
    """Killed in each cycle's pruning and tuning; steps are counted from the start of each process."""
    command = forking(source, "--cycles", "2", "--epochs-tune", "4", "--budget", "flops=0.4")
    with Server(tmp_path, command) as server:
        assert server.start(tmp_path / "whole").code == 0
        out = tmp_path / "out"
        half = Kill("half a checkpoint")  # of fine-tuning, then of what is pruned
        kills = (Kill("step", 8), half, Kill("pruned"), half, Kill("step", 7), half)
        for kill in kills:
            assert server.start(out, kill).signal == 9, kill
        assert server.start(out).code == 0
    assert differences(contents(out), contents(tmp_path / "whole")) == []


# Distillation


def softened(logits: Tensor, temperature: float) -> list[list[float]]:
    found: list[list[float]] = F.softmax(logits.detach().double() / temperature, dim=1).tolist()
    return found


def test_the_loss_is_the_formula(tmp_path: Path) -> None:
    """(1 - a) CE + a T^2 KL(teacher || student) of the main logits, and auxiliary heads as without a teacher."""
    torch.manual_seed(0)
    network, student, share, temperature = WithHead(), WithHead(), 0.3, 2.5
    images, labels = torch.randn(5, 3, 8, 8), torch.arange(5) % 3
    teacher = Teacher(network, Distill(share, temperature))
    loss, logits = make_trainer(tmp_path)._taught(student, teacher, images, labels)
    main_logits, head, _ = student(images)
    divergence = 0.0
    rows = softened(network.main(images.flatten(1)), temperature), softened(main_logits, temperature)
    for ours, theirs in zip(*rows, strict=True):
        divergence += sum(p * math.log(p / q) for p, q in zip(ours, theirs, strict=True)) / len(images)
    entropy, of_head = (F.cross_entropy(x, labels, label_smoothing=0.1) for x in (main_logits, head))
    expected = (1 - share) * entropy.item() + share * temperature**2 * divergence + 0.3 * of_head.item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(logits, main_logits)
    loss.backward()
    assert all(p.grad is None for p in network.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_a_student_is_drawn_to_a_teacher_that_does_not_change(tmp_path: Path) -> None:
    """With the whole loss from the teacher, labels do not matter."""
    trainer, teacher, student = make_trainer(tmp_path), make_model(), make_model()
    trainer.fit(teacher, trainer.optimizer(teacher), Stage("dense", ((6, 0.1),)))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    asked = Teacher(teacher, Distill(1.0, 1.0))
    images = next(trainer.val.in_order(16))[0]
    distance = asked.divergence(student.eval()(images), images).item()
    stage = Stage("tune", ((8, 0.1),), keep="last")
    trainer.fit(student, trainer.optimizer(student), stage, teacher=asked)
    assert asked.divergence(student.eval()(images), images).item() < 0.2 * distance
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not teacher.training


def test_learning_in_exact_mode_can_have_a_teacher(tmp_path: Path) -> None:
    """The learner's second pass asks the teacher too, and the gradient of both passes is of the same loss."""
    curves = {}
    for share in (0.0, 0.5):
        torch.manual_seed(0)
        gm = dspfx.prepare(resume.build("", 3), torch.zeros(2, 3, 8, 8))
        (tmp_path / str(share)).mkdir()
        trainer, calls = make_trainer(tmp_path / str(share)), 0

        class Counted(Teacher):
            def divergence(self, logits: Tensor, images: Tensor) -> Tensor:
                nonlocal calls
                calls += 1
                return super().divergence(logits, images)

        optimizer, stage = trainer.optimizer(gm), Stage("learn", ((2, 0.1),))
        with dspfx.GroupLearner(gm, optimizer, 2 * trainer.steps, mode="exact") as learner:
            teacher = Counted(make_model(), Distill(share, 4.0))
            curves[share] = trainer.fit(gm, optimizer, stage, learner, teacher).curve
        assert learner.steps == 2 * trainer.steps
        assert calls == 2 * learner.steps
    assert curves[0.5][-1]["train_loss"] != curves[0.0][-1]["train_loss"]


def test_distillation_is_resumed_and_changes_fine_tuning_alone(source: Path, tmp_path: Path) -> None:
    command = forking(source, "--distill", "0.5", "--dense-control")
    with Server(tmp_path, command) as server:
        assert server.start(tmp_path / "whole").code == 0
        assert server.start(tmp_path / "out", Kill("half a checkpoint", 3)).signal == 9
        assert server.start(tmp_path / "out").code == 0
    assert differences(contents(tmp_path / "out"), contents(tmp_path / "whole")) == []
    found, plain = read(tmp_path / "out"), read(source)
    assert found["left"] == plain["left"]
    assert found["curves"]["learn"] == plain["curves"]["learn"]
    assert found["curves"]["tune"][0]["train_loss"] != plain["curves"]["tune"][0]["train_loss"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--distill 1.5", "--distill is 1.5; give the teacher's share of the loss, in [0, 1]."),
        ("--distill 0.5 --temperature 0", "--temperature is 0.0; give a positive number."),
        ("--distill 0.5 --one-shot", "--distill is for fine-tuning, and there is none; give --epochs-tune, or leave"),
        ("--distill 0.5 --epochs-dense 0", "--distill needs a trained dense network to learn from, and this one is"),
    ],
)
def test_teachers_that_teach_nothing_are_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings(line)


# From scratch, and without any training


def test_from_scratch_groups_are_learned_from_random_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--epochs-dense", "0", "--dense-control", "--out", str(tmp_path)]) == 0
    results = read(tmp_path)
    assert {name: len(curve) for name, curve in results["curves"].items()} == {
        "dense": 0,
        "learn": 2,
        "tune": 2,
        "control": 4,
    }
    torch.manual_seed(0)
    start = resume.build("", 10)
    control = load_state(tmp_path / "checkpoints" / "control.pt")
    assert control is not None
    shown = capsys.readouterr().out
    assert "The dense network was never trained: groups were learned from scratch, or not at all." in shown
    dense = safetensors.torch.load_file(tmp_path / "dense.safetensors")
    assert all(torch.equal(value, dense[key]) for key, value in start.state_dict().items())
    assert not torch.equal(control["model"]["0.weight"], dense["0.weight"])
    assert results["left"]["flops"] <= 0.6


def test_one_shot_of_a_trained_network_is_stated_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--one-shot", "--out", str(tmp_path)]) == 0
    results = read(tmp_path)
    assert [len(curve) for curve in results["curves"].values()] == [2, 0, 0]
    assert "never trained" not in capsys.readouterr().out
    pruned = load_state(tmp_path / "checkpoints" / "pruned.pt")
    assert pruned is not None
    plan = json.loads(pruned["plan"])
    layer = plan["layers"][0]
    groups = [len(group["filters"]) for group in layer["groups"]]
    assert sum(size > 0 for size in groups) > 1  # clustered: logits of zeros would put all filters into one group
    assert not pruned["model"][f"{layer['name']}.gate_logits"].any()


def test_help_teaches_the_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["compress", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for phrase in (
        "groups that were learned once serve many budgets",
        "budgets fall geometrically, with 3 to flops=0.35 by 0.70, 0.50, 0.35.",
        "0 without --checkpoint is training from scratch",
        "no learning and no fine-tuning: filters are clustered, pruned, and batch norms measured anew.",
        "this share of the loss is not about the labels but about the dense network's answers",
    ):
        assert phrase in text
