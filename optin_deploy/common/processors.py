"""How many processors this process may keep busy: its affinity and its control group's quota, not the machine's all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUP = "sys/fs/cgroup"


def usable_cpus() -> frozenset[int]:
    """Numbers of the logical CPUs this process may run on (all of them where the system cannot tell)."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def available_cpus(root: Path = Path("/")) -> int:
    """Threads that can compute at the same time, at least 1: by affinity and by the quota, rounded down.

    More threads than a quota allows are stopped for the rest of each period, all at once.
    Args: root: where `proc` and `sys` are looked for.
    """
    quota = quota_cpus(root)
    count = len(usable_cpus())
    return count if quota is None else max(1, min(count, int(quota)))


def is_limited() -> bool:
    """May this process use less than the whole machine?"""
    return available_cpus() < (os.cpu_count() or 1)


def default_threads(root: Path = Path("/")) -> int:
    """Threads of an engine that is asked for none: one for each physical core, within `available_cpus`."""
    usable = usable_cpus()
    cpus = [cpu for cpu in read_cpuinfo(root / "proc/cpuinfo") if int(cpu["processor"]) in usable]
    return max(1, min(physical_cores(cpus) or _physical() or len(usable), available_cpus(root)))


def limit_libraries() -> None:
    """Tell libraries that are not loaded yet of a quota below the number of CPUs, by OMP_NUM_THREADS; a set one stays.

    They go by the affinity alone.
    """
    if available_cpus() < len(usable_cpus()):
        os.environ.setdefault("OMP_NUM_THREADS", str(available_cpus()))


def physical_cores(cpus: list[dict[str, str]]) -> int | None:
    """Cores that these CPUs of /proc/cpuinfo are threads of; None where it does not tell."""
    return (
        len({(cpu["physical id"], cpu["core id"]) for cpu in cpus if {"physical id", "core id"} <= cpu.keys()}) or None
    )


def quota_cpus(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the strictest control group around this process allows; None: as much as there is."""
    limits = [limit for folder in _groups(root) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def read_text(path: Path) -> str:
    """A system file; empty if this system does not have it or does not show it."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def read_cpuinfo(path: Path) -> list[dict[str, str]]:
    """/proc/cpuinfo as one dict per logical CPU; empty where there is none (not Linux)."""
    rows = ([line.partition(":") for line in entry.splitlines()] for entry in read_text(path).split("\n\n"))
    cpus = ({key.strip(): value.strip() for key, _, value in row} for row in rows)
    return [cpu for cpu in cpus if "processor" in cpu]


def _groups(root: Path) -> Iterator[Path]:
    """Folders of this process's control groups and of all around them, of both versions.

    In a container the path is often the host's, of which only the top is there to be seen.
    """
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounts = (f"{CGROUP}/cpu", f"{CGROUP}/{controllers}") if controllers else (CGROUP, f"{CGROUP}/unified")
        inner = PurePosixPath(*(part for part in PurePosixPath(path).parts if part not in ("/", "..")))
        for mount in mounts:
            yield from (root / mount / folder for folder in (inner, *inner.parents))


def _limit(folder: Path) -> float | None:
    """Quota over period, of version 2 (`cpu.max`) or 1."""
    said = read_text(folder / "cpu.max").split() or [
        read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    if len(said) != 2 or not all(number.isdecimal() for number in said) or not int(said[0]) * int(said[1]):
        return None  # "max", -1, or nothing
    return int(said[0]) / int(said[1])


def _physical() -> int | None:
    import psutil

    found: int | None = psutil.cpu_count(logical=False)
    return found
