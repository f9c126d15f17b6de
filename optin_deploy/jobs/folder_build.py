"""Artifacts of an engine for an output folder, proven."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from optin_deploy.checkpoint.config import head_in
from optin_deploy.errors import BadInput
from optin_deploy.exporters import check_precision, exporter
from optin_deploy.exporters.base import ExportSpec
from optin_deploy.exporters.options import EngineOptions
from optin_deploy.exporters.passes.pooled import head_of
from optin_deploy.exporters.to_onnx import check_size
from optin_deploy.feeds.pooling import POOLED
from optin_deploy.files.names import DENSE, PRUNED
from optin_deploy.jobs.artifact_quality import artifact_qualities, quality_of
from optin_deploy.jobs.building import Built, build, check_free_sizes, forms_in, int8_samples
from optin_deploy.jobs.origin import check_origin
from optin_deploy.jobs.prepared import Prepared, prepare
from optin_deploy.jobs.proving import check_engine
from optin_deploy.jobs.samples import recorded
from optin_deploy.jobs.stages import dense_stage
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.sealed import finished
from optin_deploy.network.unused import tidied
from optin_deploy.reporting.artifact_table import FLOAT32, ArtifactQuality


class FolderBuild:
    """An output folder whose networks are exported."""

    def __init__(self, folder: Path) -> None:
        self.workspace = Workspace(folder)

    @cached_property
    def prepared(self) -> Prepared:
        """The dense model and the data of the folder's job, which must be there."""
        return prepare(self.workspace.source(), self.workspace.root)

    def build(
        self,
        *,
        engine: str,
        precision: str | None = None,
        pool: str | None = None,
        options: EngineOptions | None = None,
        dense: bool = True,
        dry_run: bool = False,
    ) -> Built | None:
        """Export the networks in an output folder and prove the artifacts.

        Args: dry_run: only check that it could be done; returns None.
        """
        target = exporter(engine)
        precision = check_precision(target, precision)
        own = target.options.checked(options)
        target.check(own, pool)
        workspace = self.workspace
        workspace.read_plan()
        path = workspace.root / PRUNED
        network = read_file(path)
        check_origin(path, "pruned")
        head = None
        if pool is not None:
            head = head_of(tidied(network, without=POOLED), pool, head_in(workspace.model_folder))
        if own.sizes():
            check_free_sizes(network, engine)
        if target.reads_onnx:
            check_size(network, precision)
        samples: Sequence[Any] = ()
        if precision == "int8":
            ready = self.prepared.ready
            samples = int8_samples(ready.rows.calibration.batches, [port.name for port in ready.network.inputs])
        if dense and finished(workspace.root / DENSE) is None:
            prepared = self.prepared
            if not dry_run:
                dense_stage(workspace, prepared)
        if dry_run:
            return None
        spec = ExportSpec(precision, head, own, samples, of_module=not target.reads_onnx)
        forms = forms_in(workspace, head, dense=dense)
        built = build(workspace, target, spec, forms)
        check_engine(built, forms, [recorded(workspace)])
        return built

    def judge(self, built: Built) -> tuple[list[ArtifactQuality], list[str]]:
        """Judge artifacts of another precision than float32 on the job's rows, which need the dense model and its data.

        Returns: what `artifact_qualities` does; where the data are not here, the reason alone.
        """
        if built.obstacle is not None or all(pair.precision == FLOAT32 for pair in built.pairs):
            return [], []
        try:
            prepared = self.prepared
        except BadInput as err:
            return [], [f"The artifacts were not judged: {err}"]
        smaller = read_file(self.workspace.root / PRUNED)
        return artifact_qualities(prepared, smaller, built, quality_of(prepared, smaller, built))
