"""Most memory that a job holds in each of its stages."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

from optin_deploy.scoring.memory import peak_bytes

CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux takes there to let VmHWM begin again at what is resident now."""
SAMPLED_EVERY = 0.02
"""Seconds, where the peak cannot be begun again."""


class StageMemory:
    """Peaks by stage; stages may lie within others, which then hold their peaks too."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        """Most resident bytes of the process, by title."""
        self._open: list[int] = []

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        """Measure a stage; of one that comes again the largest peak stays."""
        if not self._open:
            _reset()
        self._fold()
        self._open.append(0)
        with _sampler() as sampled:
            try:
                yield
            finally:
                self._fold()
                peak = max(sampled[0], self._open.pop())
                self._note(peak)
                self.peaks[title] = max(peak, self.peaks.get(title, 0))

    def _fold(self) -> None:
        """Note what was held until now for every open stage, and begin again."""
        held = peak_bytes(torch.device("cpu"))
        if _reset():
            self._note(held)

    def _note(self, held: int) -> None:
        self._open = [max(peak, held) for peak in self._open]


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def over_budget(peaks: Mapping[str, int], before: int, budget: int | None) -> dict[str, int]:
    """Stages that took more than the budget beyond what was held before, with what they took, in bytes."""
    taken = {title: peak - before for title, peak in peaks.items()}
    return {} if budget is None else {title: size for title, size in taken.items() if size > budget}


def _reset() -> bool:
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return True


@contextmanager
def _sampler() -> Iterator[list[int]]:
    """Largest of many looks at what is resident, where the system's own peak cannot be begun again; else 0."""
    most = [0]
    if _reset():
        yield most
        return
    ended = threading.Event()

    def sample() -> None:
        with suppress(psutil.Error):
            while not ended.wait(SAMPLED_EVERY):
                most[0] = max(most[0], resident_bytes())

    most[0] = resident_bytes()
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()
        most[0] = max(most[0], resident_bytes())
