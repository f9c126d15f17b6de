"""Time two artifacts of an engine beside each other, and refuse what cannot be timed here."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from optin_deploy.common.processors import available_cpus
from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.common.validation import whole_number
from optin_deploy.errors import BadInput
from optin_deploy.exporters import ENGINES, exporter
from optin_deploy.exporters.base import DeviceExporter, Exporter
from optin_deploy.files.ownership import Record
from optin_deploy.measuring.timing import PairTiming, measure_pair
from optin_deploy.network.onnx_data import remedy
from optin_deploy.network.write import data_path
from optin_deploy.runtimes.base import Feeds, Runtime
from optin_deploy.runtimes.device import NO_GPU, current_gpu

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """An artifact, and how an engine opens it."""

    target: Exporter
    path: Path
    precision: str | None
    """Precision that is asked for; None means the artifact's own."""
    threads: int
    task: str | None = None
    """Task of the artifact, if it is a dense transformers folder."""

    def open(self) -> Runtime:
        """Load the artifact."""
        return self.target.open(self.path, precision=self.precision, threads=self.threads, task=self.task)


def time_pair(dense: Opening, pruned: Opening, feeds: Feeds, *, title: str, stage: Stage = silent_stage) -> PairTiming:
    """Interleaved A/B timing of two artifacts on the same feeds, as one stage."""
    with stage(title) as progress:
        return measure_pair(dense.open, pruned.open, feeds, on_block=progress)


def device_exporter(target: Exporter) -> DeviceExporter:
    """The same exporter, as one that opens artifacts for the time on the device.

    Raises: BadInput: its engine cannot launch without transfers; names those that can. Or there is no GPU.
    """
    if not isinstance(target, DeviceExporter):
        able = ", ".join(name for name in ENGINES if isinstance(exporter(name), DeviceExporter))
        raise BadInput(f"engine {target.engine} cannot be timed on the device alone; --device-time is for {able}.")
    if current_gpu() is None:
        raise BadInput(f"--device-time is the time on a GPU, and {NO_GPU}. Leave it out.")
    return target


def check_runs(target: Exporter, precision: str | None) -> None:
    """Refuse an engine that this machine cannot run.

    Raises: BadInput: says why.
    """
    obstacle = target.obstacle(precision)
    if obstacle is not None:
        named = f"{target.engine} in {precision}" if precision else target.engine
        raise BadInput(f"{named} does not run on this machine: {obstacle}.")


def check_built(path: Path, engine: str, precision: str) -> None:
    """Refuse an output folder that lacks an artifact; warn if what is there is not what was written.

    Raises: BadInput: says how it is made.
    """
    command = f"optin build {path.parent} --engine {engine} --precision {precision}"
    again = remedy(path) if path.suffix == ".onnx" else f"Make it with `{command}`."
    if not path.exists():
        raise BadInput(f"{path} does not exist. {again}")
    record = Record.above(path)
    for file in (path, data_path(path)):
        if record is not None and file.is_file() and not record.strangers(file) and not record.owns(file):
            log.warning("%s was changed after it was written. %s", file, again)


def check_threads(threads: int) -> None:
    """Refuse more threads than can run at the same time, or a negative number.

    Raises: BadInput.
    """
    most = available_cpus()
    available = "This process may use 1 CPU" if most == 1 else f"This process may use {most} CPUs"
    whole_number(threads, "--threads", 0, most, f"{available}; 0 is the engine's default.")
