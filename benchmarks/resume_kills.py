"""`compress` killed at random, started again until it is finished, and compared with runs that nobody killed.

OMP_NUM_THREADS=1 python -m benchmarks.resume_kills --kills 50 --everywhere --write docs/results/resume.md
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tabulate import tabulate

from dspfx.cli.checkpoints import load_state
from dspfx.deploy.machine import describe_machine
from tests.cli.resume import End, Kill, Server, contents, differences

COMMON = ["--threads", "1", "--device", "cpu", "--epochs-dense", "2", "--epochs-learn", "2", "--epochs-tune", "2"]
DIGITS = ["compress", "--image-size", "8", "--limit-train", "120", "--batch-size", "20", *COMMON]
FILES = ["compress", "--image-size", "72", "--workers", "1", "--batch-size", "8", "--mode", "exact", *COMMON]


@dataclass
class Outcome:
    """What became of the runs of one command.

    Attributes:
        kills: where they were killed -> how often; "at a time" lies between two events.
        runs: how many were finished in the end.
        starts: of all of these together.
        faults: what was not as in the run that nobody killed.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    starts: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def killed(self) -> int:
        """All kills."""
        return sum(self.kills.values())

    def start(self, server: Server, out: Path, kill: Kill | None) -> End:
        """Starts a run, counts how it ends, and reads every checkpoint that is there then."""
        end = server.start(out, kill)
        self.starts += 1
        if end.signal is not None and kill is not None:
            self.kills[end.events[-1] if kill.seconds is None else "at a time"] += 1
        for checkpoint in out.glob("checkpoints/*.pt"):
            load_state(checkpoint)  # raises where it is damaged
        return end

    def finish(self, server: Server, out: Path, expected: dict[str, Any]) -> None:
        """Lets a run come to its end, compares it, and deletes it."""
        end = self.start(server, out, None)
        self.runs += 1
        if end.code != 0:
            self.faults.append(f"{out.name}: exit code {end.code}: {end.err}")
        self.faults += [f"{out.name}{place}" for place in differences(expected, contents(out))]
        shutil.rmtree(out)


def kill_and_compare(command: list[str], kills: int, seed: int, folder: Path) -> Outcome:
    """Runs `command` until it has been killed so often; half of the times at an event, half at a moment."""
    rng, outcome = random.Random(seed), Outcome()
    with Server(folder, command) as server:
        expected, events, seconds = _whole(server, folder)
        while outcome.killed < kills:
            out, left = folder / f"run{outcome.runs}", len(events)
            while outcome.killed < kills:
                kill = Kill(count=rng.randint(1, left))
                kill = kill if rng.random() < 0.5 else Kill(seconds=rng.uniform(0, seconds * left / len(events)))
                end = outcome.start(server, out, kill)
                if end.signal is None:
                    break
                left = max(left - len(end.events) // 2, 10)
            outcome.finish(server, out, expected)
    return outcome


def kill_everywhere(command: list[str], folder: Path) -> Outcome:
    """As many runs of `command` as one has events, each of them killed at another one."""
    outcome = Outcome()
    with Server(folder, command) as server:
        expected, events, _ = _whole(server, folder)
        for count in range(1, len(events) + 1):
            out = folder / f"run{count}"
            outcome.start(server, out, Kill(count=count))
            outcome.finish(server, out, expected)
    return outcome


def _whole(server: Server, folder: Path) -> tuple[dict[str, Any], tuple[str, ...], float]:
    """Files, events and seconds of a run that nobody kills."""
    begun = time.perf_counter()
    end = server.start(folder / "whole")
    assert end.code == 0, end.err
    return contents(folder / "whole"), end.events, time.perf_counter() - begun


def write_images(folder: Path, count: int = 12, size: int = 80) -> Path:
    """An ImageFolder of noise, too large to be kept in memory: workers decode and augment it."""
    generator = torch.Generator().manual_seed(0)
    for split, images in (("train", count), ("test", 4)):
        for label in range(3):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for index in range(images):
                pixels = torch.randint(0, 150, (size, size, 3), dtype=torch.uint8, generator=generator)
                pixels[..., label] += 100
                Image.fromarray(pixels.numpy()).save(place / f"{index}.png")
    return folder


def table(outcomes: dict[str, Outcome]) -> str:
    """A row an event, a column a command."""
    events = sorted({event for outcome in outcomes.values() for event in outcome.kills})
    rows: list[tuple[object, ...]] = [(event, *(o.kills[event] for o in outcomes.values())) for event in events]
    rows.append(("all kills", *(o.killed for o in outcomes.values())))
    rows.append(("starts", *(o.starts for o in outcomes.values())))
    rows.append(("runs finished", *(o.runs for o in outcomes.values())))
    rows.append(("differences to the run that nobody killed", *(len(o.faults) for o in outcomes.values())))
    return tabulate(rows, headers=["killed at", *outcomes], tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of both commands together")
    parser.add_argument("--everywhere", action="store_true", help="also a run for each event, killed there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a page with the table")
    args = parser.parse_args()
    begun = time.perf_counter()
    outcomes = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [*FILES, "--data", str(write_images(folder / "images"))]
        jobs: dict[str, Callable[[Path], Outcome]] = {
            "digits, in memory": lambda place: kill_and_compare(DIGITS, args.kills * 7 // 10, args.seed, place),
            "files, by a worker": lambda place: kill_and_compare(files, args.kills * 3 // 10, args.seed, place),
        }
        if args.everywhere:
            jobs["digits, each event once"] = lambda place: kill_everywhere(DIGITS, place)
        for index, (title, job) in enumerate(jobs.items()):
            place = folder / str(index)
            place.mkdir()
            outcomes[title] = job(place)
            print(title, outcomes[title], flush=True)
    text = table(outcomes)
    print(text)
    if args.write is not None:
        machine, seconds = describe_machine(torch.device("cpu"), 1), time.perf_counter() - begun
        args.write.write_text(PAGE.format(table=text, seconds=seconds, machine=machine, kills=args.kills))


PAGE = """\
# Killed and started again

`python -m dspfx compress` of a tiny network (two epochs of each stage, a dropout, batch norms, the learner's noise)
gets SIGKILL at a random event, or at a random moment, and is started again until it is finished. Then every file in its
folder, the lowered network, the plan and the checkpoints' tensors, optimizer and learner state included, is compared
bit for bit with that of a run that nobody killed; seconds are left out, and latencies are made of FLOPs, so that what
is measured is the same in both. A checkpoint that is there after a kill always loads, and no file that is half-written
stays behind.

{table}

"half a ..." is a file of which half was on the disk. The run that nobody killed stores what layers cost, two events
that later runs do not have: so many of the runs that were to be killed at each event went through.

{seconds:.0f} s on {machine}.

Made by

    OMP_NUM_THREADS=1 python -m benchmarks.resume_kills --kills {kills} --everywhere --write docs/results/resume.md
"""


if __name__ == "__main__":
    main()
