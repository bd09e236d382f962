"""Runs that start from what another run has learned: its settings, and its dense and learned networks."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dspfx import ranks
from dspfx.cli.arguments import DEFAULTS
from dspfx.cli.checkpoints import SETTINGS_FILE, load_state, read_json, show_value, write_atomically
from dspfx.cli.training import Stage
from dspfx.errors import ConfigError

# What comes after learning, and what compares: a fork may have its own.
AFTERWARDS = (
    "fork", "budget", "runtime", "epochs_tune", "lr_tune", "cycles", "distill", "temperature", "one_shot",
    "dense_control", "unify", "prune_blocks", "block", "bits", "epochs_unify",
)  # fmt: skip


def inherited(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the run that `given["fork"]` names, as far as the fork keeps them.

    Raises ConfigError where that folder holds no run, or what is given differs from what that run was trained with.
    """
    fork = given["fork"]
    path = Path(fork) / SETTINGS_FILE
    if not path.is_file():
        raise ConfigError(f"--fork {fork} holds no {SETTINGS_FILE}; give the --out of a run of `compress`.")
    source: dict[str, Any] = DEFAULTS | read_json(path)
    for name in [name for name in source if name not in AFTERWARDS]:
        ours = list(given[name]) if isinstance(given.get(name), tuple) else given.get(name)
        if ours is not None and ours != source[name]:
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"--fork {fork} has learned with {option} {show_value(source[name])}, this run has {option} "
                f"{show_value(ours)}; leave {option} out, or leave --fork out to learn anew."
            )
    if given.get("epochs_tune"):
        source["one_shot"] = False
    return source | {"dense_control": False}


def take_over(fork: str, stages: Iterable[Stage], checkpoints: Path) -> None:
    """Copies what the run in `fork` has trained in these stages, with its curves, to where a run looks for its own.

    Raises ConfigError where that run has not come so far.
    """
    ranks.decided_by_first(lambda: _taken_over(Path(fork), stages, checkpoints))


def _taken_over(fork: Path, stages: Iterable[Stage], checkpoints: Path) -> str:
    for stage in stages:
        own, other = (folder / f"{stage.name}.pt" for folder in (checkpoints, fork / "checkpoints"))
        if stage.epochs == 0 or own.exists():
            continue
        state = load_state(other)
        done = len(state["progress"]["curve"]) if state is not None else 0
        if done < stage.epochs:
            raise ConfigError(
                f"--fork {fork} has trained {done} of the {stage.epochs} epochs of its stage {stage.name!r}; start "
                "that run again, to the end of learning at least, and then this one."
            )
        write_atomically(own, partial(shutil.copyfile, other))
    return ""
