"""Measure a pruned artifact of another type beside the float32 dense model: what pruning and type gain together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.exporters import exporter
from optin_deploy.exporters.base import Exporter
from optin_deploy.files.names import DENSE
from optin_deploy.jobs.bench import Inputs, measure
from optin_deploy.jobs.building import Built
from optin_deploy.measuring.artifacts import Opening
from optin_deploy.measuring.measurement import Measurement
from optin_deploy.measuring.points import Point
from optin_deploy.pruning.source import Source
from optin_deploy.reporting.artifact_table import FLOAT32


def measure_beside_float32(
    built: Built,
    inputs: Inputs,
    source: Source,
    points: Sequence[Point],
    *,
    threads: int = 0,
    stage: Stage = silent_stage,
) -> list[Measurement]:
    """Interleaved A/B timing of the float32 dense model and the pruned artifact at each point.

    Returns: none if the artifact is in float32 itself, where the ordinary measurements say this.
    """
    asked = built.pairs[-1]
    if asked.precision == FLOAT32:
        return []
    engine, path = float32_dense(built, source)
    dense = Opening(engine, path, FLOAT32, threads, source.task)
    smaller = Opening(asked.engine, asked.pruned.path, asked.precision, threads)
    return measure(dense, smaller, inputs, points, beside=" beside float32 dense", stage=stage)


def float32_dense(built: Built, source: Source) -> tuple[Exporter, Path]:
    """The dense model in float32 on the asked engine, if such an artifact is there; else the model itself on torch."""
    engine = built.pairs[-1].engine
    if FLOAT32 in engine.precisions:
        _, name = engine.file_names(FLOAT32, built.pairs[-1].pruned.path.parent)
        if name is None:
            return engine, Path(source.model)
        for pair in built.pairs:
            if pair.precision == FLOAT32 and pair.dense is not None and pair.dense.path.name == name:
                return engine, pair.dense.path
    if source.is_file:
        return exporter("onnx"), built.pairs[0].pruned.path.with_name(DENSE)
    return exporter("torch"), Path(source.model)
