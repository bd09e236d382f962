"""The tree's rules, read from the sources: imports run downward, nothing unsafe is loaded, every test asserts."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    {"config", "errors", "plan", "plans", "plots"},
    {"method", "kernels", "ranks"},
    {"graph", "modules", "norms", "forms", "grouped", "native", "kernel_conv", "held"},
    {"passes"},
    {
        "gates",
        "optimizers",
        "second_pass",
        "steering",
        "learner_checks",
        "learner",
        "alike",
        "unifier",
        "stats_log",
        "storage",
        "origins",
        "remap",
    },
    {"deploy"},
    {"enliven", "pipeline", "profiler", "coverage", "selfcheck", "estimate"},
    {"integrations"},
    {"__init__"},
    {"cli", "__main__"},
)
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch.jit"}


def library_files() -> dict[str, Path]:
    """Module name -> file, for everything that is imported as dspfx."""
    files = {file.relative_to(ROOT): file for file in (ROOT / "dspfx").rglob("*.py") if not _below_link(file)}
    files |= {Path("dspfx") / file.relative_to(ROOT): file for file in (ROOT / "passes").rglob("*.py")}
    return {_module_name(path): file for path, file in sorted(files.items())}


def _below_link(file: Path) -> bool:
    return (ROOT / "dspfx" / "passes") in file.parents


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a file, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            base = ".".join([*above, *(node.module.split(".") if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def layer(module: str) -> int:
    """The layer of dspfx.<unit>[.more]; a unit without one has to be given one above."""
    unit = module.split(".")[1] if "." in module else "__init__"
    found = [index for index, units in enumerate(LAYERS) if unit in units]
    assert found, f"{module} belongs to no layer: add {unit!r} to LAYERS where it belongs"
    return found[0]


def internal_imports(module: str, file: Path, known: set[str]) -> dict[str, int]:
    """Imported dspfx module -> line; `from dspfx.errors import X` is dspfx.errors."""
    targets: dict[str, int] = {}
    for line, name in imports(ast.parse(file.read_text()), module, file.name == "__init__.py"):
        if name.split(".")[0] == "dspfx":
            while name not in known and "." in name:
                name = name.rpartition(".")[0]
            targets.setdefault(name, line)
    targets.pop(module, None)
    return targets


def test_imports_run_strictly_downward() -> None:
    files = library_files()
    upward = [
        f"{file.relative_to(ROOT)}:{line}: {module} imports {target}, which lies above it"
        for module, file in files.items()
        for target, line in internal_imports(module, file, set(files)).items()
        if layer(target) > layer(module)
    ]
    assert upward == []


def test_no_imports_in_a_circle() -> None:
    files = library_files()
    graph = {module: set(internal_imports(module, file, set(files))) for module, file in files.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")
    assert set(files) <= set(order)


def test_reader_sees_lazy_relative_and_aliased_imports() -> None:
    source = "import torch.jit as j\ndef f():\n    from . import errors\n    from ..graph.trace import trace as t\n"
    found = [name for _, name in imports(ast.parse(source), "dspfx.method.blocks", package=False)]
    assert found == ["torch.jit", "dspfx.method.errors", "dspfx.graph.trace.trace"]
    package = [name for _, name in imports(ast.parse("from . import x"), "dspfx.method", package=True)]
    assert package == ["dspfx.method.x"]


def unsafe(tree: ast.AST, module: str = "tests") -> Iterator[str]:
    """What could run code from a file: pickle and its kin, TorchScript, torch.load that unpickles."""
    for line, name in imports(tree, module, package=False):
        if any(name == bad or name.startswith(f"{bad}.") for bad in UNSAFE_MODULES):
            yield f"{line}: imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.jit":
            yield f"{node.lineno}: uses torch.jit"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            flags = [keyword.value for keyword in node.keywords if keyword.arg == "weights_only"]
            if [ast.unparse(flag) for flag in flags] != ["True"]:
                yield f"{node.lineno}: torch.load without weights_only=True"
        if isinstance(node, ast.keyword) and node.arg == "weights_only" and ast.unparse(node.value) == "False":
            yield f"{node.value.lineno}: weights_only=False"


def test_nothing_unsafe_is_loaded() -> None:
    files = [*library_files().values(), *(ROOT / "tools").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    found = [f"{file.relative_to(ROOT)}:{what}" for file in files for what in unsafe(ast.parse(file.read_text()))]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import jit",
        "def f():\n    import torch.jit",
        "torch.jit.script(f)",
        "torch.load(p)",
        "load(p, weights_only=False)",
    ],
)
def test_unsafe_sources_are_recognised(source: str) -> None:
    assert list(unsafe(ast.parse(source))) != []


def test_files_are_short() -> None:
    lengths = {file: len(file.read_text().splitlines()) for file in library_files().values()}
    assert {str(file.relative_to(ROOT)): n for file, n in lengths.items() if n > 300} == {}


def _asserting(function: ast.AST, helpers: set[str]) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in {"raises", "warns"} | helpers or name.startswith(("assert_", "check_")):
                return True
    return False


def silent_tests(tree: ast.Module) -> list[str]:
    """Test functions that assert nothing, neither themselves nor through a function of their file."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    helpers: set[str] = set()
    for _ in functions:
        helpers |= {function.name for function in functions if _asserting(function, helpers)}
    return [f.name for f in functions if f.name.startswith("test_") and f.name not in helpers]


def test_every_test_asserts() -> None:
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    silent = {str(file.relative_to(ROOT)): silent_tests(ast.parse(file.read_text())) for file in files}
    assert {file: names for file, names in silent.items() if names} == {}


def test_silent_tests_are_recognised() -> None:
    source = "def test_a():\n    f()\ndef test_b():\n    same(1)\ndef same(x):\n    assert x\n"
    assert silent_tests(ast.parse(source)) == ["test_a"]


def test_passes_is_one_package_behind_a_relative_link() -> None:
    link = ROOT / "dspfx" / "passes"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "passes")
    package = importlib.import_module("dspfx.passes")
    assert package.__file__ is not None
    assert Path(package.__file__).resolve() == ROOT / "passes" / "__init__.py"
    assert sys.modules["dspfx.passes"] is package


def test_bare_passes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    message = "^this package was imported as 'passes'; its name is dspfx.passes: import dspfx.passes$"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("passes")
    assert "passes" not in sys.modules
