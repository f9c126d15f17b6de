"""Time models of given widths on an engine, as they would be shipped, interleaved with the dense model.

Widths alone decide the time (but for int8, which chooses by its noise what stays in float), so that candidates are cut
without compensation: seconds each, not minutes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from exporters import check_precision
from exporters.base import Exporter, ExportSpec
from exporters.bench.measuring import Point, check_runs, example_feeds, length_of
from optin_deploy.bench.environment import environment, installed_versions
from optin_deploy.bench.timing import PairTiming, Samples, measure_pair, measure_together
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.progress import Progress, silent
from optin_deploy.pruned import PrunedModel
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.runtimes.base import Feeds, Runtime
from optin_deploy.runtimes.device import current_gpu, describe_device
from optin_deploy.search import make_plan
from optin_deploy.stages import Prepared

DENSE = "dense"


@dataclass(frozen=True, eq=False)
class Yardstick:
    """One engine on this device, at one size of input; `yardstick` makes it."""

    prepared: Prepared
    target: Exporter
    spec: ExportSpec
    point: Point
    threads: int
    align: int
    """Multiple of neurons in which widths are chosen."""
    feeds: Feeds
    dense: Path
    """Artifact of the dense model."""
    scratch: Path
    """Candidates lie here while they are measured."""

    @property
    def precision(self) -> str:
        """Of the artifacts."""
        return check_precision(self.target, self.spec.precision)

    @property
    def setting(self) -> dict[str, str | int]:
        """See `setting_of`."""
        return setting_of(self.prepared, self.target, self.spec, self.point, threads=self.threads, align=self.align)

    def plan(self, heads: Sequence[int], neurons: Sequence[int]) -> PruningPlan:
        """The first so many units of each layer: which ones makes no difference to the time."""
        layers = self.prepared.layout.layers
        masks = Masks(
            tuple(tuple(i < count for i in range(x.heads)) for x, count in zip(layers, heads, strict=True)),
            tuple(tuple(i < count for i in range(x.neurons)) for x, count in zip(layers, neurons, strict=True)),
            self.prepared.layout.hash,
        )
        return make_plan(masks, self.prepared.layout, self.prepared.cost)

    def against_dense(self, plan: PruningPlan, progress: Progress = silent) -> PairTiming:
        """The whole protocol for one candidate."""
        with self._artifacts([plan]) as (artifact,):
            return measure_pair(self._open_dense, partial(self._open, artifact), self.feeds, on_block=progress)

    def behind_dense(self, plan: PruningPlan, progress: Progress = silent) -> PairTiming:
        """The same with the roles exchanged: the candidate stands as `dense`, the dense model as `pruned`."""
        with self._artifacts([plan]) as (artifact,):
            return measure_pair(partial(self._open, artifact), self._open_dense, self.feeds, on_block=progress)

    def together(self, plans: Sequence[PruningPlan], *, blocks: int) -> Samples:
        """Some candidates beside the dense model: `dense`, `0`, `1`, ..."""
        with self._artifacts(plans) as artifacts:
            candidates = {str(i): partial(self._open, artifact) for i, artifact in enumerate(artifacts)}
            return measure_together({DENSE: self._open_dense, **candidates}, self.feeds, blocks=blocks)

    def _open_dense(self) -> Runtime:
        task = self.prepared.source.task
        return self.target.open(self.dense, precision=self.precision, threads=self.threads, task=task)

    def _open(self, artifact: Path) -> Runtime:
        return self.target.open(artifact, precision=self.precision, threads=self.threads)

    @contextmanager
    def _artifacts(self, plans: Sequence[PruningPlan]) -> Iterator[list[Path]]:
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            yield [self._export(plan, Path(folder) / str(i)) for i, plan in enumerate(plans)]

    def _export(self, plan: PruningPlan, folder: Path) -> Path:
        name, dense_name = self.target.file_names(self.precision)
        smaller = rewrite_torch(self.prepared.loaded.model, self.prepared.layout, plan)
        if dense_name is None:  # the engine runs the transformers model itself
            PrunedModel(smaller, plan, self.prepared.layout).save(folder / name)
        return self.target.export(smaller, self.spec, folder / name).path


def setting_of(
    prepared: Prepared, target: Exporter, spec: ExportSpec, point: Point, *, threads: int, align: int
) -> dict[str, str | int]:
    """All that a latency table depends on besides the model."""
    gpu, env = current_gpu(), environment()
    limited = env["cpus_available"] != env["cores_logical"]
    quota = f", {env['cpus_available']} at the same time" if limited else ""
    return {
        "engine": target.engine,
        "precision": check_precision(target, spec.precision),
        "pool": spec.pool or "none",
        "options": str(spec.options.settings()) if target.has_profiles else "none",
        "batch": point.batch,
        "seq_len": length_of(point, prepared.loaded.model, prepared.cost.tokens),
        "threads": threads,
        "align": align,
        "cpu": f"{env['cpu_model']}, {env['cores_logical']} cores{quota}",
        "gpu": "none" if gpu is None else describe_device(gpu)[0],
        "versions": ", ".join(f"{name} {found}" for name, found in installed_versions().items()),
    }


@contextmanager
def yardstick(
    prepared: Prepared,
    target: Exporter,
    spec: ExportSpec,
    point: Point,
    *,
    threads: int = 0,
    align: int | None = None,
    home: Path | None = None,
) -> Iterator[Yardstick]:
    """Export the dense model and get ready to time others beside it.

    Args:
        align: default: what the engine likes.
        home: folder where the dense artifact stays, or lies already; default: gone afterwards.
    Raises: BadInput: the engine does not run here. CannotBuildHere.
    """
    check_runs(target, spec.precision)
    model: nn.Module = prepared.loaded.model
    seq_len = length_of(point, model, prepared.cost.tokens)
    feeds = example_feeds(model, point.batch, seq_len)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        _, name = target.file_names(check_precision(target, spec.precision))
        dense = Path(prepared.source.model)
        if name is not None:
            dense = target.export(model, spec, (home or scratch) / name).path
        align = target.align if align is None else align
        yield Yardstick(prepared, target, spec, point, threads, align, feeds, dense, scratch)
