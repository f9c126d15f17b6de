"""What a model takes and gives: the names and shapes of its inputs, examples of them, its output."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.network.examples import SERVED_SIZE as IMAGE_SIZE

LOGITS = ("Classification", "QuestionAnswering", "CausalLM", "MaskedLM", "LMHead")
"""Parts of the names of classes that put out logits."""
SOUND = ("input_values", "input_features")
"""Main inputs of models that take sound: waves, or spectra."""
VOLATILE = ("architectures", "dtype", "transformers_version")
"""Entries of a config that may differ between a model in memory and the same model read back."""


def takes_images(model: nn.Module) -> bool:
    """Does the model take pixel_values?"""
    return bool(getattr(model, "main_input_name", "") == "pixel_values")


def takes_text(model: nn.Module) -> bool:
    """Does the model take input_ids, and neither images nor sound?"""
    return not takes_images(model) and getattr(model, "main_input_name", "") not in SOUND


def input_names(model: nn.Module) -> tuple[str, ...]:
    """Input names in the order of CONTRACT: text with or without token types, or images."""
    if takes_images(model):
        return ("pixel_values",)
    types = getattr(model.config, "type_vocab_size", 0) > 1
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    return ("input_ids", "attention_mask", *(("token_type_ids",) if types and takes_types else ()))


def gives_logits(model: nn.Module) -> bool:
    """Does the model put out `logits`, of a row or of each token, or states (`last_hidden_state`)?"""
    return any(words in type(model).__name__ for words in LOGITS)


def example_inputs(model: nn.Module, *, batch: int, seq_len: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs without padding: (batch, seq_len) ids, or (batch, channels, height, width) pixels.

    Raises: BadInput: seq_len is longer than the model's position table.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    names = input_names(model)
    if names == ("pixel_values",):
        size = getattr(config, IMAGE_SIZE, None) or config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {"pixel_values": torch.randn(batch, config.num_channels, height, width, generator=generator)}
    check_seq_len(config, seq_len)
    values = {
        # id 0 and the first few are special in most vocabularies
        "input_ids": torch.randint(
            min(5, config.vocab_size - 1), config.vocab_size, (batch, seq_len), generator=generator
        ),
        "attention_mask": torch.ones(batch, seq_len, dtype=torch.long),
        "token_type_ids": torch.zeros(batch, seq_len, dtype=torch.long),
    }
    return {name: values[name] for name in names}


def config_settings(model: nn.Module) -> dict[str, Any]:
    """The config without what may change when it is saved and read: paths, dtype, versions."""
    config: Any = model.config
    return {k: v for k, v in config.to_dict().items() if k not in VOLATILE and not k.startswith("_")}


def check_seq_len(config: Any, seq_len: int) -> None:
    """Refuse a length that the position table does not hold.

    Raises: BadInput: names the longest length possible.
    """
    longest = longest_text(config)
    if seq_len < 1 or (longest is not None and seq_len > longest):
        raise BadInput(f"--seq-len {seq_len}: possible are 1 to {longest or 'any'} tokens for this model.")


def longest_text(config: Any) -> int | None:
    """Tokens that the position table holds; None if there is no table."""
    table = getattr(config, "max_position_embeddings", None)
    # RoBERTa-like models number positions from pad_token_id + 1.
    shifted = getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert")
    offset = (config.pad_token_id or 0) + 1 if shifted else 0
    return None if table is None else int(table - offset)
