"""Run a float32 ONNX graph on recorded samples, and see which of its activations leave the range of float16."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from optin_deploy.common.formatting import listed, named
from optin_deploy.doctor.findings import Finding
from optin_deploy.doctor.half_range import LARGEST, NEAR, REMEDY, mask_limits
from optin_deploy.doctor.onnx_files import module_path
from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.runtimes.ort import PROVIDER, import_onnxruntime

PREFIX = "optin_range_"
"""Prefix of the names that are added to the copy of a graph; these names must be new."""


def check_activations(
    proto: onnx.ModelProto, folder: Path, feeds: Mapping[str, np.ndarray], masks: Mapping[str, float], subject: str
) -> list[Finding]:
    """Run the float32 graph on recorded inputs and judge the largest value of every tensor.

    Args: feeds: (rows, ...) by input name. masks: see `Constants`.
    """
    names = _input_names(proto)
    unfit = _not_possible(proto, names, feeds)
    if unfit is not None:
        return [Finding("warning", subject, f"fp16 range of activations not checked: {unfit}.")]
    try:
        peaks, finite = _peaks(proto, folder, {name: feeds[name] for name in names}, masks)
    except (BadInput, MissingDependency) as err:
        return [Finding("warning", subject, f"fp16 range of activations not checked: {err}")]
    rows = len(feeds[names[0]])
    found: list[Finding] = []
    if not finite:
        text = f"gives NaN or infinity on the {rows} recorded samples, in float32."
        found.append(Finding("problem", subject, text, "export the model again, and look at the samples"))
    made_by = {output: node for node in proto.graph.node for output in node.output}
    over = [name for name, peak in peaks.items() if peak > LARGEST]
    near = [name for name, peak in peaks.items() if NEAR < peak <= LARGEST]
    for names, what, is_over in ((over, "overflows in fp16", True), (near, "is near overflow in fp16", False)):
        if names:
            first, more = names[0], f"; so do {len(names) - 1} tensors more" if len(names) > 1 else ""
            where, peak = _place(first, made_by[first]), f"{peaks[first]:.6g}"
            text = f"{where} reaches {peak} on {rows} samples and {what} (largest 65504){more}."
            found.append(Finding("problem" if is_over else "warning", subject, text, REMEDY))
    if not found and peaks:
        top = max(peaks, key=lambda name: peaks[name])
        text = (
            f"fits fp16: the largest activation on {rows} samples is {peaks[top]:.4g} in {_place(top, made_by[top])}."
        )
        found.append(Finding("ok", subject, text))
    return found


def check_outputs(proto: onnx.ModelProto, folder: Path, feeds: Mapping[str, np.ndarray], subject: str) -> list[Finding]:
    """Run a graph that is in half precision already, and see whether what it gives is finite."""
    names = _input_names(proto)
    unfit = _not_possible(proto, names, feeds)
    if unfit is not None:
        return [Finding("warning", subject, f"in half precision, not run: {unfit}.")]
    given, rows = {name: feeds[name] for name in names}, len(feeds[names[0]])
    outputs = [entry.name for entry in proto.graph.output]
    try:
        session = _session(proto, folder)
        found = [value for row in range(rows) for value in _run(session, outputs, _row(given, row))]
    except (BadInput, MissingDependency) as err:  # its CPU provider has no bfloat16
        return [Finding("ok", subject, f"in half precision, not run here: {err}")]
    if _all_finite(found):
        # Neighbours computed in float32 keep a value that fp16 would lose: finite here is no proof for a GPU.
        text = f"in half precision: finite on {rows} samples on the CPU; its range is judged on the float32 file."
        return [Finding("ok", subject, text)]
    return [Finding("problem", subject, f"in half precision: gives NaN or infinity on {rows} samples.", REMEDY)]


def _input_names(proto: onnx.ModelProto) -> list[str]:
    stored = {tensor.name for tensor in proto.graph.initializer}
    return [entry.name for entry in proto.graph.input if entry.name not in stored]


def _row(feeds: Mapping[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
    return {name: value[row : row + 1] for name, value in feeds.items()}


def _all_finite(values: Sequence[np.ndarray]) -> bool:
    return all(bool(np.isfinite(value).all()) for value in values if value.dtype.kind == "f")


def _not_possible(proto: onnx.ModelProto, names: list[str], feeds: Mapping[str, np.ndarray]) -> str | None:
    if not feeds:
        return "no samples.safetensors with recorded inputs beside it"
    missing = [name for name in names if name not in feeds]
    if missing or not names:
        return f"the recorded samples have no {listed(map(named, missing))}"
    if any(feeds[name].ndim == 0 or len(feeds[name]) != len(feeds[names[0]]) for name in names):
        return "the recorded inputs have different numbers of rows"
    used = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    return "its names clash with ours" if any(name.startswith(PREFIX) for name in used) else None


def _peaks(
    proto: onnx.ModelProto, folder: Path, feeds: Mapping[str, np.ndarray], masks: Mapping[str, float]
) -> tuple[dict[str, float], bool]:
    """Largest magnitude of each float32 tensor, in graph order, and whether all outputs are finite.

    The copy of the graph gives one number a tensor, reduced as soon as the tensor is there, and sees one row at a
    time: memory stays that of a normal run.
    """
    exposed = [name for node in proto.graph.node for name in node.output if name]
    floats = [name for name, kind in _output_types(proto, folder, exposed).items() if kind == "tensor(float)"]
    limits = mask_limits(proto, masks)
    copy = _copy(proto)
    del copy.graph.node[:]
    for node in proto.graph.node:
        copy.graph.node.append(node)
        for name in node.output:
            if name in floats:
                copy.graph.node.extend(_reduction(name, limits.get(name)))
    wanted = [PREFIX + name for name in floats]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    copy.graph.initializer.append(helper.make_tensor(PREFIX + "zero", TensorProto.FLOAT, [], [0.0]))
    for name in floats:
        if name in limits:
            copy.graph.initializer.append(
                helper.make_tensor(f"{PREFIX}limit_{name}", TensorProto.FLOAT, [], [limits[name]])
            )
    session = _session(copy, folder)
    outputs = [entry.name for entry in proto.graph.output]
    peaks, finite = dict.fromkeys(floats, 0.0), True
    for row in range(len(next(iter(feeds.values())))):
        found = _run(session, [*outputs, *wanted], _row(feeds, row))
        for name, value in zip(floats, found[len(outputs) :], strict=True):
            peaks[name] = max(peaks[name], float(value)) if not math.isnan(value) else math.inf
        finite = finite and _all_finite(found[: len(outputs)])
    return peaks, finite


def _reduction(name: str, limit: float | None) -> list[onnx.NodeProto]:
    """max |x| over the elements that are not masked."""
    source, nodes = name, []
    if limit is not None:
        below, source = f"{PREFIX}below_{name}", f"{PREFIX}kept_{name}"
        nodes.append(helper.make_node("Less", [name, f"{PREFIX}limit_{name}"], [below]))
        nodes.append(helper.make_node("Where", [below, PREFIX + "zero", name], [source]))
    nodes.append(helper.make_node("Abs", [source], [f"{PREFIX}abs_{name}"]))
    return [*nodes, helper.make_node("ReduceMax", [f"{PREFIX}abs_{name}"], [PREFIX + name], keepdims=0)]


def _output_types(proto: onnx.ModelProto, folder: Path, names: list[str]) -> dict[str, str]:
    """Types as ONNX Runtime infers them: it knows those of com.microsoft nodes too."""
    copy = _copy(proto)
    there = {entry.name for entry in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    return {entry.name: entry.type for entry in _session(copy, folder).get_outputs() if entry.name in set(names)}


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def _session(proto: onnx.ModelProto, folder: Path) -> Any:
    """A session that computes the graph as it is written.

    Raises: BadInput: ONNX Runtime refuses it.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what it refuses, it raises
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        return ort.InferenceSession(proto.SerializeToString(), options, providers=[PROVIDER])
    except Exception as err:  # its errors have no common base but Exception
        raise BadInput(f"ONNX Runtime refuses the graph: {named(str(err))}") from err


def _run(session: Any, names: list[str], feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    try:
        found: list[np.ndarray] = session.run(names, feeds)
    except Exception as err:  # its errors have no common base but Exception
        raise BadInput(f"ONNX Runtime cannot run the recorded samples: {named(str(err))}") from err
    return found


def _place(name: str, node: onnx.NodeProto) -> str:
    module = module_path(node)
    where = f", module {named(module)}" if module else ""
    return f"{named(name)} ({node.op_type} {named(node.name)}{where})"
