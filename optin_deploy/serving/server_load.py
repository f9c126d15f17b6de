"""The load under which a server's latency is measured, and how long its answers are waited for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optin_deploy.errors import BadInput
from optin_deploy.measuring.points import BLOCKS

TIMEOUT_SECONDS = 30.0
"""Default of the seconds that any answer may take."""


@dataclass(frozen=True)
class ServerLoad:
    """How a server is loaded while its latency is measured from the client's side."""

    concurrencies: Sequence[int] = (1, 4, 16)
    """Clients that ask at the same time, one number after the other; without any, latency is not measured."""
    batch: int = 1
    """Samples a request."""
    seconds: float = 1.0
    """Seconds of load on each model, at each concurrency, in each block."""
    blocks: int = BLOCKS
    seed: int = 0
    """Draws the order within the blocks."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.seconds <= 0 or any(each < 1 for each in self.concurrencies):
            given = f"--batch {self.batch}, --seconds {self.seconds:g}, --concurrency {list(self.concurrencies)}"
            raise BadInput(f"{given}: all above zero.")
