"""What a cut did to the outputs of any network, on rows that nothing learned from: one figure that fits the output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.data.class_maps import UNKNOWN, ClassMap
from optin_deploy.data.label_order import check_order
from optin_deploy.data.labels import class_number
from optin_deploy.data.targets import Answers, Grade, Role
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Feeds, Label, real_first, rows_of
from optin_deploy.files.opening import short
from optin_deploy.network.run import Program
from optin_deploy.quality.entities import OUTSIDE, entity_f1, tags_spans
from optin_deploy.quality.guessing import check_skill, spearman_skill
from optin_deploy.quality.quality import Quality, check_finite, correlation, known_labels, labels_judge, spearman
from optin_deploy.scoring.losses import Readout
from optin_deploy.scoring.reading import Reading
from optin_deploy.scoring.subject import read_tokens


def readouts(program: Program, reading: Reading, rows: Feeds) -> Iterator[Readout]:
    """Run a network on rows, batch by batch, and read what is compared."""
    for batch in rows.batches:
        mask = read_tokens(batch)
        valid = None if mask is None else mask.to(program.device)
        with torch.inference_mode():
            outputs = program({port.name: batch[port.name] for port in program.network.inputs}).outputs
            yield reading.read(outputs, valid)


@dataclass(frozen=True, eq=False)
class _Note:
    """What is kept of a batch."""

    kind: str
    values: Tensor
    """Classes (rows, positions), or numbers (rows, positions, values)."""
    valid: Tensor
    """Whether a position counts, (rows, positions)."""
    classes: int = 0


class NetworkJudge:
    """Compares cut networks with the dense one on the same rows; of the dense one only what is compared is kept."""

    def __init__(
        self,
        dense: Iterable[Readout],
        rows: Feeds,
        *,
        names: Sequence[str] | None = None,
        strict: bool = False,
    ) -> None:
        """Read what the dense network gives.

        Args:
            dense: one a batch of `rows`, as `readouts` makes them.
            names: of the classes, in their order.
            strict: refuse labels that the network does not know, and rows without one beside others; else these are
                left out, with a warning.

        Raises: BadInput: labels by which the network is no better than guessing.
        """
        self.rows, self._names = rows, names
        notes = [self._note(readout) for readout in dense]
        self._dense = notes
        self._first = notes[0]
        self._each = any(note.values.shape[1] > 1 for note in notes)  # whether positions are compared one by one
        self._labels = None if self._first.kind != "classes" else self._targets(names, strict)
        self._spans = False  # whether there are entities
        if self._labels is not None:
            self._check_order(self._labels)
        self._single = self._first.kind == "numbers" and not self._each and self._first.values.shape[2] == 1
        self._wanted = self._numbers(strict) if self._single else None
        if self._wanted is not None:
            check_skill(spearman_skill(*self._ranked([note.values for note in notes])), rows.origin)

    def compare(self, cut: Iterable[Readout]) -> Quality:
        """Return one figure for both networks: what fits the output."""
        rows, dense = len(self.rows), self._dense
        notes = [self._note(readout) for readout in cut]
        kind = self._first.kind
        if kind == "embedding":
            products = torch.cat([(a.values * b.values).sum(-1).mean(1) for a, b in zip(dense, notes, strict=True)])
            return Quality("cosine_to_dense", 1.0, float(products.mean()), rows)
        if kind == "numbers":
            return self._of_numbers([note.values for note in dense], [note.values for note in notes])
        each = "_per_token" if self._each else ""
        if self._labels is None:
            valid = [note.valid for note in dense]
            same = _share(dense, [note.values for note in notes], valid)
            return Quality(f"same_prediction{each}", 1.0, same, rows)
        counted = [label != UNKNOWN for label in self._labels]
        if not each:
            rows = sum(int(each.sum()) for each in counted)
        before, after = (_share(some, self._labels, counted) for some in (dense, notes))
        if self._spans:
            wanted = self._tags(self._labels)
            f1 = [entity_f1(wanted, self._tags([note.values for note in some])) for some in (dense, notes)]
            return Quality("entity_f1", f1[0], f1[1], rows, {"accuracy_per_token": (before, after)})
        return Quality(f"accuracy{each}", before, after, rows)

    def _check_order(self, labels: Sequence[Tensor]) -> None:
        """Refuse labels in another order; where there are entities, by their tokens: most others are right anyhow."""
        wanted = torch.cat([each.flatten() for each in labels])
        given = torch.cat([note.values.flatten() for note in self._dense])
        given, wanted = given[wanted != UNKNOWN], wanted[wanted != UNKNOWN]
        names, count, shares = self._names, self._first.classes, None
        what = "tokens" if self._each else "rows"
        if what == "tokens" and names is not None and len(names) == count and tags_spans(names):
            inside = torch.tensor([name != OUTSIDE for name in names])[wanted]
            self._spans = bool(inside.any())
            if self._spans:
                what, shares = "tokens of entities", torch.bincount(given, minlength=count).numpy() / len(given)
                wanted, given = wanted[inside], given[inside]
        shown = [str(names[i]) if names and i < len(names) else str(i) for i in range(count)]
        check_order(wanted.numpy(), given.numpy(), shown, self.rows.origin, what=what, shares=shares)

    def _tags(self, classes: Sequence[Tensor]) -> list[list[str]]:
        """Names of the classes of each row's labelled positions."""
        assert self._labels is not None
        assert self._names is not None
        pairs = zip(self._labels, classes, strict=True)
        rows = (each[label != UNKNOWN] for wanted, found in pairs for label, each in zip(wanted, found, strict=True))
        return [[self._names[number] for number in row.tolist()] for row in rows]

    def _of_numbers(self, dense: list[Tensor], cut: list[Tensor]) -> Quality:
        if self._single:
            before, after = torch.cat(dense).flatten(), torch.cat(cut).flatten()
            same = (1.0, correlation(before, after))
            if self._wanted is None:
                return Quality("correlation_with_dense", *same, len(self.rows))
            (one, count), (other, _) = (self._ranked(each) for each in (dense, cut))
            return Quality("spearman", one, other, count, {"correlation_with_dense": same})
        moved = sum(float((a - b).double().square().sum()) for a, b in zip(dense, cut, strict=True))
        size = sum(float(a.double().square().sum()) for a in dense)
        return Quality("relative_error", 0.0, math.sqrt(moved / max(size, 1e-30)), len(self.rows))

    def _ranked(self, found: list[Tensor]) -> tuple[float, int]:
        """Spearman's correlation with the labels, and how many rows have one."""
        assert self._wanted is not None
        there = ~self._wanted.isnan()
        return spearman(self._wanted[there].tolist(), torch.cat(found).flatten()[there].tolist()), int(there.sum())

    def _note(self, readout: Readout) -> _Note:
        values = readout.values
        check_finite(values, self.rows.origin)
        if readout.kind == "embedding":
            return _Note("embedding", values.float().cpu(), readout.valid.bool().cpu())
        if readout.kind == "regression" or values.shape[-1] == 1:  # one class is no choice
            return _Note("numbers", (values * readout.valid.unsqueeze(-1)).float().cpu(), readout.valid.bool().cpu())
        return _Note("classes", values.argmax(-1).cpu(), readout.valid.bool().cpu(), values.shape[-1])

    def _labelled(self, strict: bool) -> bool:
        """Whether labels are used: enough rows have one."""
        given = sum(label is not None for label in self.rows.labels)
        return labels_judge(given, len(self.rows), self.rows.origin, strict=strict)

    def _numbers(self, strict: bool) -> Tensor | None:
        """Labels as numbers, (rows,), NaN where there is none; None: labels are not used."""
        if not self._labelled(strict):
            return None

        def read() -> Tensor:
            found = [math.nan if label is None else _number(label) for label in self.rows.labels]
            different = {each for each in found if not math.isnan(each)}
            if len(different) == 1:
                raise BadInput(f"the labels are all {different.pop()}, and rank nothing.")
            return torch.tensor(found, dtype=torch.float64)

        return known_labels(read, self.rows.origin, strict=strict)

    def _targets(self, names: Sequence[str] | None, strict: bool) -> list[Tensor] | None:
        """Classes by batch, (rows, positions), UNKNOWN where there is none; None: labels are not used."""
        if not self._labelled(strict):
            return None

        def read() -> list[Tensor]:
            found, start = [], 0
            for note, batch in zip(self._dense, self.rows.batches, strict=True):
                labels = self.rows.labels[start : (start := start + rows_of(batch))]
                rows = [_classes(label, note, names, each=self._each) for label in labels]
                found.append(real_first(torch.stack(rows), batch))
            if not any(bool((each != UNKNOWN).any()) for each in found):
                raise BadInput(f"no token of the {len(self.rows)} rows that judge has a tag that counts.")
            return found

        return known_labels(read, self.rows.origin, strict=strict)


def _number(label: Label) -> float:
    """A label as a number."""
    try:
        found = float(label) if isinstance(label, int | float | str) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if isinstance(label, Role):
        raise BadInput(
            "rows with `query` and `positive`, or with `sentence1`, `sentence2` and `score`, judge embeddings, and the "
            "network puts out one number a row. Give `query` with lists `positive` and `negative`, or name the columns "
            "of pairs by --text-column, --pair-column and --label-column."
        )
    if not math.isfinite(found):
        raise BadInput(f"the label {short(label)} is no finite number, and the network puts out one number a row.")
    return found


def _classes(label: Label, note: _Note, names: Sequence[str] | None, *, each: bool) -> Tensor:
    """A label as classes of the positions, (positions,). Args: each: whether they are labelled one by one."""
    positions = note.values.shape[1]
    if label is None:
        return torch.full((positions,), UNKNOWN)
    if isinstance(label, ClassMap):
        raise BadInput(f"{label.path} has a class for each pixel, and the network is read at {positions} positions.")
    if each and isinstance(label, tuple) and len(label) == positions:
        numbers = [UNKNOWN if tag is None else class_number(tag, names, note.classes) for tag in label]
        return torch.tensor(numbers)
    if isinstance(label, tuple | Answers | Role | Grade):
        raise BadInput(f"a label is {short(label)}, and the network puts out classes of {positions} positions.")
    if isinstance(label, Tensor):
        if len(label) != positions or int(label.max()) >= note.classes:
            raise BadInput(
                f"the labels of a row are {len(label)} classes up to {int(label.max())}; the network puts out"
                f" {positions} positions and classes up to {note.classes - 1}."
            )
        return label.clamp(min=-1).masked_fill(label < 0, UNKNOWN)
    if each:
        raise BadInput(f"the label {label!r} is one for a row, and the network puts out {positions} positions.")
    return torch.tensor([class_number(label, names, note.classes)])


def _share(notes: Sequence[_Note], targets: Sequence[Tensor], counted: Sequence[Tensor]) -> float:
    """Share of the counted positions whose prediction is the target."""
    right = sum(
        int((note.values == target)[mark].sum()) for note, target, mark in zip(notes, targets, counted, strict=True)
    )
    return right / max(1, sum(int(mark.sum()) for mark in counted))
