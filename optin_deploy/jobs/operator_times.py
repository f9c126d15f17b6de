"""Operator times of ONNX files, by ONNX Runtime's own profiler, and which block of the model each belongs to."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from optin_deploy.common.environment import environment
from optin_deploy.common.processors import default_threads, is_limited
from optin_deploy.files.storage import write_json
from optin_deploy.jobs.bench import BenchSettings, Inputs, checked
from optin_deploy.measuring.diagnosis import OUTSIDE, Operators, PrunedFacts, Width
from optin_deploy.measuring.points import Point
from optin_deploy.network.onnx_data import read_onnx
from optin_deploy.runtimes.base import Feeds
from optin_deploy.runtimes.ort import PROVIDER, import_onnxruntime

RUNS, WARMUP = 30, 5
SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node: the modules that it was traced in, outermost first."""
NUMBER = re.compile(r"[./](\d+)(?![\w])")
"""Number of a block, in the path of a module."""
FILE = "operators.json"


@dataclass(frozen=True)
class Explanation:
    """One point."""

    batch: int
    seq_len: int | None
    dense: Operators
    pruned: Operators
    cut: PrunedFacts


def explain_folder(
    folder: Path, points: Sequence[Point], *, precision: str | None = None, threads: int = 0
) -> list[Explanation]:
    """Profile the dense and the pruned ONNX file of an output folder; the times go to operators.json.

    Raises: BadInput: a file is missing.
    """
    case = checked(folder, BenchSettings("onnx", precision, tuple(points), threads))
    found = []
    for each in points:
        point = case.inputs.settled(each)
        feeds = case.inputs.feeds(point)
        dense, pruned = (operator_times(one.path, feeds, threads=one.threads) for one in (case.dense, case.smaller))
        cut = PrunedFacts(
            kept=1 / case.inputs.ideal(point),
            widths=_widths(case.inputs),
            align=case.smaller.target.align,
            rows=point.batch * (point.seq or 1),
        )
        found.append(Explanation(point.batch, point.seq, dense, pruned, cut))
    about = {
        "schema_version": 2,
        "precision": case.precision,
        "threads": case.threads,
        "environment": environment(),
    }
    write_json(folder / FILE, {**about, "points": [asdict(each) for each in found]})
    return found


def operator_times(path: Path, feeds: Feeds, *, threads: int = 0) -> Operators:
    """Profile an ONNX file of the ONNX exporter on the CPU; profiling itself takes a few percent."""
    ort = import_onnxruntime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads or (default_threads() if is_limited() else 0)
    with tempfile.TemporaryDirectory() as temporary:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(temporary) / "profile")
        session = ort.InferenceSession(str(path), settings, providers=[PROVIDER])
        wanted = {node.name for node in session.get_inputs()}
        for _ in range(WARMUP + RUNS):
            session.run(None, {name: values for name, values in feeds.items() if name in wanted})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return summed(events, _blocks(path))


def summed(events: Sequence[Mapping[str, Any]], blocks: Mapping[str, str]) -> Operators:
    """Medians over the runs after warming up.

    Args: events: of ONNX Runtime's profile; times in microseconds. blocks: of the nodes that were exported; nodes that
        fusion made are not among them and count for the block of the node before.
    """
    runs = sorted((e for e in events if e["name"] == "model_run"), key=_start)[WARMUP:]
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    by_operator: list[Counter[str]] = []
    by_layer: list[Counter[str]] = []
    for run in runs:
        operators, layers, block = Counter[str](), Counter[str](), OUTSIDE
        for node in sorted((n for n in nodes if 0 <= _start(n) - _start(run) <= run["dur"]), key=_start):
            block = blocks.get(node["name"].removesuffix("_kernel_time"), block)
            operators[node["args"]["op_name"]] += node["dur"]
            layers[block] += node["dur"]
        by_operator.append(operators)
        by_layer.append(layers)
    return Operators(median(run["dur"] for run in runs) / 1000, _medians(by_operator), _medians(by_layer))


def _start(event: Mapping[str, Any]) -> float:
    return float(event["ts"])


def _medians(runs: Sequence[Counter[str]]) -> dict[str, float]:
    """Milliseconds, largest first."""
    names: Iterable[str] = set().union(*runs)
    found = {name: median(run[name] for run in runs) / 1000 for name in names}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _widths(inputs: Inputs) -> list[Width]:
    keep, groups = inputs.plan.keep, inputs.layout.groups
    kinds = {group.kind for group in groups if group.name in keep}
    return [
        Width(_block(group.name), group.kind, len(keep.get(group.name, range(group.units))), group.units)
        for group in groups
        if group.kind in kinds
    ]


def _blocks(path: Path) -> dict[str, str]:
    """Name of a node -> number of the block that it was traced in, by its scopes or its name, or OUTSIDE."""
    found = {}
    for node in read_onnx(path).graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), node.name)
        found[node.name] = _block(scopes)
    return found


def _block(path: str) -> str:
    """The first number in the path of a module; OUTSIDE: there is none."""
    number = NUMBER.search(path)
    return OUTSIDE if number is None else number[1]
