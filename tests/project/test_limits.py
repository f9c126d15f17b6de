"""No heaps: a file has at most 300 lines and holds one idea; a function has at most 60 lines and 8 parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from support.project import ROOT

FOLDERS = ("optin_deploy", "exporters", "benchmarks")
FILE_LINES, FUNCTION_LINES, PARAMETERS = 300, 60, 8
EXCEPTIONS = {
    "optin_deploy/pruning/modules.py:prune": "public, keyword by keyword; most of its lines say what they mean",
}
"""Path, or path and function, of what is larger -> the reason."""


def heaps(source: str) -> Iterator[tuple[str, str]]:
    """Yield each function that is too large, or an empty name for the file, and what is too large about it."""
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        yield "", f"{lines} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            parameters = [each.arg for each in arguments if each.arg not in ("self", "cls")]
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                yield node.name, f"{length} lines"
            if len(parameters) > PARAMETERS:
                yield node.name, f"{len(parameters)} parameters"


def named(place: str, exception: str) -> bool:
    """Is a place, a path or path:function, what an exception names, or in the folder that it names?"""
    return place.startswith(exception) if exception.endswith("/") else place == exception


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = 0\n" * 300, []),
        ("x = 0\n" * 301, ["301 lines"]),
        ("def f():\n" + "    pass\n" * 59, []),
        ("def f():\n" + "    pass\n" * 60, ["61 lines"]),
        ("class A:\n    def f(self, a, b, c, d, *, e, f, g, h): ...", []),
        ("class A:\n    async def f(self, a, b, c, d, /, e, f, *, g, h, i): ...", ["9 parameters"]),
    ],
)
def test_the_check_finds_heaps(source: str, found: list[str]) -> None:
    assert [what for _, what in heaps(source)] == found


def test_files_and_functions_stay_small() -> None:
    found = {}
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for name, what in heaps(path.read_text(encoding="utf-8")):
            place = f"{path.relative_to(ROOT).as_posix()}:{name}".removesuffix(":")
            found.setdefault(place, what)
    told = [f"{place}: {what}" for place, what in found.items() if not any(named(place, each) for each in EXCEPTIONS)]
    assert told == []
    assert [each for each in EXCEPTIONS if not any(named(place, each) for place in found)] == [], "no longer needed"
