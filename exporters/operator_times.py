"""Operator times of an ONNX file, by ONNX Runtime's own profiler, and which block of the model each belongs to."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optin_deploy.bench.diagnosis import Operators
from optin_deploy.layout import ModelLayout
from optin_deploy.runtimes.base import Feeds
from optin_deploy.runtimes.ort import PROVIDER, import_onnxruntime

RUNS, WARMUP = 20, 3
SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata of a node: the modules that it was traced in, outermost first."""


def operator_times(path: Path, feeds: Feeds, layout: ModelLayout, *, threads: int = 0) -> Operators:
    """Profile an ONNX file that the ONNX exporter wrote, on the CPU; profiling itself costs a few percent.

    Nodes that fusion made have no module: they count for the block of the node before them.
    """
    ort = import_onnxruntime()
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    with tempfile.TemporaryDirectory() as temporary:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(temporary) / "profile")
        session = ort.InferenceSession(str(path), settings, providers=[PROVIDER])
        wanted = {node.name for node in session.get_inputs()}
        for _ in range(WARMUP + RUNS):
            session.run(None, {name: values for name, values in feeds.items() if name in wanted})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _summed(events, _blocks(path, layout))


def _summed(events: Sequence[dict[str, Any]], blocks: dict[str, str]) -> Operators:
    """Means over the runs after warming up."""
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: float(e["ts"]))[WARMUP:]
    start = float(runs[0]["ts"])
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time") and e["ts"] >= start]
    by_operator, by_layer = Counter[str](), Counter[str]()
    last = max((int(block) for block in blocks.values()), default=0)
    block = "before"
    for event in sorted(nodes, key=lambda e: float(e["ts"])):
        name = event["name"].removesuffix("_kernel_time")
        if name in blocks:
            block = blocks[name]
        elif block == str(last) and event["args"].get("node_index") is None:
            block = "after"
        by_operator[event["args"]["op_name"]] += event["dur"]
        by_layer[block] += event["dur"]
    mean = 1 / 1000 / len(runs)
    return Operators(
        sum(float(e["dur"]) for e in runs) * mean,
        {name: micros * mean for name, micros in by_operator.most_common()},
        {name: micros * mean for name, micros in by_layer.items()},
    )


def _blocks(path: Path, layout: ModelLayout) -> dict[str, str]:
    """Name of a node -> number of the block that it was traced in."""
    import onnx

    numbers = {layer.path: str(i) for i, layer in enumerate(layout.layers)}
    found = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "")
        for scope in re.findall(r"[\w.]+", scopes):
            number = numbers.get(scope.removeprefix("model."))
            if number is not None:
                found[node.name] = number
    return found
