from __future__ import annotations

import argparse
import re

import pytest
import torch

from dspfx.cli.arguments import add_arguments
from dspfx.cli.machine import Machine, set_machine
from dspfx.cli.options import Epochs, Settings, read_settings
from dspfx.cli.training import Stage
from dspfx.config import Budget
from dspfx.errors import BudgetError, ConfigError, DspfxError


def parse(line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--out", "runs/x", *line.split()])


def settings(line: str) -> Settings:
    return read_settings(parse(line))


def test_digits_have_quick_defaults() -> None:
    found = settings("")
    assert (found.model, found.data.spec, found.budget) == ("resnet20", "digits", Budget(flops=0.35))
    assert found.epochs == Epochs(10, 6, 10)
    assert found.recipe.batch_size == 64


def test_other_images_have_full_defaults() -> None:
    assert settings("--data folder").epochs == Epochs(120, 60, 60)
    assert settings("--data folder").recipe.batch_size == 128


def test_a_checkpoint_needs_no_dense_training() -> None:
    assert settings("--data folder --checkpoint a.pt").epochs == Epochs(0, 60, 60)
    assert settings("--data folder --checkpoint a.pt --epochs-dense 3").epochs.dense == 3


def test_one_shot_trains_neither_groups_nor_weights() -> None:
    assert settings("--one-shot --epochs-tune 9").epochs == Epochs(10, 0, 0)


def test_several_budgets() -> None:
    found = settings("--budget flops=0.3 params=0.5 latency=0.6").budget
    assert found == Budget(flops=0.3, params=0.5, latency=0.6)


def test_the_runtime_is_eager_unless_another_is_asked_for() -> None:
    assert settings("").runtime == "eager"
    assert settings("--runtime onnxruntime").flat()["runtime"] == "onnxruntime"


def test_networks_are_timed_where_the_runtime_is_for() -> None:
    machine = Machine(torch.device("cuda", 1), 0)
    assert machine.timed_on("inductor") == machine.device
    assert machine.timed_on("onnxruntime") == torch.device("cpu")


def test_control_repeats_learning_and_tuning() -> None:
    found = settings("--epochs-learn 3 --epochs-tune 4 --lr 0.1 --lr-tune 0.01")
    assert found.stage("learn") == Stage("learn", ((3, 0.1),), keep="last")
    assert found.tuning() == [(found.budget, Stage("tune", ((4, 0.01),), first_epoch=3))]
    assert found.stage("control") == Stage("control", ((3, 0.1), (4, 0.01)))


def test_flat_settings_name_every_option_that_matters() -> None:
    options = set(vars(parse(""))) - {"out", "device", "threads", "workers", "dry_run", "json"}
    assert set(settings("").flat()) == options


def test_flat_settings_show_what_was_given() -> None:
    flat = settings("--budget params=0.5 --groups 2 --strength 0.1 --no-flip --mean 0 0 0").flat()
    assert flat["budget"] == ["params=0.5"]
    assert (flat["groups"], flat["strength"], flat["flip"], flat["mean"]) == (2, 0.1, False, (0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("--budget flops=0", BudgetError, "Budget.flops is 0.0; give the fraction that remains, in (0, 1]"),
        ("--model resnet21", ConfigError, "network 'resnet21' is not known; give one of resnet20, resnet32"),
        (
            "--runtime fast",
            ConfigError,
            "runtime is 'fast', which dspfx does not know; give one of 'eager', 'inductor', 'onnxruntime', ",
        ),
        ("--groups 0", ConfigError, "GateConfig.groups is 0; give an integer of at least 1"),
        ("--epochs-learn -1", ConfigError, "--epochs-learn is -1; give 0 or more."),
        ("--lr 0", ConfigError, "--lr is 0.0; give a positive number."),
        ("--lr-tune -1", ConfigError, "--lr-tune is -1.0; give a positive number."),
        ("--one-shot --dense-control", ConfigError, "--one-shot trains none; leave one of them out."),
    ],
)
def test_bad_settings_are_explained(line: str, kind: type[DspfxError], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        settings(line)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--budget flops", "argument --budget: 'flops' is no budget; give flops=0.35 or params=0.35 or latency=0.35"),
        (
            "--budget speed=0.5",
            "argument --budget: 'speed=0.5' is no budget; give flops=0.35 or params=0.35 or latency=0.35",
        ),
        ("--strength much", "argument --strength: 'much' is neither 'auto', 'steered' nor a number"),
    ],
)
def test_unreadable_options_are_explained(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(line)
    assert message in capsys.readouterr().err


def test_threads_and_device_are_set() -> None:
    before = torch.get_num_threads()
    try:
        machine = set_machine(parse("--threads 2 --device cpu --workers 5"))
        assert torch.get_num_threads() == 2
        assert (machine.device, machine.workers) == (torch.device("cpu"), 5)
        assert str(machine) == "device cpu, CPU threads: 2"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--threads 0", "--threads is 0; give at least 1."),
        ("--device toaster", "--device toaster cannot be used ("),
        ("--device cuda:99", "--device cuda:99 cannot be used ("),
    ],
)
def test_machines_that_are_not_there_are_explained(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        set_machine(parse(line))
