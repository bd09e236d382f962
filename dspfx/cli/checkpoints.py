"""Files that survive `kill -9`: each is the old or the new one, never half of either."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dspfx.errors import ConfigError, StorageError

SETTINGS_FILE = "settings.json"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place once it is on the disk."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    """Writes `text` atomically."""
    write_atomically(path, lambda part: part.write_text(text))


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Saves tensors, numbers, strings and containers of them atomically."""
    write_atomically(path, lambda part: torch.save(state, part))


def load_state(path: Path) -> dict[str, Any] | None:
    """What `save_state` wrote, on the CPU; None where there is no file. Raises StorageError where it is damaged."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises nearly every built-in exception on a damaged file
        raise StorageError(f"Checkpoint {path} cannot be read ({error}); delete it to repeat that stage.") from error
    return state


def read_json(path: Path) -> Any:
    """The JSON in a file; raises StorageError where it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read ({error}); delete it, or give another --out.") from error


def claim_folder(out: Path, settings: dict[str, Any]) -> Path:
    """Makes `out` the folder of a run with these settings, or checks that it already is; returns that of checkpoints.

    Raises ConfigError that names the first setting in which the run found there differs.
    """
    checkpoints = out / "checkpoints"
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made ({error}); give another folder.") from error
    path = out / SETTINGS_FILE
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1))
        return checkpoints
    found = read_json(path)
    for name in settings | found:
        if settings.get(name) != found.get(name):
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"--out {out} holds a run with {option} {_show(found.get(name))}, this one has {option} "
                f"{_show(settings.get(name))}; give another --out, or delete that folder to start over."
            )
    return checkpoints


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
