"""Export the pruned and the dense model to an engine, and to what that engine is built from."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from exporters import exporter
from exporters.base import Artifact, Exporter, ExportSpec, graph_precision
from exporters.onnx_artifact import data_path
from optin_deploy.errors import CannotBuildHere
from optin_deploy.masking import Batch, rows_of
from optin_deploy.ownership import RECORD
from optin_deploy.storage import atomic_file, read_json, write_json
from optin_deploy.workspace import Workspace

INT8_ROWS = 64
"""Calibration samples for int8: ranges change little after some dozens."""
OWN_FILES = ("model.safetensors", "plan.json", "layout.json", "optin.json")
"""What model/ holds besides config and tokenizer or processor."""


@dataclass(frozen=True)
class Pair:
    """The pruned and the dense model on one engine, in one precision."""

    engine: Exporter
    precision: str
    pruned: Artifact
    dense: Artifact | None
    """None: not asked for, or the engine runs the dense model's own folder."""

    @property
    def obstacle(self) -> str | None:
        """Why it cannot run on this machine; None: it can."""
        return self.engine.obstacle(self.precision)

    def artifacts(self) -> dict[str, Artifact]:
        """By name."""
        named = {"pruned": self.pruned, "dense": self.dense}
        return {name: artifact for name, artifact in named.items() if artifact is not None}


@dataclass(frozen=True)
class Built:
    """What an export left: the forms of the model on the way to the asked engine, the asked one last."""

    pairs: tuple[Pair, ...]
    problem: CannotBuildHere | None = None
    """Why the asked engine is not among them."""

    @property
    def obstacle(self) -> str | None:
        """Why the asked engine cannot be measured on this machine; None: it can."""
        return str(self.problem) if self.problem else self.pairs[-1].obstacle

    def sizes(self) -> dict[str, int]:
        """Bytes of the last pair, as `pruned` and `dense`."""
        return {name: artifact.size_bytes for name, artifact in self.pairs[-1].artifacts().items()}

    def hashes(self) -> dict[str, str]:
        """sha256 of each artifact and of its data files, by file name."""
        every = (artifact for pair in self.pairs for artifact in pair.artifacts().values())
        return {name: sha256 for a in every for name, sha256 in {a.path.name: a.sha256, **a.data}.items()}


def build(
    workspace: Workspace, target: Exporter, spec: ExportSpec, pruned: nn.Module, dense: nn.Module | None
) -> Built:
    """Export pruned and dense to an engine; what it is built from is exported, kept and proven too."""
    _copy_support_files(workspace)
    pairs: list[Pair] = []
    for engine, precision in _steps(target, spec.precision or target.precisions[0]):
        try:
            pairs.append(_pair(workspace, engine, precision, spec, pruned, dense))
        except CannotBuildHere as problem:
            return Built(tuple(pairs), problem)
    return Built(tuple(pairs))


def _steps(target: Exporter, precision: str) -> list[tuple[Exporter, str]]:
    """What an engine's artifact is made from, first to last: float32 ONNX, typed ONNX, the artifact."""
    if not target.reads_onnx:
        return [(target, precision)]
    onnx = exporter("onnx")
    typed = graph_precision(precision)
    steps = [(onnx, "fp32")] if typed == "fp32" else [(onnx, "fp32"), (onnx, typed)]
    return steps if target.engine == onnx.engine else [*steps, (target, precision)]


def _pair(
    workspace: Workspace,
    engine: Exporter,
    precision: str,
    spec: ExportSpec,
    pruned: nn.Module,
    dense: nn.Module | None,
) -> Pair:
    spec = replace(spec, precision=precision)
    name, dense_name = engine.file_names(precision)
    smaller = engine.export(pruned, spec, workspace.root / name)
    original: Artifact | None = None
    if dense_name is not None and dense is not None:
        original = engine.export(dense, spec, workspace.root / dense_name)
    elif dense_name is not None:
        for each in (dense_name, data_path(Path(dense_name)).name):  # of an earlier run: perhaps of another model
            workspace.record.remove(each)
    return Pair(engine, precision, smaller, original)


def _copy_support_files(workspace: Workspace) -> None:
    """Config, tokenizer and modules beside the ONNX file, where Optimum and others look for them."""
    for file in (path for path in workspace.model_folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(workspace.model_folder))
        if name == "tokenizer_config.json":
            write_json(workspace.root / name, _for_transformers_4(read_json(file, "Run the export again.")))
        elif name not in (*OWN_FILES, RECORD):
            with atomic_file(workspace.root / name) as temporary:
                shutil.copyfile(file, temporary)


def _for_transformers_4(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """Names that transformers 4, which Optimum's ORTModel classes need, reads too; 5 still takes them."""
    config = dict(tokenizer_config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # 4 takes this key for a dict of named tokens
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def int8_samples(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The first calibration batches that hold enough rows to measure the range of activations."""
    rows = np.cumsum([rows_of(batch) for batch in batches])
    return batches[: int(np.searchsorted(rows, INT8_ROWS)) + 1]
