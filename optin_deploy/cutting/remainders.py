"""What a contraction over nothing gives: its bias, or zero; of one entry along every axis where it is constant."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tensor_adapters import from_torch_dtype

from optin_deploy.cutting.editing import Editor
from optin_deploy.network.axes import size
from optin_deploy.network.graph import Node

BIAS = {
    **{"Gemm": 2, "Conv": 2, "ConvTranspose": 2},
    **{"MatMulNBits": 5, "DynamicQuantizeMatMul": 4, "MatMulIntegerToFloat": 6},
}
"""Contractions with a bias, and its place."""
CONTRACTIONS = (*BIAS, "MatMul", "FusedMatMul", "Einsum", "MatMulInteger", "ConvInteger")
WHOLE = ("MatMulInteger", "ConvInteger")
"""Those whose results are whole numbers, of 32 bits."""


def bias_of(node: Node) -> int | None:
    """Return the place of a contraction's bias, None if it has none."""
    place = BIAS.get(node.op)
    return place if place is not None and place < len(node.inputs) and node.inputs[place] else None


def remainder(cut: Editor, node: Node, copy: ir.Node) -> tuple[ir.Value, list[int]]:
    """Return what is left of a contraction over nothing, with as many axes as its result, and its sizes in the probe.

    Along an axis of the node's own weight it has all entries, so that a normalisation of channels can read it.
    """
    name, place = node.outputs[0], bias_of(node)
    if place is not None:
        return _bias(cut, node, copy, place)
    axes = cut.structure.axes[name]
    own = {axis.root for use in cut.structure.uses if use.node == node.index for axis in use.axes}
    held = [axis.size if axis.root in own else 1 for axis in axes]
    left = [size(axis, cut.sizes) if axis.root in own else 1 for axis in axes]
    dtype = ir.DataType.INT32 if node.op in WHOLE else from_torch_dtype(cut.structure.shapes.tensors[name].dtype)
    return cut.constant(np.zeros(left, dtype.numpy()), "zero"), held


def _bias(cut: Editor, node: Node, copy: ir.Node, place: int) -> tuple[ir.Value, list[int]]:
    tensor, value = cut.structure.shapes.tensors[node.inputs[place]], copy.inputs[place]
    assert value is not None
    if node.op == "Gemm" and node.get("beta", 1.0) != 1.0:
        beta = np.asarray(node.get("beta")).astype(from_torch_dtype(tensor.dtype).numpy())
        value = cut.before(copy, "Mul", [value, cut.constant(beta, "beta")])
    rank = len(cut.structure.axes[node.outputs[0]])
    if tensor.ndim == rank:
        return value, list(tensor.shape)
    along = 1 if "Conv" in node.op else rank - 1
    shape, held = ([number if position == along else 1 for position in range(rank)] for number in (-1, tensor.numel()))
    return cut.before(copy, "Reshape", [value, cut.constant(np.array(shape, dtype=np.int64), "channels")]), held
