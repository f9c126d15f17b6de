"""Torch's exporter takes seconds for a tiny model: modules that the tests read again and again are exported once.

What is kept is the graph; its weights are those of the module that is read, as without it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from optin_deploy.network.read_torch import Axes, Traced

UNKNOWN = (pickle.PicklingError, AttributeError, TypeError, RecursionError)
"""Modules that hold what has no name, such as a class inside of a function, or themselves."""
REAL = torch.onnx.export
"""Tests that put something in its place want to see it used."""
Export = Callable[[Traced, Mapping[str, Tensor], Axes, int], ir.Model]


def exported_once(export: Export, folder: Path) -> Export:
    """The same export that keeps what it made in a folder, which several processes may share."""

    def found(traced: Traced, inputs: Mapping[str, Tensor], axes: Axes, opset: int) -> ir.Model:
        if torch.onnx.export is not REAL:
            return export(traced, inputs, axes, opset)
        forms = {name: (value.dtype, tuple(value.shape), value.stride()) for name, value in inputs.items()}
        try:
            path = folder / key(traced.module, forms, {name: dict(some) for name, some in axes.items()}, opset)
        except UNKNOWN:
            return export(traced, inputs, axes, opset)
        weights = dict((*_named(traced.named_parameters), *_named(traced.named_buffers)))
        if path.exists():
            proto = onnx.ModelProto.FromString(path.read_bytes())
            traced.found_names.all = tuple(json.loads(proto.doc_string))
            model = ir.from_proto(proto)
            for name, value in model.graph.initializers.items():
                if name in weights:
                    value.const_value = ir.tensor_adapters.TorchTensor(weights[name].detach(), name)
            return model
        model = export(traced, inputs, axes, opset)
        memory = {weight.data_ptr() for weight in traced.parameters()}
        others = (value.const_value for name, value in model.graph.initializers.items() if name not in weights)
        if all(not isinstance(each.raw, Tensor) or each.raw.data_ptr() not in memory for each in others):
            made = path.with_name(f"{path.name}.{os.getpid()}")
            proto = ir.to_proto(model)
            proto.doc_string = json.dumps(traced.found_names.all)
            made.write_bytes(proto.SerializeToString())
            made.rename(path)
        return model

    return found


BY_TORCHSCRIPT = """
from optin_deploy.network import read_torch
def left_out(*_):
    raise NotImplementedError
read_torch._by_dynamo = left_out
"""
"""Begins a script whose process reads modules as tests with the fixture `by_torchscript` do."""


def _named(tensors: Callable[..., Iterator[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    return tensors(remove_duplicate=False)


def key(*parts: Any) -> str:
    """Hash of a module and of what it is exported with.

    Raises: one of UNKNOWN.
    """
    written = io.BytesIO()
    _Pickler(written).dump((torch.__version__, *parts))
    return hashlib.sha256(written.getvalue()).hexdigest()


class _Pickler(pickle.Pickler):
    """Writes all that a module's graph depends on, in the same way in any process.

    Not the values of parameters, not where files lie, and not the numbers of hooks, which go on counting; other tensors
    by what they hold, and sets in one order.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.fast = True  # by values: strings that are equal may be one object or two
        self.seen: list[Tensor] = []

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, str):
            return "a path" if os.path.isabs(obj) else None
        if isinstance(obj, Tensor):
            known = next((number for number, each in enumerate(self.seen) if each is obj), None)
            if known is not None:
                return known
            self.seen.append(obj)
            held = None if isinstance(obj, nn.Parameter) else obj.detach().cpu().flatten().tolist()
            return obj.dtype, tuple(obj.shape), obj.stride(), repr(held)
        if isinstance(obj, (set, frozenset)):
            return sorted(map(repr, obj))
        if isinstance(obj, OrderedDict) and obj and all(isinstance(name, int) for name in obj):
            return list(obj.values())
        return None
