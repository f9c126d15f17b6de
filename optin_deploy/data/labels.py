"""Labels of rows against what a model puts out: class indices, numbers, or nothing that can be compared."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from optin_deploy.data.files import short
from optin_deploy.data.samples import Sample
from optin_deploy.errors import BadInput
from optin_deploy.inputs import gives_logits

log = logging.getLogger(__name__)


def check_labels(rows: Sequence[Sample], model: nn.Module) -> None:
    """Refuse labels that the model does not know, before the long work.

    Raises: BadInput: names the first such row; also for multi-label models.
    """
    check_task(model)
    problems = _problems(rows, model)
    for row in rows:
        if row.label in problems:
            raise BadInput(f"{row.source}: {problems[row.label]} Correct it, or leave out all labels.")


def known_labels(rows: Sequence[Sample], model: nn.Module) -> tuple[Sample, ...]:
    """The same rows without the labels that cannot be compared with the model's outputs, of which one warning tells.

    A number beyond the classes tells that the classes are numbered in another way: then no label is kept.
    Raises: BadInput: a multi-label model.
    """
    check_task(model)
    problems = _problems(rows, model)
    if not problems:
        return tuple(rows)
    unknown = [row for row in rows if row.label in problems]
    all_of_them = classifies(model) and any(isinstance(label, int) for label in problems)
    log.warning(
        "%s: %s %d of %d rows have a label that is not the model's: %s.",
        *(unknown[0].source, problems[unknown[0].label], len(unknown), len(rows)),
        "no label of the file is used" if all_of_them else "those labels are not used",
    )
    return tuple(replace(row, label=None) if all_of_them or row.label in problems else row for row in rows)


def labelled_rows(rows: Sequence[Sample], model: nn.Module) -> tuple[Sample, ...]:
    """The rows of a classifier that have a label, if half of them or more do; else all, without labels.

    A warning tells which.
    """
    labelled = tuple(row for row in rows if row.label is not None)
    if len(labelled) in (0, len(rows)) or not classifies(model):
        return tuple(rows)
    used = 2 * len(labelled) >= len(rows)
    told = "quality is that of the others" if used else "too few have one to measure accuracy, agreement is measured"
    log.warning("%d of the %d held-out rows have no label: %s", len(rows) - len(labelled), len(rows), told)
    return labelled if used else tuple(replace(row, label=None) for row in rows)


def check_task(model: nn.Module) -> None:
    """Raises: BadInput: a multi-label model, whose outputs are no distribution over classes."""
    config: Any = model.config
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise BadInput("the model is a multi-label classifier; possible are single-label, regression and embeddings.")


def is_regression(model: nn.Module) -> bool:
    """One output number, or several if the config says so."""
    config: Any = model.config
    return gives_logits(model) and (getattr(config, "problem_type", None) == "regression" or config.num_labels == 1)


def classifies(model: nn.Module) -> bool:
    """Does the model put out a class a row?"""
    return gives_logits(model) and not is_regression(model)


def class_index(label: str | int | None, config: Any) -> int:
    """The output that a label stands for: the class of that name, or of that number where names are no numbers.

    Raises: BadInput: no such class.
    """
    names = {str(name): int(index) for index, name in config.id2label.items()}
    if len(names) < len(config.id2label) and str(label) in (shared := _repeated(map(str, config.id2label.values()))):
        raise BadInput(f"label {short(label)} is the name of {shared[str(label)]} classes of the model.")
    numbers = {int(found[1]): index for name, index in names.items() if (found := _WHOLE.fullmatch(name))}
    index = names.get(str(label))
    if index is None and isinstance(label, int):
        # Ratings 1.0 to 5.0 are read as 1 to 5. Where all names are numbers, a label that is none of them is no index.
        index = numbers.get(label) if len(numbers) == len(names) else label
    if index is None or not 0 <= index < config.num_labels:
        known = ", ".join(list(names)[:10])
        more = "" if len(numbers) == len(names) else f"; or 0 to {config.num_labels - 1}"
        raise BadInput(f"label {short(label)} is not one of the model's ({known}{more}).")
    return index


def _repeated(names: Iterable[str]) -> dict[str, int]:
    return {name: times for name, times in Counter(names).items() if times > 1}


_WHOLE = re.compile(r"\s*(-?(?:0|[1-9][0-9]{0,17}))(?:\.0)?\s*")


def _problems(rows: Sequence[Sample], model: nn.Module) -> dict[str | int | None, str]:
    """Why labels cannot be compared with the model's outputs, for each such label."""
    found: dict[str | int | None, str] = {}
    for label in {row.label: None for row in rows if row.label is not None} if gives_logits(model) else ():
        try:
            if is_regression(model):
                if not math.isfinite(float(str(label).replace(",", "."))):  # some write a decimal comma
                    raise ValueError
            else:
                class_index(label, model.config)
        except BadInput as err:
            found[label] = str(err)
        except ValueError:
            found[label] = f"the model puts out a number, and label {short(label)} is none."
    return found
