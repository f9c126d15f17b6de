"""The parent's side of a worker process: ask with a time limit, and end what crashed or hangs."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 180.0
"""Importing torch and transformers from a cold disk takes up to a minute."""
ERROR_LINES = 4


class WorkerDied(Exception):
    """The worker crashed or did not answer in time; the message holds the last lines of its log."""


class WorkerProcess:
    """A running worker."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        """Start it.

        Args: log: gets all that it prints; appended to.
        Raises: WorkerDied: it did not say hello.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                process_group=0,  # its compile helpers end with it, and Ctrl-C reaches the parent alone
            )
        self._answers: queue.Queue[bytes] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.hello = self._answer(START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b"")

    def ask(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Give one job and wait for its answer.

        Raises: WorkerDied: it crashed, or `limit_s` passed; close it then.
        """
        assert self._process.stdin is not None
        self._log_start = self._log.stat().st_size
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as err:
            raise WorkerDied(f"the worker had ended. {self._last_lines()}") from err
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=limit_s)
        except queue.Empty:
            raise WorkerDied(f"no answer within {limit_s:.0f} s. {self._last_lines()}") from None
        if not line.endswith(b"\n"):
            code = self._process.wait(timeout=30)
            raise WorkerDied(f"the worker ended with code {code}. {self._last_lines()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_lines(self) -> str:
        """The end of what was printed since the last job came, without this machine's paths."""
        with self._log.open("rb") as file:
            file.seek(self._log_start)
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        text = " | ".join(lines[-ERROR_LINES:])
        for path, name in ((str(ROOT), "."), (sys.prefix, "PYTHON"), (str(Path.home()), "~")):
            text = text.replace(path, name) if len(path) > 1 else text
        return text[-1000:]

    def close(self, *, patience_s: float = 10.0) -> None:
        """End the worker and its helpers; a second call does nothing.

        Args: patience_s: how long it may take to end by itself; 0 for one that hangs.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):  # what was still in the pipe has no reader any more
            process.stdin.close()
        try:
            process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the group that we made: not yet reaped, so the id is still its own
            process.wait()
        self._reader.join()
        process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
