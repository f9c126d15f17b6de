"""What every engine's exporter does: a network in, an artifact out, and open the artifact again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from optin_deploy.common.processors import default_threads
from optin_deploy.exporters.options import EngineOptions
from optin_deploy.runtimes.base import DeviceRuntime, Runtime

if TYPE_CHECKING:
    from torch import nn

    from optin_deploy.feeds.embedding_head import EmbeddingHead
    from optin_deploy.network.graph import Network


@dataclass(frozen=True, eq=False)
class Form:
    """A network as artifacts are made of it."""

    graph: Path
    """Its float32 ONNX file, sealed."""
    network: Network
    """The same, read."""
    module: Path | nn.Module | None = None
    """Folder of the transformers model that computes the same, or a module in memory; None: there is none."""
    task: str | None = None
    """Task of that model, if it is a dense one."""
    longest: int | None = None
    """Tokens that its table of positions holds; None: not known."""


@dataclass(frozen=True)
class ExportSpec:
    """How a model is exported, beyond its weights."""

    precision: str | None = None
    """One of the exporter's precisions; None = its first."""
    head: EmbeddingHead | None = None
    """What makes the output `sentence_embedding` of the states; None: there is no such output."""
    options: EngineOptions | None = None
    """Those of its engine; None: their defaults."""
    calibration: Sequence[Mapping[str, np.ndarray]] = ()
    """Inputs by name on which int8 measures the range of activations."""
    of_module: bool = False
    """Is the artifact made of the torch module, not of the ONNX file?"""


@dataclass(frozen=True)
class Artifact:
    """One file or folder that an engine runs."""

    path: Path
    engine: str
    precision: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sha256: str
    """Hash of the file (which holds those of `data`), or of the weights inside the folder."""
    size_bytes: int
    """Size of the artifact together with `data`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Packages that made it."""
    shapes: tuple[tuple[int, int], ...] = ()
    """(batch, tokens) at which it must be proven, if it does not take every shape."""
    data: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the files beside `path` that hold its weights, by their names."""


class Exporter(Protocol):
    """One engine. A new engine is one file with this protocol and one line in the table of `__init__.py`."""

    engine: str
    precisions: tuple[str, ...]
    """What `--precision` may be; the first is the default."""
    align: int
    """Multiple of neurons that its kernels like: 16 on CPUs, 64 on GPUs."""
    reads_onnx: bool
    """Is the artifact an ONNX file, or built from one? Then the float32 ONNX is exported and proven beside it."""

    options: type[EngineOptions]
    """What else its artifacts are built with, as a type of its own: `--engine-option` gives its fields."""

    def check(self, options: EngineOptions, pool: str | None = None) -> None:
        """Refuse options, or a pooled output, that it cannot build with here.

        Raises: BadInput.
        """

    def file_names(self, precision: str, folder: Path | None = None) -> tuple[str, str | None]:
        """Names in the output folder of the pruned and of the dense artifact; None: the dense model's own folder.

        Args: folder: that output folder, where names depend on what lies there.
        """

    def export(self, form: Form, spec: ExportSpec, out: Path) -> Artifact:
        """Write the artifact of a dense or pruned network to `out`, atomically; a finished one is reused.

        Raises: CannotBuildHere: this machine cannot build the engine; says what to run where.
        """

    def cannot_build(self) -> str | None:
        """Why this machine cannot make artifacts of this engine; None: it can."""

    def obstacle(self, precision: str | None = None) -> str | None:
        """Why this machine cannot run artifacts of this engine; None: it can."""

    def threads(self, asked: int) -> int:
        """Intra-op threads that it runs with; 0: it computes on no CPU.

        Args: asked: 0 = its default.
        Raises: BadInput: it has no threads to be set.
        """

    def open(self, path: Path, *, precision: str | None = None, threads: int = 0, task: str | None = None) -> Runtime:
        """Load an artifact.

        Args: precision: where the artifact itself does not fix it. threads: 0 leaves the engine's default.
            task: of a dense transformers folder, where that is the artifact.
        """


@runtime_checkable
class DeviceExporter(Protocol):
    """What an exporter has besides if its engine launches without transfers: `--device-time` measures it."""

    def open_device(
        self, path: Path, *, precision: str | None = None, cuda_graph: bool = True, task: str | None = None
    ) -> DeviceRuntime:
        """Load an artifact.

        Args: cuda_graph: replay a graph of the launch, where one can be recorded. task: see `Exporter.open`.
        """


class ExporterDefaults:
    """What most engines share: kernels of a CPU, no options, and nothing in the way."""

    align = 16
    options: type[EngineOptions] = EngineOptions

    def check(self, options: EngineOptions, pool: str | None = None) -> None:
        """See `Exporter.check`."""

    def cannot_build(self) -> str | None:
        """See `Exporter.cannot_build`."""
        return None

    def threads(self, asked: int) -> int:
        """See `Exporter.threads`; the default is ONNX Runtime's."""
        return asked or default_threads()

    def obstacle(self, precision: str | None = None) -> str | None:
        """See `Exporter.obstacle`."""
        return None


def graph_precision(precision: str) -> str:
    """The precision whose graph is run: TF32 is a way to compute float32 products, not a type."""
    return "fp32" if precision == "tf32" else precision


def typed_name(stem: str, precision: str, suffix: str) -> str:
    """`model.onnx` in float32, `model.fp16.onnx` in another type."""
    graph = graph_precision(precision)
    return f"{stem}{suffix}" if graph == "fp32" else f"{stem}.{graph}{suffix}"
