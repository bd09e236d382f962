"""The command that is made of a run's settings is read back as these settings."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from dspfx.cli.arguments import add_arguments
from dspfx.cli.commands import compress
from dspfx.cli.options import Settings, read_settings


def parsed(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_settings(parser.parse_args([*words, "--out", "runs/x"]))


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--model resnet18 --data images --checkpoint a.pt --budget flops=0.5 latency=0.4 --runtime onnxruntime",
        "--checkpoint a.pt --one-shot --unify 0.5 --block 4x2",
        "--checkpoint a.pt --epochs-dense 3 --no-flip --mean 0.1 0.2 0.3 --limit-train 100 --image-size 48",
        "--strength steered --cycles 2 --distill 0.5 --dense-control --bits 32 --seed 7 --mode exact",
        "--data images --strength 0.01 --unify 0.4 --prune-blocks 0.2 --epochs-unify 3 --label-smoothing 0.1",
    ],
)
def test_a_command_is_read_back_as_its_settings(words: str) -> None:
    settings = parsed(*words.split())
    for arguments in (settings.flat(), json.loads(json.dumps(settings.flat()))):  # as it is, and out of a file
        made = compress(arguments, "cpu", 2)
        assert made[:4] == ["python", "-m", "dspfx", "compress"]
        assert made[-4:] == ["--device", "cpu", "--threads", "2"]
        assert parsed(*made[4:]) == settings


@pytest.mark.parametrize("words", ["--budget flops=0.5", "--one-shot", "--epochs-tune 3 --dense-control --unify 0.5"])
def test_a_fork_is_read_back_too(words: str, tmp_path: Path) -> None:
    source = parsed("--model", "resnet56", "--lr", "0.01")
    (tmp_path / "settings.json").write_text(json.dumps(source.flat()))
    settings = parsed("--fork", str(tmp_path), *words.split())
    assert parsed(*compress(settings.flat(), "cpu", 1)[4:]) == settings


def test_only_what_is_not_usual_is_said() -> None:
    assert " ".join(compress(parsed("--groups", "8").flat(), "cuda", 4)) == (
        "python -m dspfx compress --model resnet20 --groups 8 --budget flops=0.35 --data digits --device cuda "
        "--threads 4"
    )


def test_several_processes_are_started_by_torchrun() -> None:
    words = compress(parsed().flat(), "cpu", 1, processes=4)
    assert words[:5] == ["torchrun", "--nproc-per-node", "4", "-m", "dspfx"]
