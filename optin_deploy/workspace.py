"""The output folder: who owns it, what was asked for, and the files in which the stages meet."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optin_deploy.cost.macs import MacCost
from optin_deploy.cost.units import UnitCost
from optin_deploy.curves import HINT as CURVES_HINT
from optin_deploy.curves import Curves
from optin_deploy.data.pairs import PAIR_COLUMN
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.layout import ModelLayout
from optin_deploy.locking import ATTEMPTS, Lock, opened
from optin_deploy.ownership import Record
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.scoring.scores import Scores
from optin_deploy.storage import read_metadata, read_tensors, write_json, write_tensors
from optin_deploy.validation import INT32, OPEN, STORED, UINT64, read_stored, whole_number

SCHEMA_VERSION = 1
MOST_TOKENS = 2**20
"""Longer than any position table."""
SCORE_TENSORS = ("heads", "neurons", "head_errors", "neuron_errors")
MADE_FROM_SCORES = ("curves.json", "masks.json", "plan.json", "scores.png", "sweep.json", "sweep.csv", "sweep.png")
LOCK = ".optin.lock"
PAUSE_SECONDS = 0.05
SUPPORT_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *(
        "added_tokens.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
    ),
)
"""What lies beside an ONNX file for other loaders."""
TYPES = ("", ".fp16", ".bf16", ".int8")
ARTIFACTS = tuple(
    f"{stem}{suffix}"
    for stem in ("model", "dense")
    for suffix in (
        *(f"{kind}.onnx{data}" for kind in TYPES for data in ("", ".data")),
        *(f"{kind}.pt2" for kind in TYPES),
        *(f"{kind}.engine{log}" for kind in ("", ".rtx") for log in ("", ".log")),
    )
)
NAMES = (
    *("source.json", "scores.safetensors", "scores.json", *MADE_FROM_SCORES, "latency.json", "model", *SUPPORT_FILES),
    *(*ARTIFACTS, "engine.json", "timing.cache", "samples.safetensors", "measurements.json", "operators.json"),
    *("mlperf", "mlperf.json", "report.json", "report.md", "report.html"),
)
"""All that any command writes into an output folder: what others have put there is found before the work begins."""
SCORE_HINT = "Write it with `optin score MODEL --out DIR`."
PLAN_HINT = "Write it with `optin plan DIR`."


@dataclass(frozen=True)
class Source:
    """What a job starts from; every later stage reads it, so that commands need only the folder."""

    __pydantic_config__ = STORED

    model: str
    """Folder or hub id of the dense model."""
    task: str | None = None
    calibration: str | None = None
    """File or image folder; None = the bundled set."""
    text_column: str = "text"
    label_column: str = "label"
    seq_len: int = 128
    """Longest calibration text in tokens, and the length at which MACs are counted."""
    samples: int = 512
    seed: int = 0
    evaluation: str | None = None
    """File or image folder whose rows judge the models; None = rows held out of the calibration set."""
    pair_column: str = PAIR_COLUMN
    """Column of the second text of pairs."""

    def __post_init__(self) -> None:
        whole_number(max(self.seq_len, 1), "--seq-len", 1, MOST_TOKENS, "The default is 128.")  # the model says more
        whole_number(self.samples, "--samples", 1, INT32, "The default is 512.")
        whole_number(self.seed, "--seed", -(2**63), UINT64, "The default is 0.")

    def inputs(self) -> dict[str, str]:
        """What a job reads, by what it is."""
        read = {"model": self.model, "calibration data": self.calibration, "data of --eval": self.evaluation}
        return {what: path for what, path in read.items() if path is not None}


@dataclass(frozen=True)
class _StoredSource(Source):
    """source.json."""

    __pydantic_config__ = STORED

    schema_version: int = 0

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise BadInput(f"schema_version {self.schema_version}; this version reads schema_version {SCHEMA_VERSION}")
        if self.seq_len < 1 or self.samples < 1:
            raise BadInput(f"seq_len {self.seq_len} and samples {self.samples} must be above zero")


@dataclass(frozen=True)
class _StoredScores:
    """What is read of scores.json."""

    __pydantic_config__ = OPEN

    schema_version: int
    layout_hash: str
    key: str
    provenance: Mapping[str, Any]
    cost: MacCost
    params: UnitCost
    layout: ModelLayout

    def __post_init__(self) -> None:
        self.cost.check(self.layout)
        self.params.check(self.layout)


@dataclass(frozen=True)
class _StoredCurves:
    """curves.json."""

    __pydantic_config__ = STORED

    key: str
    curves: Curves


class Scored(NamedTuple):
    """Scores, and all that planning needs beside them."""

    scores: Scores
    layout: ModelLayout
    macs: MacCost
    params: UnitCost
    key: str
    """Of the settings that made them."""


@dataclass(frozen=True)
class Workspace:
    """One output folder."""

    root: Path

    @classmethod
    def claim(cls, root: Path, source: Source, *, force: bool = False) -> Workspace:
        """Make the folder ours and note what it is made from.

        Raises: BadInput: a file, or a folder with files of others where ours are to be (without `force`).
        """
        cls.check(root, source, force=force)
        root.mkdir(parents=True, exist_ok=True)
        workspace = cls(root)
        workspace.take(source, force=force)
        return workspace

    @classmethod
    @contextmanager
    def at_work(cls, root: Path, source: Source, *, force: bool = False, shared: bool = False) -> Iterator[Workspace]:
        """The folder while a job runs: checked and locked; `take` makes it ours. Gone again if nothing was written.

        Raises: BadInput: as `claim`, or another job writes there.
        """
        cls.check(root, source, force=force)
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
    def check(cls, root: Path, source: Source, *, force: bool = False) -> None:
        """Would `claim` take this folder?

        Raises: BadInput: as `claim`, or what the job reads lies inside (it could be written over).
        """
        if root.is_file():
            raise BadInput(f"--out {root} is a file. Give a folder.")
        # Hidden files do not count: another worker may be writing its source.json at this moment.
        taken = root.is_dir() and any(not path.name.startswith(".") for path in root.iterdir())
        if taken and not force and not is_job(root):
            raise BadInput(f"--out {root} is not empty and was not made by optin-deploy. Use another, or --force.")
        for what, name in source.inputs().items():
            if Path(name).exists() and Path(name).resolve().is_relative_to(root.resolve()):
                raise BadInput(f"--out {root} holds the {what} {name} itself, which would be lost. Use another folder.")
        cls(root).record.reserve(NAMES, force=force, dry_run=True)

    @property
    def record(self) -> Record:
        """Which files in the folder are ours."""
        return Record(self.root)

    def take(self, source: Source, *, force: bool = False) -> None:
        """Make a checked folder ours and note what it is made from; with `force`, files of others are set aside.

        Raises: BadInput: files of others where ours are to be.
        """
        self._begin(force=force)
        write_json(self.source_path, {"schema_version": SCHEMA_VERSION, **asdict(source)})

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
        """Where the pruned transformers model lies."""
        return self.root / "model"

    @property
    def parts_folder(self) -> Path:
        """Where parts of an unfinished scoring lie."""
        return self.root / "parts"

    def source(self) -> Source:
        """What the job started from.

        Raises: BadInput: not a folder of ours.
        """
        if not self.source_path.is_file():
            raise BadInput(f"{self.source_path} does not exist. {self.root} is not an output folder. {SCORE_HINT}")
        stored = asdict(read_stored(_StoredSource, self.source_path, SCORE_HINT))
        return Source(**{name: value for name, value in stored.items() if name != "schema_version"})

    def write_scores(
        self,
        scores: Scores,
        layout: ModelLayout,
        macs: MacCost,
        params: UnitCost,
        key: str,
        fingerprint: str | None = None,
    ) -> None:
        """Store scores, and with them what planning needs: layout and costs. What came of other scores goes.

        Args: fingerprint: of the calibration data.
        """
        for name in MADE_FROM_SCORES:
            self.record.remove(name)
        tensors = {f"{kind}.{i}": t for kind in SCORE_TENSORS for i, t in enumerate(getattr(scores, kind))}
        about = {"schema_version": str(scores.schema_version), "layout_hash": scores.layout_hash, "key": key}
        write_tensors(self.root / "scores.safetensors", tensors, about)
        write_json(
            self.root / "scores.json",
            {
                "schema_version": scores.schema_version,
                "layout_hash": scores.layout_hash,
                "key": key,
                "calibration_fingerprint": fingerprint,
                "provenance": dict(scores.provenance),
                "versions": {name: version(name) for name in ("optin-deploy", "torch", "transformers")},
                "cost": asdict(macs),
                "params": asdict(params),
                "layout": layout.to_json(),
            },
        )

    def read_scores(self) -> Scored:
        """Scores, layout, costs, and the key of the settings that made them.

        Raises: BadInput, PlanMismatch: files missing, damaged, or of different runs.
        """
        path = self.root / "scores.safetensors"
        stored = self._stored_scores()
        tensors, metadata = read_tensors(path, SCORE_HINT), read_metadata(path, SCORE_HINT)
        layers: dict[str, tuple[Tensor, ...]] = {}
        for kind, branches in zip(SCORE_TENSORS, (0, 1, 0, 1), strict=True):
            if kind in SCORE_TENSORS[2:] and f"{kind}.0" not in tensors:
                continue  # nothing was estimated
            shapes = [(layer.branches[branches].units,) for layer in stored.layout.layers]
            found = [tensors.get(f"{kind}.{i}") for i in range(len(shapes))]
            if [None if each is None else tuple(each.shape) for each in found] != shapes:
                raise PlanMismatch(f"{path}: {kind} do not fit the layout in scores.json. {SCORE_HINT}")
            if any(each is None or not each.is_floating_point() for each in found):
                raise BadInput(f"{path}: {kind} are no decimal numbers. {SCORE_HINT}")
            layers[kind] = tuple(each.to(torch.float64) for each in found if each is not None)
        scores = Scores(
            layout_hash=stored.layout_hash,
            provenance=stored.provenance,
            schema_version=stored.schema_version,
            **layers,
        )
        scores.check(stored.layout)
        if metadata.get("key") != stored.key:
            raise BadInput(f"scores.json and scores.safetensors in {self.root} are of different runs. {SCORE_HINT}")
        return Scored(scores, stored.layout, stored.cost, stored.params, stored.key)

    def _stored_scores(self) -> _StoredScores:
        return read_stored(_StoredScores, self.root / "scores.json", SCORE_HINT)

    def has_scores(self, key: str) -> bool:
        """Are finished scores here that these very settings made?"""
        try:
            return self.read_scores().key == key
        except BadInput:
            return False

    def write_curves(self, curves: Curves, key: str) -> None:
        """Store error curves and the key of what they were measured with."""
        write_json(self.root / "curves.json", {"key": key, "curves": curves.to_json()})

    def read_curves(self) -> tuple[Curves, str]:
        """Error curves, and the key of what they were measured with.

        Raises: BadInput: missing or damaged.
        """
        stored = read_stored(_StoredCurves, self.root / "curves.json", CURVES_HINT)
        return stored.curves, stored.key

    def write_plan(self, plan: PruningPlan, masks: Masks, settings: Mapping[str, Any]) -> None:
        """Store masks (with the settings of the search) and plan."""
        write_json(self.root / "masks.json", {**masks.to_json(), "settings": dict(settings)})
        write_json(self.root / "plan.json", plan.to_json())

    def read_plan(self) -> PruningPlan:
        """The plan, checked by the layout and the costs in scores.json where that is there.

        Raises: BadInput, PlanMismatch: missing, damaged, edited, or of another model.
        """
        path = self.root / "plan.json"
        stored = self._stored_scores() if (self.root / "scores.json").is_file() else None
        plan = PruningPlan.read(path, PLAN_HINT, None if stored is None else stored.layout)
        if stored is not None:
            cost = stored.cost
            pruned = cost.of([len(kept) for kept in plan.heads], [len(kept) for kept in plan.neurons])
            told = (plan.macs_pruned, plan.macs_dense, plan.macs_fixed, plan.tokens)
            if told != (pruned, cost.dense, cost.fixed, cost.tokens):
                raise PlanMismatch(f"{path}: its MACs are not those of the units that it keeps. {PLAN_HINT}")
        return plan


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
