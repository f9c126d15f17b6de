"""Words with a tag each become the tokens that their text has, and the tag of a word stands at its first token."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from optin_deploy.data.samples import Sample
from optin_deploy.feeds.targets import target_of
from optin_deploy.feeds.text_feeds import encoded
from support import tiny_checkpoint as tiny

WORDS = ("Ada", "lives", "in", "Paris", ",", "naïve", "New York", "日本")
SPECIAL = ["<s>", "</s>", "<unk>"]
SENTENCES = ["Ada lives in Paris and Ada likes Paris , a naïve town"] * 20


def by_bytes(*, trim: bool, prefix: bool) -> Any:
    """A tokenizer as that of RoBERTa: a token begins with the space before its word."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL)
    made.train_from_iterator(SENTENCES, trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim, prefix)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="</s>", unk_token="<unk>")


def by_pieces() -> Any:
    """A tokenizer as that of Llama: only the first word of a text gets a mark before it."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="</s>", unk_token="<unk>")


def tagged(tokenizer: Any, words: tuple[str, ...]) -> tuple[list[int], list[int | None]]:
    """Ids of the words, and the number of the word that each of them is the first of."""
    sample = Sample(" ".join(words), words=words, label=tuple(range(len(words))))
    (row,) = encoded([sample], tokenizer, [], 60)
    label = target_of(sample, row, len(row["input_ids"]), left=False)
    assert isinstance(label, tuple)
    return row["input_ids"], [None if each is None else int(each) for each in label]


MAKERS = {
    "bytes": lambda: by_bytes(trim=False, prefix=False),
    "roberta": lambda: by_bytes(trim=True, prefix=False),
    "prefixed": lambda: by_bytes(trim=True, prefix=True),
    "pieces": by_pieces,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_words_have_the_tokens_of_their_text(kind: str) -> None:
    tokenizer = MAKERS[kind]()
    ids, first = tagged(tokenizer, WORDS)
    assert ids == tokenizer(" ".join(WORDS))["input_ids"]
    assert [each for each in first if each is not None] == list(range(len(WORDS)))
    for number in range(4):
        token = tokenizer.convert_ids_to_tokens(ids[first.index(number)])
        assert token.lstrip("Ġ▁") == WORDS[number], "known words are one token"


def test_words_of_bert_have_the_tokens_that_they_have_alone() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.bert())
    words = ("museum", "unheard", "of", ".", "the", "river's", "co-owner")
    ids, first = tagged(tokenizer, words)
    wanted = tokenizer(list(words), is_split_into_words=True)
    assert ids == wanted["input_ids"]
    pairs = zip([None, *wanted.word_ids()], wanted.word_ids(), strict=False)
    assert first == [None if each == last else each for last, each in pairs]
