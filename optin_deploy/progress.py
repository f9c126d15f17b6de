"""How long work reports how far it is: a function of (done, total), drawn by whoever called."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], object]
"""Called as progress(done, total)."""


def silent(done: int, total: int) -> None:
    """The default: say nothing."""
