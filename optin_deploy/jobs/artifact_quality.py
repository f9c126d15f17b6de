"""Judge what is served: artifacts on the rows that judge, by their own outputs, beside the float32 dense network."""

from __future__ import annotations

from collections.abc import Iterator

from optin_deploy.errors import NonFiniteActivation
from optin_deploy.exporters.base import Artifact
from optin_deploy.jobs.building import ArtifactPair, Built
from optin_deploy.jobs.prepared import Prepared
from optin_deploy.jobs.sized_runs import misfit, run_rows
from optin_deploy.network.graph import Network
from optin_deploy.pruning.ready import Ready
from optin_deploy.quality.quality import Quality
from optin_deploy.reporting.artifact_table import FLOAT32, ArtifactQuality
from optin_deploy.scoring.losses import Readout
from optin_deploy.scoring.subject import read_tokens


def quality_of(prepared: Prepared, smaller: Network, built: Built) -> Quality:
    """Return the quality of the engine's own outputs where it runs here and takes the rows, else of our own run."""
    pair = built.pairs[-1] if built.pairs else None
    if pair is None or built.obstacle is not None or _misfit(prepared.ready, pair.pruned):
        return prepared.ready.quality_of(smaller)
    return _judged(prepared.ready, pair, pair.pruned)


def artifact_qualities(
    prepared: Prepared, smaller: Network, built: Built, asked: Quality
) -> tuple[list[ArtifactQuality], list[str]]:
    """Judge every artifact of another precision than float32 that runs here.

    Args: asked: what `quality_of` gave.
    Returns: rows, those of the float32 networks (run by torch) first, and why artifacts are left out; nothing where
        all artifacts are in float32 or none runs here.
    """
    ready, rows, left_out = prepared.ready, list[ArtifactQuality](), list[str]()
    for pair in built.pairs:
        if pair.precision == FLOAT32 or pair.obstacle is not None:
            continue
        for which, artifact in sorted(pair.artifacts().items()):
            reason = _misfit(ready, artifact)
            try:
                if reason is None:
                    known = which == "pruned" and pair is built.pairs[-1] and built.problem is None
                    found = asked if known else _judged(ready, pair, artifact)
                    rows.append(ArtifactQuality(pair.engine.engine, pair.precision, which, found))
            except NonFiniteActivation:
                reason = "it puts out NaN or infinity there"
            if reason is not None:
                left_out.append(f"{artifact.path.name} was not run on the rows that judge: {reason}.")
    if rows:
        cut, metric = ready.quality_of(smaller), asked.metric
        same = Quality(metric, cut.dense, cut.dense, cut.samples, {k: (v[0], v[0]) for k, v in cut.beside.items()})
        rows[:0] = [ArtifactQuality("torch", FLOAT32, "dense", same), ArtifactQuality("torch", FLOAT32, "pruned", cut)]
    return rows, left_out


def _judged(ready: Ready, pair: ArtifactPair, artifact: Artifact) -> Quality:
    reading, rows = ready.subject.reading, ready.rows.held_out
    assert rows is not None, "rows that judge were asked for"

    def readouts() -> Iterator[Readout]:
        with pair.engine.open(artifact.path, precision=pair.precision) as runtime:
            for batch in rows.batches:
                yield reading.read(run_rows(runtime, artifact, ready.network, batch), read_tokens(batch))

    return ready.judge.compare(readouts())


def _misfit(ready: Ready, artifact: Artifact) -> str | None:
    assert ready.rows.held_out is not None, "rows that judge were asked for"
    return misfit(artifact, ready.network, ready.rows.held_out)
