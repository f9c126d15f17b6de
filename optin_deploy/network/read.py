"""Read whatever holds a network: an .onnx file, a model of onnx or onnx_ir, a transformers model, any torch module."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.network.examples import example_of
from optin_deploy.network.graph import Network
from optin_deploy.network.read_onnx import read_file, read_ir, read_proto
from optin_deploy.network.read_torch import read_module


def read(x: Any, inputs: Mapping[str, Tensor] | None = None) -> Network:
    """Read a network.

    Args:
        x: path of an .onnx file, `onnx.ModelProto`, `onnx_ir.Model`, a transformers model, or a torch module.
        inputs: example inputs of a module by the names of forward's arguments; a transformers model needs none.
    Raises: BadInput: damaged, of an unknown kind, or cannot be traced.
    """
    match x:
        case Network():
            return x
        case str() | PathLike():
            return read_file(Path(x))
        case onnx.ModelProto():
            return read_proto(x)
        case ir.Model():
            return read_ir(x)
        case nn.Module() if inputs is not None:
            return read_module(x, inputs)
        case nn.Module() if hasattr(x, "main_input_name") and hasattr(x, "config"):
            example = example_of(x)
            return read_module(x, example.inputs, axes=example.axes)
        case nn.Module():
            raise BadInput(
                f"{type(x).__name__} is no transformers model: give example inputs by the names of its arguments, as "
                "in `read(module, {'x': torch.randn(2, 3, 224, 224)})`."
            )
    raise BadInput(f"A network is read from a path, an ONNX model or a torch module, not from {type(x).__name__}.")
