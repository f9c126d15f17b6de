"""What the parts of an ONNX file say: the values of a tensor, the torch module that a node came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from optin_deploy.common.formatting import named
from optin_deploy.errors import BadInput


def values(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """A stored tensor as an array; `external_fault` must have found none.

    Raises: BadInput: its bytes do not fit its shape.
    """
    try:
        return onnx.numpy_helper.to_array(tensor, str(folder))
    except (ValueError, TypeError, OSError, MemoryError, KeyError) as err:
        raise BadInput(f"tensor {named(tensor.name)} is damaged: {named(str(err))}. Export the model again.") from err


def module_path(node: onnx.NodeProto) -> str:
    """Path of the torch module that a node came from, as torch's exporter noted it; empty if it did not."""
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "")
    parts = scopes.strip("[]").split(", ")  # a Python list of names: the modules from outside in, then the operation
    return parts[-2].strip("'") if len(parts) > 1 else ""
