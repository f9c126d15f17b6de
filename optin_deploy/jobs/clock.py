"""What each stage of a job takes: seconds, and the most memory that the process held."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from optin_deploy.common.progress import Progress, Stage
from optin_deploy.jobs.stage_memory import StageMemory


@dataclass
class Clock:
    """Seconds of each stage and the most memory held in it, by title; a `Stage` itself."""

    stage: Stage
    seconds: dict[str, float] = field(default_factory=dict)
    memory: StageMemory = field(default_factory=StageMemory)

    @contextmanager
    def __call__(self, title: str) -> Iterator[Progress]:
        """Stand around one stage."""
        started = time.perf_counter()
        with self.stage(title) as progress, self.memory(title):
            yield progress
        self.seconds[title] = round(time.perf_counter() - started, 2)
