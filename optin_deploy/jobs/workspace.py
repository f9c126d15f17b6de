"""The output folder: who owns it, what was asked for, and the files in which the stages meet."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from optin_deploy.common.stored import Stored
from optin_deploy.errors import BadInput
from optin_deploy.files.locking import ATTEMPTS, Lock, opened
from optin_deploy.files.names import LOCK, MADE_FROM_SCORES, NAMES, SCORES, TUNED
from optin_deploy.files.ownership import Record
from optin_deploy.planning.curve import Curve
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.source import Source
from optin_deploy.scoring.unit_scores import UnitScores
from optin_deploy.structure.groups import Layout

PAUSE_SECONDS = 0.05
SCORE_HINT = "Write it with `optin score MODEL --out DIR`."
PLAN_HINT = "Write it with `optin plan DIR`."


@dataclass(frozen=True)
class _Curves(Stored):
    """curves.json."""

    schema_version = 2
    hint = "Measure them with `optin plan {folder}`."

    key: str
    curves: Mapping[str, Curve]


@dataclass(frozen=True)
class Workspace:
    """One output folder."""

    root: Path

    @classmethod
    def claim(cls, root: Path, source: Source, *, force: bool = False) -> Workspace:
        """Make the folder ours and note what it is made from.

        Raises: BadInput: a file, or, without `force`, a folder with files of others where ours are to be, or with what
            was made of another model or fine-tuned.
        """
        cls.check(root, source, force=force)
        root.mkdir(parents=True, exist_ok=True)
        workspace = cls(root)
        workspace.take(source, force=force)
        return workspace

    @classmethod
    @contextmanager
    def at_work(
        cls, root: Path, source: Source, *, force: bool = False, shared: bool = False, tunes: bool = False
    ) -> Iterator[Workspace]:
        """The folder while a job runs: checked and locked; `take` makes it ours. Gone again if nothing was written.

        Raises: BadInput: as `claim`, or another job writes there.
        """
        cls.check(root, source, force=force, tunes=tunes)
        made = not root.exists()
        root.mkdir(parents=True, exist_ok=True)
        workspace = cls(root)
        try:
            with workspace.locked(shared=shared):
                yield workspace
        finally:
            if made and not {path.name for path in root.iterdir()} - {LOCK}:
                with suppress(OSError):  # another one came at this moment
                    (root / LOCK).unlink(missing_ok=True)
                    root.rmdir()

    @classmethod
    def check(cls, root: Path, source: Source, *, force: bool = False, tunes: bool = False) -> None:
        """Would `claim` take this folder?

        Args: tunes: what fine-tuning left is the caller's to judge.
        Raises: BadInput: as `claim`, or what the job reads lies inside (it could be written over).
        """
        if root.is_file():
            raise BadInput(f"--out {root} is a file. Give a folder.")
        # Hidden files do not count: another worker may be writing its source.json at this moment.
        taken = root.is_dir() and any(not path.name.startswith(".") for path in root.iterdir())
        if taken and not force and not is_job(root):
            raise BadInput(f"--out {root} is not empty and was not made by optin-deploy. Use another, or --force.")
        before = cls(root)._other_model(source)
        if before is not None and not force and (root / "plan.json").is_file():
            raise BadInput(
                f"--out {root} holds what was made of {before}. Use another folder, or --force to replace it by "
                f"what is made of {source.model}."
            )
        if not force and not tunes:
            cls(root).check_untuned("Use another folder, or --force to replace it")
        for what, name in source.inputs().items():
            if Path(name).exists() and Path(name).resolve().is_relative_to(root.resolve()):
                raise BadInput(f"--out {root} holds the {what} {name} itself, which would be lost. Use another folder.")
        cls(root).record.reserve(NAMES, force=force, dry_run=True)

    def check_untuned(self, instead: str = "Use another folder") -> None:
        """Refuse to cut a network anew in a folder whose network was fine-tuned.

        Raises: BadInput.
        """
        if self._tuned:
            raise BadInput(
                f"{self.root} holds a fine-tuned model, which would be lost. {instead}; to train it again, "
                "`optin finetune` in the folder that it was made of."
            )

    @property
    def _tuned(self) -> bool:
        """Is a tuned.json of ours here, edited or not?"""
        path = self.root / TUNED
        return path.is_file() and not self.record.strangers(path)

    @property
    def record(self) -> Record:
        """Which files in the folder are ours."""
        return Record(self.root)

    def take(self, source: Source, *, force: bool = False) -> None:
        """Make a checked folder ours and note what it is made from; with `force`, files of others are set aside.

        What was made of another model goes, as does what was fine-tuned.
        Raises: BadInput: files of others where ours are to be.
        """
        another = self._tuned or self._other_model(source) is not None
        self._begin(force=force)
        if another:
            for name in (*self.record.names(), *NAMES):
                self.record.remove(name)
        source.write(self.source_path)

    def _other_model(self, source: Source) -> str | None:
        """The model that an earlier job here was about, if it is not that of this one."""
        try:
            before = self.source().model
        except BadInput:
            return None
        return None if before == source.model else before

    @contextmanager
    def changing(self, *, force: bool = False) -> Iterator[None]:
        """While a command writes into an output folder of an earlier one.

        Raises: BadInput: not an output folder, another job writes there, or files of others are where ours are to be.
        """
        self.source()
        with self.locked():
            self._begin(force=force)
            yield

    @contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[None]:
        """Keep other jobs out, or only those that do not share the scoring.

        Raises: BadInput: another job writes there.
        """
        with opened(self.root / LOCK) as lock:
            alone = lock.take()
            if alone:
                self.record.clear_temporaries()
            if not (_joined(lock) if shared else alone):
                raise BadInput(
                    f"another job is writing to {self.root}. Wait until it has ended, or use another folder."
                )
            yield

    def _begin(self, *, force: bool) -> None:
        self.record.reserve(NAMES, force=force)
        self.record.begin()

    @property
    def source_path(self) -> Path:
        """Marks the folder as ours."""
        return self.root / "source.json"

    @property
    def model_folder(self) -> Path:
        """Folder of the pruned transformers model."""
        return self.root / "model"

    @property
    def parts_folder(self) -> Path:
        """Folder of the parts of an unfinished scoring."""
        return self.root / "parts"

    def source(self) -> Source:
        """What the job started from.

        Raises: BadInput: not a folder of ours.
        """
        if not self.source_path.is_file():
            raise BadInput(f"{self.source_path} does not exist. {self.root} is not an output folder. {SCORE_HINT}")
        source = Source.read(self.source_path)
        if source.seq_len is not None and source.seq_len < 1:
            raise BadInput(f"{self.source_path}: seq_len {source.seq_len} must be above zero. {source.hint}")
        return source

    def write_scores(self, scores: UnitScores) -> None:
        """Store scores. What came of other scores goes."""
        for name in MADE_FROM_SCORES:
            self.record.remove(name)
        scores.write(self.root / SCORES)

    def read_scores(self) -> UnitScores:
        """The scores.

        Raises: BadInput: missing or damaged.
        """
        path = self.root / SCORES
        if not path.is_file():
            raise BadInput(f"{path} does not exist. {SCORE_HINT}")
        return UnitScores.read(path)

    def scores_of(self, layout: Layout) -> UnitScores:
        """The scores, which must be of this network.

        Raises: BadInput, PlanMismatch: missing, damaged, or of another network.
        """
        scores = self.read_scores()
        try:
            scores.check(layout)
        except BadInput as err:
            raise type(err)(f"{self.root / SCORES}: {err}") from err
        return scores

    def has_scores(self, key: str) -> bool:
        """Are finished scores here that these very settings made?"""
        try:
            return self.read_scores().provenance.get("key") == key
        except BadInput:
            return False

    def write_curves(self, curves: Mapping[str, Curve], key: str) -> None:
        """Store error curves and the key of what they were measured with."""
        _Curves(key, dict(curves)).write(self.root / "curves.json")

    def read_curves(self) -> tuple[Mapping[str, Curve], str]:
        """Error curves, and the key of what they were measured with.

        Raises: BadInput: missing or damaged.
        """
        stored = _Curves.read(self.root / "curves.json")
        return stored.curves, stored.key

    def read_plan(self) -> NetworkPlan:
        """The plan.

        Raises: BadInput: missing, damaged or edited.
        """
        path = self.root / "plan.json"
        if not path.is_file():
            raise BadInput(f"{path} does not exist. {PLAN_HINT}")
        return NetworkPlan.read(path)


def is_job(folder: Path) -> bool:
    """Is this the output folder of a job?"""
    try:
        Workspace(folder).source()
    except BadInput:
        return False
    return True


def _joined(lock: Lock) -> bool:
    """Share a lock; who has just come may hold it alone for a moment, to clear away."""
    for _ in range(ATTEMPTS):
        if lock.take(shared=True):
            return True
        time.sleep(PAUSE_SECONDS)
    return False
