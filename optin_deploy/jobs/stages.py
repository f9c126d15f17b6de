"""The stages of a job as functions on a workspace: each reads files, does one thing, writes files.

A finished stage is recognised by the hash of everything that went into it and is not done again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from optin_deploy.checkpoint.reloading import differs
from optin_deploy.checkpoint.smaller import BASE_MODEL, fits, intact, save
from optin_deploy.common.progress import Progress, silent
from optin_deploy.cutting.torch import cut_and_tell
from optin_deploy.data.pairs import TEXT_PAIRS
from optin_deploy.errors import BadInput
from optin_deploy.files.hub import hub_id_of
from optin_deploy.files.names import ARTIFACTS, DENSE, PRUNED
from optin_deploy.files.storage import sha256_json
from optin_deploy.jobs.prepared import Prepared, prepare
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.network.graph import Network
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.sealed import finished, store
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.modules import with_weights_of
from optin_deploy.pruning.pruning import CutResult, check_plan, curves_of, make, score, score_key
from optin_deploy.pruning.source import Source
from optin_deploy.pruning.stored import mark
from optin_deploy.scoring.parts import FolderStore, Worker
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.structure.find import find
from optin_deploy.tuning.label_free import without_held_out
from optin_deploy.tuning.settings import LabelFree

log = logging.getLogger(__name__)

MADE_FROM_MODEL = (
    *(name for name in ARTIFACTS if name.startswith("model.")),
    *("samples.safetensors", "measurements.json", "operators.json"),
    *("mlperf", "mlperf.json", "report.json", "report.md", "report.html"),
)
"""What in the output folder a new model.onnx makes stale: artifacts of every engine, and what was measured. Names that
the user gave, such as `optin report --out model.html`, are none of these."""


def dense_stage(workspace: Workspace, prepared: Prepared) -> None:
    """Write dense.onnx, unless it is there."""
    dense = prepared.dense
    store(dense.network, workspace.root / DENSE, dense.key, mark(prepared.ready.subject.hash))


def score_stage(
    workspace: Workspace,
    prepared: Prepared,
    settings: ScoreSettings | None = None,
    *,
    memory_budget: int | None = None,
    worker: Worker | None = None,
    progress: Progress = silent,
) -> bool:
    """Write scores.safetensors; True if finished ones were reused.

    Parts that are finished lie in parts/ until the scores are written: by whichever worker finds all of them there.
    Raises: PartsLeft: this worker's are done, others' are not.
    """
    settings, ready = replace(settings or ScoreSettings(), seed=prepared.source.seed), prepared.ready
    key = score_key(ready, settings)
    parts = FolderStore(workspace.parts_folder / key[:16], ready.layout.groups)
    if workspace.has_scores(key) and not parts.folder.exists():
        return True
    with parts.shared(finished=lambda: workspace.has_scores(key)) as done:
        if done:
            return True
        scores = score(ready, settings, memory_budget=memory_budget, store=parts, worker=worker, progress=progress)
        with parts.claimed("scores", wait=True):
            if not workspace.has_scores(key):
                dense_stage(workspace, prepared)
                workspace.write_scores(scores)
    return False


@dataclass(frozen=True)
class ScoreRequest:
    """All that a worker needs to score, wherever it runs."""

    source: Source
    out: Path
    settings: ScoreSettings
    memory_budget: int | None = None
    force: bool = False

    def run(self, worker: Worker | None = None, progress: Progress = silent) -> bool:
        """Load network and data, then `score_stage`."""
        with Workspace.at_work(self.out, self.source, force=self.force, shared=True) as workspace:
            prepared = prepare(self.source, self.out)
            workspace.take(self.source, force=self.force)
            return score_stage(
                workspace, prepared, self.settings, memory_budget=self.memory_budget, worker=worker, progress=progress
            )


def curve_stage(workspace: Workspace, prepared: Prepared, *, progress: Progress = silent) -> bool:
    """Write curves.json, by which `--allocation curves` plans; True if a finished one was reused."""
    scores = workspace.scores_of(prepared.ready.layout)
    key = sha256_json([prepared.key, scores.provenance.get("key")])
    try:
        if workspace.read_curves()[1] == key:
            return True
    except BadInput:
        pass  # absent or damaged: measured again
    workspace.write_curves(curves_of(prepared.ready, scores, progress), key)
    return False


ABOUT = "optin.about"
"""Entry of the metadata of model.onnx: how it was made, as JSON."""


@dataclass(frozen=True, eq=False)
class StoredCut:
    """A cut network in its output folder."""

    network: Network
    plan: NetworkPlan
    error: float
    """Largest difference between the cut and the masked network, as a part of the largest output."""
    skipped: Mapping[str, int]
    """Products that could not be repaired, by why."""
    why_graph: str
    """Why there is no model/ of a transformers class; empty: there is one, or the network came as a graph."""
    compensated: bool = True
    tuned: Mapping[str, Any] | None = None
    """How it was tuned without labels, and what that did; None: it was not."""
    reused: bool = False


def tuned_key(key: str, tuning: LabelFree | None) -> str:
    """Return the key of a cut network that was tuned. Args: key: that of the network before."""
    return key if tuning is None else sha256_json([key, asdict(tuning)])


def rewrite_stage(
    workspace: Workspace,
    prepared: Prepared,
    *,
    compensation: bool = True,
    tuning: LabelFree | None = None,
    progress: Progress = silent,
) -> StoredCut:
    """Write model.onnx from the stored plan, and model/ where a transformers class holds it.

    Args: tuning: how the network is tuned afterwards, with rows that teach no repair; a finished one that was tuned so
    is taken as it is.
    """
    workspace.check_untuned()
    plan, ready = workspace.read_plan(), prepared.ready
    check_plan(ready, plan)
    held_out = compensation and tuning is not None
    key, path = sha256_json([prepared.key, plan.hash, compensation, held_out]), workspace.root / PRUNED
    dense_stage(workspace, prepared)
    known = finished(path)
    about = {} if known is None else json.loads(known.said.get(ABOUT, "{}"))
    fits_plan = known is not None and known.key in (key, tuned_key(key, tuning))
    if fits_plan and (prepared.dense.loaded is None or about["why_graph"] or intact(workspace.model_folder, plan.hash)):
        return StoredCut(network=read_file(path), plan=plan, reused=True, **about)
    if about.get("tuned") and tuning is None:
        log.warning("%s was tuned, which this undoes; `optin-export MODEL --tune minutes=5` tunes again", path)
    taught_by = without_held_out(ready) if held_out else ready
    made = make(taught_by, plan, compensation=compensation, progress=progress)
    for name in MADE_FROM_MODEL:  # of an earlier plan: nothing may be measured or shipped beside the wrong model
        workspace.record.remove(name)
    skipped = () if made.compensation is None else made.compensation.skipped
    about = {
        "error": made.proof.masked,
        "skipped": dict(Counter(each.why for each in skipped)),
        "why_graph": _write_module(workspace, prepared, made),
        "compensated": compensation,
    }
    store(made.network, path, key, {**mark(ready.subject.hash, plan.hash), ABOUT: json.dumps(about)}, anew=True)
    return StoredCut(network=made.network, plan=plan, **about)


def _write_module(workspace: Workspace, prepared: Prepared, made: CutResult) -> str:
    """Write model/, the cut network as a transformers class. Returns: why there is none; empty where there is."""
    loaded, ready = prepared.dense.loaded, prepared.ready
    if loaded is None:
        workspace.record.remove("model")
        return ""
    name = type(loaded.model).__name__
    repaired = None
    if any(made.plan.merges):
        why = f"{name} keeps all of its tokens"
    elif ready.turned:
        why = f"{name} has one width for all that a head holds"
    else:
        why = f"what was repaired is no weight of {name}"
        repaired = with_weights_of(loaded.model, made.dense, ready.network)
    if repaired is not None:
        probes = ready.found.probes
        smaller = cut_and_tell(repaired, find(made.dense, probes), made.plan.keep, probes)
        why = smaller.why_graph.removesuffix(".") or (
            "" if fits(smaller.module) else f"{name} is no class of transformers"
        )
        if not why:
            name = workspace.source().model
            about = {TEXT_PAIRS: ready.rows.pairs} | ({BASE_MODEL: name} if hub_id_of(name) else {})
            saved = (smaller.module, smaller.attributes, made.plan, workspace.model_folder)
            save(*saved, preprocessor=loaded.preprocessor, files=loaded.files, about=about)
            why = differs(workspace.model_folder, made.network, probes)
    return without_module(workspace, why)


def without_module(workspace: Workspace, why: str) -> str:
    """Take model/ away and warn of it, unless the reason is empty. Returns: the reason."""
    if why:
        workspace.record.remove("model")
        log.warning("there is no model/: %s. model.onnx is there, and optin_deploy.load reads it.", why)
    return why
