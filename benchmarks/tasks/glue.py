"""GLUE (Wang et al., 2018) through Hugging Face `datasets`, for a model that was fine-tuned on one of its tasks.

Test rows are of the validation part, whose labels are public, as in the literature on pruning.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tasks.task import Task
from optin_deploy.checkpoint.loading import load_dense
from optin_deploy.data.labels import class_index, classifies
from optin_deploy.data.samples import Sample
from optin_deploy.errors import BadInput

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Format:
    """Places of the texts of one task."""

    first: str
    """Column of the text."""
    second: str | None = None
    """Column of the second text of a pair."""
    validation: str = "validation"


GLUE = {
    "cola": Format("sentence"),
    "mnli": Format("premise", "hypothesis", "validation_matched"),
    "mrpc": Format("sentence1", "sentence2"),
    "qnli": Format("question", "sentence"),
    "qqp": Format("question1", "question2"),
    "rte": Format("sentence1", "sentence2"),
    "sst2": Format("sentence"),
    "stsb": Format("sentence1", "sentence2"),
    "wnli": Format("sentence1", "sentence2"),
}


def glue(name: str, model: str, *, data: Path | None = None, rows: int = 2048, seq_len: int = 128) -> Task:
    """One task for a fine-tuned model.

    Args:
        model: folder or hub id of a classifier (stsb: with one output) whose labels are numbered as in the data.
        data: folder with the files of the task, as the hub has them (train and validation, .parquet, .jsonl or
            .csv); default: from the hub.
        rows: of the training part, for calibration.
    Raises: BadInput: an unknown task, or a model or columns that do not fit it.
    """
    from datasets import load_dataset

    if name not in GLUE:
        raise BadInput(f"--glue {name}: possible are {', '.join(GLUE)}.")
    form = GLUE[name]
    # Named one by one: else the two validation parts of mnli count as one.
    found = {part: f"{part}[-.]*" for part in ("train", form.validation)}
    if data is not None and not all(any(data.glob(pattern)) for pattern in found.values()):
        raise BadInput(f"--data {data}: no files of {' and '.join(found)} (.parquet, .jsonl or .csv).")
    parts = load_dataset(HUB, name) if data is None else load_dataset(str(data), data_files=found)
    train, test = (_samples(parts, part, form) for part in ("train", form.validation))
    random.Random(0).shuffle(train)
    loaded = load_dense(model, "text-classification")
    classes = classifies(loaded.model)
    if classes == (name == "stsb"):
        kind = "classes" if classes else "numbers"
        raise BadInput(f"{model} puts out {kind}: that does not fit --glue {name}.")
    task = Task(name, loaded.model, loaded.preprocessor, tuple(train[:rows]), tuple(test), seq_len)
    config: Any = loaded.model.config
    names = [str(each) for each in config.id2label.values()]
    for row in (*task.calibration, *task.test) if classes else ():
        class_index(row.label, names)  # type: ignore[arg-type]  # GLUE has classes and numbers
    return task


def _samples(parts: Mapping[str, Iterable[Mapping[str, Any]]], part: str, form: Format) -> list[Sample]:
    if part not in parts:
        raise BadInput(f"no part {part} in the data, only {', '.join(parts)}.")
    found = []
    for row in parts[part]:
        missing = {form.first, form.second, "label"} - {None, *row}
        if missing:
            raise BadInput(f"no column {', '.join(sorted(map(str, missing)))} in part {part}, only {', '.join(row)}.")
        pair = None if form.second is None else row[form.second]
        found.append(Sample(text=row[form.first], text_pair=pair, label=row["label"]))
    return found
