"""Labels of words and characters as labels of tokens, and texts with some of their tokens masked."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from optin_deploy.data.samples import Sample
from optin_deploy.data.targets import Answers, Role
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Label
from optin_deploy.feeds.sentence_modules import NONE, Prompts

MASKED = 0.15
"""Share of the tokens that are masked (Devlin et al., BERT, 2019, arXiv 1810.04805)."""


def target_of(sample: Sample, encoding: Any, width: int, *, left: bool) -> Label:
    """The label of a row, padded as the row is.

    The tag of a word counts at its first token; an answer's text keeps the characters that each token stands for.
    Args: encoding: what a fast tokenizer made of the sample. width: tokens of the row with its padding.
    Raises: BadInput: the tokenizer does not tell which token stands for what.
    """
    if sample.label is None or not (sample.words or isinstance(sample.label, Answers)):
        return sample.label
    if not getattr(encoding, "is_fast", False):
        raise BadInput(
            f"{sample.source}: the tokenizer does not tell which token stands for which word. Save it as a fast one "
            "(tokenizer.json) beside the weights."
        )
    if isinstance(sample.label, Answers):
        second = [each == 1 for each in encoding.sequence_ids()]
        spans = [tuple(span) for span in encoding.encodings[0].offsets]
        places = [span if there and span[0] < span[1] else None for there, span in zip(second, spans, strict=True)]
        return replace(sample.label, places=tuple(_padded(places, None, width, left=left)))
    assert isinstance(sample.label, tuple)
    assert sample.words is not None
    words, tags = _words_of(encoding.encodings[0].offsets, sample.words), sample.label
    of_tokens = [None if word is None or word in words[:at] else tags[word] for at, word in enumerate(words)]
    return tuple(_padded(of_tokens, None, width, left=left))


def _words_of(spans: Sequence[tuple[int, int]], words: Sequence[str]) -> list[int | None]:
    """The number of the word that each token begins in, None where it stands for none.

    Args: spans: characters of each token, first and behind the last, in the words with a space between them, with which
        a token may begin.
    """
    numbers: list[int | None] = []
    for number, word in enumerate(words):
        numbers += [*[number] * len(word), None]
    return [next((each for each in numbers[start:end] if each is not None), None) for start, end in spans]


def prompted(samples: Sequence[Sample], prompts: Prompts) -> Sequence[Sample]:
    """Texts with what is put before them: queries and what they search have prompts of their own.

    Returns: as many samples, and one more for each text that is both, where the prompts differ; both have its number.
    """
    if prompts == NONE:
        return samples
    found = []
    for sample in samples:
        role = sample.label if isinstance(sample.label, Role) else Role(-1)
        each = [sample]
        if role.positives and role.candidate and prompts.query != prompts.document:
            labels = replace(role, candidate=False), Role(role.number, candidate=True)
            each = [replace(sample, label=label) for label in labels]
        usual = prompts.query if role.positives else prompts.document if role.candidate else prompts.usual
        for one, prompt in zip(each, (usual, prompts.document), strict=False):
            found.append(replace(one, text=f"{prompt}{one.text}", prompt=None if prompts.pooled else prompt))
    return found


def masked(encoding: Mapping[str, list[int]], tokenizer: Any) -> tuple[dict[str, list[int]], list[int]]:
    """The same row with some of its ordinary tokens masked, always the same ones, and what they were, -1 elsewhere.

    Raises: BadInput: the tokenizer has no token that masks.
    """
    if tokenizer.mask_token_id is None:
        raise BadInput("The tokenizer has no mask token, which a model of masked words is judged by. Save it with one.")
    ids = list(encoding["input_ids"])
    special = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    ordinary = [place for place, each in enumerate(special) if not each]
    draw = random.Random(hashlib.sha256(repr(ids).encode()).digest())
    hidden = draw.sample(ordinary, min(len(ordinary), max(1, round(MASKED * len(ordinary)))))
    wanted = [-1] * len(ids)
    for place in hidden:
        wanted[place], ids[place] = ids[place], tokenizer.mask_token_id
    return {**encoding, "input_ids": ids}, wanted


def padded_ids(wanted: Sequence[int], width: int, *, left: bool) -> torch.Tensor:
    """What masked tokens were, padded as the row is, (width,)."""
    return torch.tensor(_padded(wanted, -1, width, left=left))


def _padded(values: Sequence[Any], fill: Any, width: int, *, left: bool) -> list[Any]:
    padding = [fill] * (width - len(values))
    return [*padding, *values] if left else [*values, *padding]
