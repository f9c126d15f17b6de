"""What a model takes and gives: the names and shapes of its inputs, examples of them, its output."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput


def input_names(model: nn.Module) -> tuple[str, ...]:
    """Input names in the order of CONTRACT: text with or without token types, or images."""
    if getattr(model, "main_input_name", "") == "pixel_values":
        return ("pixel_values",)
    types = getattr(model.config, "type_vocab_size", 0) > 1
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    return ("input_ids", "attention_mask", *(("token_type_ids",) if types and takes_types else ()))


def gives_logits(model: nn.Module) -> bool:
    """Does the model classify (output `logits`), or give states (`last_hidden_state`)?"""
    return "Classification" in type(model).__name__


def example_inputs(model: nn.Module, *, batch: int, seq_len: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs without padding: (batch, seq_len) ids, or (batch, channels, height, width) pixels.

    Raises: BadInput: seq_len is longer than the model's position table.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    names = input_names(model)
    if names == ("pixel_values",):
        size = config.image_size
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


def check_seq_len(config: Any, seq_len: int) -> None:
    """Refuse a length that the position table does not hold.

    Raises: BadInput: names the longest length possible.
    """
    table = getattr(config, "max_position_embeddings", None)
    # RoBERTa-like models number positions from pad_token_id + 1.
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
    if seq_len < 1 or (table is not None and seq_len > table - offset):
        raise BadInput(f"--seq-len {seq_len}: possible are 1 to {table - offset if table else 'any'} for this model.")
