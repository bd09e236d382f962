"""A built wheel holds the source tree, all of it and nothing else, and imports from an empty folder."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
PAGES = ("dspfx/cli/pages/page.css", "dspfx/cli/pages/page.js")
DATA = ("dspfx/py.typed", "dspfx/kernels/native.cpp", *PAGES)


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _sources(*folders: str) -> list[str]:
    return [str(file.relative_to(ROOT)) for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that the build leaves nothing in the working tree."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE", "README.md", *DATA, *_sources("passes"), *_sources("dspfx")):
        if (ROOT / name).exists() and not name.startswith("dspfx/passes/"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / "dspfx" / "passes").symlink_to(Path("..") / "passes")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source))
    _run(*PIP, *build, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    library = [name for name in _sources("dspfx") if not name.startswith("dspfx/passes/")]
    assert sorted(names) == sorted([*DATA, *library, *(f"dspfx/{name}" for name in _sources("passes"))])


def test_wheel_imports_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    _run(*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=elsewhere)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import dspfx, dspfx.passes\n"
        "print(dspfx.__file__); print(dspfx.passes.__file__)"
    )
    files = _run(sys.executable, "-c", code, cwd=elsewhere).split()
    assert files == [str(target / "dspfx" / "__init__.py"), str(target / "dspfx" / "passes" / "__init__.py")]


def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    backend = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    _run(sys.executable, "-c", backend, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path))
    _run(*PIP, "wheel", *options, str(archive), cwd=tmp_path)
    (rebuilt,) = tmp_path.glob("*.whl")
    assert sorted(zipfile.ZipFile(rebuilt).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
