"""Export the pruned and the dense model to an engine, and prove that the artifacts compute the same."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from exporters import check_precision, exporter
from exporters.base import POOLED, Artifact, Exporter, ExportSpec, output_names
from optin_deploy.errors import CannotBuildHere, ParityFailure, PlanMismatch
from optin_deploy.inputs import example_inputs
from optin_deploy.loading import load_dense
from optin_deploy.masking import inference
from optin_deploy.pruned import load_pruned
from optin_deploy.rewrite.verify import main_output, relative_error
from optin_deploy.storage import atomic_file, read_json, sha256_tensors, write_json
from optin_deploy.workspace import Workspace

ENGINE_TOLERANCE = 1e-4
"""float32 engines against torch, relative to the largest output: fused kernels sum in another order."""
PARITY_POINTS = ((1, 1.0), (3, 0.4))
"""(batch, share of seq_len) at which engines are compared with torch: not the sizes that were traced."""
OWN_FILES = ("model.safetensors", "plan.json", "layout.json", "optin.json")
"""What model/ holds besides config and tokenizer or processor."""


@dataclass(frozen=True)
class Built:
    """What an export left."""

    engine: Exporter
    """Runs `pruned` and `dense` here: the asked engine, or the portable one that it is built from."""
    pruned: Artifact
    dense: Artifact | None
    """None: not asked for, or the engine runs the dense model's own folder."""
    final: Artifact | None = None
    """The asked engine's own artifact, if it is built from the portable one."""
    problem: CannotBuildHere | None = None
    """Why there is no such artifact."""

    @property
    def is_asked_engine(self) -> bool:
        """False: times of these artifacts would not be those of the asked engine."""
        return self.final is None and self.problem is None

    def artifacts(self) -> dict[str, Artifact]:
        """By name."""
        named = {"pruned": self.pruned, "dense": self.dense, "engine": self.final}
        return {name: artifact for name, artifact in named.items() if artifact is not None}

    def sizes(self) -> dict[str, int]:
        """Bytes of each artifact."""
        return {name: artifact.size_bytes for name, artifact in self.artifacts().items()}

    def hashes(self) -> dict[str, str]:
        """sha256 of each artifact."""
        return {f"{name}_artifact": artifact.sha256 for name, artifact in self.artifacts().items()}


def build(
    workspace: Workspace, target: Exporter, spec: ExportSpec, pruned: nn.Module, dense: nn.Module | None
) -> Built:
    """Export pruned and dense with the same exporter; where the engine cannot be built, its portable form."""
    _copy_support_files(workspace)
    base = exporter(target.portable) if target.portable else target
    base_spec = replace(spec, precision=None) if target.portable else spec
    smaller = base.export(pruned, base_spec, workspace.root / base.file_names[0])
    original: Artifact | None = None
    if base.file_names[1] is not None:
        dense_path = workspace.root / base.file_names[1]
        if dense is None:
            dense_path.unlink(missing_ok=True)  # of an earlier run; it could be measured beside the wrong model
        else:
            original = base.export(dense, base_spec, dense_path)
    if target is base:
        return Built(base, smaller, original)
    try:
        return Built(base, smaller, original, final=target.export(pruned, spec, workspace.root / target.file_names[0]))
    except CannotBuildHere as problem:
        return Built(base, smaller, original, problem=problem)


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


def check_engine(built: Built, pruned: nn.Module, dense: nn.Module | None, *, seq_len: int) -> dict[str, float]:
    """Error of each artifact against its torch model, at sizes that were not traced, with padding.

    Raises: ParityFailure: above 1e-4 of the largest output.
    """
    errors = {}
    pairs = [("pruned", built.pruned, pruned), ("dense", built.dense, dense)]
    for name, artifact, model in pairs:
        if artifact is None or model is None:
            continue
        with built.engine.open(artifact.path) as runtime, inference(model), torch.inference_mode():
            found_errors = []
            for batch, share in PARITY_POINTS:
                inputs = example_inputs(model, batch=batch, seq_len=max(2, int(share * seq_len)), seed=batch)
                if "attention_mask" in inputs:
                    inputs["attention_mask"][-1, -1] = 0
                expected = main_output(model(**inputs))
                found = runtime.run({k: v.numpy() for k, v in inputs.items()})
                found_errors.append(relative_error(expected.numpy(), found[artifact.outputs[0]]))
                if POOLED in found:
                    real = inputs.get("attention_mask", torch.ones(expected.shape[:2])).unsqueeze(-1)
                    mean = (expected * real).sum(1) / real.sum(1)
                    found_errors.append(relative_error(mean.numpy(), found[POOLED]))
        worst = float(np.max(found_errors))  # NaN stays NaN
        if not worst <= ENGINE_TOLERANCE:
            raise ParityFailure(
                f"{artifact.path} differs from its torch model by {worst:.2e} (allowed: {ENGINE_TOLERANCE:.0e})."
            )
        errors["torch_vs_engine" if name == "pruned" else "torch_vs_engine_dense"] = worst
    return errors


def build_folder(
    folder: Path,
    *,
    engine: str,
    precision: str | None = None,
    pool: str | None = None,
    dense: bool = True,
    dry_run: bool = False,
) -> Built | None:
    """Export the model in an output folder and prove the artifacts; the dense model is loaded from its source.

    Args: dry_run: only check that it could be done; returns None.
    """
    target = exporter(engine)
    spec = ExportSpec(check_precision(target, precision), pool)
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
    built = build(workspace, target, spec, pruned.model, original)
    check_engine(built, pruned.model, original, seq_len=source.seq_len)
    return built
