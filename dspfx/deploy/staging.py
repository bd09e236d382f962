"""Files that appear whole or not at all: written in a folder beside their place, then put there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspfx.errors import StorageError


@contextmanager
def staged(path: str | os.PathLike[str], suffixes: tuple[str, ...]) -> Iterator[Path]:
    """A path of the same name in a folder of its own; what is written there, and beside it, moves to `path` at the end.

    Companions (such as weights too large for the file itself) move first. After an error nothing is left behind, and
    a file that was at `path` is as it was.

    Raises:
        StorageError: `path` has another suffix than these, is a folder, or its folder is absent or not writable.
    """
    target = Path(path)
    if target.suffix not in suffixes:
        raise StorageError(f"{target} is named as another kind of file; end it with {' or '.join(suffixes)}.")
    if target.is_dir():
        raise StorageError(f"{target} is a folder; give a file in it.")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise StorageError(f"{target} cannot be written ({error}); give a file in a folder that can be.") from error
    try:
        yield folder / target.name
        _move(folder, target)
    except OSError as error:
        raise StorageError(f"{target} cannot be written ({error}); give a file in a folder that can be.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path) -> None:
    for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        os.replace(file, target.with_name(file.name))


def write_file(path: Path, content: bytes) -> None:
    """Writes one file whole or not at all; StorageError where it cannot be."""
    with staged(path, (path.suffix,)) as part:
        part.write_bytes(content)
