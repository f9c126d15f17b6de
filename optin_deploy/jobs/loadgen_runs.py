"""MLCommons LoadGen's scenarios on the dense and the pruned artifact, for people who compare by them."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from optin_deploy.common.environment import environment
from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.files.storage import atomic_folder, write_json
from optin_deploy.jobs.bench import BenchSettings, checked
from optin_deploy.measuring.loadgen import SCENARIOS, LoadSettings, Run, ScenarioRuns
from optin_deploy.measuring.loadgen_log import Figures, read_log
from optin_deploy.measuring.loadgen_system import SAMPLES, System
from optin_deploy.measuring.timing import warm_up
from optin_deploy.runtimes.base import Feeds, Runtime

ORDER = (("dense", 1), ("pruned", 1), ("pruned", 2), ("dense", 2))
"""Drift of the machine hits both alike."""
LOGS, FILE = "mlperf", "mlperf.json"


def import_loadgen() -> Any:
    """The module of LoadGen.

    Raises: MissingDependency.
    """
    try:
        import mlperf_loadgen
    except ImportError as err:
        raise MissingDependency("LoadGen is not installed. Run: pip install 'optin-deploy[mlperf]'") from err
    return mlperf_loadgen


def bench_loadgen(
    folder: Path, bench: BenchSettings, load: LoadSettings, *, dry_run: bool = False, stage: Stage = silent_stage
) -> ScenarioRuns | None:
    """Test the artifacts in an output folder; LoadGen's logs go to mlperf/, the figures to mlperf.json.

    Both take the place of those of an earlier call.
    Args: dry_run: only check that it could be done.
    Raises: BadInput: an artifact is missing, or not one point, or a batch where the scenario has none.
        MissingDependency. What an engine raises.
    """
    if len(bench.points) != 1:
        raise BadInput(f"--protocol mlperf measures one point; {len(bench.points)} were given. Give one --at.")
    (point,) = bench.points
    if point.batch > 1 and load.scenario != "offline":
        raise BadInput(f"--at batch={point.batch}: {load.scenario} sends single samples; batches are for offline.")
    case = checked(folder, bench)
    import_loadgen()
    if dry_run:
        return None
    point = case.inputs.settled(point)
    feeds = case.inputs.feeds(replace(point, batch=SAMPLES))
    runs = []
    with atomic_folder(folder / LOGS) as written:
        for model, number in ORDER:
            opening = case.dense if model == "dense" else case.smaller
            name = f"{load.scenario}-{model}-{number}"
            (written / name).mkdir()
            with stage(name), opening.open() as runtime:
                figures = run_load(runtime, feeds, load, batch=point.batch, logs=written / name)
            runs.append(Run(model, number, f"{LOGS}/{name}", figures))
    found = ScenarioRuns(load, tuple(runs))
    asked = {"engine": bench.engine, "precision": case.precision, "threads": case.threads, "batch": point.batch}
    settings = {**asked, "seq_len": point.seq, "inputs": SAMPLES, "inputs_seed": 0}
    about = {"schema_version": 1, "settings": settings, "environment": environment()}
    write_json(folder / FILE, {**about, **found.to_json()})
    return found


def run_load(runtime: Runtime, feeds: Feeds, load: LoadSettings, *, batch: int, logs: Path) -> Figures:
    """Warm up an open runtime and test it.

    Args: feeds: SAMPLES inputs. batch: samples a run. logs: an empty folder.
    Raises: LoadGenFailed: no figures. What the runtime raises, after the test.
    """
    lg = import_loadgen()
    system = System(lg, runtime, feeds, batch)
    # LoadGen lays out its queries before the test: it has to know how fast they will go.
    batch_seconds = warm_up({"": runtime}, system.taken(range(batch)), time.perf_counter)
    asked, log = _test_settings(lg, load, batch, batch_seconds), _log_settings(lg, logs)
    server = load.scenario == "server"
    sut = lg.ConstructSUT(system.queue.put if server else system.run, lambda: None)
    qsl = lg.ConstructQSL(SAMPLES, SAMPLES, lambda indices: None, lambda indices: None)

    def start() -> None:
        # An audit.config in the working directory would change the settings: name one that is not there.
        lg.StartTestWithLogSettings(sut, qsl, asked, log, str(logs / "audit.config"))

    try:
        with system.keeps_interrupts():
            system.serve(start) if server else start()
    finally:
        lg.DestroyQSL(qsl)
        lg.DestroySUT(sut)
    if system.error is not None:
        raise system.error
    return read_log(logs)


def _test_settings(lg: Any, load: LoadSettings, batch: int, batch_seconds: float) -> Any:
    asked = lg.TestSettings()
    asked.mode = lg.TestMode.PerformanceOnly
    asked.scenario = getattr(lg.TestScenario, SCENARIOS[load.scenario][0])
    asked.min_duration_ms = math.ceil(load.seconds * 1000)
    asked.single_stream_expected_latency_ns = max(1, int(batch_seconds * 1e9))
    asked.offline_expected_qps = batch / batch_seconds
    if load.qps is not None and load.target_latency_ms is not None:
        asked.server_target_qps = load.qps
        asked.server_target_latency_ns = math.ceil(load.target_latency_ms * 1e6)
        # Overloaded, the queue would grow all the time: end early once what waits takes as long as the run.
        asked.server_max_async_queries = max(100, math.ceil(load.seconds / batch_seconds))
    return asked


def _log_settings(lg: Any, folder: Path) -> Any:
    log = lg.LogSettings()
    log.enable_trace = False  # a line a sample, written while it measures
    log.log_output.outdir = str(folder)
    log.log_output.copy_summary_to_stdout = False
    return log
