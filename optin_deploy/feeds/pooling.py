"""How the states of a text's tokens become one vector, as the model was trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.errors import BadInput

POOLINGS = ("mean", "cls", "lasttoken", "max", "weightedmean", "mean_sqrt_len_tokens")
"""Over the real tokens, by the names of sentence-transformers: their mean; the first of them; the last of them; the
largest of each entry; their mean with weights 1, 2, 3, ... by their places in the text; their sum by the root of
their number."""
POOLED = "sentence_embedding"
"""Name of the pooled output of a graph."""
POOLING = "sentence_pooling"
"""Our entry in a config, where it is not the mean: it stays with the model when that is saved."""


def pooling_of(model: nn.Module) -> str:
    """How a model's states are pooled.

    Raises: BadInput: its config names another way.
    """
    found = getattr(getattr(model, "config", None), POOLING, POOLINGS[0])
    if found not in POOLINGS:
        raise BadInput(f"config.json: {POOLING} is {found!r}; possible: {', '.join(POOLINGS)}.")
    return str(found)


def set_pooling(config: Any, pooling: str) -> None:
    """Note in a config how the states are pooled."""
    if pooling != POOLINGS[0]:
        setattr(config, POOLING, pooling)


def pooled_states(states: Tensor, valid: Tensor, pooling: str) -> Tensor:
    """One vector a sample.

    Args:
        states: (batch, tokens, hidden).
        valid: (batch, tokens), of the type of the states; 0 where a token does not count, else 1, or its place in the
            text from 1 on.
    Returns: (batch, hidden).
    """
    places, valid = valid, (valid > 0).to(valid)
    if pooling == "max":
        return states.masked_fill(valid.unsqueeze(-1) == 0, torch.finfo(states.dtype).min).amax(1)
    if pooling == "cls":
        valid = valid * (valid.cumsum(1) == 1).to(valid)  # (batch, tokens): 1 at the first real token
    elif pooling == "lasttoken":
        valid = valid * (valid.cumsum(1) == valid.sum(1, keepdim=True)).to(valid)
    elif pooling == "weightedmean":
        valid = places if places.max() > 1 else valid * valid.cumsum(1)
    weights = valid.unsqueeze(-1)
    count = weights.sum(1)
    return (states * weights).sum(1) / (count.sqrt() if pooling == "mean_sqrt_len_tokens" else count)
