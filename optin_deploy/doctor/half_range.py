"""Which weights and constants of a float32 ONNX graph leave the range of float16, and which of them are masks.

Two kinds of large numbers are no overflow. torch's own masks take the smallest number of their dtype: a half export
writes -65504 where the float32 graph has -3.4e38, and softmax makes 0 of both. And -inf stays -inf. So constants at
the end of float32 are passed over, and so are the masked positions of the attention scores that they are added to;
everything else in these tensors counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from optin_deploy.common.formatting import listed, named
from optin_deploy.doctor.findings import Finding
from optin_deploy.doctor.onnx_files import values
from optin_deploy.network.onnx_data import all_nodes

LARGEST = 65504.0
"""Largest finite float16."""
NEAR = LARGEST / 4
"""Magnitude from which other inputs than the recorded ones may overflow."""
DTYPE_END = 3e38
"""Magnitudes from here on stand for the end of float32 (3.4e38) or bfloat16 (3.39e38), or are infinite."""
LITERAL_MASK = -1e6
"""Constants of one value from here down are taken for masks that a model's author wrote as a number, such as -1e9."""
ROUNDS_TO_ZERO = float(np.finfo(np.float16).smallest_subnormal) / 2
MASK_SHARE = 1e-3
"""A masked score is the mask's value plus or divided by ordinary numbers: at least this share of it is left."""
REMEDY = "use --precision bf16 or fp32"
CARRIES_MASK = """
    Add Cast Concat Div Expand Flatten Gather Identity Max Min Mul Pad Reshape ScatterND Slice Split Squeeze Sub Sum
    Tile Transpose Trilu Unsqueeze Where
"""
"""Operators that pass a mask's large negative values on; Softmax, which ends them, is not among them."""


@dataclass(frozen=True)
class Constants:
    """What the constants of a graph mean for float16."""

    findings: tuple[Finding, ...]
    masks: Mapping[str, float]
    """Constant -> values up to this (negative) one are a mask's, not a number's."""


def check_constants(proto: onnx.ModelProto, folder: Path, subject: str) -> Constants:
    """Judge float32 weights and constants; external data is read from `folder`.

    Raises: BadInput: a tensor is damaged.
    """
    large: list[tuple[float, str]] = []
    lost: list[str] = []
    findings: list[Finding] = []
    masks: dict[str, float] = {}
    for name, array in _constants(proto, folder):
        smallest, largest = float(array.min()), float(array.max())
        if math.isnan(smallest):
            findings.append(Finding("problem", subject, f"{named(name)} holds NaN.", "export the model again"))
            continue
        if smallest <= -DTYPE_END:
            masks[name] = _masked_below(smallest)
        elif smallest <= LITERAL_MASK and len(np.unique(array)) <= 2:  # one value, or a table of it and 0
            masks[name] = _masked_below(smallest)
            findings.append(_literal_mask(proto, name, smallest, subject))
            continue
        peak = max(-smallest, largest)
        if peak >= DTYPE_END:
            sizes = np.abs(array)
            peak = float(np.max(sizes, where=sizes < DTYPE_END, initial=0))
        if peak > NEAR:
            large.append((peak, name))
        elif 0 < peak < ROUNDS_TO_ZERO:
            lost.append(name)
    over = [f"{named(name)} up to {peak:.4g}" for peak, name in large if peak > LARGEST]
    near = [f"{named(name)} up to {peak:.4g}" for peak, name in large if peak <= LARGEST]
    if over:
        text = f"weights overflow in fp16 (largest 65504): {listed(over)}."
        findings.append(Finding("problem", subject, text, REMEDY))
    if near:
        findings.append(Finding("warning", subject, f"weights come near fp16's largest 65504: {listed(near)}.", REMEDY))
    if lost:
        text = f"constants become 0 in fp16, a division by them infinite: {listed(map(named, lost))}."
        findings.append(Finding("warning", subject, text, REMEDY))
    return Constants(tuple(findings), masks)


def mask_limits(proto: onnx.ModelProto, masks: Mapping[str, float]) -> dict[str, float]:
    """Follow the masks' values through the graph: tensor -> values up to this one are masked."""
    limits, carriers = dict(masks), frozenset(CARRIES_MASK.split())
    for node in proto.graph.node:
        found = [limits[name] for name in node.input if name in limits]
        if found and node.op_type in carriers:
            limits |= dict.fromkeys(node.output, max(found))
    return limits


def _masked_below(value: float) -> float:
    return min(MASK_SHARE * max(value, -float(np.finfo(np.float32).max)), -LARGEST)


def _literal_mask(proto: onnx.ModelProto, name: str, value: float, subject: str) -> Finding:
    """A mask value such as -1e9 is in the model's code, not of its dtype: -inf in fp16, and 0 x -inf is NaN."""
    multiplied = any(node.op_type == "Mul" and name in node.input for node in all_nodes(proto))
    effect = "0 times it is NaN" if multiplied else "a row that is masked whole gives NaN"
    text = f"mask value {value:g} in {named(name)} becomes -infinity in fp16: {effect}."
    return Finding("problem" if multiplied else "warning", subject, text, REMEDY)


def _constants(proto: onnx.ModelProto, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Float32 constants that have elements, by the tensor that they are."""
    stored = [(tensor.name, tensor) for tensor in proto.graph.initializer]
    for node in all_nodes(proto):
        if node.op_type in ("Constant", "ConstantOfShape") and node.output:
            for attribute in node.attribute:
                if attribute.name == "value":
                    stored.append((node.output[0], attribute.t))
                elif attribute.name == "value_float":
                    yield node.output[0], np.array([attribute.f], np.float32)
                elif attribute.name == "value_floats" and attribute.floats:
                    yield node.output[0], np.array(attribute.floats, np.float32)
    for name, tensor in stored:
        if tensor.data_type == TensorProto.FLOAT and 0 not in tensor.dims:
            yield name, values(tensor, folder)
