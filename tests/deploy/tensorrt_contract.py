"""Holds every name that sources use of TensorRT against the real bindings, which are loaded over stand-in libraries.

python -m tests.deploy.tensorrt_contract BINDINGS LIBRARIES SOURCE...    prints JSON: version, uses, problems
python -m tests.deploy.tensorrt_contract BINDINGS LIBRARIES              version, and how building an engine ends

A value is TensorRT's where a name `trt` (the module) leads to it, or where an annotation `api.Class` says so. Of each
such value every attribute has to exist, every attribute assigned to has to be writable, and every call has to fit one
of the signatures that the bindings' docstrings give. A result whose type those do not tell has to be annotated before
anything of it is used.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


@dataclass(frozen=True)
class Value:
    """What is known of an expression: a class or module of the bindings, an instance, or a method with its owner."""

    kind: str  # "module", "class", "instance", "method" or "unknown"
    what: Any = None
    name: str = ""
    bound: bool = False


UNKNOWN = Value("unknown")


@dataclass
class Checker(ast.NodeVisitor):
    """Walks one source; `uses` and `problems` are its result."""

    trt: Any
    file: str
    uses: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    known: dict[str, Value] = field(default_factory=dict)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = dict(self.known)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            self.known.pop(argument.arg, None)
            annotated = self.annotated(argument.annotation)
            if annotated:
                self.known[argument.arg] = annotated
        for statement in node.body:
            self.visit(statement)
        self.known = before

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.typed(node.value)
        annotated = self.annotated(node.annotation)
        if annotated and isinstance(node.target, ast.Name):
            self.known[node.target.id] = annotated

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self.typed(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.known.pop(target.id, None)
                if value is not None and target.id != "trt":
                    self.known[target.id] = value
            elif isinstance(target, ast.Attribute):
                self.assigned(target)
            else:
                self.visit(target)

    def assigned(self, node: ast.Attribute) -> None:
        """Checks that the attribute of a value of the bindings can be written."""
        owner = self.typed(node.value)
        if owner is None:
            return
        self.attribute(node, owner)
        found = getattr(owner.what, node.attr, None)
        if owner.kind == "instance" and isinstance(found, property) and found.fset is None:
            self.wrong(node, f"{owner.name}.{node.attr} cannot be assigned to")

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.expr):
            self.typed(node)
        else:
            super().generic_visit(node)

    def typed(self, node: ast.expr) -> Value | None:
        """What an expression is, after checking everything in it; None where it has nothing to do with TensorRT."""
        if isinstance(node, ast.Name):
            return Value("module", self.trt, "trt") if node.id == "trt" else self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.typed(node.value)
            return None if owner is None else self.attribute(node, owner)
        if isinstance(node, ast.Call):
            return self.call(node)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.typed(child)
            else:
                super().generic_visit(child)
        return None

    def attribute(self, node: ast.Attribute, owner: Value) -> Value | None:
        if owner.kind == "unknown":
            self.wrong(node, f".{node.attr} of a result whose type the bindings do not tell; annotate it")
            return None
        name = f"{owner.name}.{node.attr}"
        if not hasattr(owner.what, node.attr):
            self.wrong(node, f"{name} does not exist")
            return None
        found = getattr(owner.what, node.attr)
        if owner.kind == "module" and node.attr == "__version__":
            return None
        self.uses.add(name.removeprefix("trt."))
        if isinstance(found, type):
            return Value("class", found, name.removeprefix("trt."))
        if callable(found):
            return Value("method", found, name.removeprefix("trt."), bound=owner.kind == "instance")
        if isinstance(found, property):
            return self.named(result_of(found.fget.__doc__ or ""))
        return None  # a member of an enumeration

    def call(self, node: ast.Call) -> Value | None:
        called = self.typed(node.func)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.typed(argument)
        if called is None or called.kind not in ("class", "method"):
            return None
        maker = called.what.__init__ if called.kind == "class" else called.what
        options = signatures(maker.__doc__ or "", getattr(maker, "__name__", ""))
        if not options:
            self.wrong(node, f"{called.name} has no signature in the bindings")
        positional = len(node.args) + (called.kind == "class" or called.bound)
        keywords = {keyword.arg for keyword in node.keywords}
        if options and not any(fits(names, needed, positional, keywords) for names, needed, _ in options):
            self.wrong(node, f"{called.name} takes {[names for names, _, _ in options]}: {ast.unparse(node)}")
        if called.kind == "class":
            return Value("instance", called.what, called.name)
        results = {result for _, _, result in options}
        return self.named(results.pop()) if len(results) == 1 else UNKNOWN

    def named(self, text: str) -> Value | None:
        """The type that a docstring tells."""
        if text in ("None", "int", "bool", "str", "float", "bytes") or text.startswith(("List[", "list[")):
            return None
        found = getattr(self.trt, text.rpartition(".")[2], None)
        return Value("instance", found, text.rpartition(".")[2]) if isinstance(found, type) else UNKNOWN

    def annotated(self, node: ast.expr | None) -> Value | None:
        """The class of the bindings that an annotation `api.Class` or `api.Class | None` names."""
        for part in ast.walk(node) if node is not None else ():
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "api":
                found = getattr(self.trt, part.attr, None)
                if not isinstance(found, type):
                    self.wrong(part, f"{part.attr} does not exist")
                    return UNKNOWN
                self.uses.add(part.attr)
                return Value("instance", found, part.attr)
        return None

    def wrong(self, node: ast.AST, what: str) -> None:
        self.problems.append(f"{self.file}:{getattr(node, 'lineno', 0)}: {what}")


def signatures(doc: str, name: str) -> list[tuple[list[str], int, str]]:
    """(names of the parameters, how many of them have no default, the result) of each overload in a docstring."""
    found = []
    for line in doc.splitlines():
        match = re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\) -> (.+)$", line.strip())
        if match and match[1] != "*args, **kwargs":
            parameters = list(split(match[1]))
            needed = sum("=" not in parameter for parameter in parameters)
            found.append(([p.partition(":")[0].strip() for p in parameters], needed, match[2].strip()))
    return found


def split(text: str) -> Iterator[str]:
    """The parts between the commas that are in no bracket."""
    depth, part = 0, ""
    for letter in text:
        depth += (letter in "([<{") - (letter in ")]>}")
        if letter == "," and depth == 0:
            yield part
            part = ""
        else:
            part += letter
    if part.strip():
        yield part


def fits(names: list[str], needed: int, positional: int, keywords: set[str | None]) -> bool:
    """Whether a call with so many positional arguments (self among them) and these keywords is one of the signature."""
    given = set(names[:positional]) | keywords
    return (
        positional <= len(names)
        and keywords <= set(names[positional:])
        and all(name in given for name in names[:needed])
    )


def result_of(doc: str) -> str:
    """The type that a property's docstring tells."""
    match = re.search(r"-> (.+)$", doc.strip().splitlines()[0]) if doc.strip() else None
    return match[1].strip() if match else ""


def load(bindings: Path, libraries: Path) -> Any:
    """The bindings, over the libraries in that folder, also as the module `tensorrt`."""
    for name in LIBRARIES:
        (file,) = libraries.glob(f"lib{name}.so.*")
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(bindings))
    sys.modules["tensorrt"] = found = importlib.import_module("tensorrt_bindings")
    return found


def check(trt: Any, sources: list[Path]) -> dict[str, Any]:
    """The version, what the sources use, and what is wrong with it."""
    uses: set[str] = set()
    problems: list[str] = []
    for source in sources:
        checker = Checker(trt, source.name)
        checker.visit(ast.parse(source.read_text()))
        uses |= checker.uses
        problems += checker.problems
    return {"version": trt.__version__, "uses": sorted(uses), "problems": problems}


def started() -> str:
    """How the library's own code ends when it builds an engine over libraries that do nothing."""
    from dspfx.deploy.tensorrt_build import BuildOptions, build_engine, load_tensorrt, make_log
    from dspfx.errors import DspfxError

    trt = load_tensorrt()
    log = make_log(trt, False)
    log.log(trt.ILogger.Severity.ERROR, "an error")
    log.log(trt.ILogger.Severity.INFO, "a remark")
    assert log.errors == ["an error"]
    try:
        build_engine(Path("network.onnx"), {}, BuildOptions(), b"")
    except DspfxError as error:
        return f"{type(error).__name__}: {error}"
    return "built"


if __name__ == "__main__":
    module = load(Path(sys.argv[1]), Path(sys.argv[2]))
    files = [Path(name) for name in sys.argv[3:]]
    print(json.dumps(check(module, files) if files else {"version": module.__version__, "started": started()}))
