"""Docstrings: their examples are true, and every argument of a public class is documented.

Examples run with doctest (ELLIPSIS, NORMALIZE_WHITESPACE) in an empty folder without a network, module by module. Arguments of
`__init__` are documented under `Args:` of the class's docstring or of `__init__`'s own; those of functions are ruff's D417.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

MODULES = [
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
    for file in sorted((REPOSITORY / "dynkp").rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples fail; the output above says which"


def test_a_false_example_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "false_example.py").write_text('"""Adds.\n\n>>> 1 + 1\n3\n"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError, match="1 of 1 examples fail"):
        test_examples("false_example", tmp_path, monkeypatch)


def undocumented_arguments(source: str) -> list[str]:
    """`Class.argument` for every argument of a public class's `__init__` that no `Args:` section names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    text = (ast.get_docstring(node) or "") + "\n" + (ast.get_docstring(method) or "")
                    arguments = [*method.args.posonlyargs, *method.args.args, *method.args.kwonlyargs]
                    found += [
                        f"{node.name}.{argument.arg}"
                        for argument in arguments[1:]
                        if not re.search(rf"^ +(\w+, )*{argument.arg}(, \w+)*( \([^:]*\))?:", text, re.MULTILINE)
                    ]
    return found


def test_arguments_of_public_classes_are_documented() -> None:
    missing = {
        module: arguments
        for module in (REPOSITORY / "dynkp").rglob("*.py")
        if (arguments := undocumented_arguments(module.read_text(encoding="utf-8")))
    }
    assert missing == {}


def test_an_undocumented_argument_is_found() -> None:
    source = 'class A:\n    """An a.\n\n    Args:\n        b: a b.\n    """\n\n    def __init__(self, b, *, c):\n        pass\n'
    assert undocumented_arguments(source) == ["A.c"]
