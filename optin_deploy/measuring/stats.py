"""Statistics of a measurement: percentiles, throughput, and the interval of a mean ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, stdtrit

from optin_deploy.errors import BadInput


def bootstrap_ci(
    log_ratios: Sequence[float] | np.ndarray, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap confidence interval of the geometric mean ratio, exp(mean(log_ratios)); percentiles, expanded.

    The bootstrap's spread is too small by sqrt((n - 1) / n) and its tails are normal, so that plain percentiles of 12
    replicates cover 91% instead of 95%: they are taken so far out that normal replicates give Student's t interval.
    Args: log_ratios: (replicates,), natural logs of unitless ratios; one per independent replicate (a block).
        resamples: how often the replicates are drawn again. level: coverage asked for, in (0, 1).
    Returns: (low, high), ratios.
    Raises: BadInput: fewer than 2 replicates, a non-finite one, or a level outside (0, 1).
    Source: Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 5.3.
    """
    logs = np.asarray(log_ratios, dtype=np.float64)
    if logs.ndim != 1 or logs.size < 2:
        raise BadInput(f"An interval needs 2 or more replicates in one row; got shape {logs.shape}.")
    if not np.isfinite(logs).all():
        raise BadInput(f"Log ratios must be finite; got {logs.tolist()}. Was a latency of 0 measured?")
    if not 0 < level < 1:
        raise BadInput(f"level is {level}; use a number between 0 and 1, e.g. 0.95.")
    drawn = np.random.default_rng(seed).integers(logs.size, size=(resamples, logs.size))
    means = logs[drawn].mean(axis=1)  # (resamples,)
    spread = math.sqrt(logs.size / (logs.size - 1))
    tail = ndtr(spread * stdtrit(logs.size - 1, (1 - level) / 2))
    low, high = np.exp(np.quantile(means, (tail, 1 - tail)))
    return float(low), float(high)


def percentile(samples: Sequence[float] | np.ndarray, q: float) -> float:
    """The q-th percentile (q in 0..100, linear interpolation), in the unit of the samples.

    Raises: BadInput: no samples, or q outside 0..100.
    """
    if len(samples) == 0:
        raise BadInput("There are no samples to take a percentile of.")
    if not 0 <= q <= 100:
        raise BadInput(f"Percentile {q} was asked; use 0 to 100.")
    return float(np.percentile(np.asarray(samples, dtype=np.float64), q))


def throughput(latency_ms: float, *, batch: int) -> float:
    """Samples per second of one client that sends batch after batch.

    Args: latency_ms: milliseconds for one batch. batch: samples in it.
    Raises: BadInput: a latency or batch that is not positive.
    """
    if not latency_ms > 0 or batch < 1:
        raise BadInput(f"Throughput needs a positive latency and batch; got {latency_ms} ms and batch {batch}.")
    return batch * 1000.0 / latency_ms
