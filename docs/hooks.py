"""Hooks of MkDocs: results and READMEs of the repository are pages too, under the paths by which pages name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("benchmarks", "benchmarks/results", "docker", "examples")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and pictures of other folders."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("*")):
            if path.suffix in (".md", ".png"):
                uri = f"{folder}/{path.name}"
                files.append(File.generated(config, uri, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name those folders from within the documentation."""
    for folder in FOLDERS:
        markdown = markdown.replace(f"](../{folder}/", f"]({folder}/")
    return markdown
