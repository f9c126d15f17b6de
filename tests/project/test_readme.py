"""The code blocks of README and documentation run as they stand, each page in an empty folder of its own.

Python blocks run in order in one process, as a reader would type them; of bash blocks the lines that start with
`optin` or `optin-export` run after that, in the same folder. A fence marked `no-test: GPU`, `no-test: docker`,
`no-test: minutes` or `no-test: part` (of a file that belongs to the reader) is left out; there is no other reason.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

import optin_deploy
from optin_deploy.cli import app
from support.project import ROOT, environment

PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md"))]
PAGES += sorted((ROOT / "docs").glob("*.md"))
REASONS = ("GPU", "docker", "minutes", "part")
MISNAMED = {"py": "python", "python3": "python", "sh": "bash", "shell": "bash", "console": "bash", "zsh": "bash"}
"""Fence languages that would slip past this test."""
LONG = ("first-hour", "networks", "python")
"""Pages that take half a minute or more each."""
SECONDS = 300
RUNNER = """
import json, sys
namespace = {"__name__": "__main__"}
for line, code in json.loads(sys.stdin.read()):
    exec(compile("\\n" * line + code, "page", "exec"), namespace)  # tracebacks name the page's line
"""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    code: str
    line: int
    """Of the fence, from 1."""
    left_out: str | None
    """The reason of `no-test`."""


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks.

    Raises: ValueError: an unknown reason, a fence language that would not be run, or a fence that does not end.
    """
    found: list[Block] = []
    opened: tuple[str, str, int] | None = None
    code: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if opened is None:
            fence = re.match(r"\s*(`{3,}|~{3,})\s*(.*)$", line)
            if fence:
                opened, code = (fence[1], fence[2].strip(), number), []
        elif re.match(rf"\s*{opened[0]}\w", line):
            raise ValueError(f"line {number}: a fence opens inside the block of line {opened[2]}; close that one.")
        elif line.strip() == opened[0]:
            found.append(_block(opened[1], "\n".join(code) + "\n", opened[2]))
            opened = None
        else:
            code.append(line)
    if opened:
        raise ValueError(f"line {opened[2]}: this fence never ends.")
    return found


def _block(info: str, code: str, line: int) -> Block:
    language = info.split()[0] if info else ""
    if language in MISNAMED:
        raise ValueError(f"line {line}: write {MISNAMED[language]} for {language}, so that the block is run.")
    reason: str | None = None
    if "no-test" in info:
        marked = re.search(r"no-test:\s*([A-Za-z]+)\s*$", info)
        reason = marked[1] if marked else ""
        if reason not in REASONS:
            raise ValueError(f"line {line}: {info!r}; the reasons are no-test: {' | '.join(REASONS)}.")
    return Block(language, code, line, reason)


def commands_of(code: str) -> list[str]:
    """The lines of a bash block that call our programs, with continuation lines joined and prompts dropped."""
    lines = code.replace("\\\n", " ").splitlines()
    lines = [line.strip().removeprefix("$ ") for line in lines]
    return [line for line in lines if re.match(r"optin(-export)?(\s|$)", line)]


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in a language, also those left out."""
    return [block for block in blocks_of(page.read_text(encoding="utf-8")) if block.language == language]


def blocks_to_run(page: Path, language: str) -> list[Block]:
    return [block for block in blocks(page, language) if block.left_out is None]


def with_blocks(language: str) -> list[Path]:
    """The pages with blocks to run."""
    return [
        page
        for page in PAGES
        if any(block.language != "bash" or commands_of(block.code) for block in blocks_to_run(page, language))
    ]


def test_the_readme_is_short_and_has_code_to_run() -> None:
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 100
    assert PAGES[0] in with_blocks("python")
    assert any(commands_of(block.code) for block in blocks(PAGES[0], "bash"))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in LONG else [])
        for page in with_blocks("python")
    ],
)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    code = [(block.line, block.code) for block in blocks_to_run(page, "python")]
    called([sys.executable, "-c", RUNNER], tmp_path, page.name, input=json.dumps(code))
    for block in blocks_to_run(page, "bash"):
        for command in commands_of(block.code):
            called(["bash", "-c", command], tmp_path, f"{page.name}:{block.line}: {command}")


def test_python_blocks_of_all_pages_compile_and_name_what_there_is() -> None:
    # Also of those that are too long to run each time, or anywhere.
    for page, block in [(each, block) for each in PAGES for block in blocks(each, "python")]:
        if block.left_out == "part":
            continue
        for node in ast.walk(ast.parse(block.code, f"{page.name}:{block.line}")):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optin_deploy"):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), f"{page.name}:{block.line}: {name.name}"
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "optin_deploy":
                assert hasattr(optin_deploy, node.attr), f"{page.name}:{block.line}: optin_deploy.{node.attr}"


def test_commands_are_run_after_the_code_that_they_need() -> None:
    assert {*with_blocks("bash")} <= {*with_blocks("python")}


def called(command: list[str], folder: Path, where: str, **options: Any) -> None:
    """Run a command as a reader does.

    Raises: AssertionError: it failed.
    """
    usual = {"env": environment(), "capture_output": True, "text": True, "timeout": SECONDS, "check": False}
    done = subprocess.run(command, cwd=folder, **usual, **options)
    assert done.returncode == 0, f"{where}\n{done.stdout[-2000:]}{done.stderr[-5000:]}"


def test_all_commands_of_the_bash_blocks_exist_with_their_flags() -> None:
    # Also of those that are too long to run here.
    group: Any = typer.main.get_command(app)
    for page, block in [(each, block) for each in PAGES for block in blocks(each, "bash")]:
        for command in commands_of(block.code):
            program, *words = shlex.split(command, comments=True)
            name = "export" if program == "optin-export" else words[0]
            assert name in group.commands, f"{page.name}:{block.line}: {command}"
            known = {option for parameter in group.commands[name].params for option in parameter.opts}
            known |= {option for parameter in group.commands[name].params for option in parameter.secondary_opts}
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert flags <= known | {"--help"}, f"{page.name}:{block.line}: {command}"


# the test's own tools

SAMPLE = """
Text with `inline` code.
```python
x = 1
```
```bash no-test: minutes
optin-export big
```
  ```bash
  $ optin plan work --flops 0.5 \\
      --align 8
  make demo
  optin-exporter is another program
  optin show work  # a comment
  ```
```text
optin not code
```
~~~python no-test: GPU
boom()
~~~
"""


def test_blocks_are_found_with_language_line_and_reason() -> None:
    found = [(block.language, block.line, block.left_out) for block in blocks_of(SAMPLE)]
    assert found == [
        ("python", 3, None),
        ("bash", 6, "minutes"),
        ("bash", 9, None),
        ("text", 16, None),
        ("python", 19, "GPU"),
    ]
    assert blocks_of(SAMPLE)[0].code == "x = 1\n"


def test_only_our_own_commands_are_taken_from_bash() -> None:
    commands = commands_of(blocks_of(SAMPLE)[2].code)
    assert [" ".join(command.split()) for command in commands] == [
        "optin plan work --flops 0.5 --align 8",
        "optin show work # a comment",
    ]


@pytest.mark.parametrize(
    "info",
    ["python no-test: lazy", "python no-test", "bash no-test:", "bash no-test: GPU later", "sh", "py", "console"],
)
def test_no_block_escapes_without_a_good_reason(info: str) -> None:
    with pytest.raises(ValueError, match=r"line 1: "):
        blocks_of(f"```{info}\npass\n```\n")


def test_a_block_that_swallows_the_next_fence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"line 3.*line 1"):
        blocks_of("```bash\noptin show work\n```text\n")


def test_a_fence_that_never_ends_is_refused() -> None:
    with pytest.raises(ValueError, match=r"line 2.*never ends"):
        blocks_of("text\n```python\nx = 1\n")
