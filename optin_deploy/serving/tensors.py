"""The inputs and outputs of an artifact, as an inference server names them, and the batches that it takes."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import helper

from optin_deploy.common.formatting import named
from optin_deploy.errors import BadInput
from optin_deploy.exporters.profiles import parse_profile
from optin_deploy.network.onnx_data import read_onnx
from optin_deploy.runtimes.record import EngineRecord
from optin_deploy.serving.manifest import DATATYPES, TensorSpec

V2_NAMES = {numpy_name: name for name, numpy_name in DATATYPES.items() if name != "BYTES"}


def tensors_of(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of an ONNX file.

    Raises: BadInput: not to be read, or a tensor that no server takes.
    """
    proto = read_onnx(path)
    stored = {tensor.name for tensor in proto.graph.initializer}
    inputs = tuple(_spec(path, entry) for entry in proto.graph.input if entry.name not in stored)
    return inputs, tuple(_spec(path, entry) for entry in proto.graph.output)


def _spec(path: Path, entry: onnx.ValueInfoProto) -> TensorSpec:
    tensor = entry.type.tensor_type
    if not tensor.HasField("shape"):
        raise BadInput(f"{path}: {named(entry.name)} is no tensor with a shape. Export it with shapes.")
    try:
        kind = V2_NAMES[helper.tensor_dtype_to_np_dtype(tensor.elem_type).name]
    except KeyError as err:
        raise BadInput(
            f"{path}: {named(entry.name)} has type {tensor.elem_type}, which the V2 protocol does not know; possible: "
            f"{', '.join(V2_NAMES)}."
        ) from err
    # Some exporters write -1 or 0 for any size.
    shape = tuple(axis.dim_value if axis.dim_value > 0 else -1 for axis in tensor.shape.dim)
    try:
        return TensorSpec(entry.name, kind, shape)
    except BadInput as err:
        raise BadInput(f"{path}: {err}. Export it with other names and shapes.") from err


def largest_batch(path: Path, record: EngineRecord, longest: int | None) -> int:
    """Samples that an engine takes at once: the smallest of its profiles' largest batches.

    Args: longest: tokens of a text at most, where the server tokenizes.
    Raises: BadInput: it does not take one sample, or no text of that length.
    """
    profiles = [parse_profile(text) for text in record.options.get("profiles", "").split("; ")]
    least = max(profile.batch[0] for profile in profiles)
    if least > 1:
        raise BadInput(
            f"{path} was built for batches of {least} or more, but servers send single requests too. Build it with "
            f'--profile "batch=1,{profiles[0].batch[1]},{profiles[0].batch[2]}".'
        )
    most = min(profile.seq[2] for profile in profiles)
    if longest is not None and longest > most:
        raise BadInput(f"--longest {longest}: {path} was built for at most {most} tokens. Give that, or build it anew.")
    return min(profile.batch[2] for profile in profiles)
