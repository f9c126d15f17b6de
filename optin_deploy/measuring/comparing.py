"""Compare two artifacts of one engine, interleaved in one run: a candidate with its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from optin_deploy.common.environment import environment
from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.errors import BadInput, OptinError
from optin_deploy.exporters import ENGINES, check_precision, exporter
from optin_deploy.exporters.base import Exporter
from optin_deploy.files.storage import sha256_file
from optin_deploy.measuring.artifact_inputs import (
    Input,
    common_inputs,
    graph_beside,
    inputs_of,
    make_feeds,
    settled,
    with_sizes,
)
from optin_deploy.measuring.artifacts import Opening, check_built, check_runs, check_threads, time_pair
from optin_deploy.measuring.gate import Gate, GatedPoint, LatencyLimit, verdict_of
from optin_deploy.measuring.pins import Pin, data_hashes, pinned_path, write_pin
from optin_deploy.measuring.points import Point, point_name
from optin_deploy.measuring.room import check_room, least_bytes
from optin_deploy.network.onnx_data import data_files
from optin_deploy.network.read_onnx import read_file
from optin_deploy.planning.plan import NetworkPlan

DEFAULT_SEQ = 128
"""Length where neither the user nor a plan beside the baseline gives one."""
PIN_SUFFIX = ".json"
SAID = 300
"""Characters of an engine's own error that are shown."""


@dataclass(frozen=True)
class Comparison:
    """Two artifacts and where they are compared; everything checked that can be without running them."""

    target: Exporter
    precision: str | None
    """None: the artifacts' own."""
    threads: int
    baseline: Path
    candidate: Path
    inputs: tuple[Input, ...]
    points: tuple[Point, ...]
    """Points with their lengths."""

    @property
    def settings(self) -> dict[str, Any]:
        """What both are run with."""
        return {"engine": self.target.engine, "precision": self.precision, "threads": self.threads}

    def __str__(self) -> str:
        """Say for people at which points and on which engine it is measured."""
        at = ", ".join(point_name(point.batch, point.seq) for point in self.points)
        return f"at {at}, engine {self.target.engine}, threads {self.threads or 'default'}"

    def run(self, limit: LatencyLimit, *, stage: Stage = silent_stage) -> Gate:
        """Run each once at every point, then measure and judge.

        Raises: BadInput: one of them does not load, or does not run at a point.
        """
        artifacts = {name: _about(path) for name, path in (("baseline", self.baseline), ("candidate", self.candidate))}
        self.try_out()
        first, second = (
            Opening(self.target, path, self.precision, self.threads) for path in (self.baseline, self.candidate)
        )
        points = []
        for point in self.points:
            title = f"measure {point_name(point.batch, point.seq)}"
            timing = time_pair(first, second, make_feeds(self.inputs, point), title=title, stage=stage)
            points.append(GatedPoint(point.batch, point.seq, timing, verdict_of(timing, limit)))
        settings = {**self.settings, "threads": self.target.threads(self.threads)}
        return Gate(limit, tuple(points), settings, artifacts, environment())

    def pin(self, file: Path) -> Pin:
        """Run the baseline once at every point, then write its pin.

        Raises: BadInput: as `check_pin`, or it does not run.
        """
        self.check_pin(file)
        self.try_out()
        return write_pin(file, self.baseline, points=self.points, **self.settings)

    def check_pin(self, file: Path) -> None:
        """Could a pin of the baseline be written there?

        Raises: BadInput: the file is another one's, or a pin could not describe the baseline.
        """
        check_not_input(file, self.baseline, option="--pin")
        if file.suffix != PIN_SUFFIX:
            raise BadInput(f"--pin {file}: give a name that ends in {PIN_SUFFIX}, by which a pin is recognised later.")
        if self.baseline.suffix == ".onnx":
            data_files(self.baseline)
        pinned_path(file, self.baseline)

    def try_out(self) -> None:
        """Run both artifacts once at each point.

        Raises: BadInput: says which did not load or run, where, and what the engine said.
        """
        for path in dict.fromkeys((self.baseline, self.candidate)):
            for point in self.points:
                self._try(path, point, make_feeds(self.inputs, point))

    def _try(self, path: Path, point: Point, feeds: Mapping[str, np.ndarray]) -> None:
        try:
            with self.target.open(path, precision=self.precision, threads=self.threads) as runtime:
                runtime.run(feeds)
                runtime.synchronize()
        except OptinError:
            raise
        except Exception as err:  # the errors of engines have no common base but Exception
            at = f"batch={point.batch}" + ("" if point.seq is None else f",seq={point.seq}")
            said = " ".join(str(err).split())[:SAID]
            raise BadInput(
                f"{path} does not run on engine {self.target.engine} at {at}: {said}. Give a point that the model "
                "takes, e.g. a shorter --at seq, or export it again."
            ) from err


def comparison_of(
    baseline: Path,
    candidate: Path | None = None,
    *,
    engine: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    points: Sequence[Point] = (),
) -> Comparison:
    """Find both artifacts, and everything else that was not given: from the pin, if the baseline is one.

    Args: baseline: an artifact, an output folder, or a pin. candidate: an artifact or an output folder; None: the
        baseline itself, to be pinned. engine: None: the pin's, or onnx. threads: None: the pin's, or 0.
    Raises: BadInput: something is missing or does not fit, or the pinned file changed.
    """
    pin = Pin.read(baseline) if baseline.suffix == PIN_SUFFIX else None
    if pin is not None:
        baseline = pin.path(baseline.parent)
        engine, points = engine or pin.engine, points or pin.points
        precision = precision or pin.precision
        threads = pin.threads if threads is None else threads
    target, threads = exporter(engine or "onnx"), threads or 0
    check_threads(threads)
    target.threads(threads)
    if precision is not None:
        check_precision(target, precision)
    check_runs(target, precision)
    baseline, candidate = (artifact_of(path, target, precision) for path in (baseline, candidate or baseline))
    plan = plan_beside(baseline.parent)
    inputs = with_sizes(inputs_of(baseline), plan)
    if candidate != baseline:
        inputs = common_inputs((baseline, inputs), (candidate, inputs_of(candidate)))
    chosen = tuple(dict.fromkeys(settled(baseline, inputs, point, DEFAULT_SEQ) for point in points or (Point(),)))
    if plan is not None and (graph := graph_beside(baseline)) is not None:
        network = read_file(graph)
        for point in chosen:
            room = least_bytes(network, make_feeds(inputs, replace(point, batch=1)), precision)
            check_room(room, str(point), point.batch)
    return Comparison(target, precision, threads, baseline, candidate, inputs, chosen)


def artifact_of(path: Path, target: Exporter, precision: str | None) -> Path:
    """An artifact's own path, or that of the pruned artifact in an output folder.

    Raises: BadInput: missing, or the engine has no artifact that is a file.
    """
    chosen = check_precision(target, precision)
    name, dense_name = target.file_names(chosen, path if path.is_dir() else path.parent)
    if dense_name is None:
        possible = [each for each in ENGINES if exporter(each).file_names(exporter(each).precisions[0])[1] is not None]
        raise BadInput(
            f"--engine {target.engine} runs a folder, and files are compared; possible: {', '.join(possible)}."
        )
    if path.is_dir():
        check_built(path / name, target.engine, chosen)
        return path / name
    if not path.is_file():
        raise BadInput(f"{path} does not exist. Give an artifact such as model.onnx, or an output folder.")
    return path


def plan_beside(folder: Path) -> NetworkPlan | None:
    """The plan in an output folder; None: there is none of ours, only perhaps a foreign plan.json."""
    try:
        return NetworkPlan.read(folder / "plan.json")
    except BadInput:
        return None


def check_not_input(file: Path, *inputs: Path, option: str) -> None:
    """Refuse to write over what is read, or over a folder.

    Raises: BadInput.
    """
    if file.is_dir():
        raise BadInput(f"{option} {file} is a folder. Give a file.")
    if any(file.resolve() == path.resolve() for path in inputs):
        raise BadInput(f"{option} {file} would replace what is compared. Give another file.")


def _about(path: Path) -> dict[str, Any]:
    found = {"file": path.name, "sha256": sha256_file(path), "size_bytes": path.stat().st_size}
    data = data_hashes(path)
    return {**found, "data": data} if data else found
