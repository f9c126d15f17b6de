"""Which model an artifact was made from: its ONNX file says it, and model/ beside it must be that one."""

from __future__ import annotations

from pathlib import Path

from exporters.onnx_artifact import was_changed, weights_of
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.onnx_data import read_onnx, remedy
from optin_deploy.pruned import MANIFEST, REWRITE_HINT, read_saved
from optin_deploy.runtimes.record import read_record
from optin_deploy.storage import read_tensors, sha256_file, sha256_tensors

MODEL = "model"


def check_origin(path: Path, role: str) -> bool:
    """Refuse an artifact that the model in its output folder did not make.

    Args: role: `dense` or `pruned`.
    Returns: False if nothing tells: it is of an earlier version, or of an engine that is built without ONNX.
    Raises: BadInput: it is damaged, or was changed. PlanMismatch: it is of another model.
    """
    graph = path
    if path.suffix != ".onnx":
        record = read_record(path)
        graph = path.with_name(record.onnx or "")
        if record.onnx is None or not graph.is_file():
            return False
        if record.onnx_sha256 not in (None, sha256_file(graph)):
            again = f"Build it again: optin build {path.parent} --engine {record.engine} --precision {record.precision}"
            raise PlanMismatch(f"{path} was not built from {graph}, which is newer. {again}")
    proto = read_onnx(graph)
    if was_changed(graph, proto):
        raise BadInput(f"{graph}, or the file with its weights, is not as it was written. {remedy(graph)}")
    made_from, expected = weights_of(proto), _weights(path.parent / MODEL, role)
    if made_from is None or expected is None:
        return False
    if made_from != expected:
        other = path.parent / MODEL if role == "pruned" else f"the dense model of {path.parent / MODEL}"
        raise PlanMismatch(f"{graph} was not made from {other}, but from another model. {remedy(graph)}")
    return True


def _weights(folder: Path, role: str) -> str | None:
    """sha256 of the tensors of the pruned model in a folder, or of the dense one that it was cut from, if it says so.

    Raises: BadInput, PlanMismatch: the folder is damaged.
    """
    if not (folder / MANIFEST).is_file():
        return None
    saved, _, _ = read_saved(folder)
    if role == "dense":
        return saved.report.get("dense_weights")
    path = folder / "model.safetensors"
    tensors = read_tensors(path, REWRITE_HINT)
    if sha256_file(path) != saved.weights_sha256:
        raise PlanMismatch(f"{path} is not the file that was saved there. {REWRITE_HINT}")
    return sha256_tensors(tensors)
