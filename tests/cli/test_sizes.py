"""`python -m dspfx sizes`: bytes that add up, for a named network and for a pruned one from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dspfx
from dspfx.__main__ import main
from dspfx.cli import models

SMALL = ("sizes", "resnet20")


def test_the_table_of_a_named_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--bits", "32,4", "--block", "4x4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "tensors"
    rows: dict[str, list[int]] = {}
    for line in lines[2:-1]:
        name, *numbers = (part.strip() for part in line.split("  ") if part.strip())
        rows[name] = [int(n.replace(",", "")) for n in numbers]
    assert next(iter(rows)) == "conv1.weight"
    assert rows["conv1.weight"][:2] == [4 * 432, 2 * 432]
    for column in range(5):  # what is not in a row of its own is the header
        parts = sum(row[column] for name, row in rows.items() if name != "file")
        assert 0 < rows["file"][column] - parts < 12_000 or column == 2
    assert rows["file"][4] < rows["file"][3] < rows["file"][0]
    assert lines[-1].startswith("to float32")


def test_a_pruned_network_from_a_file_is_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gm = dspfx.prepare(models.build("resnet20", 10), torch.zeros(1, 3, 32, 32))
    dspfx.prune(gm, dspfx.Budget(flops=0.4))
    dspfx.unify(gm, dspfx.BlockConfig((4, 4), 0.3, 0.5))
    dspfx.save(gm, tmp_path / "pruned.safetensors")
    record = tmp_path / "sizes.json"
    command = ["sizes", str(tmp_path / "pruned.safetensors"), "--against", "resnet20", "--bits", "32,5"]
    assert main([*command, "--json", str(record)]) == 0
    found: dict[str, Any] = json.loads(record.read_text())["bytes"]["file"]
    assert found["dspfx, 32 bits"] < 0.3 * found["float32"]
    assert found["dspfx, 5 bits"] < 0.1 * found["float32"]
    own = tmp_path / "own.safetensors"
    assert dspfx.write_compressed(gm, own, bits=5).size == own.stat().st_size == found["dspfx, 5 bits"]


@pytest.mark.parametrize(("arguments", "words"), [(["--bits", "9"], "--bits 9"), (["--block", "4by4"], "'4by4'")])
def test_bad_options_are_named(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert words in capsys.readouterr().err
