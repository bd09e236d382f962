"""Runs of `compress` that are killed: one process imports everything, and every run is a fork of it.

    with Server(folder) as server:
        end = server.start(out, Kill("replace", 3))       killed before its third os.replace
        end.signal, end.events                            9, ("step", "step", ..., "replace")

What can be killed at are events: each optimizer step, each decision, and every way in which a file comes to be; "half"
is a file of which half is written. Milliseconds are made of FLOPs, so that runs that should be equal are.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

ROOT = Path(__file__).resolve().parents[2]
ANY = "any"  # the name of every event


@dataclass(frozen=True)
class Kill:
    """Which signal, and when: at the `count`th event called `event`, or after so many seconds.

    whole_job: workers get it, too, as from Ctrl-C or from whatever ends jobs.
    """

    event: str = ANY
    count: int = 1
    seconds: float | None = None
    signal: int = signal.SIGKILL
    whole_job: bool = False


@dataclass(frozen=True)
class End:
    """How a run ended: its exit code or the signal that ended it, the events until then, and what it printed."""

    code: int | None
    signal: int | None
    events: tuple[str, ...]
    out: str
    err: str


class Server:
    """The process that forks runs; `command` is theirs, without --out."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.command, self.log = command, folder / "server"
        self.log.mkdir(exist_ok=True)
        places = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-m", "tests.cli.resume", str(self.log)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            arguments, cwd=ROOT, env=os.environ | places, stdin=pipe, stdout=pipe, text=True
        )

    def start(self, out: Path, kill: Kill | None = None, command: list[str] | None = None) -> End:
        """Runs the command, or another one, until it is killed or done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"argv": [*(command or self.command), "--out", str(out)], "kill": None if kill is None else asdict(kill)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        events, text, error = ((self.log / name).read_text() for name in ("events", "out", "err"))
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        return End(code, number, tuple(events.splitlines()), text, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def contents(out: Path) -> dict[str, Any]:
    """Every file of a run by its name: bytes, or the values of those that hold seconds, which are left out."""
    import torch

    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            for epoch in state.get("progress", {}).get("curve", ()):
                del epoch["seconds"]
            found[name] = state
        elif name == "results.json":
            results = json.loads(path.read_text())
            for curve in results["curves"].values():
                for epoch in curve:
                    del epoch["seconds"]
            found[name] = results
        else:
            found[name] = path.read_bytes()
    return found


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two nested values are not equal bit for bit."""
    import torch

    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [fault for key in a for fault in differences(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [fault for i, pair in pairs for fault in differences(*pair, f"{place}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    return [] if type(a) is type(b) and a == b else [place]


def _serve(log: Path) -> None:
    """Answers jobs on stdin with the exit status of the child that did them.

    This process never trains: autograd refuses to work in a fork of one that did.
    """
    import sklearn.datasets
    import torch

    import dspfx.__main__

    torch.set_num_threads(1)
    sklearn.datasets.load_digits()
    assert dspfx.__main__ is not None
    dspfx.prepare(build("", 10), torch.zeros(2, 3, 8, 8))  # imports what it imports at first use
    for line in sys.stdin:
        job = json.loads(line)
        for name in ("events", "out", "err"):
            (log / name).write_text("")
        child = os.fork()
        if child == 0:
            _run(job, log)
        kill = job["kill"] or {}
        done = threading.Event()
        if kill.get("seconds") is not None:
            threading.Thread(target=_kill_later, args=(child, kill["seconds"], kill["signal"], done)).start()
        status = os.waitpid(child, 0)[1]
        done.set()
        print(status, flush=True)


def _kill_later(child: int, seconds: float, number: int, done: threading.Event) -> None:
    if not done.wait(seconds):
        os.kill(child, number)


def _run(job: dict[str, Any], log: Path) -> None:
    """The child: runs the command with its events counted, and never returns."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _Events(job["kill"], os.open(log / "events", os.O_WRONLY | os.O_APPEND)).watch()
        from dspfx.__main__ import main

        with (
            (log / "out").open("w", buffering=1) as out,
            (log / "err").open("w", buffering=1) as err,
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            code = main(job["argv"])
    finally:
        os._exit(code)


class _Events:
    """Counts events and sends the signal at the one that is asked for."""

    def __init__(self, kill: dict[str, Any] | None, log: int) -> None:
        self.kill, self.log, self.count = kill, log, 0

    def is_due(self, name: str) -> bool:
        """Notes the event; True where it is the one to be killed at."""
        os.write(self.log, f"{name}\n".encode())
        if self.kill is None or self.kill["seconds"] is not None or self.kill["event"] not in (name, ANY):
            return False
        self.count += 1
        return bool(self.count == self.kill["count"])

    def die(self) -> None:
        assert self.kill is not None
        if self.kill["whole_job"]:  # by another process: workers know their parent's signals
            command = ["kill", f"-{int(self.kill['signal'])}", "--", f"-{os.getpid()}"]
            subprocess.run(command, start_new_session=True, check=True)
        else:
            os.kill(os.getpid(), self.kill["signal"])
        time.sleep(0)  # an interrupt is raised here

    def happen(self, name: str) -> None:
        if self.is_due(name):
            self.die()

    def around(self, owner: Any, key: str, before: str | None, after: str | None) -> None:
        """`owner.key` is an event when it is called, and when it is done."""
        whole: Callable[..., Any] = getattr(owner, key)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                self.happen(before)
            result = whole(*args, **kwargs)
            if after is not None:
                self.happen(after)
            return result

        setattr(owner, key, watched)

    def halved(self, owner: Any, key: str, name: str, place: int) -> None:
        """`owner.key` writes a file, and is an event of which half of that file is left."""
        whole: Callable[..., Any] = getattr(owner, key)

        def watched(*args: Any, **kwargs: Any) -> Any:
            result = whole(*args, **kwargs)
            if self.is_due(name):
                os.truncate(args[place], os.path.getsize(args[place]) // 2)
                self.die()
            return result

        setattr(owner, key, watched)

    def watch(self) -> None:
        """Patches what a run goes through."""
        import safetensors.torch
        import torch

        import dspfx
        from dspfx import pipeline
        from dspfx.cli import models
        from dspfx.deploy import timing
        from dspfx.storage import container

        self.halved(torch, "save", "half a checkpoint", 1)
        self.halved(container, "save_file", "half a network", 1)
        self.halved(safetensors.torch, "save_file", "half a network", 1)
        self.halved(Path, "write_text", "half a text", 0)
        self.around(os, "fsync", "fsync", None)
        self.around(os, "replace", "replace", "replaced")
        self.around(torch.optim.SGD, "step", None, "step")
        self.around(dspfx, "prune", "prune", "pruned")
        self.around(dspfx, "lower", "lower", None)
        self.around(dspfx, "benchmark", "benchmark", None)
        models.build = build  # type: ignore[assignment]
        timing._seconds = _by_flops()  # type: ignore[assignment]
        pipeline.NATIVE = ()  # type: ignore[assignment]  # whose FLOPs torch does not see


def build(name: str, classes: int) -> Any:
    """What takes the place of ResNet20: with a dropout and batch norms, whose state a resumed run must restore."""
    from torch import nn

    def layer(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    body = [*layer(3, 8), *layer(8, 12), nn.MaxPool2d(2), *layer(12, 12)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, classes))


def _by_flops() -> Callable[[Any, int], float]:
    """As tests/cli/conftest.py has it: a call takes a microsecond, and a nanosecond a FLOP."""
    from torch.utils.flop_counter import FlopCounterMode

    known: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    def seconds(call: Any, repeats: int) -> float:
        if call not in known:
            with FlopCounterMode(display=False) as counter:
                call()
            known[call] = 1e-6 + 1e-9 * counter.get_total_flops()
        return known[call]

    return seconds


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
