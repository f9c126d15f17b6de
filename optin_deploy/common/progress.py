"""How long work reports how far it is: functions that whoever called may draw."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

Progress = Callable[[int, int], object]
"""Called as progress(done, total)."""
Stage = Callable[[str], AbstractContextManager[Progress]]
"""Called as `with stage(title) as progress:` around one long step."""


def silent(done: int, total: int) -> None:
    """The default: say nothing."""


def silent_stage(title: str) -> AbstractContextManager[Progress]:
    """The default: no titles either."""
    return nullcontext(silent)
