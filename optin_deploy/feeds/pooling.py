"""How the states of a text's tokens become one vector: their mean, or the first of them, as the model was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from optin_deploy.errors import BadInput
from optin_deploy.files.storage import read_json

POOLINGS = ("mean", "cls")
"""`mean` over real tokens; `cls`: the first real token."""
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


def pooling_in(folder: Path) -> str | None:
    """How the config.json in a folder says that states are pooled; None: there is none.

    Raises: BadInput: it is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    return str(read_json(path, "Run the export again.").get(POOLING, POOLINGS[0]))


def set_pooling(config: Any, pooling: str) -> None:
    """Note in a config how the states are pooled."""
    if pooling != POOLINGS[0]:
        setattr(config, POOLING, pooling)


def pooled_states(states: Tensor, valid: Tensor, pooling: str) -> Tensor:
    """One vector a sample.

    Args: states: (batch, tokens, hidden). valid: (batch, tokens), 0 or 1, of the type of the states.
    Returns: (batch, hidden).
    """
    if pooling == "cls":
        valid = valid * (valid.cumsum(1) == 1).to(valid)  # (batch, tokens): 1 at the first real token
    weights = valid.unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1)
