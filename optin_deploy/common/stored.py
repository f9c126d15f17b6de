"""JSON files of ours: each kind states its version and the next step once; all are read, written and hashed alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from optin_deploy.common.validation import STORED, validated
from optin_deploy.errors import BadInput


@dataclass(frozen=True)
class Stored:
    """One kind of file: a subclass states what stands here, and has the other entries of the file as its fields."""

    schema_version: ClassVar[int] = 1
    """Version that is written, and read; raised when the meaning of the file changes."""
    older: ClassVar[tuple[int | None, ...]] = ()
    """Earlier versions that are read as well; None: it may be left out."""
    what: ClassVar[str] = "of this version"
    """What a file that is refused is not, such as `a pin of this version`."""
    hint: ClassVar[str]
    """The next step where a file is absent or refused; `{folder}` stands for the folder that it lies in."""

    __pydantic_config__ = STORED
    """How a file is checked; values in its fields are checked likewise, unless they state it themselves."""

    @classmethod
    def read(cls, path: Path, hint: str = "") -> Self:
        """Read a file.

        Args: hint: in place of the kind's own.
        Raises: BadInput: names the file, the field and the hint: absent, damaged, edited, or of another version.
        """
        from optin_deploy.files.storage import read_json  # here, as below: commands take defaults of such values

        hint = hint or cls.hint.replace("{folder}", str(path.parent))
        return cls.from_json(read_json(path, hint, ours=True), f"{path}: ", hint)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "", hint: str = "") -> Self:
        """Make one of what `to_json` gave.

        Args: where: starts an error. hint: ends it, in place of the kind's own.
        Raises: BadInput: of another version, or a field is missing, unknown, of the wrong type or impossible.
        """
        message, hint = f"{where}not {cls.what}", hint or cls.hint
        version, readable = data.get("schema_version"), cls.readable(data)
        if version not in readable or isinstance(version, bool | float):
            possible = " and ".join(str(each) for each in readable if each is not None)
            found = ascii(version)[:60] if "schema_version" in data else "is missing"
            raise BadInput(f"{message}: schema_version {found}; this version of optin-deploy reads {possible}. {hint}")
        return validated(cls, {name: each for name, each in data.items() if name != "schema_version"}, message, hint)

    @classmethod
    def readable(cls, data: Mapping[str, Any]) -> tuple[int | None, ...]:
        """Versions of which this data may be."""
        return (*cls.older, cls.schema_version)

    @classmethod
    def is_at(cls, path: Path) -> bool:
        """Is there a file of this kind, that can be read?"""
        try:
            cls.read(path)
        except BadInput:
            return False
        return True

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict: what the file holds."""
        return {"schema_version": self.schema_version, **asdict(self)}

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        from optin_deploy.files.storage import write_json

        write_json(path, self.to_json())

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON."""
        from optin_deploy.files.storage import sha256_json

        return sha256_json(self.to_json())
