"""What an output folder offers to an inference server: its artifacts with their manifests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save

from optin_deploy.checkpoint.config import longest_in
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.exporters import check_precision, exporter
from optin_deploy.files.names import PRUNED
from optin_deploy.files.opening import check_inside
from optin_deploy.files.storage import read_metadata, read_tensors
from optin_deploy.jobs.belonging import disagreements
from optin_deploy.jobs.origin import check_origin
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.network.onnx_data import data_files
from optin_deploy.network.sealed import finished
from optin_deploy.pruning.dense import SEQ_LEN
from optin_deploy.reporting.findings import StoredReport, read_report
from optin_deploy.reporting.latency_rows import LatencyRow
from optin_deploy.runtimes.record import read_record
from optin_deploy.serving.base import Server
from optin_deploy.serving.manifest import FOLDER, Manifest, check_name
from optin_deploy.serving.names import dense_of
from optin_deploy.serving.order import ShipOrder
from optin_deploy.serving.repository import Version, hashes
from optin_deploy.serving.tensors import largest_batch, tensors_of
from optin_deploy.serving.texts import text_models

SAMPLES = f"{FOLDER}/samples.safetensors"
TRAVEL = ("plan.json", "report.json")
"""What goes with a pruned artifact, besides samples."""
NEARLY_BEST = 0.95
"""Share of the best measured throughput from which on a batch size is preferred."""
REBUILD = "Make it with `optin build {folder} --engine {engine}`."


def shipments(folder: Path, order: ShipOrder, target: Server) -> list[Version]:
    """The models that are asked for, all with version 1: the repository numbers them.

    Raises: BadInput: something that is missing, damaged, or that the server would not serve.
    """
    chosen = exporter(order.engine)
    precision = check_precision(chosen, order.precision)
    if order.engine not in target.artifacts:
        raise BadInput(f"{order.server} does not serve engine {order.engine}; possible: {', '.join(target.artifacts)}.")
    if order.dense == "versions" and not target.side_by_side:
        raise BadInput(f"{order.server} serves one version of a model at a time: use --dense models or none.")
    workspace = Workspace(folder)
    source, plan = workspace.source(), workspace.read_plan()
    for problem in disagreements(folder):
        raise PlanMismatch(problem)
    report = read_report(folder)
    pruned, dense = chosen.file_names(precision, folder)
    paths = {"pruned": folder / pruned}
    if order.dense != "none":
        if dense is None:
            raise BadInput(f"engine {order.engine} has no dense artifact; use --dense none.")
        paths = {"dense": folder / dense, **paths}
    made_from = {"source": Path(source.model).name, "plan": plan.hash, "network": plan.network or ""}
    models = [_model(path, role, order, precision, target, report, made_from) for role, path in paths.items()]
    if order.text:
        longest = source.seq_len or min(SEQ_LEN, longest_in(workspace.model_folder) or SEQ_LEN)
        models += text_models(workspace.model_folder, models[-1][0], target, longest)
    for manifest, _ in models:
        target.check(manifest)
    return models


def _model(
    path: Path,
    role: str,
    order: ShipOrder,
    precision: str,
    target: Server,
    report: StoredReport | None,
    made_from: Mapping[str, str],
) -> Version:
    folder = path.parent
    check_inside(path, folder)
    if not path.is_file():
        raise BadInput(f"There is no {path}. {REBUILD.format(folder=folder, engine=order.engine)}")
    known = {} if report is None else report.hashes
    network = {"network": known["network"]} if "network" in known else {}
    if not check_origin(path, role) and path.name not in known:
        again = REBUILD.format(folder=folder, engine=order.engine)
        raise BadInput(f"Nothing says which model {path} was made from: it is of an earlier version. {again}")
    options, graph = order.options, path
    if target.artifacts[order.engine].endswith(".plan"):
        record = read_record(path)
        if record.stripped or record.onnx is None:
            raise BadInput(f"{path} holds no weights; servers need them inside. Build it without --weights stripped.")
        graph = folder / record.onnx
        most = largest_batch(path, record, options.longest)
        if options.max_batch > most:
            limit = f"the engine was built for at most {most}. Give that or less."
            raise BadInput(f"--max-batch {options.max_batch}: {limit}")
    inputs, outputs = tensors_of(graph)
    if not options.preferred and report is not None:
        options = replace(options, preferred=preferred_batches(report.latency, order, precision))
    data = data_files(path) if path.suffix == ".onnx" else ()
    cut = role == "pruned"  # of the dense one neither plan nor report tell, and a new plan makes no new version of it
    name = dense_of(order.name) if not cut and order.dense == "models" else order.name
    contents: dict[str, Path | bytes] = {
        target.artifacts[order.engine]: path,
        **{str(each.relative_to(folder)): each for each in data},  # by the names in the artifact
        **({f"{FOLDER}/{name}": folder / name for name in TRAVEL if (folder / name).is_file()} if cut else {}),
        SAMPLES: _samples(folder, role, [tensor.name for tensor in inputs]),
    }
    manifest = Manifest(
        name=check_name(name),
        version=1,
        role=role,
        engine=order.engine,
        precision=precision,
        file=target.artifacts[order.engine],
        inputs=inputs,
        outputs=outputs,
        options=options,
        sha256=hashes(contents),
        size_bytes=sum(each.stat().st_size for each in (path, *data)),
        made_from={**(made_from if cut else {"source": made_from["source"]}), **network},
    )
    return manifest, contents


def preferred_batches(latency: Sequence[LatencyRow], order: ShipOrder, precision: str) -> tuple[int, ...]:
    """Measured batch sizes with nearly the best throughput; none where only single samples were measured."""
    throughput = {
        row.batch: row.pruned.throughput for row in latency if (row.engine, row.precision) == (order.engine, precision)
    }
    best = max(throughput.values(), default=0.0)
    good = (size for size, value in throughput.items() if value >= NEARLY_BEST * best)
    return tuple(sorted(size for size in good if 1 < size <= order.options.max_batch))


def _samples(folder: Path, role: str, inputs: Sequence[str]) -> bytes:
    """Recorded inputs, and what the model of this role gave.

    Raises: BadInput: something is missing, or the numbers of rows differ. PlanMismatch: they are of another model.
    """
    path, hint = folder / "samples.safetensors", f"Write it with `optin-export MODEL --out {folder}`."
    # Files of earlier versions do not say of which model they are.
    tensors, recorded_of = read_tensors(path, hint), read_metadata(path, hint).get("model")
    made = finished(folder / PRUNED)
    if role == "pruned" and recorded_of is not None and made is not None and recorded_of != made.key:
        raise PlanMismatch(f"{path} was recorded from another network than {folder / PRUNED}. {hint}")
    output = read_metadata(path, hint).get("output", "output")
    wanted = {**{f"input.{name}": f"input.{name}" for name in inputs}, f"{role}.{output}": "output"}
    absent = [name for name in wanted if name not in tensors]
    if absent:
        raise BadInput(f"{path} holds no {', '.join(absent)}, but {', '.join(sorted(tensors)) or 'nothing'}. {hint}")
    if len({tensors[name].shape[:1] for name in wanted}) > 1 or not all(tensors[name].numel() for name in wanted):
        raise BadInput(f"{path}: its tensors are empty or differ in their number of rows. {hint}")
    return save({new: tensors[name] for name, new in wanted.items()})


def default_name(folder: Path) -> str:
    """A model's name after its output folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name).strip("-_")[:63] or "model"
