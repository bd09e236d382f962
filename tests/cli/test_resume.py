"""A run that is killed, wherever that happens, ends like one that nobody killed; interrupts say how to go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.resume_kills import DIGITS, FILES, kill_and_compare, write_images
from dspfx.cli import checkpoints
from dspfx.cli.checkpoints import claim_folder, load_state, save_state, write_atomically, write_text
from dspfx.errors import StorageError
from tests.cli.resume import Kill, Server, contents, differences

# One run, killed in every stage: what ends each start.
KILLS = (
    Kill("half a text"),  # settings.json
    Kill("step", 3),  # the dense network's first epoch
    Kill("half a checkpoint", 2),  # its second
    Kill("step", 8, signal=signal.SIGINT),  # learning
    Kill("half a checkpoint", 2, signal=signal.SIGTERM),  # learning's second epoch
    Kill("replaced", 2),  # what was pruned
    Kill("half a network", 2),  # what is saved in the end
    Kill("half a text", 2),  # results.json
)
GOES_ON = "the same command goes on from the last finished epoch."


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("server"), DIGITS) as server:
        yield server


def names(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def test_a_run_killed_again_and_again_ends_like_one_that_was_not(server: Server, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert server.start(whole).code == 0
    stages = []
    for kill in KILLS:
        end = server.start(out, kill)
        left = {name for name in names(out) if name.endswith(".part")}
        if kill.signal == signal.SIGKILL:
            assert end.signal == signal.SIGKILL
            assert bool(left) == kill.event.startswith("half")
        else:
            how = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}[
                signal.Signals(kill.signal)
            ]
            assert (end.code, end.err) == (how[0], f"\ndspfx compress: {how[1]}; {GOES_ON}\n")
            assert left == set()
        assert "results.json" not in names(out)
        stages.append(sum(path.endswith(".pt") for path in names(out)))
    assert stages == [0, 0, 1, 1, 2, 3, 4, 4]
    end = server.start(out)
    assert end.code == 0
    assert "tune: 2 of 2 epochs found in " in end.out
    assert names(out) == names(whole)
    assert differences(contents(out), contents(whole)) == []


def test_a_job_whose_workers_get_the_signal_too_ends_without_a_traceback(server: Server, tmp_path: Path) -> None:
    command = [*FILES, "--data", str(write_images(tmp_path / "images", count=40)), "--workers", "2"]
    end = server.start(tmp_path / "out", Kill("step", 1, signal=signal.SIGTERM, whole_job=True), command)
    assert (end.code, end.err) == (143, f"\ndspfx compress: terminated; {GOES_ON}\n")
    assert names(tmp_path / "out") == {"settings.json"}


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images")
    for command, kills in ((DIGITS, 35), ([*FILES, "--data", str(data)], 15)):
        folder = tmp_path / str(kills)
        folder.mkdir()
        outcome = kill_and_compare(command, kills, seed=0, folder=folder)
        assert outcome.faults == []
        assert outcome.killed == kills


def test_differences_are_found() -> None:
    a: dict[str, Any] = {"x": [torch.zeros(2), b"1"], "y": {"z": 1.0}}
    assert differences(a, {"x": [torch.zeros(2), b"1"], "y": {"z": 1.0}}) == []
    assert differences(a, {"x": [torch.tensor([0.0, 1e-45]), b"2"], "y": {"z": 1}}) == ["/x/0", "/x/1", "/y/z"]
    assert differences(a, {"x": a["x"]}) == [""]


def state() -> dict[str, Any]:
    return {"a": torch.arange(600.0), "b": {"c": 1.5, "curve": [{"x": 1}]}}


def test_a_checkpoint_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_state(path, state())
    whole = path.read_bytes()
    for length in range(0, len(whole), 41):
        path.write_bytes(whole[:length])
        with pytest.raises(StorageError, match=r"^Checkpoint .*a\.pt cannot be read \("):
            load_state(path)


def test_a_checkpoint_with_a_wrong_bit_is_refused_or_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_state(path, state())
    whole, refused, places = path.read_bytes(), 0, 0
    for place in range(0, len(whole), 41):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        places += 1
        try:
            found = load_state(path)
        except StorageError:
            refused += 1
        else:  # in what fills the file up to a multiple of 64
            assert differences(found, state()) == []
    assert refused > places // 2


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    paths: dict[int, str] = {}
    whole = {key: getattr(os, key) for key in ("open", "fsync", "replace")}

    def opened(path: Any, *args: Any, **kwargs: Any) -> int:
        number: int = whole["open"](path, *args, **kwargs)
        paths[number] = Path(path).name
        return number

    def fsync(number: int) -> None:
        done.append(f"fsync {paths[number]}")
        whole["fsync"](number)

    def replace(*args: Any) -> None:
        done.append("replace")
        whole["replace"](*args)

    for key, patched in (("open", opened), ("fsync", fsync), ("replace", replace)):
        monkeypatch.setattr(checkpoints.os, key, patched)
    write_text(tmp_path / "a.json", "{}")
    monkeypatch.undo()
    assert done == ["fsync a.json.part", "replace", f"fsync {tmp_path.name}"]
    assert names(tmp_path) == {"a.json"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_stops_a_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    write_text(tmp_path / "a.json", "old")

    def write(part: Path) -> None:
        part.write_text("ne")
        raise error

    with pytest.raises(error):
        write_atomically(tmp_path / "a.json", write)
    assert names(tmp_path) == {"a.json"}
    assert (tmp_path / "a.json").read_text() == "old"


def test_only_what_a_killed_run_leaves_is_deleted(tmp_path: Path) -> None:
    mine = {"film.part", "notes.json", "checkpoints/dense.pt", "deeper/plan.json.part"}
    left = {
        "plan.json.part",
        "dense.safetensors.part",
        ".network.safetensors.0a1b2c3d.part",
        "checkpoints/tune.pt.part",
    }
    (tmp_path / "deeper").mkdir()
    (tmp_path / "checkpoints").mkdir()
    for name in mine | left:
        (tmp_path / name).write_text("")
    claim_folder(tmp_path, {"lr": 0.1})
    assert names(tmp_path) == mine | left | {"settings.json"}  # a folder that was not a run's until now
    claim_folder(tmp_path, {"lr": 0.1})
    assert names(tmp_path) == mine | {"settings.json"}
