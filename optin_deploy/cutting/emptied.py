"""What becomes of a network where a group lost all of its units: no tensor without entries stays in the graph.

A contraction over nothing is zero, so what is left of it is its bias; what is joined with nothing stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch

from optin_deploy.cutting.dimensions import Dimensions
from optin_deploy.errors import BadInput
from optin_deploy.network.axes import Axis, size, touched
from optin_deploy.network.graph import Node
from optin_deploy.network.operators import rows
from optin_deploy.network.operators.elementwise import aligned, same
from optin_deploy.network.operators.normalizations import per_channel
from optin_deploy.network.tensors import DTYPES
from optin_deploy.structure.flow import Structure

if TYPE_CHECKING:
    from optin_deploy.cutting.graph import Cut

WITHOUT_BIAS = ("MatMul", "FusedMatMul", "Einsum", "MatMulInteger", "ConvInteger")
WHOLE = ("MatMulInteger", "ConvInteger")
"""Those whose results are whole numbers, of 32 bits."""
WITH_BIAS = ("Gemm", "Conv", "ConvTranspose")


def empty_values(structure: Structure, sizes: Mapping[Axis, int]) -> frozenset[str]:
    """Return the names of values, weights aside, that have no entries when leaves have these sizes."""
    if all(sizes.values()):
        return frozenset()
    return frozenset(
        name
        for name, axes in structure.axes.items()
        if any(touched(axis, sizes) and size(axis, sizes) == 0 for axis in axes)
    )


def replaced(cut: Cut, node: Node, copy: ir.Node, empty: Collection[str], dimensions: Dimensions) -> bool:
    """Do without a node that reads a value without entries; False: it stays, with fewer inputs.

    Raises: BadInput: what it computes from nothing is not known.
    """
    if node.op == "Concat":
        left = [value for name, value in zip(node.inputs, copy.inputs, strict=True) if name not in empty]
        for place, value in enumerate(left):
            copy.replace_input_with(place, value)
        copy.resize_inputs(len(left))
        return False
    if node.op == "Shape":
        return False
    if node.op == "CastLike":
        to = _onnx_type(cut.structure.shapes.tensors[node.inputs[1]].dtype)
        cut.renamed(copy, cut.before(copy, "Cast", [copy.inputs[0]], {"to": to.value}))
        return True
    if node.op not in WITHOUT_BIAS + WITH_BIAS:
        raise BadInput(
            f"{node} reads units of which the plan keeps none; what it makes of nothing is not known. Keep one unit."
        )
    axes = cut.structure.axes[node.outputs[0]]
    value = _remainder(cut, node, copy)
    dimensions.leave(node.outputs[0])
    if _needs_all(cut.structure, node.outputs[0], dimensions):
        value = _expanded(cut, node, copy, value, axes, dimensions)
    cut.renamed(copy, value)
    return True


def without_parts(cut: Cut, node: Node, copy: ir.Node, empty: Collection[str]) -> None:
    """Let a Split give only the parts that have entries."""
    left = [place for place, name in enumerate(node.outputs) if name not in empty]
    values: Sequence[ir.Value | None] = [copy.inputs[0]]
    if len(left) > 1:
        along = node.get("axis", 0) % len(cut.structure.axes[node.outputs[0]])
        new = [size(cut.structure.axes[node.outputs[place]][along], cut.sizes) for place in left]
        values = cut.split(copy, along, new, by_input="split" not in node.attributes)
    for place, value in zip(left, values, strict=True):
        assert value is not None
        cut.renamed(copy, value, place)


def _remainder(cut: Cut, node: Node, copy: ir.Node) -> ir.Value:
    """What a contraction over nothing gives: its bias, or zero; of one entry along the axes where it is constant."""
    axes = cut.structure.axes[node.outputs[0]]
    if node.op in WITH_BIAS and len(node.inputs) > 2 and node.inputs[2]:
        bias = copy.inputs[2]
        assert bias is not None
        if node.op == "Gemm":
            beta = node.get("beta", 1.0)
            dtype = cut.structure.shapes.tensors[node.inputs[2]].dtype
            factor = cut.constant(np.asarray(beta).astype(_onnx_type(dtype).numpy()), "beta")
            return bias if beta == 1.0 else cut.before(copy, "Mul", [bias, factor])
        shape = cut.constant(np.array([1, -1, *[1] * (len(axes) - 2)], dtype=np.int64), "channels")
        return cut.before(copy, "Reshape", [bias, shape])
    real = _onnx_type(cut.structure.shapes.tensors[node.outputs[0]].dtype)
    kind = ir.DataType.INT32 if node.op in WHOLE else real
    return cut.constant(np.zeros([1] * len(axes), kind.numpy()), "zero")


def _onnx_type(dtype: torch.dtype) -> ir.DataType:
    return next(kind for kind, other in DTYPES.items() if other is dtype)


def _needs_all(structure: Structure, name: str, dimensions: Dimensions) -> bool:
    """Whether a reader of a value needs its whole shape, not one that broadcasts to it."""
    network = structure.network
    if any(port.name == name for port in network.outputs):
        return True
    for node, place in network.consumers.get(name, ()):
        flow = rows()[node.domain, node.op].flow
        if flow not in (same, aligned, per_channel) or (flow is per_channel and place):
            return True
        others = [other for at, other in enumerate(node.inputs) if other and at != place]
        full = any(
            structure.shapes.shape(other) == structure.shapes.shape(name) and not dimensions.left(other)
            for other in others
        )
        if not (full and flow is aligned) and _needs_all(structure, node.outputs[0], dimensions):
            return True
    return False


def _fixed(structure: Structure, axis: Axis, copy: ir.Node, position: int) -> bool:
    """Whether an axis has the same size for all inputs: it lies on a weight, or the file says so."""
    if any(axis.root is other.root for use in structure.uses for other in use.axes):
        return True
    if all(isinstance(n, int) for port in structure.network.inputs for n in port.shape or ("?",)):
        return True
    shape = copy.outputs[0].shape
    return shape is not None and isinstance(shape[position], int)


def _expanded(
    cut: Cut, node: Node, copy: ir.Node, value: ir.Value, axes: list[Axis], dimensions: Dimensions
) -> ir.Value:
    """Repeat a value to the shape that the node's output has after the cut."""
    graph_values = {v.name: v for each in cut.model.graph for v in each.outputs} | {
        v.name: v for v in cut.model.graph.inputs
    }
    sizes: list[ir.Value | None] = []
    for position, axis in enumerate(axes):
        changed = touched(axis, cut.keep)
        places = None if changed else dimensions.of(axis, node.index)
        if places is None:
            if not changed and not _fixed(cut.structure, axis, copy, position):
                raise BadInput(
                    f"{node} reads units of which the plan keeps none; how large axis {position} of its result is then "
                    "cannot be told from what is left. Keep one unit."
                )
            sizes.append(cut.constant(np.array([size(axis, cut.sizes)], dtype=np.int64), "sizes"))
            continue
        factors = []
        for name, at in places:
            shape = cut.before(copy, "Shape", [graph_values[name]])
            factors.append(cut.before(copy, "Gather", [shape, cut.constant(np.array([at]), "at")], {"axis": 0}))
        product = factors[0]
        for factor in factors[1:]:
            product = cut.before(copy, "Mul", [product, factor])
        sizes.append(product)
    shape = cut.before(copy, "Concat", sizes, {"axis": 0})
    return cut.before(copy, "Expand", [value, shape])
