from __future__ import annotations

import argparse
import re

import pytest

from dspfx.__main__ import EPILOG, main, make_parser
from dspfx.cli import compress
from dspfx.errors import ConfigError


def raising(error: BaseException):  # type: ignore[no-untyped-def]
    def run(args: argparse.Namespace) -> None:
        raise error

    return run


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compress, "run", raising(ConfigError("--x is 1; give 2.")))
    assert main(["compress", "--out", "runs/x"]) == 2
    assert capsys.readouterr().err == "dspfx compress: error: --x is 1; give 2.\n"


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compress, "run", raising(KeyboardInterrupt()))
    assert main(["compress", "--out", "runs/x"]) == 130
    expected = "\ndspfx compress: interrupted; the same command goes on from the last finished epoch.\n"
    assert capsys.readouterr().err == expected


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress, "run", raising(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["compress", "--out", "runs/x"])


def test_examples_in_the_help_are_commands() -> None:
    text = re.sub(r"\\\n *", "", f"{EPILOG}\n{compress.EXAMPLES}")
    examples = [
        re.split(r" {3,}", line.strip())[0].split() for line in text.splitlines() if line.startswith("  dspfx ")
    ]
    assert len(examples) == 8
    for _, *words in examples:
        assert make_parser().parse_args(words).command == words[0]


@pytest.mark.parametrize("command", ["compress", "profile", "benchmark", "estimate"])
def test_help_names_every_kind_of_model(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "vgg16_bn_cifar (built in" in text
    assert "any classification name of torchvision" in text
