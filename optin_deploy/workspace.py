"""The output folder: who owns it, what was asked for, and the files in which the stages meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from optin_deploy.cost.macs import MacCost
from optin_deploy.cost.units import UnitCost
from optin_deploy.curves import HINT as CURVES_HINT
from optin_deploy.curves import Curves
from optin_deploy.errors import BadInput
from optin_deploy.layout import ModelLayout
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.scoring.scores import Scores
from optin_deploy.storage import read_json, read_metadata, read_tensors, write_json, write_tensors
from optin_deploy.validation import INT32, STORED, UINT64, validated, whole_number

SCHEMA_VERSION = 1
MOST_TOKENS = 2**20
"""Longer than any position table."""
SCORE_TENSORS = ("heads", "neurons", "head_errors", "neuron_errors")
MADE_FROM_SCORES = ("curves.json", "masks.json", "plan.json", "scores.png", "sweep.json", "sweep.csv", "sweep.png")
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

    def __post_init__(self) -> None:
        whole_number(max(self.seq_len, 1), "--seq-len", 1, MOST_TOKENS, "The default is 128.")  # the model says more
        whole_number(self.samples, "--samples", 1, INT32, "The default is 512.")
        whole_number(self.seed, "--seed", -(2**63), UINT64, "The default is 0.")


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

        Raises: BadInput: a file, or a non-empty folder that optin-deploy did not make (without `force`).
        """
        cls.check(root, source, force=force)
        root.mkdir(parents=True, exist_ok=True)
        workspace = cls(root)
        write_json(workspace.source_path, {"schema_version": SCHEMA_VERSION, **asdict(source)})
        return workspace

    @classmethod
    def check(cls, root: Path, source: Source, *, force: bool = False) -> None:
        """Would `claim` take this folder?

        Raises: BadInput: as `claim`, or what the job reads lies inside (it would be overwritten).
        """
        if root.is_file():
            raise BadInput(f"--out {root} is a file. Give a folder.")
        # Hidden files do not count: another worker may be writing its source.json at this moment.
        taken = root.is_dir() and any(not path.name.startswith(".") for path in root.iterdir())
        if taken and not force and not cls(root)._is_ours():
            raise BadInput(f"--out {root} is not empty and was not made by optin-deploy. Use another, or --force.")
        if Path(source.model).exists() and Path(source.model).resolve().is_relative_to(root.resolve()):
            raise BadInput(
                f"--out {root} holds the model {source.model} itself, which would be lost. Use another folder."
            )

    def _is_ours(self) -> bool:
        try:
            self.source()
        except BadInput:
            return False
        return True

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
        data = read_json(self.source_path, f"{self.root} is not an output folder. {SCORE_HINT}")
        if data.pop("schema_version", None) != SCHEMA_VERSION:
            raise BadInput(f"{self.source_path}: this version reads schema_version {SCHEMA_VERSION}. {SCORE_HINT}")
        return validated(Source, data, f"{self.source_path}: not of this version", SCORE_HINT)

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
            (self.root / name).unlink(missing_ok=True)
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
        data = read_json(self.root / "scores.json", SCORE_HINT)
        tensors = read_tensors(self.root / "scores.safetensors", SCORE_HINT)
        metadata = read_metadata(self.root / "scores.safetensors")
        try:
            layout = ModelLayout.from_json(data["layout"])
            macs, params = MacCost.from_json(data["cost"]), UnitCost.from_json(data["params"])
            count = range(len(layout.layers))
            layers = {
                kind: tuple(tensors[f"{kind}.{i}"].to(torch.float64) for i in count)
                for kind in SCORE_TENSORS
                if f"{kind}.0" in tensors
            }
            scores = Scores(
                layout_hash=str(data["layout_hash"]),
                provenance=data["provenance"],
                schema_version=data["schema_version"],
                **layers,
            )
            key = str(data["key"])
        except (KeyError, TypeError) as err:
            raise BadInput(f"{self.root}/scores.json is not of this version ({err!r}). {SCORE_HINT}") from err
        scores.check(layout)
        if {len(macs.head), len(params.head)} != {len(layout.layers)} or metadata.get("key") != key:
            raise BadInput(f"scores.json and scores.safetensors in {self.root} are of different runs. {SCORE_HINT}")
        return Scored(scores, layout, macs, params, key)

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
        data = read_json(self.root / "curves.json", CURVES_HINT)
        try:
            return Curves.from_json(data["curves"]), str(data["key"])
        except (KeyError, TypeError) as err:
            raise BadInput(f"{self.root}/curves.json is not of this version ({err!r}). {CURVES_HINT}") from err

    def write_plan(self, plan: PruningPlan, masks: Masks, settings: Mapping[str, Any]) -> None:
        """Store masks (with the settings of the search) and plan."""
        write_json(self.root / "masks.json", {**masks.to_json(), "settings": dict(settings)})
        write_json(self.root / "plan.json", plan.to_json())

    def read_plan(self) -> PruningPlan:
        """The plan.

        Raises: BadInput: missing or damaged.
        """
        return PruningPlan.from_json(read_json(self.root / "plan.json", PLAN_HINT))
