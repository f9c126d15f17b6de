"""An output folder whose network was fine-tuned: the same plan and dense network, with other weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.common.stored import Stored
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.feeds.pooling import POOLED
from optin_deploy.files.descriptors import remove_folder
from optin_deploy.files.names import DENSE, MADE_FROM_SCORES, PRUNED, SCORES, SUPPORT_FILES, TUNED
from optin_deploy.files.storage import atomic_file, json_text, read_json, sha256_json
from optin_deploy.files.support_files import support_file
from optin_deploy.jobs.prepared import Prepared, prepare
from optin_deploy.jobs.samples import record_samples
from optin_deploy.jobs.stages import ABOUT, MADE_FROM_MODEL, dense_stage
from optin_deploy.jobs.workspace import Workspace, is_job
from optin_deploy.network.graph import Network
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.sealed import finished, store
from optin_deploy.network.unused import tidied
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.pruning import check_plan
from optin_deploy.pruning.stored import MARK, mark, parsed_mark, plan_named
from optin_deploy.quality.quality import Quality
from optin_deploy.tuning.finetune import Tuned, check, finetune
from optin_deploy.tuning.settings import STATE, TrainingRows, Tuning

ABOUT_TUNED = {"error": 0.0, "skipped": {}, "why_graph": "it was fine-tuned as a graph", "compensated": True}


@dataclass(frozen=True)
class TunedRecord(Stored):
    """How the network of a folder was fine-tuned, and what that did: tuned.json."""

    hint = "Train it again with `optin finetune`."

    tuning: Tuning
    before: Quality
    after: Quality
    classes: tuple[str, ...] | None = None
    """Classes of a new classifier, in the order of its outputs; None: the network had its own."""


@dataclass(frozen=True)
class Outcome:
    """What a folder of a fine-tuned network tells."""

    record: TunedRecord
    reused: bool
    """Whether an earlier run of the very same training had left it."""


def finetune_folder(
    folder: Path,
    out: Path,
    rows: TrainingRows,
    tuning: Tuning,
    *,
    force: bool = False,
    dry_run: bool = False,
    stage: Stage = silent_stage,
) -> Outcome | None:
    """Train the network in an output folder and write another one; a run that was killed is gone on from.

    What `out` holds stays until the training has ended. The result of the very same training is not made again.
    Args: dry_run: only check that it could be done; returns None where it is not done yet.
    Raises: BadInput: the folder holds no finished model, `out` holds something else, or what `finetune` raises.
        PlanMismatch: the model was cut by another plan.
    """
    workspace = Workspace(folder)
    source, plan = workspace.source(), workspace.read_plan()
    if out.resolve() == folder.resolve():
        raise BadInput(f"--out {out} is the folder of the model itself, which stays as it is. Give another one.")
    learning = replace(
        source,
        calibration=str(rows.data.absolute()),
        evaluation=None if rows.evaluation is None else str(rows.evaluation.absolute()),
        samples=rows.samples,
        seed=tuning.seed,
        text_column=rows.text_column,
        label_column=rows.label_column,
        pair_column=rows.pair_column,
    )
    Workspace.check(out, learning, force=force, tunes=True)
    if not force:
        _check_replaceable(out, folder, plan)
    with stage("load"):
        known, smaller = _model_in(folder, plan)
        prepared = prepare(learning, folder, cut_by=source)
        check_plan(prepared.ready, plan)
        classes = check(prepared.ready, smaller, tuning)
        key = _key(prepared, plan, known, tuning)
    if (made := _finished(out, key)) is not None:
        return Outcome(made, reused=True)
    if dry_run:
        return None
    sentence = prepared.dense.sentence
    modules = {} if sentence is None else sentence.files
    with Workspace.at_work(out, learning, force=force, tunes=True) as tuned:
        with stage("fine-tune") as progress:
            scratch = out / STATE
            found = finetune(prepared.ready, smaller, tuning, classes=classes, scratch=scratch, progress=progress)
        for name in (*MADE_FROM_MODEL, *MADE_FROM_SCORES, SCORES, TUNED, "model", *modules):
            tuned.record.remove(name)
        tuned.take(learning, force=force)
        record = TunedRecord(tuning, found.before, found.after, found.names)
        _copy_support(folder, out, found.names)
        for name, content in modules.items() if found.names is None else ():  # it embeds as before
            _write_bytes(out / name, content)
        _write(tuned, prepared, plan, found, record, key)
        remove_folder(out / STATE)
    return Outcome(record, reused=False)


def _check_replaceable(out: Path, folder: Path, plan: NetworkPlan) -> None:
    """Make sure that a finished model in `out` is what an earlier fine-tuning of the same one left.

    Raises: BadInput: it is another one.
    """
    if not is_job(out) or not (out / PRUNED).is_file():
        return
    if not (out / TUNED).is_file():
        raise BadInput(f"--out {out} holds another model, which would be lost. Give another folder, or --force.")
    known = finished(out / PRUNED)
    named = None if known is None else parsed_mark(known.said.get(MARK))
    if named is not None and named["plan"] != plan.hash:
        raise BadInput(
            f"--out {out} holds a fine-tuned model of another plan than that of {folder}, which would be lost. Give "
            "another folder, or --force."
        )


def _key(prepared: Prepared, plan: NetworkPlan, model: str, tuning: Tuning) -> str:
    """Hash of all that a fine-tuned network and its record depend on. Args: model: hash of the cut one."""
    ready = prepared.ready
    rows = (ready.rows.calibration.key, ready.judging_key)
    return sha256_json([prepared.key, plan.hash, model, asdict(tuning), *rows])


def _finished(out: Path, key: str) -> TunedRecord | None:
    """The record of a training that has ended; None: there is none of this key."""
    known = finished(out / PRUNED)
    if known is None or known.key != key or not TunedRecord.is_at(out / TUNED):
        return None
    return TunedRecord.read(out / TUNED)


def _model_in(folder: Path, plan: NetworkPlan) -> tuple[str, Network]:
    """Hash and network of a finished model.onnx that was cut by this plan."""
    path = folder / PRUNED
    known = finished(path)
    if known is None:
        raise BadInput(f"{path} is missing, or was changed since. Write it with `optin rewrite {folder}`.")
    network = read_file(path)
    if plan_named(network) != plan.hash:
        raise PlanMismatch(
            f"{path} was cut by another plan than {folder / 'plan.json'}. Cut it by this one: `optin rewrite {folder}`."
        )
    return known.sha256, tidied(network, without=POOLED)


def _write(
    tuned: Workspace, prepared: Prepared, plan: NetworkPlan, found: Tuned, record: TunedRecord, key: str
) -> None:
    """Write what belongs to the model, and model.onnx last: where it is, all the rest is there too."""
    network = prepared.ready.subject.hash
    if found.names is None:
        dense_stage(tuned, prepared)
    else:
        store(found.dense, tuned.root / DENSE, key, mark(network), anew=True)
    plan.write(tuned.root / "plan.json")
    record.write(tuned.root / TUNED)
    output = None if found.names is None else found.network.outputs[0].name
    record_samples(tuned, prepared, found.network, dense=found.dense, output=output, key=key)
    entries = {**mark(network, plan.hash), ABOUT: json.dumps(ABOUT_TUNED)}
    store(found.network, tuned.root / PRUNED, key, entries, anew=True)


def _copy_support(folder: Path, out: Path, names: tuple[str, ...] | None) -> None:
    """Copy tokenizer, image processor and config, with the classes that the model has now."""
    for name in SUPPORT_FILES:
        found = support_file(folder, name) or support_file(folder / "model", name)
        if found is None:
            continue
        held = found.read_bytes()
        if name == "config.json" and names is not None:
            config = read_json(found, "Run the export again.")
            config["id2label"] = {str(number): each for number, each in enumerate(names)}
            config["label2id"] = {each: number for number, each in enumerate(names)}
            held = json_text(config).encode()
        _write_bytes(out / name, held)


def _write_bytes(path: Path, content: bytes) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
