"""The stages of a job as functions on a workspace: each reads files, does one thing, writes files.

A finished stage is recognised by the hash of everything that went into it and is not done again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from optin_deploy.arch.resolve import resolve
from optin_deploy.budget import Limit, Limits
from optin_deploy.checkpoint.raw_tokenizer import as_in_file, warn_of_unknown
from optin_deploy.checkpoint.wall import wall
from optin_deploy.cost.macs import MacCost, mac_cost
from optin_deploy.cost.params import param_cost
from optin_deploy.cost.units import UnitCost
from optin_deploy.curves import error_curves
from optin_deploy.data.calibration import (
    Batches,
    Sample,
    bundled_samples,
    image_batches,
    read_samples,
    split,
    text_batches,
)
from optin_deploy.data.held_out import not_in, unseen
from optin_deploy.data.labels import check_labels, classifies, known_labels, labelled_rows
from optin_deploy.data.pairs import TEXT_PAIRS
from optin_deploy.errors import BadInput
from optin_deploy.inputs import check_seq_len, config_settings, input_names, set_image_size
from optin_deploy.layout import ModelLayout
from optin_deploy.loading import LoadedModel, load_dense
from optin_deploy.masking import inference
from optin_deploy.plan import PruningPlan
from optin_deploy.progress import Progress, silent
from optin_deploy.proof import prove
from optin_deploy.pruned import MANIFEST, PrunedModel, load_pruned
from optin_deploy.pruning import cut
from optin_deploy.quality import Judge
from optin_deploy.scoring import ScoreSettings, Worker, score
from optin_deploy.scoring.parts import FolderStore
from optin_deploy.search import check_align, check_plan, make_plan, search_within
from optin_deploy.storage import read_json, sha256_json, sha256_tensors
from optin_deploy.token_weights import TokenWeights, measure_token_weights
from optin_deploy.workspace import ARTIFACTS, Source, Workspace

MADE_FROM_MODEL = (
    *(name for name in ARTIFACTS if name.startswith("model.")),
    *("samples.safetensors", "measurements.json", "operators.json"),
    *("mlperf", "mlperf.json", "report.json", "report.md", "report.html"),
)
"""What in the output folder a new model/ makes stale: artifacts of every engine, and what was measured. Names that the
user gave, such as `optin report --out model.html`, are none of these."""
REMAKE_HINT = "It will be made again."


@dataclass(frozen=True, eq=False)
class Prepared:
    """The dense model and its data: what every computing stage needs."""

    source: Source
    loaded: LoadedModel
    layout: ModelLayout
    cost: MacCost
    params: UnitCost
    calibration: Batches
    held_out: Batches
    """Rows that no stage learns from."""
    weights_sha256: str
    text_pairs: bool = False
    """Are there pairs of texts among the rows?"""
    _measured: list[TokenWeights | None] = field(default_factory=list, init=False, repr=False)

    def token_weights(self, progress: Progress = silent) -> TokenWeights | None:
        """What each calibration token counts in the compensation: the same for every plan, measured once."""
        if not self._measured:
            model, batches, seed = self.loaded.model, self.calibration.batches, self.source.seed
            self._measured.append(measure_token_weights(model, self.layout, batches, seed=seed, progress=progress))
        return self._measured[0]

    @cached_property
    def judge(self) -> Judge:
        """Compares pruned models with the dense one on the held-out rows.

        Raises: BadInput: by its labels the dense model is no better than guessing.
        """
        origin = self.source.evaluation or self.source.calibration or "the labels"
        return Judge(self.loaded.model, self.held_out, origin=origin)

    @property
    def key(self) -> str:
        """Hash of all that a stage's result depends on besides its own options: model, data, cost, versions."""
        versions = [version(name) for name in ("optin-deploy", "torch", "transformers")]
        model = [self.weights_sha256, self.layout.hash, config_settings(self.loaded.model), asdict(self.cost)]
        return sha256_json([*model, self.calibration.fingerprint, versions])


def prepare(source: Source) -> Prepared:
    """Load model and calibration data, and check that they fit together.

    Raises: BadInput and its kinds: see errors.py.
    """
    loaded = load_dense(source.model, source.task)
    layout = resolve(loaded.model)
    if loaded.is_text:
        check_seq_len(loaded.model.config, source.seq_len)
    samples = bundled_samples("text" if loaded.is_text else "image")
    if source.calibration is not None:
        samples = _samples(source, source.calibration)
    if source.evaluation is None:
        chosen, held = split(known_labels(samples, loaded.model), samples_limit=source.samples, seed=source.seed)
        held = labelled_rows(held, loaded.model)
    else:
        chosen, _ = split(samples, samples_limit=source.samples, seed=source.seed)
        held = unseen(_samples(source, source.evaluation), chosen, source.evaluation)
        check_labels(held, loaded.model)
    loaded = _as_in_file(loaded, source.model, (*chosen, *held))
    calibration, held_out = (_batches(loaded, some, source.seq_len) for some in (chosen, held))
    held_out = not_in(held_out, calibration)
    if loaded.is_text:
        warn_of_unknown(loaded.preprocessor, calibration)
    if not loaded.is_text:
        set_image_size(loaded.model.config, *calibration.batches[0]["pixel_values"].shape[-2:])
    try:
        cost = mac_cost(loaded.model, layout, seq_len=source.seq_len)
    except ValueError as err:
        raise BadInput(f"{source.model} does not take what its own preprocessor makes: {err}") from err
    _try_two(loaded, calibration)
    pairs = any(row.text_pair is not None for row in (*chosen, *held))
    params, weights = param_cost(loaded.model, layout), sha256_tensors(loaded.model.state_dict())
    prepared = Prepared(source, loaded, layout, cost, params, calibration, held_out, weights, pairs)
    if classifies(loaded.model) and None not in held_out.labels:
        _ = prepared.judge  # refuses labels in another order before the long work
    return prepared


def _try_two(loaded: LoadedModel, calibration: Batches) -> None:
    """Some classifiers take one sample at a time unless their config names a padding token.

    Raises: BadInput.
    """
    two = {name: values[:2] for name, values in calibration.batches[0].items()}
    try:
        with inference(loaded.model), torch.no_grad():
            loaded.model(**two)
    except ValueError as err:
        step = "Name the padding token in its config.json (pad_token_id), as the tokenizer has it."
        if not loaded.is_text:
            step = "Check preprocessor_config.json: it makes other images than this model takes."
        raise BadInput(f"{type(loaded.model).__name__} does not take two samples at once: {err} {step}") from err


def _as_in_file(loaded: LoadedModel, name: str, rows: Sequence[Sample]) -> LoadedModel:
    """The model with a tokenizer that gives the ids of tokenizer.json, where there is one, on these rows."""
    content = loaded.files.get("tokenizer.json")
    if content is None:
        return loaded
    where, config = f"{name}: tokenizer.json", loaded.model.config
    with wall(
        f"{where} cannot be used on the calibration texts", "Save the tokenizer of this model beside its weights."
    ):
        return replace(loaded, preprocessor=as_in_file(loaded.preprocessor, content, rows, config, where))


def _samples(source: Source, path: str) -> tuple[Sample, ...]:
    columns = {name: getattr(source, name) for name in ("text_column", "label_column", "pair_column")}
    return read_samples(Path(path), **columns)


def _batches(loaded: LoadedModel, samples: Sequence[Sample], seq_len: int) -> Batches:
    if loaded.is_text:
        return text_batches(samples, loaded.preprocessor, seq_len=seq_len, inputs=input_names(loaded.model))
    return image_batches(samples, loaded.preprocessor, channels=getattr(loaded.model.config, "num_channels", 3))


def score_stage(
    workspace: Workspace,
    prepared: Prepared,
    settings: ScoreSettings | None = None,
    *,
    memory_budget: int | None = None,
    worker: Worker | None = None,
    progress: Progress = silent,
) -> bool:
    """Write scores.safetensors and scores.json; True if finished ones were reused.

    Parts that are finished lie in parts/ until the scores are written: by whichever worker finds all of them there.
    Raises: PartsLeft: this worker's are done, others' are not.
    """
    settings = replace(settings or ScoreSettings(), seed=prepared.source.seed)
    key = sha256_json([prepared.key, asdict(settings)])
    branches = [branch for layer in prepared.layout.layers for branch in layer.branches]
    store = FolderStore(workspace.parts_folder / key[:16], branches)
    if workspace.has_scores(key) and not store.folder.exists():
        return True
    with store.shared(finished=lambda: workspace.has_scores(key)) as finished:
        if finished:
            return True
        prove(prepared.loaded.model, prepared.layout, prepared.calibration.batches)
        scores = score(
            prepared.loaded.model,
            prepared.layout,
            prepared.calibration.batches,
            settings,
            memory_budget=memory_budget,
            store=store,
            worker=worker,
            progress=progress,
        )
        with store.claimed("scores", wait=True):
            if not workspace.has_scores(key):
                fingerprint = prepared.calibration.fingerprint
                workspace.write_scores(scores, prepared.layout, prepared.cost, prepared.params, key, fingerprint)
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
        """Load model and data, then `score_stage`."""
        with Workspace.at_work(self.out, self.source, force=self.force, shared=True) as workspace:
            prepared = prepare(self.source)
            workspace.take(self.source, force=self.force)
            return score_stage(
                workspace, prepared, self.settings, memory_budget=self.memory_budget, worker=worker, progress=progress
            )


def curve_stage(workspace: Workspace, prepared: Prepared, *, progress: Progress = silent) -> bool:
    """Write curves.json, by which `--allocation curves` plans; True if a finished one was reused."""
    scored = workspace.read_scores()
    key = sha256_json([prepared.key, scored.key])
    try:
        if workspace.read_curves()[1] == key:
            return True
    except BadInput:
        pass  # absent or damaged: measured again
    curves = error_curves(
        prepared.loaded.model,
        prepared.layout,
        scored.scores,
        prepared.calibration.batches,
        token_weights=prepared.token_weights(progress),
        progress=progress,
    )
    workspace.write_curves(curves, key)
    return False


def plan_stage(
    workspace: Workspace,
    limits: Limits | None = None,
    *,
    align: int = 16,
    allocation: str = "uniform",
    latency: Limit | None = None,
    emptying: bool = True,
    noted: Mapping[str, Any] | None = None,
    write: bool = True,
) -> PruningPlan:
    """Make masks.json and plan.json from stored scores (and curves); `write=False` only tells what they would be.

    Args:
        latency: a table and the nanoseconds that it allows.
        emptying: see `search_within`.
        noted: more settings for masks.json, such as the loss of quality by which the limits were found.
    """
    limits = limits or Limits()
    if limits.time is not None and latency is None:
        raise BadInput(f"{limits.time} is measured while planning: give it to optin-export.")
    scores, layout, macs, params, key = workspace.read_scores()
    check_align(align, layout)
    curves = workspace.read_curves()[0] if allocation == "curves" else None
    within = [*limits.within(macs, params), *([] if latency is None else [latency])]
    masks = search_within(scores, layout, within, align=align, allocation=allocation, curves=curves, emptying=emptying)
    plan = check_plan(make_plan(masks, layout, macs))
    if write:
        how = {"align": align, "allocation": allocation, "scores_key": key}
        settings = {**asdict(limits), **how, **(noted or {})}
        workspace.write_plan(plan, masks, settings)
    return plan


def rewrite_stage(
    workspace: Workspace, prepared: Prepared, *, compensation: bool = True, progress: Progress = silent
) -> tuple[PrunedModel, bool]:
    """Write model/ from the stored plan; the flag is True if a finished one was reused."""
    plan = workspace.read_plan()
    plan.check(prepared.layout)
    key = sha256_json([prepared.key, plan.hash, compensation])
    folder = workspace.model_folder
    try:
        if read_json(folder / MANIFEST, REMAKE_HINT).get("key") == key:
            return load_pruned(folder), True
    except BadInput:
        pass  # absent or damaged: made again
    loaded = prepared.loaded
    pruned = cut(
        loaded.model,
        prepared.layout,
        plan,
        prepared.calibration.batches,
        compensation=compensation,
        token_weights=prepared.token_weights(progress) if compensation else None,
        preprocessor=loaded.preprocessor,
        progress=progress,
    )
    pruned = replace(pruned, files=loaded.files, report={**pruned.report, TEXT_PAIRS: prepared.text_pairs})
    for name in MADE_FROM_MODEL:  # of an earlier plan: nothing may be measured or shipped beside the wrong model
        workspace.record.remove(name)
    pruned.save(folder, key=key)
    return pruned, False
