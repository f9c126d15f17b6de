"""A matrix of measurements as a TOML file: every engine, precision, number of threads, batch and length of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from optin_deploy.common.validation import STORED, validated
from optin_deploy.errors import BadInput
from optin_deploy.files.toml import read_toml
from optin_deploy.jobs.bench import BenchSettings
from optin_deploy.measuring.points import Point

HINT = 'Give lists such as engines = ["onnx"], batch = [1, 8], seq = [128], threads = [2].'
MOST_CASES = 500
"""Each takes half a minute or more."""


@dataclass(frozen=True)
class Suite:
    """The lists of a file."""

    __pydantic_config__ = STORED

    batch: tuple[int, ...] = (1,)
    seq: tuple[int, ...] = ()
    """Tokens; none = the calibration length."""
    engines: tuple[str, ...] = ("onnx",)
    precisions: tuple[str, ...] = ()
    """None = each engine's default."""
    threads: tuple[int, ...] = (0,)
    memory: bool = False
    """Measure peak memory too."""
    device_time: bool = False
    """Measure the time on the device too; every engine must be able to."""

    def __post_init__(self) -> None:
        cases = (self.engines, self.precisions or (None,), self.threads), (self.batch, self.seq or (None,))
        if not all(1 <= math.prod(map(len, lists)) <= MOST_CASES for lists in cases):
            raise BadInput(f"a suite needs 1 to {MOST_CASES} cases of 1 to {MOST_CASES} points")
        _ = self.points  # each is checked
        for name in ("batch", "seq", "engines", "precisions", "threads"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise BadInput(f"{name} names one value twice. Give each once")

    @property
    def points(self) -> tuple[Point, ...]:
        """Every batch at every length."""
        return tuple(Point(batch, seq) for batch, seq in product(self.batch, self.seq or (None,)))

    def benches(self) -> Iterator[BenchSettings]:
        """Every other combination, each with all points."""
        for engine, precision, threads in product(self.engines, self.precisions or (None,), self.threads):
            yield BenchSettings(engine, precision, self.points, threads, self.memory, self.device_time)


def read_suite(path: Path) -> Suite:
    """Read a TOML file.

    Raises: BadInput: absent, no TOML, too large, an unknown name or a wrong type.
    """
    data = read_toml(path, f"--suite {path}", HINT)
    return validated(Suite, data, f"--suite {path}", HINT)
