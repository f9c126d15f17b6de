"""Texts as feeds: those of a tokenizer's outputs that a network takes, in its types and lengths."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optin_deploy.data.samples import Sample
from optin_deploy.errors import BadInput
from optin_deploy.feeds.ports import Takes, described, few, fitted
from optin_deploy.feeds.raw_tokenizer import warn_of_unknown
from optin_deploy.feeds.rows import MASK, READ, Batch, Batching, Feeds, Label, grouped
from optin_deploy.feeds.targets import masked, padded_ids, target_of

log = logging.getLogger(__name__)

IDS, TYPES, POSITIONS = "input_ids", "token_type_ids", "position_ids"
ROLES = {
    **{IDS: IDS, MASK: MASK, TYPES: TYPES, POSITIONS: POSITIONS},
    **{"input_word_ids": IDS, "input_mask": MASK, "segment_ids": TYPES, "input_type_ids": TYPES},
}
"""Names of inputs, as exporters write them -> what a tokenizer makes for them; positions are counted."""
SEQ_LEN = 128


@dataclass(frozen=True, eq=False)
class TextInputs:
    """Which inputs of a network a text fills."""

    takes: Takes
    roles: Mapping[str, str]
    """What fills an input, by its name."""
    length: int | None
    """Tokens of every text, where that is fixed."""

    def name(self, role: str) -> str | None:
        """The input that has a role."""
        return next((name for name, filled in self.roles.items() if filled == role), None)


def text_inputs(inputs: Takes) -> TextInputs:
    """Find what a text fills.

    Raises: BadInput: an input cannot come from a text, or their lengths are fixed to different numbers.
    """
    roles = {name: ROLES[plain] for name in inputs.ports if (plain := name.partition(":")[0]) in ROLES}
    if IDS not in roles.values():  # the only whole numbers (rows, tokens) are the text, whatever they are called
        free = [port for name, port in inputs.ports.items() if name not in roles]
        alone = [port.name for port in free if port.dtype.is_integer() and _rank(inputs, port.name) == 2]
        roles |= {alone[0]: IDS} if len(alone) == 1 else {}
    others = [port for name, port in inputs.ports.items() if name not in roles]
    if others or IDS not in roles.values():
        what = (
            f"a text does not fill {few(list(map(described, others)))}" if others else f"no input of {inputs} takes ids"
        )
        raise BadInput(f"{inputs.source}: {what}. {inputs.as_arrays}")
    twice = [role for role in set(roles.values()) if list(roles.values()).count(role) > 1]
    flat = [inputs.ports[name] for name in roles if _rank(inputs, name) not in (None, 2) or name in inputs.shared]
    if twice or flat:
        shown = ", ".join(map(described, flat)) or f"{twice[0]} twice, as {', '.join(roles)}"
        raise BadInput(f"{inputs.source}: texts have the shape (rows, tokens); it takes {shown}. {inputs.as_arrays}")
    lengths = {name: shape[1] for name in roles if (shape := inputs.ports[name].shape) and isinstance(shape[1], int)}
    if len(set(lengths.values())) > 1:
        raise BadInput(
            f"{inputs.source}: its inputs of text have different fixed lengths: {inputs}. {inputs.as_arrays}"
        )
    length = next(iter(lengths.values()), None)
    if MASK not in roles.values():
        said = "are not padded: those of equal length share a batch"
        if length is not None:
            said = f"of fewer than {length} tokens are padded, and it takes that for text, as when it is served"
        log.warning("%s: the network has no attention mask, so texts %s", inputs.source, said)
    return TextInputs(inputs, roles, length)


def _rank(inputs: Takes, name: str) -> int | None:
    shape = inputs.ports[name].shape
    return None if shape is None else len(shape)


def text_feeds(
    text: TextInputs,
    samples: Sequence[Sample],
    tokenizer: Any,
    *,
    seq_len: int | None,
    batching: Batching,
    origin: str,
    masks: bool = False,
) -> Feeds:
    """Tokenise, cut and put together, sorted by length; each batch is padded to its longest text, or to a fixed length.

    A network that is not told of padding gets none: texts of equal length share a batch, unless its length is fixed.
    Args:
        seq_len: most tokens; None: as many as are fixed, or 128, or fewer where the tokenizer says so.
        masks: some tokens of each text are masked, and the labels are what they were.
    Raises: BadInput: a sample without text, an option out of range, ids that the network does not know.
    """
    longest = _longest(text, samples, tokenizer, seq_len)
    wanted = [role for role in (MASK, TYPES) if role in text.roles.values()]
    made = encoded(samples, tokenizer, wanted, longest)
    found = sorted(zip(made, samples, strict=True), key=lambda row: len(row[0][IDS]))
    widths = _widths(text, [len(row[IDS]) for row, _ in found], batching)
    filler = _filler(text, tokenizer, padded=any(w > len(row[IDS]) for w, (row, _) in zip(widths, found, strict=True)))
    rows: list[Batch] = []
    labels: list[Label] = []
    left = tokenizer.padding_side == "left"
    skipped = _skipped(samples, tokenizer, longest)
    for width, (row, sample) in zip(widths, found, strict=True):
        label = target_of(sample, row, width, left=left)
        if masks:
            row, hidden = masked(row, tokenizer)
            label = padded_ids(hidden, width, left=left)
        filled = _row(text, row, width, filler, sample.source, left=left)
        if sample.prompt is not None:
            behind = _behind(row, skipped[sample.prompt], width, sample.source, left=left)
            filled = {**filled, READ: behind}
        rows.append(filled)
        labels.append(label)
    warn_of_unknown(tokenizer, [row[IDS] for row, _ in found], origin)
    return grouped(rows, labels, origin, batching)


def encoded(
    samples: Sequence[Sample], tokenizer: Any, wanted: Sequence[str], longest: int
) -> list[Mapping[str, list[int]]]:
    """What a tokenizer makes of each text or pair, cut to `longest` tokens; the tokenizer is left as it is.

    Args: wanted: what is needed beside the ids.
    Raises: BadInput: it cannot take a text, or does not make what is wanted.
    """
    tokenizer = copy.deepcopy(tokenizer)  # truncation set on a fast one would stay, and end up in its saved file
    options = {"truncation": True, "max_length": longest} | {f"return_{each}": each in wanted for each in (MASK, TYPES)}
    found = []
    for sample in samples:  # one by one: a list cannot mix single texts and pairs
        try:
            # Words with tags too: word by word, tokenizers of bytes would not see the spaces that they have in texts.
            found.append(tokenizer(sample.text, sample.text_pair, **options))
        except Exception as err:  # what tokenizers raises is no narrower
            raise BadInput(
                f"{sample.source}: the tokenizer cannot take this text: {err}. Delete that row, or save the tokenizer"
                " again with its unknown token."
            ) from err
    missing = [name for name in wanted if found and name not in found[0]]
    if missing:
        raise BadInput(
            f"The network takes {', '.join(missing)}, but the tokenizer does not make that (it makes"
            f" {', '.join(found[0])}). Use the tokenizer that was saved with this network."
        )
    return found


def _skipped(samples: Sequence[Sample], tokenizer: Any, longest: int) -> dict[str, int]:
    """Tokens that each prompt takes at the beginning of a text, with what the tokenizer puts there itself."""
    prompts = sorted({sample.prompt for sample in samples if sample.prompt})
    if not prompts:
        return {"": 0}
    made = encoded([Sample(prompt) for prompt in prompts], tokenizer, [], longest)
    counts = [len(row[IDS]) - (row[IDS][-1] in tokenizer.all_special_ids) for row in made]
    return {"": 0, **dict(zip(prompts, counts, strict=True))}


def _behind(row: Mapping[str, list[int]], skipped: int, width: int, where: str, *, left: bool) -> Tensor:
    """Places in the text of the tokens behind a prompt, (1, width), from 1 on; 0 elsewhere."""
    count = len(row[IDS])
    if skipped >= count:
        raise BadInput(
            f"{where}: of {count} tokens its prompt takes all, and the embedding is of those behind it. Give a higher "
            "--seq-len."
        )
    places = torch.zeros(1, width, dtype=torch.int64)
    start = width - count if left else 0
    places[0, start + skipped : start + count] = torch.arange(skipped + 1, count + 1)
    return places


def _longest(text: TextInputs, samples: Sequence[Sample], tokenizer: Any, seq_len: int | None) -> int:
    """Most tokens of a text."""
    for sample in samples:
        if sample.text is None:
            raise BadInput(f"{sample.source}: no text in this sample. {text.takes.source} takes {text.takes}.")
    if seq_len is not None and text.length is not None and seq_len > text.length:
        raise BadInput(
            f"--seq-len {seq_len}: {text.takes.source} takes exactly {text.length} tokens. Leave it out, or give at"
            f" most {text.length}."
        )
    longest = seq_len or text.length or min(SEQ_LEN, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add(pair=any(sample.text_pair is not None for sample in samples))
    if longest <= special:  # below this, truncation is silently given up and the rows come out longer
        raise BadInput(
            f"{longest} tokens a text leave no room: the tokenizer adds {special} special tokens. Use --seq-len"
            f" {special + 1} or more{'' if text.length is None else ', and a network of longer inputs'}."
        )
    return int(longest)


def _widths(text: TextInputs, lengths: Sequence[int], batching: Batching) -> list[int]:
    """Tokens of each row with its padding; rows are sorted by length."""
    if text.length is not None:
        return [text.length] * len(lengths)
    if MASK not in text.roles.values():
        return list(lengths)
    return [
        max(lengths[start : start + batching.size])
        for start in range(0, len(lengths), batching.size)
        for _ in lengths[start : start + batching.size]
    ]


def _filler(text: TextInputs, tokenizer: Any, *, padded: bool) -> dict[str, int]:
    """What fills padding; behind a mask any id does."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None and padded and MASK not in text.roles.values():
        raise BadInput(
            f"{text.takes.source} takes exactly {text.length} tokens, and the tokenizer has no padding token for short"
            ' texts. Set one, for example "pad_token" in its tokenizer_config.json.'
        )
    return {IDS: pad or 0, TYPES: tokenizer.pad_token_type_id or 0}


def _row(
    text: TextInputs, row: Mapping[str, list[int]], width: int, filler: Mapping[str, int], where: str, *, left: bool
) -> Batch:
    count = len(row[IDS])
    start = width - count if left else 0
    made: dict[str, Tensor] = {}
    for name, role in text.roles.items():
        # Positions of right padding go on counting, as a position is an index of a table; those of left padding are 0.
        fill = torch.full((1, width), filler.get(role, 0), dtype=torch.int64)
        values = torch.arange(width - start) if role == POSITIONS else torch.tensor(row[role])
        fill[0, start : start + len(values)] = values
        made[name] = fill
    made = fitted(text.takes, made, where)
    if text.name(MASK) not in (None, MASK):  # what reads the batch tells padding by this name
        made[MASK] = made[str(text.name(MASK))].to(torch.int64)
    return made
