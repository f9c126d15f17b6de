"""Names of the models that belong together in a repository."""

from __future__ import annotations

TEXT = "TEXT"
"""The input of a model that takes texts."""


def dense_of(name: str) -> str:
    """The dense model that is served beside a pruned one."""
    return f"{name}-dense"


def tokenizer_of(name: str) -> str:
    """What makes ids of texts for a model."""
    return f"{name}-tokenizer"


def text_of(name: str) -> str:
    """A model that takes texts: the tokenizer, then the model."""
    return f"{name}-text"
