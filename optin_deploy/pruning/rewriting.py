"""`optin rewrite FILE.onnx`: cut an ONNX file by a plan, prove the result, compare with ONNX Runtime, write it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.cutting.proof import Proof, difference
from optin_deploy.cutting.tokens import merged
from optin_deploy.errors import BadInput, MissingDependency, ParityFailure
from optin_deploy.files.ownership import free_name
from optin_deploy.files.storage import scratch_folder
from optin_deploy.network.graph import Network
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.run import Program
from optin_deploy.network.write import data_path, write
from optin_deploy.planning.costs import costs_of
from optin_deploy.planning.plan import NetworkPlan, plan_cost
from optin_deploy.pruning.networks import as_plan, costs_merging, cut_by, find_in
from optin_deploy.pruning.stored import MARK, marked
from optin_deploy.runtimes.ort import OrtRuntime

log = logging.getLogger(__name__)

TOLERANCES = {
    ir.DataType.FLOAT16: 2e-2,
    ir.DataType.BFLOAT16: 6e-2,
    ir.DataType.INT8: 6e-2,
    ir.DataType.UINT8: 6e-2,
}
"""Largest allowed difference by type of the weights, as a part of the largest output; 1e-4 for all other files."""


@dataclass(frozen=True)
class RewrittenFile:
    """What a cut did to a file."""

    plan: NetworkPlan
    """The plan with its cost, also if the stored one was written by hand."""
    proof: Proof
    bytes_dense: int
    bytes_pruned: int | None
    """None: nothing was written."""
    engine: float | None
    """Largest difference of ONNX Runtime, as a part of the largest output; None: it was not run."""


def rewrite_file(
    source: Path,
    plan: Path,
    out: Path,
    *,
    sizes: Mapping[str, int] | None = None,
    force: bool = False,
    dry_run: bool = False,
    stage: Stage = silent_stage,
) -> RewrittenFile:
    """Cut a file.

    Args: sizes: of free axes, by name. dry_run: all but writing.
    Raises: BadInput, PlanMismatch: the plan does not fit, or something else is at `out`. NotProven, ParityFailure: the
        result computes something else; nothing is written then.
    """
    _check_out(out, source, plan)
    free_name(out, is_ours, force=force, dry_run=True)
    free_name(data_path(out), lambda _: is_ours(out), force=force, dry_run=True)
    with stage("find"):
        found = find_in(source, sizes=sizes)
        chosen = as_plan(plan, found.layout)
        costs = costs_of(found.layout)
        if any(chosen.merges):
            costs = costs_merging(found, merged(found.layout, chosen.merges, found.probes), costs)
        chosen = replace(chosen, cost=plan_cost(found.layout, costs, chosen.keep))
    with stage("cut and prove"):
        smaller, proof = cut_by(found, chosen)
    named = marked(smaller, chosen)
    with stage("compare"), scratch_folder(out) as folder:
        write(named, folder / out.name)
        error = compare(named, found.network, folder / out.name, source, found.probes)
    if dry_run:
        return RewrittenFile(chosen, proof, file_bytes(source), None, error)
    free_name(out, is_ours, force=force)
    free_name(data_path(out), lambda _: is_ours(out), force=force)
    write(named, out)
    return RewrittenFile(chosen, proof, file_bytes(source), file_bytes(out), error)


def is_ours(path: Path) -> bool:
    """Is this a file that an earlier rewrite wrote?"""
    try:
        return MARK in read_file(path).model.metadata_props
    except BadInput:
        return False


def file_bytes(path: Path) -> int:
    """Size of an ONNX file, with the weights beside it."""
    data = data_path(path)
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def compare(
    smaller: Network, dense: Network, path: Path, dense_path: Path, probes: Sequence[Mapping[str, Tensor]]
) -> float | None:
    """Run the written file by ONNX Runtime, where that is installed.

    Returns: the largest difference from our own run, as a part of the largest output.
    Raises: ParityFailure: more than the type allows, though the dense file runs as ours does.
    """
    try:
        error = _engine_error(smaller, path, probes)
    except MissingDependency as err:
        log.warning("not compared with ONNX Runtime: %s", err)
        return None
    except BadInput as err:
        if _runs(dense, dense_path, probes):
            raise ParityFailure(f"ONNX Runtime takes {dense_path} but not what was cut from it: {err}") from err
        log.warning("ONNX Runtime takes neither this network nor the dense one: %s", err)
        return None
    limit = tolerance(smaller)
    if not error <= limit and not error <= 2 * _engine_error(dense, dense_path, probes):
        raise ParityFailure(
            f"ONNX Runtime gives outputs that differ by {error:.1e} of the largest one from what was proven (at most "
            f"{limit:g}), and the dense file does not. Please report it, with the plan."
        )
    return error


def tolerance(network: Network) -> float:
    """How far an engine may be off, by the types of the weights."""
    return max(TOLERANCES.get(weight.dtype, 1e-4) for weight in (*network.weights.values(), ir.tensor([0.0])))


def _runs(network: Network, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> bool:
    try:
        return math.isfinite(_engine_error(network, path, probes))
    except BadInput:
        return False


def _engine_error(network: Network, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> float:
    program, worst = Program(network), 0.0
    with OrtRuntime(path, threads=1) as runtime, torch.no_grad():
        for feeds in probes:
            ours = program(feeds).outputs
            theirs = runtime.run({name: value.numpy() for name, value in feeds.items()})
            for name, value in theirs.items():
                worst = max(worst, difference(torch.from_numpy(value), ours[name]))
    return worst


def _check_out(out: Path, source: Path, plan: Path) -> None:
    """Raises: BadInput: no .onnx file, or it would replace what is read."""
    if out.suffix.lower() != ".onnx":
        raise BadInput(f"--out {out}: give a file that ends in .onnx.")
    for read in (source, plan, data_path(source)):
        for written in (out, data_path(out)):
            if written.exists() and read.exists() and written.samefile(read):
                raise BadInput(f"--out {out} would replace {read}, which is read. Give another name.")
