"""Shapes of every value, and the values of all numbers such as sizes and indices, without computing a real number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from optin_deploy.network.graph import Network, Node
from optin_deploy.network.operators import rows
from optin_deploy.network.operators.elementwise import aligned, same
from optin_deploy.network.operators.row import Result, Row
from optin_deploy.network.run import UNRUNNABLE, together
from optin_deploy.network.tensors import torch_dtype, torch_tensor

REAL_INTEGERS = 2**20
"""Stored integers up to so many entries are read; larger ones are quantised weights."""
REAL_FLOATS = 16
"""The same for real numbers: scales of sizes, limits of a Range."""
REAL_VALUES = 2**12
"""What nodes compute is held as values up to so many entries: sizes are few."""
META = torch.device("meta")


@dataclass
class Shapes:
    """What one probe finds."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Values by name: real ones on the meta device, numbers with their values where these are known."""
    problems: dict[int, str] = field(default_factory=dict)
    """Nodes by index whose outputs have no shape here, with the reason."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Sizes of a value; None if they are not known."""
        tensor = self.tensors.get(name)
        return None if tensor is None else tuple(tensor.shape)

    def known(self, name: str) -> np.ndarray | None:
        """Entries of a value of numbers; None if they follow from real numbers."""
        tensor = self.tensors.get(name)
        return None if tensor is None or tensor.device == META else tensor.numpy()


def shapes_of(network: Network, feeds: Mapping[str, Tensor], *, compute: bool = False) -> Shapes:
    """Find the shapes of all values for some inputs.

    Args: compute: also compute real numbers, on the CPU; for networks whose shapes follow from them.
    """
    found = Shapes()
    for name, stored in network.weights.items():
        try:
            dtype = torch_dtype(stored.dtype)
            small = stored.size <= (REAL_FLOATS if dtype.is_floating_point else REAL_INTEGERS)
            found.tensors[name] = (
                torch_tensor(stored)
                if small or compute
                else torch.empty(stored.shape.numpy(), dtype=dtype, device=META)
            )
        except TypeError:
            continue
    for name, value in feeds.items():
        found.tensors[name] = value.to(META) if value.is_floating_point() and not compute else value
    last = {name: node.index for node in network.nodes for name in node.inputs if name}
    for node in network.nodes:
        why = _step(node, found.tensors)
        if why:
            found.problems[node.index] = why
        done = (name for name in node.inputs if last.get(name) == node.index) if compute else node.outputs
        for name in done:
            if name in found.tensors and found.tensors[name].numel() > REAL_VALUES and name not in network.weights:
                found.tensors[name] = found.tensors[name].to(META)
    return found


def _step(node: Node, tensors: dict[str, Tensor]) -> str:
    """Compute one node; returns why that is not possible."""
    row = rows().get((node.domain, node.op))
    if row is None:
        return f"the operator {node.domain or 'onnx'}.{node.op} is not known"
    missing = [name for name in node.inputs if name and name not in tensors]
    if missing:
        return f"the shape of {missing[0]} is not known"
    inputs = [tensors[name] if name else None for name in node.inputs]
    if any(inputs[place] is not None and inputs[place].device == META for place in row.numbers if place < len(inputs)):  # type: ignore[union-attr]
        return f"its sizes follow from what {node.op} reads"
    try:
        with torch.no_grad():
            inputs = together(inputs, row.numbers)
            if row.flow in (same, aligned):
                result = _outline(row, node, inputs)
            else:
                result = _many(row, node, inputs) or row.compute(node, *inputs)
    except NotImplementedError as err:
        return str(err)
    except UNRUNNABLE as err:
        return f"{type(err).__name__}: {err}"
    for name, value in zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=False):
        if name and value is not None:
            tensors[name] = value
    return ""


def _many(row: Row, node: Node, inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
    """Find the shape of numbers that are too many to be held: no file makes us compute them. None: they are few."""
    if not row.numbers or any(value is not None and value.device == META for value in inputs):
        return None
    outlines = [
        value if value is None or place in row.numbers else value.to(META) for place, value in enumerate(inputs)
    ]
    try:
        with META:
            result = row.compute(node, *outlines)
    except UNRUNNABLE:
        return None  # the computation itself will say why
    several = result if isinstance(result, tuple) else (result,)
    return several if any(value is not None and value.numel() > REAL_VALUES for value in several) else None


def _outline(row: Row, node: Node, inputs: Sequence[Tensor | None]) -> Result:
    """Find the shape of what is computed entry by entry, and its type by one entry: quicker than on the meta device."""
    if all(value is None or value.device != META for value in inputs):
        return row.compute(node, *inputs)
    ones = [None if value is None else torch.ones((), dtype=value.dtype) for value in inputs]
    result = row.compute(node, *ones)
    shapes = [tuple(value.shape) for value in inputs[: 1 if row.flow is same else None] if value is not None]
    shape = shapes[0] if len(set(shapes)) == 1 else np.broadcast_shapes(*shapes)
    outlined = tuple(
        None if value is None else torch.empty(shape, dtype=value.dtype, device=META)
        for value in (result if isinstance(result, tuple) else (result,))
    )
    return outlined if isinstance(result, tuple) else outlined[0]  # type: ignore[return-value]
