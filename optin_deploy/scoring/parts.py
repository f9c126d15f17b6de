"""Scoring in parts that many processes share by files alone: no messages, nothing lost, nothing scored twice.

A part's result is one file, written whole under a name that says what it is, in a folder named by the hash of model,
data and settings. Who works on a part holds the operating system's lock on a file beside it, which a killed process
lets go of; what is finished is skipped.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError

from optin_deploy.common.progress import Progress
from optin_deploy.common.validation import whole_number
from optin_deploy.errors import BadInput, OptinError
from optin_deploy.files.locking import Lock, opened
from optin_deploy.files.ownership import Record
from optin_deploy.files.storage import read_metadata, read_tensors, sha256_file, write_tensors
from optin_deploy.scoring.terms import ROWS, Terms
from optin_deploy.structure.groups import UnitGroup

FIGURES = ("samples", "probes", "output_probes", "forward_seconds", "seconds", "peak_bytes")
"""Fields of `Terms` that a part's file holds beside the sums."""
REMAKE_HINT = "It will be scored again."
NOTHING = hashlib.sha256().hexdigest()
"""Hash of an empty file, as locks are."""
MOST_WORKERS = 2**16


class PartsLeft(OptinError):
    """This worker did its parts; others are not finished."""

    exit_code = 0


@dataclass(frozen=True, eq=False)
class Part:
    """One piece of work."""

    name: str
    """Says what is scored; unique among the parts of one scoring."""
    cost: int
    """Cost for the progress bar: about samples times forwards."""
    work: Callable[[Progress], Terms]


@dataclass(frozen=True)
class Worker:
    """One of the processes that share the parts."""

    index: int = 0
    count: int = 1
    helps: bool = True
    """Whether, after its own parts, it takes over what nobody works on and waits for the rest, or leaves them."""

    def __post_init__(self) -> None:
        whole_number(self.count, "the number of workers,", 1, MOST_WORKERS)
        if not 0 <= self.index < self.count:
            raise BadInput(
                f"--shard {self.index + 1}/{self.count}: possible are 1/{self.count} to {self.count}/{self.count}."
            )


def worker_of(shard: str | None, environment: Mapping[str, str]) -> Worker:
    """Which worker this process is: by `--shard i/N`, else by torchrun's RANK and WORLD_SIZE, else the only one.

    Raises: BadInput.
    """
    if shard is not None:
        index, _, count = shard.partition("/")
        if not (_is_count(index) and _is_count(count) and int(count) > 0):
            raise BadInput(f"--shard {shard!r}: give i/N, for example 1/4 to 4/4 for four processes.")
        return Worker(int(index) - 1, int(count), helps=False)
    rank, size = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    if not (_is_count(rank) and _is_count(size) and int(rank) < int(size)):
        raise BadInput(f"RANK {rank!r} of WORLD_SIZE {size!r}: torchrun sets both; unset them to score alone.")
    return Worker(int(rank), int(size))


def _is_count(text: str) -> bool:
    return text.isdecimal() and len(text) <= 20  # Python refuses to read thousands of digits


@dataclass(frozen=True)
class MemoryStore:
    """A store for one process: parts are kept until it ends."""

    parts: dict[str, Terms] = field(default_factory=dict)

    def get(self, name: str) -> Terms | None:
        """The result of a part, if it is finished."""
        return self.parts.get(name)

    def put(self, name: str, terms: Terms) -> None:
        """Keep a result."""
        self.parts[name] = terms

    @contextmanager
    def claimed(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Always this worker's."""
        yield True


@dataclass(frozen=True)
class FolderStore:
    """A store in a folder for many processes, now or later."""

    folder: Path
    branches: Sequence[UnitGroup]
    """Branches of the model, which a part may hold sums of."""

    @contextmanager
    def shared(self, finished: Callable[[], bool]) -> Iterator[bool]:
        """Stand among those who work on the parts; the last one to leave clears away what nobody needs any more.

        Args: finished: are the scores written?
        Returns: what `finished` said when this worker came.
        """
        while True:
            with opened(self.folder.with_name(f"{self.folder.name}.lock")) as lock:
                lock.take(shared=True, wait=True)
                if not lock.stands():
                    continue  # it was cleared away meanwhile
                try:
                    yield finished()
                finally:
                    # First alone, then the question: else the one who finishes may still see us, and we not its scores.
                    if lock.take() and (finished() or not any(self.folder.glob("*.safetensors"))):
                        Record(self.folder).clear_temporaries()
                        Record(self.folder.parent).remove(self.folder.name)
                        lock.remove()  # last: who waits for it begins anew
                        with suppress(OSError):  # parts of other settings are there
                            self.folder.parent.rmdir()
                return

    def get(self, name: str) -> Terms | None:
        """The result of a part, if its file is there, whole, and of this part."""
        path, known = self._path(name), {branch.name: branch for branch in self.branches}
        try:
            sums = {known[of]: sums for of, sums in read_tensors(path, REMAKE_HINT).items()}
            about = read_metadata(path, REMAKE_HINT)
            figures = json.loads(about["figures"])
            whole = sums and all(_fits(some, branch) for branch, some in sums.items()) and _are_figures(figures)
        except (BadInput, SafetensorError, OSError, KeyError, ValueError):
            return None
        return Terms(sums, **figures) if whole and about.get("part") == name else None

    def put(self, name: str, terms: Terms) -> None:
        """Write the part's file, whole or not at all."""
        figures = {figure: getattr(terms, figure) for figure in FIGURES}
        tensors = {branch.name: sums for branch, sums in terms.sums.items()}
        path, record = self._path(name), Record(self.folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        record.begin()
        if path.is_file():  # damaged, or of another part: nobody edits these
            record.note(path, sha256_file(path))
        write_tensors(path, tensors, {"part": name, "figures": json.dumps(figures)})

    @contextmanager
    def claimed(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold the lock of a part; False if another worker does and `wait` is off."""
        with self._locked(name) as lock:
            yield lock.take(wait=wait)

    @contextmanager
    def _locked(self, name: str) -> Iterator[Lock]:
        """An open lock, whose empty file is in the record as all other files here."""
        path = self.folder / f"{name}.lock"
        with opened(path) as lock:
            record = Record(self.folder)
            with suppress(FileNotFoundError):  # it is cleared away at this moment
                if record.strangers(path):
                    record.begin()
                    record.note(path, NOTHING)
            yield lock

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


Store = MemoryStore | FolderStore


def run_parts(
    parts: Sequence[Part], store: Store, worker: Worker, progress: Progress, *, further: bool = False
) -> list[Terms]:
    """Do this worker's parts and collect those of all.

    Args: further: after a round that is finished: who does not help may have left before it, so that whoever is there
        does all that nobody works on.
    Returns: the results, in the order of `parts`.
    Raises: PartsLeft: another worker's are missing, and this one does not help.
    """
    finished: dict[str, Terms] = {}
    total = sum(part.cost for part in parts)

    def visit(part: Part, *, wait: bool) -> None:
        done = sum(p.cost for p in parts if p.name in finished)
        found = store.get(part.name)
        if found is None:
            with store.claimed(part.name, wait=wait) as mine:
                if not mine:
                    return
                found = store.get(part.name)
                if found is None:
                    started = time.perf_counter()
                    found = part.work(lambda d, t: progress(done + part.cost * d // max(t, 1), total))
                    found = replace(found, seconds=time.perf_counter() - started)
                    store.put(part.name, found)
        finished[part.name] = found
        progress(done + part.cost, total)

    own = parts[worker.index :: worker.count]
    rest = [part for part in parts if part not in own] if worker.helps or further else []
    for part in (*own, *rest):
        visit(part, wait=False)
    if worker.helps:
        for part in parts:  # what others are at: wait, and take over from whoever was killed
            if part.name not in finished:
                visit(part, wait=True)
    results = [finished.get(part.name) or store.get(part.name) for part in parts]
    found = [terms for terms in results if terms is not None]
    if left := len(parts) - len(found):
        raise PartsLeft(
            f"worker {worker.index + 1} of {worker.count} has done its parts; {left} of {len(parts)} are left to "
            "others. The last one to finish writes the scores; run the same command to go on after a crash."
        )
    return found


def _are_figures(found: object) -> bool:
    if not isinstance(found, dict) or set(found) != set(FIGURES):
        return False
    return all(isinstance(x, int | float) and math.isfinite(x) and x >= 0 for x in found.values())


def _fits(sums: torch.Tensor, branch: UnitGroup) -> bool:
    return sums.shape == (ROWS, branch.units) and sums.dtype == torch.float64 and bool(torch.isfinite(sums).all())
