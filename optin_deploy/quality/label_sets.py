"""What a cut did to the labels of rows that may have several, or none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from optin_deploy.data.labels import class_number
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Feeds, Label
from optin_deploy.files.opening import short
from optin_deploy.quality.quality import Quality, check_finite, known_labels
from optin_deploy.scoring.losses import Readout


class LabelSetJudge:
    """Compares cut networks with the dense one: a row has the labels whose logits are above 0."""

    def __init__(
        self, dense: Iterable[Readout], rows: Feeds, *, names: Sequence[str] | None = None, strict: bool = False
    ) -> None:
        """Read what the dense network gives.

        Args: dense: one a batch of `rows`. names: of the labels, in their order. strict: refuse labels that the
            network does not know, and rows without any beside others; else no label is used, with a warning.
        Raises: BadInput: labels by which the network is no better than giving every row the same ones.
        """
        self.rows = rows
        self._dense = self._found(dense)
        self._wanted = self._labels(names, strict)
        if self._wanted is not None:
            wanted = self._wanted
            alike = max(micro_f1(wanted, row.expand_as(wanted)) for row in torch.eye(wanted.shape[1]) > 0)
            found = micro_f1(wanted, self._dense)
            if found <= alike and found < 1:
                why = "The labels seem to mean others than the network's."
                if bool((wanted == wanted[0]).all()):
                    why = "All rows have the same labels: give rows with others too."
                raise BadInput(
                    f"{rows.origin}: the dense network has a micro F1 of {found:.1%}, no more than one label for all "
                    f"rows has ({alike:.1%}): no loss can be measured there. {why}"
                )

    def compare(self, cut: Iterable[Readout]) -> Quality:
        """Return micro F1 of both networks and the share of the rows whose labels are all right, or without labels the
        share of the rows with the same ones."""
        found = self._found(cut)
        if self._wanted is None:
            return Quality("same_prediction", 1.0, _alike(self._dense, found), len(self.rows))
        wanted, dense = self._wanted, self._dense
        beside = {"subset_accuracy": (_alike(wanted, dense), _alike(wanted, found))}
        return Quality("micro_f1", micro_f1(wanted, dense), micro_f1(wanted, found), len(self.rows), beside)

    def _found(self, readouts: Iterable[Readout]) -> Tensor:
        """Which labels each row gets, (rows, labels)."""
        values = torch.cat([readout.values.flatten(0, 1).cpu() for readout in readouts])
        check_finite(values, self.rows.origin)
        return values > 0

    def _labels(self, names: Sequence[str] | None, strict: bool) -> Tensor | None:
        given = sum(label is not None for label in self.rows.labels)
        if not given:
            return None

        def read() -> Tensor:
            if given < len(self.rows):
                raise BadInput(f"{len(self.rows) - given} of the {len(self.rows)} rows that judge have no labels.")
            return label_sets(self.rows.labels, names, self._dense.shape[1])

        return known_labels(read, self.rows.origin, strict=strict)


def label_sets(labels: Sequence[Label], names: Sequence[str] | None, count: int) -> Tensor:
    """The labels of all rows as marks, (rows, labels).

    Lists of 0 and 1 alone, one for each label of the network, are such marks (multi-hot) and not numbers of labels.
    Raises: BadInput: no such label, or all lists may be either.
    """
    if not all(isinstance(row, tuple) and len(row) == count and all(x in (0, 1) for x in row) for row in labels):
        return torch.stack([label_set(label, names, count) for label in labels])
    try:
        for label in labels:
            label_set(label, names, count)
    except BadInput:
        return torch.tensor(labels) > 0
    names_of_some = f", such as {short(names[0])}" if names else ""
    raise BadInput(
        f"all labels are lists such as {short(labels[0])}, which may be numbers of labels, or 0 and 1 for each of "
        f"{count} labels. Write their names{names_of_some}, or where a row has one label its number without a list."
    )


def label_set(label: Label, names: Sequence[str] | None, count: int) -> Tensor:
    """The labels of a row as marks, (labels,): of names or numbers, of names with `|` between them, or an array of 0
    and 1.

    Raises: BadInput: no such label, or one twice.
    """
    if isinstance(label, Tensor):
        if len(label) != count or not bool(((label == 0) | (label == 1)).all()):
            raise BadInput(f"the labels of a row are {label.tolist()}: give 0 or 1 for each of {count} labels.")
        return label.bool()
    if isinstance(label, str) and label not in (names or ()):
        label = tuple(part for part in re.split(r"\s*\|\s*", label.strip()) if part)
    found = torch.zeros(count, dtype=torch.bool)
    for each in label if isinstance(label, tuple) else (label,):
        if not isinstance(each, str | int | float):
            raise BadInput(f"a row has {short(each)} for labels: give their names or numbers.")
        number = int(class_number(each, names, count))  # of a bool too
        if found[number]:
            raise BadInput(
                f"a row's labels are {short(label)}, which name {short(each)} twice: give each name or number once, or "
                f"in all rows 0 or 1 for each of {count} labels."
            )
        found[number] = True
    return found


def micro_f1(wanted: Tensor, found: Tensor) -> float:
    """F1 over all rows and labels together; 1 where there are none at all."""
    both, all_of_them = int((wanted & found).sum()), int(wanted.sum() + found.sum())
    return 2 * both / all_of_them if all_of_them else 1.0


def _alike(one: Tensor, other: Tensor) -> float:
    return float((one == other).all(-1).double().mean())
