"""What every engine can do at run time: take named arrays, give named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

import numpy as np

Feeds = Mapping[str, np.ndarray]
"""Named input arrays, batch first."""


class Runtime(Protocol):
    """One loaded model on one engine; a context manager that frees the engine on exit."""

    engine: str
    """Name in the engine table, e.g. `onnx`."""

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once; all outputs by name, in host memory."""

    def synchronize(self) -> None:
        """Return only when all started work is done (a no-op on CPU engines)."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
