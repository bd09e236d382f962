"""Runs each case in a process of its own, so that memory comes back and a crash is a row; keeps rows as they come."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tools.sweep.cases import Case

Row = dict[str, Any]
PRELOAD = ["torch", "torchvision", "dspfx", "tools.sweep.worker"]


@dataclass
class Results:
    """Rows in a file, one a line; of several with the same model the last one counts."""

    path: Path
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Those in the file, none where there is no file; a line cut off by a kill is not counted."""
        found = cls(path)
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            found.rows[row["suite"], row["model"]] = row
        return found

    def add(self, row: Row) -> None:
        """Appends the row to the file at once."""
        self.rows[row["suite"], row["model"]] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def tidy(self, order: list[tuple[str, str]]) -> None:
        """Rewrites the file with one line a model, in the catalogue's order; models it does not know come last."""
        known = [self.rows[key] for key in order if key in self.rows]
        others = [row for key, row in self.rows.items() if key not in set(order)]
        new = self.path.with_suffix(".new")
        new.write_text("".join(json.dumps(row) + "\n" for row in known + others))
        new.replace(self.path)


def run_cases(cases: list[Case], results: Results, check: str, jobs: int, limit: float, memory_gib: float) -> None:
    """A row for every case: what `check` ("dspfx" or "peer") returns, or that it died, or ran out of time."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the fork server starts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    waiting, running = list(cases), dict[str, _Job]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                case = waiting.pop(0)
                out = Path(folder) / f"{case.suite}-{case.name}.json"
                process = context.Process(target=_child, args=(case.suite, case.name, check, str(out), memory_gib))
                process.start()
                running[str(out)] = _Job(case, process, out, time.monotonic())
            time.sleep(0.05)
            for key, job in list(running.items()):
                row = job.row(limit)
                if row is not None:
                    del running[key]
                    results.add(row)
                    _tell(row, len(cases) - len(waiting) - len(running), len(cases))


@dataclass
class _Job:
    case: Case
    process: ForkServerProcess
    out: Path
    start: float

    def row(self, limit: float) -> Row | None:
        """The finished row; None while it runs."""
        seconds = time.monotonic() - self.start
        row: Row = {"suite": self.case.suite, "model": self.case.name}
        if self.process.is_alive():
            if seconds < limit:
                return None
            self.process.kill()
            self.process.join()
            return row | {"ended": f"stopped after {limit:.0f} s", "seconds": round(seconds, 1)}
        self.process.join()
        if not self.out.exists():
            return row | {"ended": f"died with exit code {self.process.exitcode}", "seconds": round(seconds, 1)}
        return row | json.loads(self.out.read_text())


def _child(suite: str, name: str, check: str, out: str, memory_gib: float) -> None:
    from tools.sweep.worker import work

    warnings.simplefilter("ignore")
    size = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))  # an error in the row, and not the machine's end
    row = work(suite, name, check)
    part = Path(f"{out}.part")
    part.write_text(json.dumps(row))
    part.replace(out)


def _tell(row: Row, done: int, count: int) -> None:
    failed = row.get("failed") or {}
    told = row.get("ended") or row.get("verdict") or "; ".join(f"{k}: {v}" for k, v in failed.items()) or "ok"
    print(f"[{done}/{count}] {row['model']}: {told} ({row.get('seconds', 0):.0f} s)", file=sys.stderr, flush=True)
