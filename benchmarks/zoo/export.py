"""Export a family as users do, by torch's two exporters and with its free axes, into a cache outside the checkout."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.zoo.families import FAMILIES
from benchmarks.zoo.family import SIZES, Exported, Family

OPSETS: Mapping[str, int] = {"dynamo": 20, "torchscript": 17}
"""Exporters, and the operator set that each is asked for."""
FORM = 1
"""Number to be raised when exports must be made anew although no config and no version changed."""


@dataclass(frozen=True)
class Export:
    """An exported network beside the model that it came from."""

    family: Family
    path: Path
    model: Exported

    def reference(self, feeds: Mapping[str, Tensor]) -> list[np.ndarray]:
        """Outputs of the torch model."""
        kind = next(self.model.parameters()).dtype
        values = [value.to(kind) if value.is_floating_point() else value for value in feeds.values()]
        with torch.no_grad():
            return [output.float().numpy() for output in self.model(*values)]


def cache() -> Path:
    """Folder of exports, `OPTIN_ZOO` or one in the user's cache."""
    named = os.environ.get("OPTIN_ZOO")
    return Path(named) if named else Path.home() / ".cache" / "optin-deploy" / "zoo"


def export(name: str, exporter: str, opset: int | None = None, *, bf16: bool = False, sdpa: bool = False) -> Export:
    """Export a family, or take the file that an earlier call left.

    Args:
        name: a key of `FAMILIES`.
        exporter: a key of `OPSETS`.
        opset: another operator set than the exporter's usual one.
        bf16: weights and activations in bfloat16.
        sdpa: attention as one call of torch, which opset 23 has an operator for.
    """
    family = FAMILIES[name]
    opset = opset or OPSETS[exporter]
    model = family.model()
    if sdpa:
        model.model.set_attn_implementation("sdpa")  # type: ignore[operator]  # every model here is of transformers
    if bf16:
        model = model.to(torch.bfloat16)
    words = f"{exporter}{opset}{'.bf16' * bf16}{'.sdpa' * sdpa}"
    path = cache() / f"{name}.{words}.{_key(model, family)}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, quiet():
            made = Path(folder) / path.name
            {"dynamo": _by_dynamo, "torchscript": _by_torchscript}[exporter](model, family, made, opset)
            made.replace(path)
    return Export(family, path, model)


def _by_dynamo(model: Exported, family: Family, path: Path, opset: int) -> None:
    axes = {size: torch.export.Dim(size, min=1, max=64) for size in SIZES}
    torch.onnx.export(
        model,
        _example(model, family),
        path,
        input_names=[one.name for one in family.inputs],
        output_names=list(family.outputs),
        dynamic_shapes=(tuple({place: axes[size] for place, size in one.free.items()} for one in family.inputs),),
        opset_version=opset,
        dynamo=True,
        optimize=True,
        external_data=False,
        verbose=False,
    )


def _by_torchscript(model: Exported, family: Family, path: Path, opset: int) -> None:
    free: dict[str, dict[int, str]] = {one.name: one.free for one in family.inputs}
    torch.onnx.export(
        model,
        _example(model, family),
        path,
        input_names=[one.name for one in family.inputs],
        output_names=list(family.outputs),
        dynamic_axes={**free, **{name: {0: "batch"} for name in family.outputs}},
        opset_version=opset,
        dynamo=False,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings and logs of exporters and other tools out of sight; what they make is compared with the model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _example(model: Exported, family: Family) -> tuple[Tensor, ...]:
    kind = next(model.parameters()).dtype
    return tuple(value.to(kind) if value.is_floating_point() else value for value in family.feeds().values())


def _key(model: Exported, family: Family) -> str:
    """Hash of what an export depends on; weights stand for the config that they were made from."""
    described = {
        "form": FORM,
        "class": type(model.model).__name__,
        "inputs": [(one.name, one.shape) for one in family.inputs],
        "outputs": family.outputs,
        "versions": [version(package) for package in ("torch", "transformers", "onnx", "onnxscript")],
    }
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        found.update(name.encode())
        found.update(tensor.float().numpy().tobytes())
    return found.hexdigest()[:12]
