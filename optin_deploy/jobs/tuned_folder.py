"""An output folder whose network was fine-tuned: the same plan and dense network, with other weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from optin_deploy.data.pairs import PAIR_COLUMN
from optin_deploy.errors import BadInput
from optin_deploy.jobs.finetuning import Tuned, Tuning, finetune
from optin_deploy.jobs.stored import mark
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.sealed import finished, store
from optin_deploy.network.unused import tidied
from optin_deploy.pooling import POOLED
from optin_deploy.progress import Stage, silent_stage
from optin_deploy.stages import ABOUT, dense_stage, prepare
from optin_deploy.storage import sha256_json, write_json
from optin_deploy.workspace import PRUNED, Workspace

STATE = "training"
"""Folder of an unfinished training."""


@dataclass(frozen=True)
class Rows:
    """What is learned from."""

    data: Path
    evaluation: Path | None = None
    """None: some rows of `data` judge."""
    samples: int = 8192
    text_column: str = "text"
    label_column: str = "label"
    pair_column: str = PAIR_COLUMN


def finetune_folder(
    folder: Path,
    out: Path,
    rows: Rows,
    tuning: Tuning,
    *,
    force: bool = False,
    dry_run: bool = False,
    stage: Stage = silent_stage,
) -> Tuned | None:
    """Train the network in an output folder and write another one, whole or as far as it can be gone on from.

    Args: dry_run: only check that it could be done; returns None.
    Raises: BadInput: the folder holds no finished model, or what `finetune` raises.
    """
    workspace = Workspace(folder)
    source, plan, path = workspace.source(), workspace.read_plan(), folder / PRUNED
    known = finished(path)
    if known is None:
        raise BadInput(f"{path} is missing, or was changed since. Write it with `optin rewrite {folder}`.")
    if out.resolve() == folder.resolve():
        raise BadInput(f"--out {out} is the folder of the model itself, which stays as it is. Give another one.")
    learning = replace(
        source,
        calibration=str(rows.data),
        evaluation=None if rows.evaluation is None else str(rows.evaluation),
        samples=rows.samples,
        seed=tuning.seed,
        text_column=rows.text_column,
        label_column=rows.label_column,
        pair_column=rows.pair_column,
    )
    Workspace.check(out, learning, force=force)
    with stage("load"):
        prepared = prepare(learning, folder)
        smaller = tidied(read_file(path), without=POOLED)
    if dry_run:
        return None
    with Workspace.at_work(out, learning, force=force) as tuned:
        tuned.take(learning, force=force)
        with stage("fine-tune") as progress:
            found = finetune(prepared.ready, smaller, tuning, scratch=out / STATE, progress=progress)
        plan.write(out / "plan.json")
        dense_stage(tuned, prepared)
        key = sha256_json([prepared.key, plan.hash, asdict(tuning), known.sha256])
        told: dict[str, Any] = {"tuning": asdict(tuning)}
        told |= {"before": found.before.to_json(), "after": found.after.to_json()}
        if found.names is not None:
            told["classes"] = list(found.names)
        about = {"error": 0.0, "skipped": {}, "why_graph": "it was fine-tuned as a graph", "compensated": True}
        entries = {**mark(prepared.ready.subject.hash, plan.hash), ABOUT: json.dumps(about)}
        store(found.network, out / PRUNED, key, entries, anew=True)
        write_json(out / "tuned.json", told)
        shutil.rmtree(out / STATE, ignore_errors=True)
    return found
