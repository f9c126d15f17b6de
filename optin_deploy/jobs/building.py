"""Export the pruned and the dense network to an engine, and to what that engine is built from."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from optin_deploy.checkpoint.config import longest_in
from optin_deploy.errors import BadInput, CannotBuildHere
from optin_deploy.exporters import exporter
from optin_deploy.exporters.base import Artifact, Exporter, ExportSpec, Form, graph_precision
from optin_deploy.exporters.passes.pooled import pooled
from optin_deploy.feeds.embedding_head import EmbeddingHead
from optin_deploy.feeds.pooling import POOLED
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.files.names import DENSE, PRUNED
from optin_deploy.files.ownership import RECORD
from optin_deploy.files.storage import atomic_file, json_text, read_json, write_json
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.network.graph import Network
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.sealed import DATA, KEY, SEAL, finished, store
from optin_deploy.network.unused import tidied
from optin_deploy.network.write import data_path

POOL = "optin.pool"
"""Metadata entry: how the pooled output of a file is made."""
INT8_ROWS = 64
"""Calibration samples for int8: ranges change little after some dozens."""
OWN_FILES = ("model.safetensors", "plan.json", "optin.json")
"""What model/ holds besides config and tokenizer or processor."""


@dataclass(frozen=True)
class ArtifactPair:
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
        """Artifacts by file name."""
        named = {"pruned": self.pruned, "dense": self.dense}
        return {name: artifact for name, artifact in named.items() if artifact is not None}


@dataclass(frozen=True)
class Built:
    """What an export left: the forms of the model on the way to the asked engine, the asked one last."""

    pairs: tuple[ArtifactPair, ...]
    problem: CannotBuildHere | None = None
    """Why the asked engine is not among them."""

    @property
    def obstacle(self) -> str | None:
        """Why the asked engine cannot be measured on this machine; None: it can."""
        return str(self.problem) if self.problem else self.pairs[-1].obstacle

    def sizes(self) -> dict[str, int]:
        """Bytes of the last pair, as `pruned` and `dense`; none where nothing could be built here."""
        if not self.pairs:
            return {}
        return {name: artifact.size_bytes for name, artifact in self.pairs[-1].artifacts().items()}

    def hashes(self) -> dict[str, str]:
        """sha256 of each artifact and of its data files, by file name."""
        every = (artifact for pair in self.pairs for artifact in pair.artifacts().values())
        return {name: sha256 for a in every for name, sha256 in {a.path.name: a.sha256, **a.data}.items()}


@dataclass(frozen=True, eq=False)
class Forms:
    """The pruned and the dense network of an output folder."""

    pruned: Form
    dense: Form | None
    """None: not asked for."""


def forms_in(workspace: Workspace, head: EmbeddingHead | None, *, dense: bool = True) -> Forms:
    """The networks of an output folder, with the pooled output that is asked for.

    Raises: BadInput: a file is missing or was changed, or there is nothing to be pooled.
    """
    source, module = workspace.source(), workspace.model_folder
    module_or_none = module if module.is_dir() else None
    longest = longest_in(module)
    pruned = Form(workspace.root / PRUNED, _pooled(workspace.root / PRUNED, head), module_or_none, None, longest)
    if not dense:
        for name in (DENSE, data_path(Path(DENSE)).name):
            workspace.record.remove(name)
        return Forms(pruned, None)
    whole = _pooled(workspace.root / DENSE, head)
    return Forms(
        pruned,
        Form(workspace.root / DENSE, whole, None if source.is_file else Path(source.model), source.task, longest),
    )


def check_free_sizes(network: Network, engine: str) -> None:
    """Make sure that an engine's profiles name all sizes of a network that are free.

    Raises: BadInput: an input has more.
    """
    for port in network.inputs:
        if sum(isinstance(size, str) for size in (port.shape or ())[1:]) > 1:
            raise BadInput(
                f"engine {engine}: its profiles name one free size beside the batch, and input {port.name!r} of sizes "
                f"{port.shape} has more. Export it for one size: with --image-size, or with numbers in the ONNX file."
            )


def _pooled(path: Path, head: EmbeddingHead | None) -> Any:
    """The network of a float32 file, which is written anew where its pooled output is not the one that is asked for."""
    known = finished(path)
    if known is None:
        fault = "was changed after it was written" if path.is_file() else "does not exist"
        raise BadInput(f"{path} {fault}. Make it with `optin rewrite {path.parent}`.")
    network = read_file(path)
    asked = None if head is None else head.digest
    if known.said.get(POOL) == asked:
        return network
    if POOLED in known.outputs:
        network = tidied(network, without=POOLED)
    if head is not None:
        network = pooled(network, head)
    entries = {name: value for name, value in known.said.items() if name not in (KEY, DATA, POOL, SEAL)}
    store(network, path, known.key, entries | ({} if asked is None else {POOL: asked}), anew=True)
    return network


def build(workspace: Workspace, target: Exporter, spec: ExportSpec, forms: Forms) -> Built:
    """Export pruned and dense to an engine; what it is built from is exported, kept and proven too."""
    pairs: list[ArtifactPair] = []
    problem: CannotBuildHere | None = None
    for engine, precision in _steps(target, spec.precision or target.precisions[0]):
        try:
            pairs.append(_pair(workspace, engine, replace(spec, precision=precision), forms))
        except CannotBuildHere as err:
            problem = err
            break
    _copy_support_files(workspace)
    return Built(tuple(pairs), problem)


def _steps(target: Exporter, precision: str) -> list[tuple[Exporter, str]]:
    """What an engine's artifact is made from, first to last: float32 ONNX, typed ONNX, the artifact."""
    if not target.reads_onnx:
        return [(target, precision)]
    onnx = exporter("onnx")
    typed = graph_precision(precision)
    steps = [(onnx, "fp32")] if typed == "fp32" else [(onnx, "fp32"), (onnx, typed)]
    return steps if target.engine == onnx.engine else [*steps, (target, precision)]


def _pair(workspace: Workspace, engine: Exporter, spec: ExportSpec, forms: Forms) -> ArtifactPair:
    precision = spec.precision or engine.precisions[0]
    name, dense_name = engine.file_names(precision, workspace.root)
    smaller = engine.export(forms.pruned, spec, workspace.root / name)
    original: Artifact | None = None
    if dense_name is not None and forms.dense is not None:
        original = engine.export(forms.dense, spec, workspace.root / dense_name)
    elif dense_name is not None:
        for each in (dense_name, data_path(Path(dense_name)).name):  # of an earlier run: perhaps of another model
            workspace.record.remove(each)
    return ArtifactPair(engine, precision, smaller, original)


def _copy_support_files(workspace: Workspace) -> None:
    """Config, tokenizer and modules beside the ONNX file, where Optimum and others look for them."""
    for file in (path for path in workspace.model_folder.rglob("*") if path.is_file()):
        name = str(file.relative_to(workspace.model_folder))
        out = workspace.root / name
        if name == "tokenizer_config.json":
            config = _for_transformers_4(read_json(file, "Run the export again."))
            if not out.is_file() or out.read_text(encoding="utf-8") != json_text(config):
                write_json(out, config)
        elif name not in (*OWN_FILES, RECORD) and not (out.is_file() and filecmp.cmp(file, out, shallow=False)):
            with atomic_file(out) as temporary:
                shutil.copyfile(file, temporary)


def _for_transformers_4(tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """Names that transformers 4, which Optimum's ORTModel classes need, reads too; 5 still takes them."""
    config = dict(tokenizer_config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # 4 takes this key for a dict of named tokens
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def int8_samples(batches: Sequence[Batch], inputs: Sequence[str]) -> Sequence[dict[str, np.ndarray]]:
    """The first calibration batches that hold enough rows to measure the range of activations.

    Args: inputs: names of the network's inputs.
    """
    rows = np.cumsum([rows_of(batch) for batch in batches])
    some = batches[: int(np.searchsorted(rows, INT8_ROWS)) + 1]
    return [{name: batch[name].numpy() for name in inputs} for batch in some]
