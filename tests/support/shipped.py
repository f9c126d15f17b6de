"""Orders to ship a tiny job, another artifact for it, and what is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from optin_deploy.serving.order import ShipOrder
from support.sealed import put_artifact


def order(out: Path, **settings: Any) -> ShipOrder:
    return ShipOrder(**{"server": "triton", "out": out, "name": "tiny", **settings})


def changed(job: Path) -> None:
    """Another pruned artifact of the same inputs and outputs, as a new export would leave it."""
    proto = onnx.load(job / "model.onnx")
    proto.doc_string += "another"
    put_artifact(proto, job)


def published(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without our lock and our record."""
    return {name: content for name, content in files.items() if not name.startswith(".optin")}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
