"""What is to be published to an inference server, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.jobs.job import Job
from optin_deploy.serving.manifest import ServingOptions, check_name, check_version

DENSE = ("models", "versions", "none")


@dataclass(frozen=True)
class ShipOrder:
    """What is to be published, and how."""

    server: str
    out: Path
    """Folder of the repository."""
    name: str
    version: int | None = None
    """None: the next one."""
    engine: str = Job.engine
    precision: str | None = None
    dense: str = "models"
    """Way in which the dense model is served too: one of two `models`, one of two `versions`, or not at all
    (`none`)."""
    text: bool = False
    """Whether a model that takes texts is published too."""
    options: ServingOptions = ServingOptions()  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.version is not None:
            check_version(self.version)
        if self.dense not in DENSE:
            raise BadInput(f"unknown --dense {self.dense!r}; possible: {', '.join(DENSE)}.")
