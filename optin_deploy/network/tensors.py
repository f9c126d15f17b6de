"""Stored tensors as torch tensors, without a copy; types of ONNX as types of torch."""

from __future__ import annotations

import warnings

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
}
"""What torch can hold as it is; 4-bit integers become 8-bit ones."""
NARROW = {ir.DataType.INT4: torch.int8, ir.DataType.UINT4: torch.uint8}


def torch_dtype(dtype: int) -> torch.dtype:
    """Torch's type of an ONNX one.

    Raises: TypeError: torch has none.
    """
    kind = ir.DataType(dtype)
    found = DTYPES.get(kind) or NARROW.get(kind)
    if found is None:
        raise TypeError(
            f"values of type {kind.name} cannot be computed with; possible are {', '.join(map(str, DTYPES))}"
        )
    return found


def stored_in(graph: ir.Graph, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """Put a tensor into a graph under a name that no value has yet, for nodes to read."""
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), const_value=tensor)
    value.shape = ir.Shape(tensor.shape.numpy())
    graph.register_initializer(value)
    return value


def torch_tensor(stored: ir.TensorProtocol) -> Tensor:
    """Return a stored tensor for reading; it shares the memory of the network where torch can hold its type.

    Raises: TypeError: torch has no such type.
    """
    dtype = torch_dtype(stored.dtype)
    raw = getattr(stored, "raw", None)
    if isinstance(raw, Tensor):
        return raw.detach()
    array = np.ascontiguousarray(stored.numpy()).reshape(stored.shape.numpy())
    if stored.dtype in NARROW:
        array = array.astype(np.int8 if dtype is torch.int8 else np.uint8)
    elif array.dtype.kind == "V" or array.dtype.name not in np.sctypeDict:  # bfloat16 and 8-bit floats: numpy has none
        array = array.view(np.int16 if array.dtype.itemsize == 2 else np.int8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        found = torch.from_numpy(array)
    return found if found.dtype is dtype else found.view(dtype)
