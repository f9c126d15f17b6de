"""What an artifact was made from: its ONNX file says it, and must be of the plan and the network in its folder."""

from __future__ import annotations

from pathlib import Path

from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.files.storage import sha256_file
from optin_deploy.network.onnx_data import read_onnx, remedy
from optin_deploy.network.sealed import MADE_FROM, was_changed
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.stored import MARK, parsed_mark
from optin_deploy.runtimes.record import read_record

PLAN = "plan.json"


def check_origin(path: Path, role: str) -> bool:
    """Refuse an artifact that the networks in its output folder did not make.

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
    said = {entry.key: entry.value for entry in proto.metadata_props}
    if MADE_FROM in said:
        source = graph.with_name(f"{graph.name.partition('.')[0]}.onnx")
        if not source.is_file() or sha256_file(source) != said[MADE_FROM]:
            raise PlanMismatch(f"{graph} was not made from {source} as it is now. {remedy(graph)}")
        return check_origin(source, role)
    made, plan_path = parsed_mark(said.get(MARK)), path.parent / PLAN
    if made is None or not plan_path.is_file():
        return False
    plan = NetworkPlan.read(plan_path)
    expected = {"plan": plan.hash if role == "pruned" else None, "network": plan.network}
    if made != expected:
        whose = f"the plan {plan_path}" if role == "pruned" else f"the network that {plan_path} is of"
        raise PlanMismatch(f"{graph} does not belong to {whose}. {remedy(graph)}")
    return True
