"""Files that survive `kill -9`: each is the old or the new one, never half of either."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dspfx import ranks
from dspfx.errors import ConfigError, StorageError

SETTINGS_FILE = "settings.json"
# What a killed run may leave behind: of `write_atomically`, and of dspfx.save.
LEFTOVERS = ("*.json.part", "*.html.part", "*.safetensors.part", ".*.safetensors.*.part", "checkpoints/*.pt.part")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place once it is on the disk.

    Of several processes the first one writes; the others see the files of a folder that all of them reach.
    """
    if ranks.rank() > 0:
        return
    temporary = path.with_name(path.name + ".part")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Waits until a file is on the disk, or a folder with the names in it."""
    if os.name != "posix" and path.is_dir():
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


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
        with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
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


def claim_folder(out: Path, settings: dict[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})) -> Path:
    """Makes `out` the folder of a run with these settings, or checks that it already is; returns that of checkpoints.

    What a killed run left half-written there is deleted. `defaults` are those of settings that an older dspfx did not
    know. Raises ConfigError that names the first setting in which the run found there differs.
    """
    return Path(ranks.decided_by_first(lambda: str(_claimed(out, settings, defaults))))


def _claimed(out: Path, settings: dict[str, Any], defaults: Mapping[str, Any]) -> Path:
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
    found = {name: defaults[name] for name in settings if name in defaults and name not in found} | found
    for name in settings | found:
        if settings.get(name) != found.get(name):
            option = "--" + name.replace("_", "-")
            raise ConfigError(
                f"--out {out} holds a run with {option} {show_value(found.get(name))}, this one has {option} "
                f"{show_value(settings.get(name))}; give another --out, or delete that folder to start over."
            )
    for pattern in LEFTOVERS:
        for part in out.glob(pattern):
            part.unlink(missing_ok=True)
    return checkpoints


def show_value(value: Any) -> str:
    """A setting as it stands on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
