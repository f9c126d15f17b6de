"""What a cut did to the outputs of any network, on rows that nothing learned from: one figure that fits the output."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from optin_deploy.data.class_maps import UNKNOWN, ClassMap
from optin_deploy.data.label_order import check_order
from optin_deploy.data.labels import class_number
from optin_deploy.errors import BadInput, NonFiniteActivation
from optin_deploy.feeds.rows import MASK, Batch, Feeds, Label, rows_of
from optin_deploy.network.run import Program
from optin_deploy.quality.quality import Quality, correlation
from optin_deploy.scoring.losses import Readout
from optin_deploy.scoring.reading import Reading

log = logging.getLogger(__name__)

Metric = Literal["perplexity"]
"""What is measured only where it is asked for."""


def readouts(program: Program, reading: Reading, rows: Feeds) -> Iterator[Readout]:
    """Run a network on rows, batch by batch, and read what is compared."""
    for batch in rows.batches:
        mask = batch.get(MASK)
        valid = mask.to(program.device) if mask is not None and mask.dim() == 2 else None
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
    loss: float = 0.0
    """Sum over so many tokens."""
    tokens: int = 0


class NetworkJudge:
    """Compares cut networks with the dense one on the same rows; of the dense one only what is compared is kept."""

    def __init__(
        self,
        dense: Iterable[Readout],
        rows: Feeds,
        *,
        names: Sequence[str] | None = None,
        metric: Metric | None = None,
        ids: str = "input_ids",
        strict: bool = False,
    ) -> None:
        """Read what the dense network gives.

        Args:
            dense: one a batch of `rows`, as `readouts` makes them.
            names: of the classes, in their order.
            metric: `perplexity`: of the next token; None: what fits the output, and the labels if there are any.
            ids: the input with the tokens.
            strict: refuse labels that the network does not know, and rows without one beside others; else these are
                left out, with a warning.

        Raises: BadInput: labels by which the network is no better than guessing, or no language model for perplexity.
        """
        self.rows, self._metric, self._ids = rows, metric, ids
        notes = [self._note(readout, batch) for readout, batch in zip(dense, rows.batches, strict=True)]
        self._dense = notes
        self._first = notes[0]
        self._labels = None if metric or self._first.kind != "classes" else self._targets(names, strict)
        if self._labels is not None and self._first.values.shape[1] == 1:
            wanted, given = torch.cat(self._labels).flatten(), torch.cat([note.values for note in notes]).flatten()
            shown = [str(names[i]) if names and i < len(names) else str(i) for i in range(self._first.classes)]
            check_order(wanted[wanted != UNKNOWN].numpy(), given[wanted != UNKNOWN].numpy(), shown, rows.origin)

    def of(self, cut: Iterable[Readout]) -> Quality:
        """Return one figure for both networks: what fits the output."""
        rows, dense = len(self.rows), self._dense
        notes = [self._note(readout, batch) for readout, batch in zip(cut, self.rows.batches, strict=True)]
        if self._metric == "perplexity":
            before, after = (
                math.exp(sum(n.loss for n in some) / sum(n.tokens for n in some)) for some in (dense, notes)
            )
            return Quality("perplexity", before, after, rows)
        kind = self._first.kind
        if kind == "embedding":
            products = torch.cat([(a.values * b.values).sum(-1).mean(1) for a, b in zip(dense, notes, strict=True)])
            return Quality("cosine_to_dense", 1.0, float(products.mean()), rows)
        if kind == "numbers":
            return self._of_numbers([note.values for note in dense], [note.values for note in notes])
        each = "" if self._first.values.shape[1] == 1 else "_per_token"
        if self._labels is None:
            valid = [note.valid for note in dense]
            same = _share(dense, [note.values for note in notes], valid)
            return Quality(f"same_prediction{each}", 1.0, same, rows)
        counted = [label != UNKNOWN for label in self._labels]
        if not each:
            rows = sum(int(each.sum()) for each in counted)
        before, after = (_share(some, self._labels, counted) for some in (dense, notes))
        return Quality(f"accuracy{each}", before, after, rows)

    def _of_numbers(self, dense: list[Tensor], cut: list[Tensor]) -> Quality:
        if self._first.values.shape[1:] == (1, 1):
            found = correlation(torch.cat(dense).flatten(), torch.cat(cut).flatten())
            return Quality("correlation_with_dense", 1.0, found, len(self.rows))
        moved = sum(float((a - b).double().square().sum()) for a, b in zip(dense, cut, strict=True))
        size = sum(float(a.double().square().sum()) for a in dense)
        return Quality("relative_error", 0.0, math.sqrt(moved / max(size, 1e-30)), len(self.rows))

    def _note(self, readout: Readout, batch: Batch) -> _Note:
        values = readout.values
        if not bool(values.isfinite().all()):
            raise NonFiniteActivation(
                f"{self.rows.origin}: the network put out NaN or infinity on rows that judge. Check the weights and the"
                " data; a network stored in half precision may overflow: export it in float32."
            )
        if self._metric == "perplexity":
            return self._scored(readout, batch)
        if readout.kind == "embedding":
            return _Note("embedding", values.float().cpu(), readout.valid.bool().cpu())
        if readout.kind == "regression" or values.shape[-1] == 1:  # one class is no choice
            return _Note("numbers", (values * readout.valid.unsqueeze(-1)).float().cpu(), readout.valid.bool().cpu())
        return _Note("classes", values.argmax(-1).cpu(), readout.valid.bool().cpu(), values.shape[-1])

    def _scored(self, readout: Readout, batch: Batch) -> _Note:
        """How well each token foretells the next."""
        ids, values = batch.get(self._ids), readout.values
        if ids is None or ids.shape != values.shape[:2] or int(ids.max()) >= values.shape[-1] or values.shape[1] < 2:
            told = "none" if ids is None else f"of shape {tuple(ids.shape)}"
            raise BadInput(
                f"perplexity needs logits of each token of a text; these are {tuple(values.shape)}, and the ids"
                f" ({self._ids!r}) are {told}. Leave out the metric: agreement is measured."
            )
        ids = _ordered(ids, batch).to(values.device)
        counted = readout.valid[:, 1:].bool()
        loss = 0.0
        for row, mark in enumerate(counted):  # a row at a time: logits of a vocabulary are large
            losses = torch.nn.functional.cross_entropy(values[row, :-1].float(), ids[row, 1:].long(), reduction="none")
            loss += float(losses[mark].double().sum())
        return _Note("scores", torch.empty(0, 1), counted.cpu(), 0, loss, int(counted.sum()))

    def _targets(self, names: Sequence[str] | None, strict: bool) -> list[Tensor] | None:
        """Classes by batch, (rows, positions), UNKNOWN where there is none; None: labels are not used."""
        given = sum(label is not None for label in self.rows.labels)
        if not given:
            return None
        left = f"{self.rows.origin}: {len(self.rows) - given} of the {len(self.rows)} rows that judge have no label"
        if strict and given < len(self.rows):
            raise BadInput(f"{left}. Label all rows, or none.")
        if 2 * given < len(self.rows):
            log.warning("%s: too few have one to measure accuracy, agreement is measured", left)
            return None
        if given < len(self.rows):
            log.warning("%s: quality is that of the others", left)
        found, start = [], 0
        try:
            for note, batch in zip(self._dense, self.rows.batches, strict=True):
                labels = self.rows.labels[start : (start := start + rows_of(batch))]
                rows = [_classes(label, note, names) for label in labels]
                found.append(_ordered(torch.stack(rows), batch))
        except BadInput as err:
            if strict:
                raise BadInput(f"{self.rows.origin}: {err} Correct the labels, or leave out all of them.") from err
            log.warning("%s: %s No label is used: agreement is measured", self.rows.origin, err)
            return None
        return found


def _classes(label: Label, note: _Note, names: Sequence[str] | None) -> Tensor:
    """A label as classes of the positions, (positions,)."""
    positions = note.values.shape[1]
    if label is None:
        return torch.full((positions,), UNKNOWN)
    if isinstance(label, ClassMap):
        raise BadInput(f"{label.path} has a class for each pixel, and the network is read at {positions} positions.")
    if isinstance(label, Tensor):
        if len(label) != positions or int(label.max()) >= note.classes:
            raise BadInput(
                f"the labels of a row are {len(label)} classes up to {int(label.max())}; the network puts out"
                f" {positions} positions and classes up to {note.classes - 1}."
            )
        return label.clamp(min=-1).masked_fill(label < 0, UNKNOWN)
    if positions > 1:
        raise BadInput(f"the label {label!r} is one for a row, and the network puts out {positions} positions.")
    return torch.tensor([class_number(label, names, note.classes)])


def _ordered(values: Tensor, batch: Batch) -> Tensor:
    """(rows, positions) in the order of a readout: real tokens first."""
    mask = batch.get(MASK)
    if mask is None or mask.shape != values.shape:
        return values
    return values.gather(1, mask.argsort(dim=1, descending=True, stable=True))


def _share(notes: Sequence[_Note], targets: Sequence[Tensor], counted: Sequence[Tensor]) -> float:
    """Share of the counted positions whose prediction is the target."""
    right = sum(
        int((note.values == target)[mark].sum()) for note, target, mark in zip(notes, targets, counted, strict=True)
    )
    return right / max(1, sum(int(mark.sum()) for mark in counted))
