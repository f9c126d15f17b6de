"""Timings with known ratios, in the place of measured ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from optin_deploy.measuring.measurement import Measurement
from optin_deploy.measuring.timing import PairTiming

BLOCKS = 12


def made(ratio: float, *, spread: float = 0.0, same: float = 1.0) -> PairTiming:
    """A candidate that takes `ratio` times the baseline's 10 ms.

    Args: spread: its block medians lie this far below and above in turn, as a factor's logarithm.
        same: what the baseline's second session takes, as a factor of its first.
    """
    signs = [1 if block % 2 else -1 for block in range(BLOCKS)]
    return PairTiming(
        dense_ms=((10.0,) * 3,) * BLOCKS,
        pruned_ms=tuple((10.0 * ratio * math.exp(spread * sign),) * 3 for sign in signs),
        again_ms=((10.0 * same,) * 3,) * BLOCKS,
        seed=0,
        load_ms={"dense": 2.0, "pruned": 1.0},
    )


HOLDS, STRADDLES, FAILS, UNSTABLE = made(0.9), made(1.05, spread=0.03), made(1.2), made(1.2, same=1.1)
"""At a limit of 1.05."""

TIMING = PairTiming(
    dense_ms=((6.0, 6.0, 8.0), (6.0,)),
    pruned_ms=((4.0, 4.0, 4.0), (4.0,)),
    again_ms=((6.0, 6.0, 6.0), (6.0,)),
    seed=0,
    load_ms={"dense": 30.0, "pruned": 20.0},
)
"""Medians 6 and 4 ms in both blocks: exactly 1.5x."""
MEASURED = Measurement(engine="onnx", batch=3, seq_len=16, threads=2, ideal=2.0, timing=TIMING)


class FakeMeasuring:
    """Stands in for `measure_pair`: gives these timings in turn, and notes what it was asked to measure."""

    def __init__(self, timings: Sequence[PairTiming]) -> None:
        self.timings = list(timings)
        self.outputs: list[tuple[Any, Any]] = []
        """Of the baseline and of the candidate, which both ran once on the same feeds."""
        self.feeds: list[Any] = []

    def __call__(self, open_dense: Any, open_pruned: Any, feeds: Any, **options: Any) -> PairTiming:
        with open_dense() as first, open_pruned() as second:
            self.outputs.append((first.run(feeds), second.run(feeds)))
        self.feeds.append(feeds)
        return self.timings.pop(0)
