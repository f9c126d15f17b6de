"""What an artifact takes, read from its graph or from the one beside it, and random inputs of that kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from optin_deploy.common.formatting import listed, named
from optin_deploy.errors import BadInput
from optin_deploy.files.names import DENSE, PRUNED
from optin_deploy.measuring.points import Point
from optin_deploy.network.graph import Network
from optin_deploy.network.indices import table_rows
from optin_deploy.network.onnx_data import data_files_of, read_onnx
from optin_deploy.planning.plan import NetworkPlan

FIRST_ID, END_ID = 5, 100
"""Integers are drawn from here: the first few ids are special in most vocabularies, and nearly all have these."""
LARGEST_BYTES = 2**32
"""Largest size of one input; more is a typing error or comes from a foreign file."""
SAME_VALUES = ("Cast", "Identity")
STORED_TABLE = ("DequantizeLinear", *SAME_VALUES)
"""Nodes that may lie between a stored table and the Gather that reads it."""


@dataclass(frozen=True)
class Input:
    """One input of an artifact."""

    name: str
    dtype: str
    """numpy's name of its element type."""
    shape: tuple[int | None, ...]
    """None: any size. An open first axis is the batch, every other open one the length."""
    end_id: int = END_ID
    """Integers must stay below: the rows of the smallest table that they look up."""
    usual: tuple[int, ...] = ()
    """Sizes at which the network was planned, of all axes; empty: not known."""

    @property
    def has_batch(self) -> bool:
        """May the first axis have any size?"""
        return self.shape[:1] == (None,)

    @property
    def has_length(self) -> bool:
        """May another axis?"""
        return None in self.shape[1:]

    @property
    def lengths(self) -> set[int]:
        """Usual sizes of the open axes but the first."""
        return {size for size, known in zip(self.usual[1:], self.shape[1:], strict=False) if known is None}

    def sample(self, batch: int, seq: int | None, rng: np.random.Generator) -> np.ndarray:
        """Random values without padding: masks of ones, token types of zeros, small ids, normal floats.

        Args: seq: None: the usual sizes.
        Raises: BadInput: larger than LARGEST_BYTES.
        """
        usual = self.usual or (1,) * len(self.shape)
        open_sizes = (batch, *(size if seq is None else seq for size in usual[1:]))[: len(self.shape)]
        shape = tuple(size if fixed is None else fixed for fixed, size in zip(self.shape, open_sizes, strict=True))
        kind = np.dtype(self.dtype)
        if math.prod(shape) * kind.itemsize > LARGEST_BYTES:
            raise BadInput(f"input {named(self.name)} of shape {shape} takes more than 4 GiB. Give a smaller point.")
        if self.name.endswith("mask"):
            return np.ones(shape, kind)
        if self.name == "token_type_ids" or kind.kind == "b":
            return np.zeros(shape, kind)
        if kind.kind == "f":
            return rng.standard_normal(shape).astype(kind)
        end = min(END_ID, self.end_id)
        return rng.integers(min(FIRST_ID, end - 1), end, shape).astype(kind)


def inputs_of(path: Path) -> tuple[Input, ...]:
    """What an artifact takes: an ONNX file says it, for all others the one in their output folder does.

    Raises: BadInput: not to be read, or an input that no random values can be made for.
    """
    if path.suffix == ".onnx":
        return graph_inputs(path)
    beside = graph_beside(path)
    if beside is None:
        raise BadInput(
            f"{path} does not say what it takes, and there is no {path.with_name(PRUNED)} that would. Leave it in its "
            "output folder, or compare .onnx files."
        )
    return graph_inputs(beside)


def graph_beside(path: Path) -> Path | None:
    """The float32 ONNX file of an artifact's output folder; None: there is none."""
    return next((path.with_name(name) for name in (PRUNED, DENSE) if path.with_name(name).is_file()), None)


def with_sizes(inputs: Sequence[Input], plan: NetworkPlan | None) -> tuple[Input, ...]:
    """The same, with the sizes at which the network was planned."""
    shapes = {} if plan is None or plan.cost is None else plan.cost.inputs
    found = []
    for each in inputs:
        usual = tuple(shapes.get(each.name, ()))
        found.append(replace(each, usual=usual if len(usual) == len(each.shape) else ()))
    return tuple(found)


def network_inputs(network: Network) -> tuple[Input, ...]:
    """What a network takes."""
    tables = table_rows(network)
    return tuple(
        Input(
            port.name,
            np.dtype(port.dtype.numpy()).name,
            tuple(size if isinstance(size, int) else None for size in port.shape or ()),
            min(END_ID, tables.get(port.name, END_ID)),
        )
        for port in network.inputs
    )


def graph_inputs(path: Path) -> tuple[Input, ...]:
    """The inputs of an ONNX file, without its stored weights.

    Raises: BadInput: also if weights lie where they are not read.
    """
    proto = read_onnx(path)
    data_files_of(proto, path)
    graph = proto.graph
    stored = {tensor.name for tensor in graph.initializer}
    found = tuple(_graph_input(path, graph, entry) for entry in graph.input if entry.name not in stored)
    if not found:
        raise BadInput(f"{path} takes no inputs: there is nothing to compare. Give a model with inputs.")
    return found


def _graph_input(path: Path, graph: onnx.GraphProto, entry: onnx.ValueInfoProto) -> Input:
    tensor = entry.type.tensor_type
    if not tensor.HasField("shape"):
        raise BadInput(f"{path}: input {named(entry.name)} is no tensor with a shape. Export it with shapes.")
    try:
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    except KeyError as err:
        raise BadInput(f"{path}: input {named(entry.name)} has unknown type {tensor.elem_type}.") from err
    if kind.kind not in "biuf":
        raise BadInput(
            f"{path}: input {named(entry.name)} is of type {kind}; possible are integers, booleans and floats of 16 to "
            "64 bits."
        )
    # Some exporters write -1 or 0 for any size.
    shape = tuple(axis.dim_value if axis.dim_value > 0 else None for axis in tensor.shape.dim)
    return Input(entry.name, kind.name, shape, _smallest_table(graph, entry.name))


def _smallest_table(graph: onnx.GraphProto, name: str) -> int:
    """Rows of the smallest stored table that a Gather reads by this input; END_ID if that is not seen to be fewer."""
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    same, smallest = {name}, END_ID
    for node in graph.node:
        if node.op_type in STORED_TABLE and node.input[0] in rows:
            rows[node.output[0]] = rows[node.input[0]]
        elif node.op_type in SAME_VALUES and node.input[0] in same:
            same.add(node.output[0])
        elif node.op_type == "Gather" and node.input[1] in same and _axis(node) == 0:
            smallest = min(smallest, rows.get(node.input[0], END_ID))
    return max(1, smallest)


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def common_inputs(baseline: tuple[Path, Sequence[Input]], candidate: tuple[Path, Sequence[Input]]) -> tuple[Input, ...]:
    """The inputs that both take: the baseline's, with ids that both look up.

    Raises: BadInput: they differ in names or types.
    """
    kinds = [{each.name: each.dtype for each in inputs} for _, inputs in (baseline, candidate)]
    if kinds[0] != kinds[1]:
        described = [
            f"{path} takes {listed(_named_types(kind))}"
            for (path, _), kind in zip((baseline, candidate), kinds, strict=True)
        ]
        raise BadInput(f"{described[0]}, but {described[1]}. Give two artifacts with the same inputs.")
    ends = {each.name: each.end_id for each in candidate[1]}
    return tuple(replace(each, end_id=min(each.end_id, ends[each.name])) for each in baseline[1])


def _named_types(kinds: Mapping[str, str]) -> list[str]:
    return [f"{named(name)} ({kind})" for name, kind in kinds.items()]


def settled(path: Path, inputs: Sequence[Input], point: Point, default_seq: int) -> Point:
    """The point with its length; None where no input has one, or open axes of several sizes.

    Raises: BadInput: a batch or length that fixed shapes do not have.
    """
    first = inputs[0].shape[:1]
    if not any(each.has_batch for each in inputs) and first != (point.batch,):
        fixed = "no batch" if not first else f"a fixed batch of {first[0]}"
        raise BadInput(f"batch={point.batch}: {path} has {fixed}. Give that one, or export it with an open batch.")
    usual = set[int]().union(*(each.lengths for each in inputs))
    if len(usual) > 1:
        if point.seq is not None:
            raise BadInput(f"seq={point.seq}: {path} has open axes of several sizes, {sorted(usual)}. Leave seq out.")
        return point
    if any(each.has_length for each in inputs):
        return replace(point, seq=point.seq or next(iter(usual), default_seq))
    sizes = sorted({size for each in inputs for size in each.shape[1:] if size is not None})
    if point.seq is not None and point.seq not in sizes:
        raise BadInput(f"seq={point.seq}: the inputs of {path} have fixed sizes {sizes}. Leave seq out.")
    return replace(point, seq=None)


def make_feeds(inputs: Sequence[Input], point: Point, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs for a point that `settled` gave."""
    rng = np.random.default_rng(seed)
    return {each.name: each.sample(point.batch, point.seq, rng) for each in inputs}
