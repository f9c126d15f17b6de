"""What every engine's exporter does: model in, artifact out, and open the artifact again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import nn

from optin_deploy.errors import BadInput
from optin_deploy.inputs import gives_logits
from optin_deploy.runtimes.base import Runtime


@dataclass(frozen=True)
class ExportSpec:
    """How a model is exported, beyond its weights."""

    precision: str | None = None
    """One of the exporter's precisions; None = its first."""
    pool: str | None = None
    """`mean`: add the mean over real tokens as output `sentence_embedding`."""


@dataclass(frozen=True)
class Artifact:
    """One file or folder that an engine runs."""

    path: Path
    engine: str
    precision: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sha256: str
    """Of the file, or of the weights inside the folder."""
    size_bytes: int
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages that made it."""


class Exporter(Protocol):
    """One engine. A new engine is one file with this protocol and one line in `exporters.ENGINES`."""

    engine: str
    precisions: tuple[str, ...]
    """What `--precision` may be; the first is the default."""
    file_names: tuple[str, str | None]
    """Names in the output folder of the pruned and of the dense artifact; None: the dense model's own folder."""
    portable: str | None
    """Engine whose artifacts (of the same stem) this one is built from, such as `onnx` for TensorRT; None: torch."""

    def export(self, model: nn.Module, spec: ExportSpec, out: Path) -> Artifact:
        """Write the artifact of a dense or pruned model to `out`, atomically; a finished one is reused.

        Raises: CannotBuildHere: this machine cannot build the engine; says what to run where.
        """

    def open(self, path: Path, *, threads: int = 0, task: str | None = None) -> Runtime:
        """Load an artifact.

        Args: threads: 0 leaves the engine's default. task: of a dense transformers folder, where that is the artifact.
        """


POOLS = ("mean",)
POOLED = "sentence_embedding"


def output_names(model: nn.Module, pool: str | None) -> tuple[str, ...]:
    """Names of an exported model's outputs.

    Raises: BadInput: unknown pooling, or pooling of a model with logits.
    """
    if pool is not None and pool not in POOLS:
        raise BadInput(f"unknown --pool {pool!r}; possible: {', '.join(POOLS)}.")
    if gives_logits(model) and pool is not None:
        raise BadInput(f"--pool {pool} is for feature-extraction; {type(model).__name__} gives logits.")
    return ("logits",) if gives_logits(model) else ("last_hidden_state", *((POOLED,) if pool else ()))
