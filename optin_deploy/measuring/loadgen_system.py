"""The system under test: an engine's answers to MLCommons LoadGen."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import numpy as np

from optin_deploy.runtimes.base import Feeds, Runtime

SAMPLES = 64
"""Different inputs that LoadGen draws from."""


class System:
    """The system under test: completes every sample, for LoadGen waits for all of them, also after an error."""

    def __init__(self, lg: Any, runtime: Runtime, feeds: Feeds, batch: int) -> None:
        self.error: BaseException | None = None
        self.queue: SimpleQueue[Sequence[Any] | None] = SimpleQueue()
        self._lg, self._runtime, self._feeds, self._batch = lg, runtime, feeds, batch
        self._singles = [{name: values[i : i + 1] for name, values in feeds.items()} for i in range(SAMPLES)]

    def taken(self, indices: Sequence[int]) -> Feeds:
        """Inputs (batch, ...) of these samples; the last batch is filled up, for some engines take one size alone."""
        if self._batch == 1:
            return self._singles[indices[0]]
        filled = np.resize(np.asarray(indices), self._batch)
        return {name: values[filled % SAMPLES] for name, values in self._feeds.items()}

    def run(self, samples: Sequence[Any]) -> None:
        """Run LoadGen's samples batch by batch; after an error they are only completed, so that the test ends."""
        for first in range(0, len(samples), self._batch):
            part = samples[first : first + self._batch]
            try:
                if self.error is None:
                    self._runtime.run(self.taken([sample.index for sample in part]))
                    self._runtime.synchronize()
            except BaseException as err:  # noqa: BLE001  # going up through LoadGen's C++ it would end the process
                self.error = err
            self._lg.QuerySamplesComplete([self._lg.QuerySampleResponse(sample.id, 0, 0) for sample in part])

    def serve(self, start: Callable[[], None]) -> None:
        """Run what comes into the queue while LoadGen sends from a thread of its own; the engine stays in this one."""
        with ThreadPoolExecutor(1) as pool:
            test = pool.submit(start)
            test.add_done_callback(lambda _: self.queue.put(None))
            while (samples := self.queue.get()) is not None:
                self.run(samples)
            test.result()

    @contextmanager
    def keeps_interrupts(self) -> Iterator[None]:
        """Ctrl-C becomes the error of the test: raised inside a callback it would end the process."""
        if threading.current_thread() is not threading.main_thread():  # only that one is interrupted
            yield
            return

        def keep(number: int, frame: object) -> None:
            self.error = self.error or KeyboardInterrupt()

        before = signal.signal(signal.SIGINT, keep)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
