"""Worker processes for the tests of scoring in parts: quick to start, watched through a log, free to be killed.

As a script it imports torch once and then forks a worker for each command that it reads: a JSON object a line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from optin_deploy.common.progress import Progress
from optin_deploy.feeds.feeds import Halves
from optin_deploy.feeds.rows import Feeds
from optin_deploy.jobs.prepared import Prepared
from optin_deploy.jobs.stages import score_stage
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.network.read_torch import read_module
from optin_deploy.pruning import pruning
from optin_deploy.pruning.dense import DenseSource
from optin_deploy.pruning.modules import example_for
from optin_deploy.pruning.networks import find_in
from optin_deploy.pruning.source import Source
from optin_deploy.scoring import unit_job, unit_parts
from optin_deploy.scoring.memory import Memory
from optin_deploy.scoring.parts import FolderStore, Part, PartsLeft, Store, Worker, run_parts
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.scoring.terms import Terms
from support import tiny_scoring
from support.project import ROOT

LEFT = 10
"""Exit code of a worker that left parts to others."""
PATIENCE_S = 60
SMALL_ROUNDS = {"ESTIMATES": 12, "MOST_PROBES": 4, "HEAD_SAMPLES": 4}
SMALL_PARTS = {"UNITS_A_PART": 6, "HEAD_CHUNK": 3}
"""Constants of the job, so that a tiny scoring has many parts, and a sketch more than one round of them."""
EXACT = ScoreSettings("exact")
SETTINGS = {"exact": EXACT, "sketch": ScoreSettings("sketch")}
SOURCE = Source("tiny")


@cache
def prepared() -> Prepared:
    """A tiny classifier with four batches; shared, not to be changed."""
    model = tiny_scoring.bert()
    batches = tuple(
        tiny_scoring.text_batch(lengths, seed=seed) for seed, lengths in enumerate([(3, 7, 5), (6, 2), (8, 4, 4), (7,)])
    )
    rows = Feeds(batches, (None,) * sum(len(batch["input_ids"]) for batch in batches), "the tests")
    example = example_for(model, rows)
    found = find_in(read_module(model, example.inputs, axes=example.axes, dynamo=False))
    ready = pruning.ready_of(found, Halves(rows, None))
    return Prepared(SOURCE, DenseSource(ready.network, "0" * 64), ready)


@dataclass(frozen=True)
class Log:
    """What workers did, in order: each line is one whole write at the end of the file."""

    path: Path

    def add(self, event: str, part: str) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(handle, f"{event} {part}\n".encode())
        os.close(handle)

    def lines(self) -> list[tuple[str, str]]:
        """(event, part)"""
        text = self.path.read_text() if self.path.exists() else ""
        return [(event, part) for event, part in (line.split() for line in text.splitlines())]

    def parts(self, event: str = "started") -> list[str]:
        return [part for each, part in self.lines() if each == event]

    def scored_again(self) -> list[str]:
        """Parts that somebody started after they were finished."""
        finished: set[str] = set()
        again = []
        for event, part in self.lines():
            if event == "finished":
                finished.add(part)
            elif part in finished:
                again.append(part)
        return again


@dataclass(frozen=True)
class LoggedStore:
    """A store that writes down what is finished."""

    store: FolderStore
    log: Log

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def put(self, name: str, terms: Terms) -> None:
        self.store.put(name, terms)
        self.log.add("finished", f"{self.store.folder.name}/{name}")


@contextmanager
def watched(log: Log, pause_s: float = 0.0) -> Iterator[None]:
    """In this process, every part is written down, and takes so much longer."""

    def slow(part: Part, store: FolderStore) -> Part:
        def work(progress: Progress) -> Terms:
            log.add("started", f"{store.folder.name}/{part.name}")
            time.sleep(pause_s)
            return part.work(progress)

        return replace(part, work=work)

    def run(parts: Sequence[Part], store: Store, worker: Worker, progress: Progress, **more: Any) -> list[Terms]:
        assert isinstance(store, FolderStore)
        return run_parts([slow(part, store) for part in parts], LoggedStore(store, log), worker, progress, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unit_job, "run_parts", run)
        yield


@contextmanager
def small_parts() -> Iterator[None]:
    """In this process, scorings have many parts, and do not measure their memory: that takes longer than a part."""
    with pytest.MonkeyPatch.context() as patch:
        for module, constants in ((unit_job, SMALL_ROUNDS), (unit_parts, SMALL_PARTS)):
            for name, value in constants.items():
                patch.setattr(module, name, value)
        patch.setattr(unit_parts, "measured", lambda work, device, budget: Memory(2**30, 2**10))
        yield


# what a forked worker can be told to do


def score(out: str, scorer: str, index: int, count: int, helps: bool, log: str, pause_s: float) -> int:
    """Take part in a scoring."""
    workspace = Workspace.claim(Path(out), SOURCE)
    with small_parts(), watched(Log(Path(log)), pause_s):
        try:
            score_stage(workspace, prepared(), SETTINGS[scorer], worker=Worker(index, count, helps))
        except PartsLeft:
            return LEFT
    return 0


def hold(folder: str, name: str, log: str) -> int:
    """Claim a part and never let go."""
    with FolderStore(Path(folder), ()).claimed(name, wait=False) as mine:
        Log(Path(log)).add("claimed" if mine else "refused", name)
        time.sleep(PATIENCE_S)
    return 1


def try_to_claim(folder: str, name: str) -> int:
    """0 if a part could be claimed."""
    with FolderStore(Path(folder), ()).claimed(name, wait=False) as mine:
        return 0 if mine else 1


class Workers:
    """Starts workers by the script below; an error in one is shown on the error stream."""

    def __init__(self) -> None:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        paths = (str(ROOT / "tests"), os.environ.get("PYTHONPATH"))
        self._process = subprocess.Popen(
            # Newer versions of Python warn of a fork beside other threads.
            [sys.executable, "-W", "error::DeprecationWarning:__main__", "-m", "support.part_workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )

    def start(self, what: str, **options: Any) -> int:
        """Process id of a new worker."""
        return self._ask({"what": what, "options": options})

    def wait(self, pid: int) -> int:
        """Exit code; negative: the signal that killed it."""
        return self._ask({"pid": pid})

    def close(self) -> None:
        """End the script, and with it all that still run."""
        self._process.communicate(timeout=PATIENCE_S)

    def _ask(self, command: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def main() -> None:
    torch.set_num_threads(1)
    # What a first scoring imports and builds; no backward pass, which on some devices forbids to fork.
    pruning.score(prepared().ready, EXACT)
    running: set[int] = set()
    for line in sys.stdin:
        command = json.loads(line)
        if "pid" in command:
            running.discard(command["pid"])
            answer = _exit_code(command["pid"])
        else:
            answer = os.fork()
            if answer == 0:
                _be(command["what"], command["options"])
            running.add(answer)
        print(answer, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _be(what: str, options: dict[str, Any]) -> None:
    code = 1
    try:
        code = {"score": score, "hold": hold, "try_to_claim": try_to_claim}[what](**options)
    except Exception:  # noqa: BLE001  # whatever it is, the test shows it
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _exit_code(pid: int) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"worker {pid} hung")


if __name__ == "__main__":
    main()
