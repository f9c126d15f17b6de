"""What every server's file does: say what it can serve, and write the files that name the served versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from optin_deploy.serving.manifest import Manifest

Files = Mapping[str, str | bytes]
"""Relative path -> content, in the order in which they are written; the last one is what switches."""
Rows = Mapping[str, np.ndarray]
"""Recorded inputs by name, rows first."""


class Server(Protocol):
    """One inference server. A new one is one file with this protocol and one line in the table of `__init__.py`."""

    name: str
    artifacts: Mapping[str, str]
    """Engine -> name of its artifact in a version's folder."""
    side_by_side: bool
    """Can it serve two versions of one model at the same time?"""
    tokenizes: bool
    """Can it take texts (`--text`)?"""
    unheard: tuple[str, ...]
    """Names of the `ServingOptions` that it has no setting for."""

    def check(self, manifest: Manifest) -> None:
        """Refuse what this server would not serve.

        Raises: BadInput.
        """

    def model_files(self, served: Sequence[Manifest], rows: Rows) -> Files:
        """Files of a model's folder.

        Args: served: its served versions, rising. rows: recorded with the last of them; empty: none are.
        """

    def root_files(self, models: Mapping[str, Sequence[Manifest]]) -> Files:
        """Files beside the models' folders.

        Args: models: every model of the repository, with its served versions.
        """
