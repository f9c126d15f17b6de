"""Recorded inputs with the outputs of both networks, for checks on another machine."""

from __future__ import annotations

import torch

from optin_deploy.feeds.rows import rows_of
from optin_deploy.files.names import PRUNED
from optin_deploy.files.storage import read_tensors, write_tensors
from optin_deploy.jobs.bench import inputs_in
from optin_deploy.jobs.prepared import Prepared
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.measuring.points import Point
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.network.sealed import finished

INPUT = "input."
"""Start of the names of recorded inputs."""
RECORDED = 8
"""Samples kept with their outputs, for parity on the target."""


def recorded(workspace: Workspace) -> dict[str, torch.Tensor]:
    """The inputs in samples.safetensors; where a stage before them was the last, random ones."""
    path = workspace.root / "samples.safetensors"
    if path.is_file():
        tensors = read_tensors(path, f"Write it with `optin-export MODEL --out {workspace.root}`.")
        return {name.removeprefix(INPUT): value for name, value in tensors.items() if name.startswith(INPUT)}
    inputs = inputs_in(workspace)
    return {name: torch.from_numpy(value) for name, value in inputs.feeds(Point(RECORDED)).items()}


def record_samples(
    workspace: Workspace,
    prepared: Prepared,
    smaller: Network,
    *,
    dense: Network | None = None,
    output: str | None = None,
    key: str | None = None,
) -> None:
    """Keep 8 inputs that judge with the outputs of both networks, for parity on the target.

    Args: dense, output: the dense network, and what is compared; None: those of the job. key: of the model.onnx that is
        written afterwards; None: that of the one that is there.
    """
    rows = prepared.ready.rows.held_out or prepared.ready.rows.calibration
    most = max(rows.batches, key=lambda batch: min(rows_of(batch), RECORDED))  # the last one may be short
    batch = {name: value if name in rows.shared else value[:RECORDED] for name, value in most.items()}
    networks = {"dense": dense or prepared.ready.network, "pruned": smaller}
    names = [port.name for port in smaller.inputs]
    tensors = {f"{INPUT}{name}": batch[name].contiguous() for name in names}
    for role, network in networks.items():
        with torch.inference_mode():
            outputs = Program(network)({name: batch[name] for name in names}).outputs
        tensors |= {f"{role}.{name}": value.contiguous() for name, value in outputs.items()}
    if key is None:
        known = finished(workspace.root / PRUNED)
        assert known is not None, "the rewrite stage wrote it"
        key = known.key
    output = output or prepared.ready.subject.reading.output
    write_tensors(workspace.root / "samples.safetensors", tensors, {"model": key, "output": output})
