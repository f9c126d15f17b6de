"""Imports go one way, importing the package stays quick, and no source loads code from data."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.project import HEAVY, ROOT

FOLDERS = ("optin_deploy", "exporters", "benchmarks", "tests", "docker", "examples")
UNSAFE = {
    r"torch\.load\s*\((?!.*weights_only=True)": "x = torch" + ".load(path)",
    r"pickle\.load": "x = pickle" + ".loads(data)",
    r"trust_remote_code\s*=\s*True": "AutoModel.from_pretrained(name, trust_remote_code" + "=True)",
}
"""Pattern -> an example it must find, split so that this file does not match itself."""


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_names(node: ast.AST) -> list[str]:
    """Absolute module names that one node imports, also by `import_module("literal")`."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module="optin_deploy", names=names, level=0):
            return [f"optin_deploy.{alias.name}" for alias in names]
        case ast.ImportFrom(module=str(module), level=0):
            return [module]
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(module)), *_],
        ):
            return [module]
    return []


def outward_imports(source: str, targets: set[str], *, allow_in_functions: bool = False) -> Iterator[str]:
    """Yield `line N imports NAME` for each import of a target package."""

    def visit(node: ast.AST, in_function: bool) -> Iterator[str]:
        for name in imported_names(node):
            if name.split(".")[0] in targets and not (allow_in_functions and in_function):
                yield f"line {node.lineno} imports {name}"  # type: ignore[attr-defined]
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), False)


@pytest.mark.parametrize(
    "source",
    [
        "import exporters",
        "import os, exporters.to_onnx as x",
        "from exporters import to_onnx",
        "def f():\n    from exporters.to_onnx import export",
        "from importlib import import_module\nimport_module('exporters.to_onnx')",
        "import importlib\nimportlib.import_module('exporters')",
        "if TYPE_CHECKING:\n    import exporters",
    ],
)
def test_the_check_finds_each_way_of_importing(source: str) -> None:
    assert list(outward_imports(source, {"exporters"}))


def test_the_check_allows_lazy_imports_and_other_packages_only() -> None:
    lazy = "def f():\n    import exporters"
    assert not list(outward_imports(lazy, {"exporters"}, allow_in_functions=True))
    assert list(outward_imports("import exporters", {"exporters"}, allow_in_functions=True))
    assert not list(outward_imports("import exporters_of_tea\nfrom . import exporters", {"exporters"}))


def test_the_library_imports_no_benchmarks_and_exporters_by_one_name() -> None:
    # `exporters` is a folder beside the library and a package within it: by two names it would be loaded twice.
    found = [
        f"{path.relative_to(ROOT)}: {hit}"
        for path in python_files("optin_deploy", "exporters")
        for hit in outward_imports(path.read_text(encoding="utf-8"), {"exporters", "benchmarks"})
    ]
    found += [
        f"{path.relative_to(ROOT)}: {hit}"
        for path in python_files("benchmarks", "tests")
        for hit in outward_imports(path.read_text(encoding="utf-8"), {"exporters"})
    ]
    assert found == []


@pytest.mark.parametrize("module", ["optin_deploy", "optin_deploy.cli", "optin_deploy.pytest_plugin"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert "optin_deploy" in loaded
    assert not loaded.intersection(HEAVY)


def test_every_folder_of_the_wheel_with_code_is_a_package() -> None:
    # The wheel is built from regular packages: a folder without __init__.py works in the checkout and is missing there.
    folders = {path.parent for path in python_files("optin_deploy", "exporters")}
    assert not [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").is_file()]


def test_no_source_loads_code_from_data() -> None:
    files = python_files(*FOLDERS)
    assert Path(__file__).resolve() in files
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files
        for pattern in UNSAFE
        for match in re.finditer(pattern, path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize(("pattern", "example"), UNSAFE.items())
def test_the_unsafe_patterns_find_what_they_are_for(pattern: str, example: str) -> None:
    assert re.search(pattern, example)


ROOMS = (
    *("errors", "files", "common", "network", "structure", "data", "feeds", "scoring", "quality", "planning"),
    *("cutting", "checkpoint", "runtimes", "exporters", "measuring", "doctor", "reporting", "pruning", "tuning"),
    *("jobs", "serving", "commands", "pytest_plugin", "cli", "__main__"),
)
"""Of the library, from the lowest to the highest; `exporters` lies beside it."""


def test_every_module_has_its_room() -> None:
    found = {
        path.relative_to(ROOT / "optin_deploy").parts[0].removesuffix(".py") for path in python_files("optin_deploy")
    }
    assert (found | {"exporters"}) - {"__init__"} == set(ROOMS)


def test_a_lower_room_imports_no_higher_one() -> None:
    wrong = []
    for level, room in enumerate(ROOMS):
        higher = {f"optin_deploy.{name}" for name in ROOMS[level + 1 :]}
        folder = room if room == "exporters" else f"optin_deploy/{room}"
        paths = python_files(folder) or [ROOT / f"{folder}.py"]
        for path in paths:
            names = [name for node in ast.walk(ast.parse(path.read_text())) for name in imported_names(node)]
            wrong += [f"{path.relative_to(ROOT)}: {name}" for name in names if ".".join(name.split(".")[:2]) in higher]
    assert wrong == []


def test_the_rooms_of_any_network_know_no_family() -> None:
    for room in ("network", "structure", "planning", "cutting"):
        for path in python_files(f"optin_deploy/{room}"):
            assert not re.search(r"bert|llama|resnet|swin", path.read_text(), re.IGNORECASE), path


def test_tests_mirror_the_rooms() -> None:
    others = {"support", "benchmarks", "invariants", "project", "servers"}
    found = {path.relative_to(ROOT / "tests").parts[0] for path in python_files("tests")}
    assert found - {"conftest.py"} - others <= set(ROOMS)


def test_no_test_imports_another_test() -> None:
    found = []
    for path in python_files("tests"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [name for node in nodes for name in imported_names(node)]
        names += [alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
        found += [f"{path.relative_to(ROOT)}: {name}" for name in names if re.search(r"\b(test_|conftest$)", name)]
    assert found == []
