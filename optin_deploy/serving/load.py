"""Closed-loop load: so many clients, each of which asks again as soon as it has its answer; models interleaved."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np

from optin_deploy.measuring.points import BLOCKS
from optin_deploy.measuring.stats import bootstrap_ci, percentile

Ask = Callable[[], object]
"""Sends one request and waits for its answer."""


@dataclass(frozen=True)
class Burst:
    """Some seconds of load on one model."""

    seconds: float
    latencies_ms: tuple[float, ...]

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return len(self.latencies_ms) / self.seconds


@dataclass(frozen=True)
class LoadPoint:
    """All bursts at one concurrency, by model; entry b of all models is of the same block."""

    concurrency: int
    bursts: Mapping[str, tuple[Burst, ...]]

    def latency_ms(self, model: str, q: float) -> float:
        """The q-th percentile over all requests to a model."""
        return percentile(np.concatenate([burst.latencies_ms for burst in self.bursts[model]]), q)

    def per_second(self, model: str) -> float:
        """Answers a second, over all bursts."""
        bursts = self.bursts[model]
        return sum(len(burst.latencies_ms) for burst in bursts) / sum(burst.seconds for burst in bursts)

    def gain(self, dense: str, pruned: str, *, seed: int = 0) -> tuple[float, tuple[float, float]]:
        """Answers a second of `pruned` / `dense`: geometric mean over blocks, and its bootstrap 95% interval."""
        logs = [
            float(np.log(ours.per_second / theirs.per_second))
            for ours, theirs in zip(self.bursts[pruned], self.bursts[dense], strict=True)
        ]
        return float(np.exp(np.mean(logs))), bootstrap_ci(logs, level=0.95, seed=seed)

    def to_json(self) -> dict[str, Any]:
        """Everything, raw latencies too."""
        return {
            "concurrency": self.concurrency,
            "bursts": {
                model: [{"seconds": each.seconds, "latencies_ms": list(each.latencies_ms)} for each in bursts]
                for model, bursts in self.bursts.items()
            },
        }


def measure_load(
    askers: Mapping[str, Callable[[], Ask]],
    concurrencies: Sequence[int],
    *,
    seconds: float,
    blocks: int = BLOCKS,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[LoadPoint, ...]:
    """Load models one after the other, in blocks of random order.

    Args: askers: model -> gives each client its own connection. seconds: of each burst; at least one answer a client.
    Raises: whatever a request raises: a failed request is a failed measurement.
    """
    rng = random.Random(seed)
    clients = {model: [make() for _ in range(max(concurrencies))] for model, make in askers.items()}
    found: dict[int, dict[str, list[Burst]]] = {each: {model: [] for model in askers} for each in concurrencies}
    for model in askers:
        clients[model][0]()  # warm
    for _ in range(blocks):
        cells = [(concurrency, model) for concurrency in concurrencies for model in askers]
        rng.shuffle(cells)
        for concurrency, model in cells:
            found[concurrency][model].append(burst(clients[model][:concurrency], seconds, clock))
    return tuple(LoadPoint(each, {k: tuple(v) for k, v in found[each].items()}) for each in concurrencies)


def burst(clients: Sequence[Ask], seconds: float, clock: Callable[[], float] = time.perf_counter) -> Burst:
    """All clients ask for so long; requests that are under way at the end are waited for and counted."""
    ended = threading.Event()
    started = clock()

    def ask(client: Ask) -> list[float]:
        latencies: list[float] = []
        while not ended.is_set() and (not latencies or clock() - started < seconds):
            before = clock()
            client()
            latencies.append(1000 * (clock() - before))
        return latencies

    with ThreadPoolExecutor(len(clients)) as pool:
        asking = [pool.submit(ask, client) for client in clients]
        try:
            for each in as_completed(asking):
                each.result()
        finally:
            ended.set()  # one failed: the others need not go on
    return Burst(clock() - started, tuple(ms for each in asking for ms in each.result()))
