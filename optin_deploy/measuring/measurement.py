"""What was measured of a dense and a pruned artifact at one point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optin_deploy.measuring.device_time import DeviceTime
from optin_deploy.measuring.timing import PairTiming

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Measurement:
    """Dense against pruned at one point, with the raw samples."""

    engine: str
    batch: int
    seq_len: int | None
    """Tokens a sample; None: its inputs have no length."""
    threads: int
    """Intra-op threads; 0: it does not compute on the CPU."""
    ideal: float
    """Dense MACs / pruned MACs at this length: the speed-up if time were MACs."""
    timing: PairTiming
    precision: str = "fp32"
    peak_bytes: Mapping[str, int] | None = None
    """Host memory that `dense` and `pruned` take beyond the libraries; None: not measured."""
    device_time: DeviceTime | None = None
    """Time without the transfers that `timing` includes; None means that it was not measured."""
    dense_engine: str | None = None
    """Engine of the dense model; None means that it is `engine`."""
    dense_precision: str | None = None
    """Precision of the dense model; None means that it is `precision`."""

    @property
    def beside(self) -> str:
        """What the dense model is, if it is of another type or engine than the pruned one; else empty."""
        return beside(self.engine, self.precision, self.dense_engine, self.dense_precision)

    @property
    def speedup(self) -> float:
        """Dense over pruned latency."""
        return self.timing.speedup

    @property
    def realised(self) -> float:
        """Share of the ideally saved time that is really saved: (1 - 1/speedup) / (1 - 1/ideal)."""
        return (1 - 1 / self.timing.speedup) / (1 - 1 / self.ideal) if self.ideal > 1 else 1.0

    def to_json(self) -> dict[str, Any]:
        """A row of report.json's `latency`."""
        t = self.timing
        throughput = t.throughput(self.batch)
        settings = {k: getattr(self, k) for k in ("engine", "precision", "batch", "seq_len", "threads", "ideal")}
        return {
            **settings,
            "dense_engine": self.dense_engine or self.engine,
            "dense_precision": self.dense_precision or self.precision,
            **({} if self.peak_bytes is None else {"peak_bytes": dict(self.peak_bytes)}),
            **({} if self.device_time is None else {"device_time": self.device_time.to_json(t)}),
            "dense": latency_figures(t.dense, throughput[0], t.load_ms["dense"]),
            "pruned": latency_figures(t.pruned, throughput[1], t.load_ms["pruned"]),
            **t.to_json(),
            "realised": self.realised,
            "machine": [*t.states],
        }


def beside(engine: str, precision: str, dense_engine: str | None, dense_precision: str | None) -> str:
    """What a dense model is that a pruned one was measured beside; empty if of the same engine and type, or None."""
    what = (dense_engine or engine, dense_precision or precision)
    if what == (engine, precision):
        return ""
    return f"beside {what[1]} dense" + ("" if what[0] == engine else f" on {what[0]}")


def latency_figures(latency: Callable[[float], float], throughput: float, load_ms: float) -> dict[str, float]:
    """What is written of one model at one point.

    Args: latency: the q-th percentile in milliseconds. throughput: samples a second. load_ms: from file to session.
    """
    return {**{f"p{q}_ms": latency(q) for q in PERCENTILES}, "throughput": throughput, "load_ms": load_ms}
