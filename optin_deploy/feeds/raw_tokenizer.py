"""Hold the tokenizer that transformers builds to tokenizer.json itself, on real texts.

transformers chooses a class by tokenizer_config.json or the model's type, and builds it anew around the vocabulary of
tokenizer.json. Where that class is another one than the file was made with, the ids are wrong, without a word.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer

from optin_deploy.data.samples import Sample
from optin_deploy.errors import BadInput
from optin_deploy.files.opening import short

log = logging.getLogger(__name__)

PROBES = (
    "The quick brown fox, aged 27, didn't jump over 3.5 lazy dogs (in 2024)!",
    "Ünïcödé naïve CAFÉ Straße Übergrößenträger e\u0301te\u0301 İstanbul ﬁne",
    "HTML <b>tags</b> & http://example.org/a_b?c=d#e  two  spaces\tand a tab",
    "東京は日本の首都です。 中文分词 한국어 Привет, мир! مرحبا بالعالم नमस्ते 🙂",
)
"""Case, accents, digits, punctuation, spaces and scripts: where settings that were read wrongly show."""
COMPARED = 4000
"""Characters of a text that are compared."""
MANY_UNKNOWN = 0.03
"""Share of unknown tokens above which a tokenizer, or the language of the texts, may be the wrong one."""
SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def raw_tokenizer(content: bytes, where: str) -> Tokenizer:
    """What a tokenizer.json holds, without truncation and padding.

    Raises: BadInput: it cannot be used.
    """
    try:
        raw = Tokenizer.from_str(content.decode("utf-8"))
    except Exception as err:  # tokenizers raises bare Exception
        raise BadInput(f"{where} is not a tokenizer of the `tokenizers` package: {short(str(err), 300)}.") from err
    raw.no_truncation()
    raw.no_padding()
    return raw


def as_in_file(tokenizer: Any, content: bytes, rows: Sequence[Sample], config: Any, where: str) -> Any:
    """The tokenizer, if its ids are those of tokenizer.json; else one that is made of the file alone.

    Args: content: of tokenizer.json. rows: what is compared. where: names the file.
    Raises: BadInput: the file cannot be used, or its ids differ from those of the tokenizer that it makes.
    """
    raw = raw_tokenizer(content, where)
    first = first_difference(tokenizer, raw, rows)
    if first is None:
        return tokenizer
    message = (
        f"{where} and the tokenizer that transformers builds beside it ({type(tokenizer).__name__}, by "
        f"tokenizer_config.json or the model's type) give other ids, first for {short(first.text)} ({first.source})"
    )
    own = of_file(content, raw, tokenizer)
    if first_difference(own, raw, rows) is not None or not _survives_saving(own, content, raw, rows, config):
        raise BadInput(
            f"{message}, and tokenizer.json alone does not give them either. Save the model's own tokenizer again with "
            "save_pretrained, so that both agree."
        )
    log.warning("%s. tokenizer.json is used, saved and shipped as it is.", message)
    return own


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence our own warnings, which would name the copies of a trial."""
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def first_difference(tokenizer: Any, raw: Tokenizer, rows: Sequence[Sample]) -> Sample | None:
    """The first row to which a transformers tokenizer gives other ids or token types than the raw one, or none."""
    for row in rows:
        text, pair = ((text or "")[:COMPARED] for text in (row.text, row.text_pair))
        texts = (text,) if row.text_pair is None else (text, pair)
        encoded = raw.encode(*texts)
        try:
            found = tokenizer(*texts, return_token_type_ids=True, verbose=False)
        except Exception:  # noqa: BLE001  # tokenizers raises bare Exception, for instance without an unknown token
            return row
        if (list(found["input_ids"]), list(found["token_type_ids"])) != (encoded.ids, encoded.type_ids):
            return row
    return None


def warn_of_unknown(tokenizer: Any, rows: Sequence[Sequence[int]], origin: str) -> None:
    """Say so if many tokens of the texts are unknown to the tokenizer.

    Args: rows: the ids of each text, without padding. origin: names the texts.
    """
    special = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep"))
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in special:
        return
    count, total = sum(list(row).count(unknown) for row in rows), sum(map(len, rows))
    if count > MANY_UNKNOWN * total:
        log.warning(
            "%s: %.0f%% of the tokens are unknown to the tokenizer (%s): it belongs to another model, or the "
            "texts are in a language that the model does not know.",
            origin,
            100 * count / total,
            tokenizer.unk_token,
        )


def of_file(content: bytes, raw: Tokenizer, tokenizer: Any) -> Any:
    """A tokenizer around the file as it is, with those special tokens of another one that the file knows."""
    named = {name: getattr(tokenizer, name, None) for name in SPECIAL}
    named["pad_token"] = next(
        (each for each in (named["pad_token"], "[PAD]", "<pad>") if each and raw.token_to_id(str(each)) is not None),
        None,
    )
    known = {name: str(token) for name, token in named.items() if token and raw.token_to_id(str(token)) is not None}
    kind: Any = transformers.PreTrainedTokenizerFast
    return kind(
        tokenizer_object=Tokenizer.from_str(content.decode("utf-8")),
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **known,
    )


def _survives_saving(tokenizer: Any, content: bytes, raw: Tokenizer, rows: Sequence[Sample], config: Any) -> bool:
    """Does what will be saved give the same ids when transformers reads it?"""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_bytes(content)
        again = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return first_difference(again, raw, rows) is None
