"""Time networks of given widths on an engine, as they would be shipped, interleaved with the dense network.

Widths alone decide the time (but for int8, which chooses by its noise what stays in float), so that candidates are cut
without compensation, from the graph that was exported once: a fraction of a second each.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from optin_deploy.checkpoint.smaller import save
from optin_deploy.common.environment import environment, installed_versions
from optin_deploy.common.progress import Progress, silent
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.torch import cut_and_tell
from optin_deploy.errors import BadInput
from optin_deploy.exporters import check_precision
from optin_deploy.exporters.base import Exporter, ExportSpec, Form
from optin_deploy.exporters.passes.pooled import pooled
from optin_deploy.files.descriptors import remove_folder
from optin_deploy.files.storage import scratch_folder, sha256_json
from optin_deploy.jobs.bench import Inputs
from optin_deploy.jobs.prepared import Prepared
from optin_deploy.measuring.artifacts import check_runs
from optin_deploy.measuring.points import Point
from optin_deploy.measuring.timing import LatencySamples, PairTiming, measure_pair, measure_together
from optin_deploy.network.graph import Network
from optin_deploy.network.sealed import store
from optin_deploy.planning.plan import plan_of
from optin_deploy.planning.widths import Keep
from optin_deploy.pruning.networks import cut_by
from optin_deploy.pruning.ready import Ready
from optin_deploy.runtimes.base import Feeds, Runtime
from optin_deploy.runtimes.device import current_gpu, describe_device
from optin_deploy.structure.groups import Layout

DENSE = "dense"


@dataclass(frozen=True, eq=False)
class WidthTimer:
    """One engine on this device, at one size of input; `width_timer` makes it."""

    prepared: Prepared
    target: Exporter
    spec: ExportSpec
    point: Point
    threads: int
    feeds: Feeds
    dense: Path
    """Artifact of the dense network."""
    scratch: Path
    """Candidates lie here while they are measured."""
    merges: tuple[int, ...] = ()
    """Tokens that every candidate merges, block by block; the dense network merges none."""

    @property
    def layout(self) -> Layout:
        """What can be cut."""
        return self.prepared.ready.layout

    @property
    def precision(self) -> str:
        """Type of the artifacts."""
        return check_precision(self.target, self.spec.precision)

    @property
    def setting(self) -> dict[str, str | int]:
        """See `setting_of`."""
        return setting_of(self.target, self.spec, self.feeds, threads=self.threads)

    def against_dense(self, keep: Keep, progress: Progress = silent) -> PairTiming:
        """The whole protocol for one candidate."""
        with self._artifacts([keep]) as (artifact,):
            return measure_pair(self._open_dense, partial(self._open, artifact), self.feeds, on_block=progress)

    def behind_dense(self, keep: Keep, progress: Progress = silent) -> PairTiming:
        """The same with the roles exchanged: the candidate stands as `dense`, the dense network as `pruned`."""
        with self._artifacts([keep]) as (artifact,):
            return measure_pair(partial(self._open, artifact), self._open_dense, self.feeds, on_block=progress)

    def together(self, plans: Sequence[Keep], *, blocks: int) -> LatencySamples:
        """Some candidates beside the dense network: `dense`, `0`, `1`, ..."""
        with self._artifacts(plans) as artifacts:
            candidates = {str(i): partial(self._open, artifact) for i, artifact in enumerate(artifacts)}
            return measure_together({DENSE: self._open_dense, **candidates}, self.feeds, blocks=blocks)

    def _open_dense(self) -> Runtime:
        task = self.prepared.source.task
        return self.target.open(self.dense, precision=self.precision, threads=self.threads, task=task)

    def _open(self, artifact: Path) -> Runtime:
        return self.target.open(artifact, precision=self.precision, threads=self.threads)

    @contextmanager
    def _artifacts(self, plans: Sequence[Keep]) -> Iterator[list[Path]]:
        with scratch_folder(self.scratch / "cut") as folder:
            yield [self._export(keep, folder / str(i)) for i, keep in enumerate(plans)]

    def _export(self, keep: Keep, folder: Path) -> Path:
        folder.mkdir()
        form = form_at(self.prepared, self.spec, keep, folder, self.merges)
        name, _ = self.target.file_names(self.precision, folder)
        return self.target.export(form, self.spec, folder / name).path


def form_at(
    prepared: Prepared, spec: ExportSpec, keep: Keep | None, folder: Path, merges: tuple[int, ...] = ()
) -> Form:
    """A network of these widths, written to a folder as every engine needs it.

    Args: keep: None: the dense network. merges: tokens that are merged in each block.
    """
    ready, dense = prepared.ready, prepared.dense
    network = ready.network if keep is None else _smaller(ready, keep, merges)
    if spec.head is not None:
        network = pooled(network, spec.head)
    graph = folder / ("dense.onnx" if keep is None else "model.onnx")
    store(network, graph, sha256_json([dense.key, keep, merges, spec.head and spec.head.digest]))
    module = None
    if dense.loaded is not None and keep is None:
        module = Path(prepared.source.model)
    elif dense.loaded is not None and spec.of_module and not any(merges):
        smaller = cut_and_tell(dense.model, ready.layout, keep or {}, ready.found.probes)
        if not smaller.why_graph:
            module = folder / "model"
            save(smaller.module, smaller.attributes, plan_of(ready.layout, keep or {}), module)
    return Form(graph, network, module, prepared.source.task, dense.longest)


def _smaller(ready: Ready, keep: Keep, merges: tuple[int, ...]) -> Network:
    """A network of these widths, as it would be shipped but for its weights."""
    if not any(merges):
        return cut(ready.layout, keep)
    return cut_by(ready.found, plan_of(ready.layout, keep, merges=merges))[0] if keep else ready.merging(merges)


def setting_of(target: Exporter, spec: ExportSpec, feeds: Feeds, *, threads: int) -> dict[str, str | int]:
    """All that a latency table depends on besides the network."""
    gpu, env = current_gpu(), environment()
    limited = env["cpus_available"] != env["cores_logical"]
    quota = f", {env['cpus_available']} at the same time" if limited else ""
    return {
        "engine": target.engine,
        "precision": check_precision(target, spec.precision),
        "pool": spec.head.digest if spec.head else "none",
        "options": str(target.options.checked(spec.options).settings() or "none"),
        "inputs": ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in sorted(feeds.items())),
        "threads": threads,
        "cpu": f"{env['cpu_model']}, {env['cores_logical']} cores{quota}",
        "gpu": "none" if gpu is None else describe_device(gpu)[0],
        "versions": ", ".join(f"{name} {found}" for name, found in installed_versions().items()),
    }


def inputs_of(prepared: Prepared) -> Inputs:
    """What the network of a job takes, at the sizes of its calibration rows."""
    ready = prepared.ready
    plan = plan_of(ready.layout, {}, sizes=ready.sizes)
    return Inputs(ready.network, plan, lambda: ready.layout, prepared.dense.longest)


@contextmanager
def width_timer(
    prepared: Prepared, target: Exporter, spec: ExportSpec, point: Point, *, threads: int = 0
) -> Iterator[WidthTimer]:
    """Export the dense network and get ready to time others beside it.

    Raises: BadInput: the engine does not run here. CannotBuildHere.
    """
    check_runs(target, spec.precision)
    _, name = target.file_names(check_precision(target, spec.precision))
    spec = replace(spec, of_module=not target.reads_onnx)
    feeds = inputs_of(prepared).feeds(point)
    scratch = Path(tempfile.mkdtemp())
    try:
        form = form_at(prepared, spec, None, scratch)
        if name is None and form.module is None:
            name = form.graph.name
        dense = Path(prepared.source.model) if name is None else target.export(form, spec, scratch / name).path
        yield WidthTimer(prepared, target, spec, point, threads, feeds, dense, scratch)
    finally:
        remove_folder(scratch)


def check_timeable(target: Exporter, spec: ExportSpec) -> None:
    """Refuse an engine whose times cannot be planned by on this machine.

    Raises: BadInput.
    """
    check_runs(target, spec.precision)
    if spec.precision == "int8":
        raise BadInput(
            "--precision int8 chooses for each model what stays in float, so that its time cannot be foretold from "
            "widths. Give --flops, and measure what comes out."
        )
