"""The integrations cost nothing until they are asked for, and say what is missing where it is."""

from __future__ import annotations

import ast
import importlib
import sys

import pytest

from dspfx.errors import ConfigError
from tests.test_layout import imports, library_files

OPTIONAL = ("lightning", "transformers", "accelerate", "timm")


def test_nothing_else_imports_them() -> None:
    """Lazily neither; and of themselves each imports its own library alone."""
    users = {
        (module, name.split(".")[0])
        for module, file in library_files().items()
        for _, name in imports(ast.parse(file.read_text()), module, file.name == "__init__.py")
        if name.split(".")[0] in OPTIONAL
        or (name.startswith("dspfx.integrations") and not module.startswith("dspfx.integrations"))
    }
    assert users == {
        ("dspfx.integrations.lightning", "lightning"),
        ("dspfx.integrations.transformers", "transformers"),
    }


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"dspfx.integrations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        importlib.import_module(f"dspfx.integrations.{name}")
    start = f"dspfx.integrations.{name} needs the package {name}, which cannot be imported ("
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith('); run: pip install "dspfx[integrations]"')
    assert isinstance(caught.value.__cause__, ImportError)
