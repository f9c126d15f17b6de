"""Options of engines: what artifacts are built with besides their precision, a frozen value of each engine's own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

from optin_deploy.errors import BadInput

if TYPE_CHECKING:
    from optin_deploy.exporters.profiles import Profile


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine that has none, and the base of those of others.

    Every field of another engine's options has a default; `__post_init__` refuses values that cannot be.
    """

    @classmethod
    def checked(cls, given: EngineOptions | None) -> Self:
        """Return options as this engine's own; None: its defaults.

        Raises: BadInput: they are those of another engine.
        """
        if given is None:
            return cls()
        if type(given) is not cls:
            raise BadInput(f"{type(given).__name__} are the options of another engine; this one takes {cls.__name__}.")
        return given

    def sizes(self) -> tuple[Profile, ...]:
        """Return the sizes of inputs that an artifact takes; none: it takes every size."""
        return ()

    def settings(self) -> dict[str, str]:
        """Return all that changes the artifact, as text."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}
