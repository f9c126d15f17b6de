"""Write a changed ONNX model as a new export would leave it: with a seal of its own."""

from __future__ import annotations

import json
from pathlib import Path

import onnx

from optin_deploy.files.storage import sha256_file
from optin_deploy.network.sealed import SEAL, _seal


def put_artifact(proto: onnx.ModelProto, job: Path) -> None:
    """Make a model the pruned artifact of a job, sealed and known to its report."""
    path = job / "model.onnx"
    entries = [entry for entry in proto.metadata_props if entry.key != SEAL]
    del proto.metadata_props[:]
    proto.metadata_props.extend(entries)
    onnx.save(proto, path)
    _seal(path)
    report = json.loads((job / "report.json").read_text())
    report["hashes"]["model.onnx"] = sha256_file(path)
    (job / "report.json").write_text(json.dumps(report))
