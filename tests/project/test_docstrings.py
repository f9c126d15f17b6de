"""Docstrings stand alone in a rendered reference: none leans on the line above it, and each is a finished sentence."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

import pytest

from support.project import ROOT

FOLDERS = ("optin_deploy", "exporters", "benchmarks")
FRAGMENTS = ("Of ", "By ", "In ", "With ", "Without ", "As ", "At ", "From ")
ENDS = (".", "!", "?", ":")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring of a module, class, function or field, and of what a constructor sets."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                match statement:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        yield statement.lineno, inspect.cleandoc(text)


def faults(source: str) -> list[str]:
    """Lines whose docstring begins as a fragment, or ends without punctuation or a code block."""
    found = []
    for line, text in docstrings(source):
        last = text.splitlines()[-1]
        if text.startswith(FRAGMENTS):
            found.append(f"{line}: begins with {text.split()[0]!r}")
        if not last.endswith(ENDS) and not last.startswith(("    ", "```")):
            found.append(f"{line}: ends with {last[-20:]!r}")
    return found


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('"""Of the dense model."""', 1),
        ('class A:\n    x: int\n    """By name"""', 2),
        ("def f():\n    '''As it is.'''", 1),
        ("class A:\n    def __init__(self):\n        self.x = 0\n        '''In bytes.'''", 1),
        ('"""Engine of the dense model."""', 0),
        ('"""Byte order."""\nx = 0\n"""Inputs by name."""', 0),
        ('"""A suite.\n\nRun:\n\n    python -m benchmarks\n"""', 0),
        ('"""Run it: python -m benchmarks"""', 1),
        ("x = 'Of text that is no docstring'", 0),
    ],
)
def test_the_check_finds_fragments_and_open_ends(source: str, count: int) -> None:
    assert len(faults(source)) == count


def test_docstrings_are_whole_sentences() -> None:
    paths = [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert {path.parts[0] for path in paths} == set(FOLDERS)
    found = [f"{path}:{fault}" for path in paths for fault in faults((ROOT / path).read_text(encoding="utf-8"))]
    assert found == []
