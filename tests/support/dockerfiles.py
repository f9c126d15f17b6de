"""Dockerfiles read instruction by instruction, the tested versions, and programs that check files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.project import ROOT


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, its lines joined."""

    keyword: str
    value: str


def instructions(path: Path) -> list[Instruction]:
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.lstrip().startswith("#"))
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    return [Instruction(keyword.upper(), value.strip()) for keyword, _, value in (x.partition(" ") for x in lines if x)]


def values(path: Path, keyword: str) -> list[str]:
    return [entry.value for entry in instructions(path) if entry.keyword == keyword]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def tool(name: str) -> str:
    """Path of a program of this environment; skips the test where it is not installed."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed")


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
