"""Export the pruned and the dense model to an engine, and prove that the artifacts compute the same."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from exporters import check_precision, exporter
from exporters.base import POOLED, TOLERANCES, Artifact, Exporter, ExportSpec, output_names
from exporters.tensorrt_plan import EngineOptions
from optin_deploy.errors import CannotBuildHere, ParityFailure, PlanMismatch
from optin_deploy.inputs import example_inputs
from optin_deploy.loading import load_dense
from optin_deploy.masking import Batch, inference, rows_of
from optin_deploy.pruned import load_pruned
from optin_deploy.rewrite.verify import main_output, relative_error
from optin_deploy.stages import prepare
from optin_deploy.storage import atomic_file, read_json, sha256_tensors, write_json
from optin_deploy.workspace import Workspace

PARITY_POINTS = ((1, 1.0), (3, 0.4))
"""(batch, share of seq_len) at which engines are compared with torch: not the sizes that were traced."""
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
        """sha256 of each artifact, by its file name."""
        return {a.path.name: a.sha256 for pair in self.pairs for a in pair.artifacts().values()}


def build(
    workspace: Workspace, target: Exporter, spec: ExportSpec, pruned: nn.Module, dense: nn.Module | None
) -> Built:
    """Export pruned and dense to an engine; what it is built from is exported, kept and proven too."""
    _copy_support_files(workspace)
    pairs: list[Pair] = []
    for engine, precision in _steps(target, spec.precision or target.precisions[0]):
        try:
            pairs.append(_pair(workspace, engine, replace(spec, precision=precision), pruned, dense))
        except CannotBuildHere as problem:
            return Built(tuple(pairs), problem)
    return Built(tuple(pairs))


def _steps(target: Exporter, precision: str) -> list[tuple[Exporter, str]]:
    """What an engine's artifact is made from, first to last: float32 ONNX, typed ONNX, the artifact."""
    if not target.reads_onnx:
        return [(target, precision)]
    onnx = exporter("onnx")
    typed = "fp32" if precision == "tf32" else precision
    steps = [(onnx, "fp32")] if typed == "fp32" else [(onnx, "fp32"), (onnx, typed)]
    return steps if target.engine == onnx.engine else [*steps, (target, precision)]


def _pair(workspace: Workspace, engine: Exporter, spec: ExportSpec, pruned: nn.Module, dense: nn.Module | None) -> Pair:
    name, dense_name = engine.file_names(spec.precision or engine.precisions[0])
    smaller = engine.export(pruned, spec, workspace.root / name)
    original: Artifact | None = None
    if dense_name is not None and dense is not None:
        original = engine.export(dense, spec, workspace.root / dense_name)
    elif dense_name is not None:
        (workspace.root / dense_name).unlink(missing_ok=True)  # of an earlier run: perhaps of another model
    return Pair(engine, spec.precision or engine.precisions[0], smaller, original)


def _copy_support_files(workspace: Workspace) -> None:
    """Config and tokenizer beside the ONNX file, where Optimum and others look for them."""
    for file in workspace.model_folder.iterdir():
        if file.name == "tokenizer_config.json":
            write_json(workspace.root / file.name, _for_transformers_4(read_json(file, "Run the export again.")))
        elif file.name not in OWN_FILES:
            with atomic_file(workspace.root / file.name) as temporary:
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


def check_engine(built: Built, pruned: nn.Module, dense: nn.Module | None, *, seq_len: int) -> dict[str, float]:
    """Error of every artifact that runs here against its torch model, with padding.

    Returns: `torch_vs_engine` (and `_dense`) of the last engine that runs here, the others with their names added.
    Raises: ParityFailure: above the tolerance of the precision.
    """
    errors = {}
    runs_here = [pair for pair in built.pairs if pair.obstacle is None]
    for pair in runs_here:
        for name, artifact in pair.artifacts().items():
            model = pruned if name == "pruned" else dense
            if model is not None:
                key = "torch_vs_engine" if pair is runs_here[-1] else f"torch_vs_{pair.engine.engine}_{pair.precision}"
                errors[key if name == "pruned" else f"{key}_dense"] = _error(pair, artifact, model, seq_len)
    return errors


def _error(pair: Pair, artifact: Artifact, model: nn.Module, seq_len: int) -> float:
    """Largest relative error over the artifact's own shapes, or over sizes that were not traced."""
    shapes = artifact.shapes or tuple((batch, max(2, int(share * seq_len))) for batch, share in PARITY_POINTS)
    errors = []
    with (
        pair.engine.open(artifact.path, precision=pair.precision) as runtime,
        inference(model),
        torch.inference_mode(),
    ):
        for batch, tokens in dict.fromkeys(shapes):
            inputs = example_inputs(model, batch=batch, seq_len=tokens, seed=batch)
            if "attention_mask" in inputs and tokens > 1:
                inputs["attention_mask"][-1, -1] = 0
            expected = main_output(model(**inputs))
            found = runtime.run({k: v.numpy() for k, v in inputs.items()})
            errors.append(relative_error(expected.numpy(), found[artifact.outputs[0]]))
            if POOLED in found:
                real = inputs.get("attention_mask", torch.ones(expected.shape[:2])).unsqueeze(-1)
                mean = (expected * real).sum(1) / real.sum(1)
                errors.append(relative_error(mean.numpy(), found[POOLED]))
    worst = float(np.max(errors))  # NaN stays NaN
    if not worst <= TOLERANCES[pair.precision]:
        raise ParityFailure(
            f"{artifact.path} differs from its torch model by {worst:.2e} (allowed in {pair.precision}: "
            f"{TOLERANCES[pair.precision]:.0e}). See `optin doctor {artifact.path.parent}`."
        )
    return worst


def build_folder(
    folder: Path,
    *,
    engine: str,
    precision: str | None = None,
    pool: str | None = None,
    options: EngineOptions | None = None,
    dense: bool = True,
    dry_run: bool = False,
) -> Built | None:
    """Export the model in an output folder and prove the artifacts; the dense model is loaded from its source.

    Args: dry_run: only check that it could be done; returns None.
    """
    target = exporter(engine)
    precision = check_precision(target, precision)
    workspace = Workspace(folder)
    source = workspace.source()
    pruned = load_pruned(folder)
    output_names(pruned.model, pool)
    original = load_dense(source.model, source.task).model if dense else None
    if original is not None and sha256_tensors(original.state_dict()) != pruned.report.get("dense_weights"):
        raise PlanMismatch(
            f"{folder}/model was not cut from {source.model}. Run `optin rewrite {folder}` first, or give --no-dense."
        )
    if dry_run:
        return None
    samples = int8_samples(prepare(source).calibration.batches) if precision == "int8" else ()
    spec = ExportSpec(precision, pool, options or EngineOptions(), samples)
    built = build(workspace, target, spec, pruned.model, original)
    check_engine(built, pruned.model, original, seq_len=source.seq_len)
    return built
