"""The site's pages: their Python runs, their commands parse, their names exist, their pictures are the script's.

A page's blocks of ```python run in order, in one namespace and an empty folder. What a reader has and the page does not
show stands in comments that run in their place among the blocks, and a page that needs more than torch says so:

    <!-- run
    model = nn.Conv2d(3, 8, 3)
    -->
    <!-- needs onnxruntime openvino -->

The ```python of docs/training.md is run section by section by tests/integrations/test_training_page.py, its ```py here.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any, NoReturn

import pytest

import dspfx
from dspfx import __main__
from dspfx.graph.ops import RULES
from tools import make_pictures

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {page.stem: page for page in sorted(DOCS.glob("*.md"))}
BLOCK = re.compile(r"^(?:```python\n(?P<shown>.*?)^```|<!-- run\n(?P<hidden>.*?)^-->)", re.DOTALL | re.MULTILINE)
BLOCK_HERE = re.compile(BLOCK.pattern.replace("```python", "```py"), BLOCK.flags)  # of docs/training.md
KEYS = {  # of metadata, and a file: no names
    *("plan", "precision", "batches", "compared", "max_error", "tolerance", "nesting", "version", "json"),
    "compressed",
}
MODULES = {"dspfx", "dspfx.integrations", "dspfx.deploy"}
OBJECTS = re.compile(r"\bdspfx((?:\.[A-Za-z]\w*)+)")


def blocks(page: Path) -> list[tuple[int, str]]:
    """(line, code) of everything that a page runs."""
    text = page.read_text()
    found = []
    for match in (BLOCK_HERE if page.stem == "training" else BLOCK).finditer(text):
        kind = "shown" if match["shown"] is not None else "hidden"
        found.append((text.count("\n", 0, match.start(kind)), match[kind]))
    return found


WITH_CODE = [name for name, page in PAGES.items() if blocks(page)]


def test_every_page_is_known() -> None:
    assert set(WITH_CODE) == {"deployment", "faster", "format", "index", "tensorrt", "tracing", "training"}
    fences = {(name, kind) for name, page in PAGES.items() for kind in re.findall(r"^```(\w+)", page.read_text(), re.M)}
    elsewhere = {("training", "python"), ("training", "py"), ("format", "json")}
    assert fences == {(name, "python") for name in WITH_CODE if name != "training"} | elsewhere
    for name, page in PAGES.items():
        opened = len(
            re.findall(
                "^(?:```py|<!-- run)$" if name == "training" else "^(?:```python|<!-- run)$", page.read_text(), re.M
            )
        )
        assert opened == len(blocks(page)), name


@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*")
@pytest.mark.parametrize("name", WITH_CODE)
def test_its_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = PAGES[name]
    for package in " ".join(re.findall(r"<!-- needs (.*) -->", page.read_text())).split():
        pytest.importorskip(package, reason=f"docs/{page.name} needs {package}")
    monkeypatch.chdir(tmp_path)
    before = dict(RULES)
    names: dict[str, Any] = {"__name__": "page"}
    try:
        for line, code in blocks(page):
            exec(compile("\n" * line + code, str(page), "exec"), names)
    finally:
        RULES.clear()
        RULES.update(before)
    shown = [code for _, code in blocks(page) if "dspfx." in code]
    assert shown
    assert "dspfx" in names


class Parsed(Exception):
    """The command line was understood; nothing is run."""


def commands(text: str) -> list[str]:
    """Every `python -m dspfx ...` of a page, in indented lines and between backticks."""
    lines = re.sub(r"\s*\\\n\s*", " ", text)
    found = re.findall(r"^ {4,}((?:[A-Z_]+=\S+ )*python -m dspfx .*)$", lines, re.MULTILINE)
    found += [" ".join(command.split()) for command in re.findall(r"`(python -m dspfx [^`]*)`", text)]
    return [command for command in found if "..." not in command]


@pytest.mark.parametrize("page", [*PAGES.values(), ROOT / "README.md"], ids=lambda page: page.name)
def test_its_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> NoReturn:
        raise Parsed(parse(parser, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    known = {"compress", "profile", "sizes", "benchmark", "estimate", "export", "verify", "report"}
    for command in commands(page.read_text()):
        words = shlex.split(command, comments=True)
        arguments = words[words.index("dspfx") + 1 :]
        assert arguments[0] in known, command
        if len(arguments) == 1 or "--help" in arguments:
            continue  # the name of a command
        try:
            with pytest.raises(Parsed):
                __main__.main(arguments)
        except SystemExit:
            pytest.fail(f"{page.name}: `{command}` is not understood")


def test_commands_are_found() -> None:
    found = {page.name: len(commands(page.read_text())) for page in PAGES.values()}
    assert found["deployment.md"] == 3
    assert found["index.md"] >= 1
    assert commands("`python -m dspfx\ncompress ...`\n\n    python -m dspfx sizes a \\\n        --x b  # why\n") == [
        "python -m dspfx sizes a --x b  # why"
    ]


def exists(dotted: str) -> bool:
    """Whether a.b of `dspfx.a.b` is public: a name of dspfx, or something in one of its modules."""
    module, _, name = f"dspfx.{dotted}".rpartition(".")
    if module == "dspfx" and name in dspfx.__all__:
        return True
    found = importlib.util.find_spec(f"{module}.{name}") if module in MODULES else None
    return found is not None or hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("page", PAGES.values(), ids=lambda page: page.name)
def test_every_name_exists(page: Path) -> None:
    names = {dotted.strip(".") for dotted in OBJECTS.findall(page.read_text())} - KEYS
    assert [name for name in sorted(names) if not exists(name)] == []


def test_what_does_not_exist_is_found() -> None:
    assert not exists("prepared")
    assert not exists("estimate.Guess")
    assert exists("estimate.Estimate")
    assert exists("integrations.lightning")


def test_pictures_are_what_the_script_draws(tmp_path: Path) -> None:
    make_pictures.main(["--out", str(tmp_path)])
    drawn = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert drawn == {file.name: file.read_text() for file in (DOCS / "pictures").iterdir()}
    assert drawn.keys() == set(re.findall(r"\(pictures/(\w+\.svg)\)", "".join(p.read_text() for p in PAGES.values())))
