"""How much memory scoring may take, and how many samples fit: measured on one sample, never guessed."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Batch, rows_of

SHARE = 0.8
"""Share of the free memory that is used; the rest is for kernels' scratch and other processes."""
CGROUP = Path("/sys/fs/cgroup")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """What a sample needs, and what there is."""

    budget_bytes: int
    row_bytes: int
    """Largest sum of live tensors while one sample is scored, beyond the model's own."""

    @property
    def rows(self) -> int:
        """Samples (exact: samples times units) that may be in work at once."""
        return self.budget_bytes // self.row_bytes

    def check_rows(self, needed: int) -> None:
        """Refuse a batch that cannot be divided and does not fit.

        Raises: BadInput.
        """
        if self.rows < needed:
            what = "one sample" if needed == 1 else f"{needed} samples at once"
            least = needed * self.row_bytes
            raise BadInput(
                f"scoring {what} takes {least / 2**20:.1f} MiB, but the memory budget is "
                f"{self.budget_bytes / 2**20:.1f} MiB. Give --memory-budget {-(-least // 2**20)}MiB or more, "
                "or a smaller --seq-len."
            )


def measured(work: Callable[[], object], device: torch.device, budget_bytes: int | None) -> Memory:
    """Run `work`, which scores one sample, and see what it takes.

    Args: budget_bytes: None = a share of what is free.
    Raises: BadInput: a single sample does not fit.
    """
    with PeakBytes() as peak:
        work()
    memory = Memory(int(SHARE * free_bytes(device)) if budget_bytes is None else budget_bytes, max(peak.most, 1))
    memory.check_rows(1)
    return memory


def micro_batches(batches: Sequence[Batch], rows: int) -> list[Batch]:
    """The same samples, at most `rows` at once."""
    return [
        {name: value[start : start + rows] for name, value in batch.items()}
        for batch in batches
        for start in range(0, rows_of(batch), rows)
    ]


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: on the device, or of the machine within the limit of its container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = (_number(CGROUP / name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, max(0, limit - used + _cached()))


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process has held: of the device, or resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Where there is one: what getrusage says begins with the memory of the process that started this one.
    high_water = re.search(r"^VmHWM:\s*(\d+) kB", _text(STATUS), re.MULTILINE)
    if high_water:
        return int(high_water[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _cached() -> int:
    """Bytes of files that the kernel keeps until memory is asked for: `memory.current` counts them as used."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError):
        return 0


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types no constructor
    """Counts the bytes of the tensors that live at once, of those made inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        """Most bytes that were alive at the same time."""
        self._now = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [storage for storage in _storages((result,)) if storage.data_ptr() not in self._alive]
        if made:
            before = {storage.data_ptr() for storage in _storages((*args, *kwargs.values()))}
            for storage in made:
                if storage.data_ptr() not in before | self._alive:
                    self._count(storage)
            self.most = max(self.most, self._now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        self._alive.add(address)
        self._now += size
        weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self._now -= size


def _storages(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """Storages of tensors in what an operator takes or gives: tensors, others, and lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()
        elif isinstance(value, (list, tuple)):
            yield from _storages(value)
