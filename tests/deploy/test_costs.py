"""CostTable: measured once and remembered; files that are damaged, foreign or cannot be written; nothing left over."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dspfx.deploy import costs, runtimes, timing
from dspfx.deploy.costs import FORMAT, CostTable
from dspfx.errors import ConfigError
from dspfx.forms import Branch, FormCase

RUNTIMES = ("eager", "onnxruntime", "openvino")
CONV = FormCase("dense", "Conv2d", (1, 16, 6, 5), 12, (3, 3), (1, 1), (1, 1), (1, 1))
WIDE = CONV.resized(24, 16)
BRANCHES = FormCase(
    **(vars(CONV) | {"form": "branches", "branches": (Branch(8, 9, True), Branch(4, 7, False)), "is_ordered": False})
)
CASES = {
    "conv": CONV,
    "branches": BRANCHES,
    "grouped": FormCase(**(vars(BRANCHES) | {"form": "grouped"})),
    "depthwise": FormCase("dense", "Conv2d", (2, 6, 5, 5), 6, (3, 3), (2, 2), (1, 1), (1, 1), 6),
    "same": FormCase("dense", "Conv2d", (1, 3, 8, 8), 4, (3, 3), (1, 1), "same", (2, 2)),
    "1d": FormCase("dense", "Conv1d", (1, 4, 9), 6, (3,), (1,), (0,), (2,)),
    "3d": FormCase("dense", "Conv3d", (1, 2, 3, 4, 5), 6, (1, 2, 3), (1, 1, 1), (0, 0, 0), (1, 1, 1)),
    "transposed": FormCase("dense", "ConvTranspose2d", (1, 4, 5, 5), 6, (2, 2), (2, 2), (0, 0), (1, 1), 2),
    "linear": FormCase("dense", "Linear", (2, 3, 8), 5),
}


class Ticking:
    """Every look at the clock is `step` seconds later than the one before, so that is what every sample takes."""

    def __init__(self) -> None:
        self.now, self.step = 0.0, 1.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    found = Ticking()
    monkeypatch.setattr(timing.time, "perf_counter", found)
    return found


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing may stay where temporary files are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "dspfx"


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_case_is_measured_once(name: str, runtime: str, folder: Path, clock: Ticking) -> None:
    table = CostTable(runtime, folder=folder)
    first = table(CASES[name])
    assert 0 < first <= 1000.0
    looks = clock.now
    assert table(CASES[name]) == first
    assert clock.now == looks > 0


def test_milliseconds_are_those_of_a_call(folder: Path, clock: Ticking) -> None:
    table = CostTable("eager", folder=folder)
    assert table(CONV) == 1000.0
    clock.step = 0.25
    assert table(WIDE) == 250.0


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_frame_is_measured_once_and_taken_off(runtime: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, taken = CostTable(runtime, folder=folder), []

    def seconds(module: Any, shape: tuple[int, ...]) -> float:
        taken.append(module is None)
        return 2.0 if module is None else 5.0 if shape[1] == 16 else 1.0

    monkeypatch.setattr(table, "_time_file", seconds)
    assert [table(CONV), table(WIDE), table(CASES["1d"]), table(CASES["linear"])] == [3000, 3000, 1000, 1000]
    assert taken == [False, True, False, False, False]
    assert table(CASES["depthwise"]) == 1e-4  # less than its frame: it takes some time all the same


def test_what_was_measured_is_there_next_time(folder: Path, clock: Ticking) -> None:
    with CostTable("onnxruntime", folder=folder) as table:
        found = {name: table(case) for name, case in CASES.items()}
    looks, clock.step = clock.now, 77.0
    with CostTable("onnxruntime", folder=folder) as again:
        assert {name: again(case) for name, case in CASES.items()} == found
    assert clock.now == looks
    assert list(folder.iterdir()) == [table.path]
    content = json.loads(table.path.read_text())
    assert (content["format"], content["setting"]) == (FORMAT, table.setting)


def test_the_users_cache_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    with CostTable("eager") as table:
        table(CONV)
    assert table.path.parent == tmp_path / "mine" / "dspfx"
    assert [path.name for path in table.path.parent.iterdir()] == [table.path.name]
    assert re.fullmatch(r"costs-eager-[0-9a-f]{16}\.json", table.path.name)


def test_it_is_stored_after_an_error_too(folder: Path) -> None:
    def interrupted() -> None:
        with CostTable("eager", folder=folder) as table:
            table(CONV)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert CostTable("eager", folder=folder).times == {CONV.key: 1000.0}


def test_every_setting_has_a_file_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [
        CostTable("eager", folder=folder),
        CostTable("eager", threads=2, folder=folder),
        CostTable("eager", dtype=torch.float64, folder=folder),
        CostTable("eager", "meta", folder=folder),
        CostTable("onnxruntime", folder=folder),
        CostTable("openvino", folder=folder),
    ]
    monkeypatch.setattr(torch, "__version__", "99.0")
    tables.append(CostTable("eager", folder=folder))
    assert len({table.path for table in tables[:3] + tables[4:]}) == 6
    assert len({table.setting for table in tables[:3] + tables[4:]}) == 6


def test_another_version_of_the_runtime_is_another_setting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = CostTable("onnxruntime", folder=folder)
    monkeypatch.setattr(importlib.import_module("onnxruntime"), "__version__", "99.0.0")
    after = CostTable("onnxruntime", folder=folder)
    assert after.path != before.path
    assert after.setting.startswith("onnxruntime 99.0.0, float32, ")


def test_inductor_takes_eagers_times_and_exports_are_float32(folder: Path) -> None:
    assert CostTable("inductor", folder=folder).path == CostTable("eager", folder=folder).path
    double = CostTable("onnxruntime", dtype=torch.float64, folder=folder)
    assert double.path == CostTable("onnxruntime", folder=folder).path
    assert double(CONV) > 0
    assert CostTable("eager", dtype=torch.float64, folder=folder)(BRANCHES) > 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"{}",
        b'{"format": 1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": FORMAT, "setting": SETTING, "ms": {"KEY": 3',
        b'{"format": 99, "setting": SETTING, "ms": {"KEY": 3}}',
        b'{"format": null, "setting": SETTING, "ms": {"KEY": 3}}',
        b'{"format": FORMAT, "setting": "another", "ms": {"KEY": 3}}',
        b'{"format": FORMAT, "setting": SETTING, "ms": [["KEY", 3]]}',
        b'{"format": FORMAT, "setting": SETTING, "ms": "KEY"}',
        b'{"format": FORMAT, "setting": SETTING, "ms": {"KEY": [3]}}',
        b'{"format": FORMAT, "setting": SETTING, "ms": {"KEY": null}}',
        b'{"format": FORMAT, "setting": SETTING, "ms": {"KEY": "three"}}',
        b'{"format": FORMAT, "setting": SETTING, "ms": {"KEY": 1' + b"0" * 400 + b"}}",
        b'{"format": FORMAT, "setting": SETTING, "ms": {"KEY": 1' + b"0" * 5000 + b"}}",
        *(b'{"format": FORMAT, "setting": SETTING, "ms": {"KEY": %s}}' % x for x in (b"NaN", b"0", b"-1", b"1e999")),
    ],
)
def test_files_that_do_not_fit_are_made_anew(content: bytes, folder: Path) -> None:
    with CostTable("eager", folder=folder) as table:
        table(CONV)
    marks = {b"FORMAT": str(FORMAT), b"SETTING": json.dumps(table.setting), b"KEY": CONV.key}
    for mark, value in marks.items():
        content = content.replace(mark, value.encode())
    table.path.write_bytes(content)
    with CostTable("eager", folder=folder) as again:
        assert again.times == {}
        assert again(WIDE) == 1000.0
    assert CostTable("eager", folder=folder).times == {WIDE.key: 1000.0}


def test_a_file_that_fits_is_believed(folder: Path) -> None:
    table = CostTable("eager", folder=folder)
    folder.mkdir(parents=True)
    table.path.write_text(json.dumps({"format": FORMAT, "setting": table.setting, "ms": {CONV.key: 3}}))
    assert CostTable("eager", folder=folder)(CONV) == 3.0


def test_two_processes_keep_what_both_measured(folder: Path, clock: Ticking) -> None:
    one, two = CostTable("eager", folder=folder), CostTable("eager", folder=folder)
    one(CONV)
    clock.step = 0.5
    two(WIDE)
    two(CONV)
    one.store()
    two.store()
    assert CostTable("eager", folder=folder).times == {CONV.key: 500.0, WIDE.key: 500.0}
    one(BRANCHES)
    one.store()
    assert set(CostTable("eager", folder=folder).times) == {case.key for case in (CONV, WIDE, BRANCHES)}
    assert list(folder.iterdir()) == [one.path]


def test_nothing_is_written_where_nothing_is_new(folder: Path) -> None:
    with CostTable("eager", folder=folder):
        pass
    assert not folder.exists()
    with CostTable("eager", folder=folder) as table:
        table(CONV)
    table.path.unlink()
    with table:
        table(CONV)
    assert not table.path.exists()


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, clock: Ticking) -> None:
    (tmp_path / "file").write_text("no folder")
    message = (
        "the measured costs of layers could not be kept in {} (Not a directory); they are measured again next time. "
        "Make the folder writable, or set XDG_CACHE_HOME to one that is."
    )
    table = CostTable("eager", folder=tmp_path / "file" / "below")
    with pytest.warns(UserWarning, match=f"^{re.escape(message.format(table.path))}$") as caught, table:
        assert table(CONV) == 1000.0
    assert len(caught) == 1
    looks = clock.now
    with table:
        assert table(CONV) == 1000.0
    assert clock.now == looks
    assert CostTable("eager", folder=tmp_path / "file" / "below").times == {}


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(folder: Path) -> None:
    table = CostTable("eager", folder=folder)
    table.path.mkdir(parents=True)
    with pytest.warns(UserWarning, match="could not be kept in"), table:
        assert table(CONV) == 1000.0
    assert list(folder.iterdir()) == [table.path]


def test_many_cases_are_measured_once_each_and_stored_now_and_then(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[FormCase] = []
    table = CostTable("eager", folder=folder)
    monkeypatch.setattr(table, "_measure", lambda case: measured.append(case) or 1.0)  # type: ignore[func-returns-value]
    cases = [CONV.resized(n, 3) for n in range(1, 121)]
    for case in [cases[7], *cases, *cases]:
        table(case)
    assert measured == [cases[7], *cases[:7], *cases[8:]]
    assert len(CostTable("eager", folder=folder).times) == 100  # two times fifty, before anything ended
    table.store()
    assert len(CostTable("eager", folder=folder).times) == 120
    assert tuple(capsys.readouterr()) == ("", "")


def test_threads_and_random_numbers_are_for_the_layer_alone(folder: Path) -> None:
    before, state = torch.get_num_threads(), torch.get_rng_state()
    for runtime in RUNTIMES:
        CostTable(runtime, threads=before + 1, folder=folder)(CONV)
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_runtimes_that_are_unknown_or_not_installed_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^runtime is 'fast', which dspfx does not know; give one of 'eager', "):
        CostTable("fast", folder=folder)
    load = importlib.import_module

    def absent(name: str) -> Any:
        if name == "openvino":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return load(name)

    monkeypatch.setattr(runtimes.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=re.escape('run: pip install "dspfx[openvino]"')):
        CostTable("openvino", folder=folder)


def test_nothing_is_printed_while_measuring(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for runtime in RUNTIMES:
            with CostTable(runtime, folder=folder) as table:
                for case in CASES.values():
                    table(case)
    assert tuple(capfd.readouterr()) == ("", "")
    assert costs.MEASURED_IN == {"inductor": "eager", "tensorrt": "eager", "onnxruntime-native": "onnxruntime"}
