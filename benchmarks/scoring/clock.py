"""Time work in dense forwards: CPU seconds of this process, with forwards over the same samples every few seconds.

With one thread, CPU seconds hardly depend on what else the machine does, and what is left of that (caches, clock rates)
meets the work and the forwards between alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from optin_deploy.common.progress import Progress
from optin_deploy.feeds.rows import Batch, rows_of
from optin_deploy.reporting.terminal import stage_bar
from optin_deploy.scoring.subject import Subject

T = TypeVar("T")
EVERY = 5.0
"""CPU seconds of work between two forwards."""


class Clock:
    """Times pieces of work, and dense forwards of one batch after the other before, between and behind."""

    def __init__(self, subject: Subject, batches: Sequence[Batch]) -> None:
        self.subject, self.batches = subject, batches
        self.rows = sum(map(rows_of, batches))
        self._turn, self._seconds, self._rows = 0, 0.0, 0
        self._forward()
        self._seconds, self._rows = 0.0, 0  # the first is slower

    def __call__(self, title: str, work: Callable[[Progress], T]) -> tuple[T, float]:
        """Result and CPU seconds, without those of the forwards between."""
        self._forward()
        lost = 0.0
        with stage_bar(title) as bar:
            started = last = time.process_time()

            def progress(done: int, total: int) -> None:
                nonlocal lost, last
                now = time.process_time()
                if now - last > EVERY:
                    self._forward()
                    last = time.process_time()
                    lost += last - now
                bar(done, total)

            result = work(progress)
            seconds = time.process_time() - started - lost
        self._forward()
        return result, seconds

    @property
    def forward(self) -> float:
        """CPU seconds of one dense forward over all samples, mean of those that were run."""
        return self._seconds / self._rows * self.rows

    @property
    def forward_rows(self) -> int:
        """Samples of the forwards that were run."""
        return self._rows

    def _forward(self) -> None:
        """Run and time a forward of the next batch."""
        batch = self.batches[self._turn % len(self.batches)]
        self._turn += 1
        started = time.process_time()
        with torch.inference_mode():
            self.subject.run(batch)
        self._seconds += time.process_time() - started
        self._rows += rows_of(batch)
