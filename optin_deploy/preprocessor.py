"""The tokenizer or image processor that was saved with a model."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from optin_deploy.errors import BadInput


def load_preprocessor(name: str, model: nn.Module) -> Any:
    """The tokenizer or image processor saved with a model.

    Raises: BadInput: its files are missing, or they belong to another vocabulary.
    """
    text = model.main_input_name != "pixel_values"
    auto: Any = transformers.AutoTokenizer if text else transformers.AutoImageProcessor
    kind = "tokenizer (tokenizer.json or vocab.txt)" if text else "preprocessor_config.json"
    try:
        preprocessor = auto.from_pretrained(name, config=model.config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as err:
        raise BadInput(f"{name} has no usable {kind}: {first_line(err)}. Save it beside the weights.") from err
    if text:
        check_tokenizer(preprocessor, model.config)
    return preprocessor


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Refuse a tokenizer that cannot belong to the model.

    transformers builds one of a few special tokens, silently, when the vocabulary files are missing.
    Raises: BadInput: hardly any ordinary token, or ids beyond `config.vocab_size`.
    """
    vocab = tokenizer.get_vocab()
    size = getattr(config, "vocab_size", None)
    ordinary = len(set(vocab) - set(tokenizer.all_special_tokens))
    # 4 letters are a vocabulary (DNA models), but not beside an embedding many times as large.
    if ordinary < 4 or (size is not None and ordinary < 100 and 4 * len(vocab) < size):
        raise BadInput(
            f"The tokenizer knows {len(vocab)} tokens, {ordinary} of them ordinary ones, and the model {size}: its"
            " vocabulary files are missing. Put tokenizer.json (or vocab.txt, merges.txt, *.model) beside config.json."
        )
    needed = max(vocab.values()) + 1
    if size is not None and needed > size:
        raise BadInput(
            f"The tokenizer needs {needed} embeddings, but config.vocab_size is {size}. Use the tokenizer saved"
            " with this model, or resize the model's embeddings before pruning."
        )


def first_line(err: Exception) -> str:
    """What an error says first."""
    return (str(err).strip().splitlines() or [type(err).__name__])[0]
