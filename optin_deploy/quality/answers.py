"""What a cut did to answers that are parts of a text: exact match and F1, as SQuAD judges them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from optin_deploy.data.targets import Answers
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import MASK, Feeds
from optin_deploy.files.opening import short
from optin_deploy.quality.quality import Quality, check_finite, known_labels, labels_judge
from optin_deploy.scoring.losses import Readout

LONGEST = 30
"""Most tokens of an answer."""


class AnswerJudge:
    """Compares cut networks with the dense one (Rajpurkar et al., SQuAD, 2016, arXiv 1606.05250)."""

    def __init__(self, dense: Iterable[Readout], rows: Feeds, *, strict: bool = False) -> None:
        """Read what the dense network gives.

        Args: dense: one a batch of `rows`, logits of first and last token: (rows, 2, tokens). strict: refuse labels
            that are no answers, and rows without one beside others; else these are left out, with a warning.
        Raises: BadInput.
        """
        self.rows = rows
        self._known = self._answers(strict)
        self._impossible = any(label is not None and not label.texts for label in self._known)
        self._dense = self._found(dense)

    def compare(self, cut: Iterable[Readout]) -> Quality:
        """Return F1 and exact match of both networks, or without answers the share of the rows with the same one."""
        found = self._found(cut)
        judged = [place for place, label in enumerate(self._known) if label is not None]
        if not judged:
            same = sum(one == other for one, other in zip(self._dense, found, strict=True))
            return Quality("same_answer", 1.0, same / len(found), len(found))
        both = [[self._points(place, texts[place]) for place in judged] for texts in (self._dense, found)]
        (f1, exact), (cut_f1, cut_exact) = ([sum(each) / len(judged) for each in zip(*p, strict=True)] for p in both)
        return Quality("answer_f1", f1, cut_f1, len(judged), {"exact_match": (exact, cut_exact)})

    def _answers(self, strict: bool) -> list[Answers | None]:
        """The right answers of each row; None where there are none, or answers are not used."""
        labels, origin = self.rows.labels, self.rows.origin

        def read() -> list[Answers | None]:
            for label in labels:
                if not (label is None or isinstance(label, Answers)):
                    raise BadInput(f"a label is {short(label)}, and the network is judged by `answers` in its texts.")
            return [label if isinstance(label, Answers) else None for label in labels]

        given = sum(label is not None for label in labels)
        used = labels_judge(given, len(labels), origin, strict=strict)
        return (known_labels(read, origin, strict=strict) if used else None) or [None] * len(labels)

    def _points(self, place: int, text: object) -> tuple[float, float]:
        label = self._known[place]
        assert label is not None
        references = label.texts or ("",)
        return max(f1(str(text), each) for each in references), max(
            float(plain(str(text)) == plain(each)) for each in references
        )

    def _found(self, readouts: Iterable[Readout]) -> list[object]:
        """The answer to each row: a text, or the first and the last token where no text is known."""
        found: list[object] = []
        for readout, batch in zip(readouts, self.rows.batches, strict=True):
            check_finite(readout.values, self.rows.origin)
            values, mask = readout.values.float().cpu(), batch.get(MASK)
            fits = mask is not None and mask.shape == values[:, 0].shape
            firsts = mask.argmax(1).tolist() if mask is not None and fits else [0] * len(values)
            for logits, first in zip(values, firsts, strict=True):
                label = self._known[len(found)]
                if label is None:
                    found.append(tuple(logits.argmax(-1).tolist()))
                else:
                    found.append(answer(logits, label, impossible=first if self._impossible else None))
        return found


def answer(logits: Tensor, label: Answers, *, impossible: int | None = None) -> str:
    """The best part of the text: the largest sum of both logits, the last token not before the first.

    Args: logits: (2, tokens). impossible: the token that stands for no answer, where that is better: the first of the
        row behind its padding. None: every question has an answer.
    """
    known = torch.tensor([place is not None for place in label.places])
    starts, ends = logits[:, : len(known)].masked_fill(~known, -torch.inf)
    sums = (starts.unsqueeze(1) + ends).triu().nan_to_num(neginf=-torch.inf)  # (first, last)
    allowed = torch.ones_like(sums, dtype=torch.bool).triu().tril(LONGEST - 1)
    sums = sums.masked_fill(~allowed, -torch.inf)
    best = int(sums.argmax())
    first, last = (label.places[place] for place in divmod(best, len(known)))
    if (
        first is None
        or last is None
        or (impossible is not None and float(logits[:, impossible].sum()) > float(sums.max()))
    ):
        return ""
    return label.context[first[0] : last[1]]


def f1(found: str, wanted: str) -> float:
    """F1 of the words of two answers; two without any word are the same."""
    one, other = plain(found).split(), plain(wanted).split()
    if not one or not other:
        return float(one == other)
    both = sum((Counter(one) & Counter(other)).values())
    return 2 * both / (len(one) + len(other))


def plain(text: str) -> str:
    """The text in small letters, without punctuation, articles and doubled spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
