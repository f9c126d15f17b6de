"""A budget in time for a network of any kind: a latency table on the cut graph, a plan by it, measured and corrected.

Cut networks of given widths are written and timed beside the dense one, a fraction of a second each: nothing is
exported again. The table says which widths are worth their time; only the measurement says whether the budget is met.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from exporters.base import Exporter
from exporters.bench.time_budget import AIM, LEAST, ROUNDS, Round, as_asked, measured_ms
from optin_deploy.bench.environment import environment, installed_versions
from optin_deploy.bench.stats import percentile
from optin_deploy.bench.timing import PairTiming, Samples, mean_ratio, measure_pair, measure_together
from optin_deploy.budget import TimeTarget
from optin_deploy.cutting.graph import cut
from optin_deploy.errors import BadInput, InfeasibleBudget
from optin_deploy.jobs.pruning import Pick
from optin_deploy.network.write import write
from optin_deploy.planning.costs import Limit, costs_of
from optin_deploy.planning.latency import LatencyTable, TimeCost
from optin_deploy.planning.points import Cell, cells, keep_at, table_of
from optin_deploy.planning.widths import Choice, Keep
from optin_deploy.progress import Progress, Stage, silent, silent_stage
from optin_deploy.runtimes.base import Feeds, Runtime
from optin_deploy.structure.groups import Layout

DENSE = "dense"
BLOCKS, AT_ONCE = 6, 3
"""Of a table's measurements, and how many cut networks are open beside the dense one."""
NS = 10**6
"""Nanoseconds of a millisecond."""


@dataclass(frozen=True, eq=False)
class Yardstick:
    """One engine on this device, with one batch of inputs."""

    layout: Layout
    target: Exporter
    feeds: Feeds
    batch: int
    threads: int
    dense: Path
    """The dense network as a file."""

    @property
    def setting(self) -> dict[str, str | int]:
        """All that a table depends on besides the network."""
        env = environment()
        return {
            "engine": self.target.engine,
            "inputs": ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in sorted(self.feeds.items())),
            "threads": self.threads,
            "cpu": f"{env['cpu_model']}, {env['cpus_available']} of {env['cores_logical']} cores",
            "versions": ", ".join(f"{name} {found}" for name, found in installed_versions().items()),
        }

    def against_dense(self, keep: Keep, progress: Progress = silent) -> PairTiming:
        """The whole protocol for one cut."""
        with self._written([keep]) as (path,):
            return measure_pair(
                partial(self._open, self.dense), partial(self._open, path), self.feeds, on_block=progress
            )

    def together(self, plans: Sequence[Keep]) -> Samples:
        """Some cuts beside the dense network: `dense`, `0`, `1`, ..."""
        with self._written(plans) as paths:
            ways = {str(i): partial(self._open, path) for i, path in enumerate(paths)}
            return measure_together({DENSE: partial(self._open, self.dense), **ways}, self.feeds, blocks=BLOCKS)

    def _open(self, path: Path) -> Runtime:
        return self.target.open(path, threads=self.threads)

    @contextmanager
    def _written(self, plans: Sequence[Keep]) -> Iterator[list[Path]]:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{i}.onnx" for i in range(len(plans))]
            for path, keep in zip(paths, plans, strict=True):
                write(cut(self.layout, keep), path)
            yield paths


def table_at(path: Path, yard: Yardstick, choice: Choice, *, progress: Progress = silent) -> LatencyTable:
    """The table in a file, measured and written if there is none for this network and setting."""
    try:
        table = LatencyTable.read(path)
        table.check(yard.layout, yard.setting)
    except BadInput:
        table = measure_table(yard, choice, progress=progress)
        table.write(path)
    return table


def measure_table(yard: Yardstick, choice: Choice, *, progress: Progress = silent) -> LatencyTable:
    """Time a few widths of all groups of a shape, inside the whole network and beside the dense one."""
    points = cells(yard.layout, choice)
    ratios: dict[Cell, float] = {}
    dense: list[float] = []
    for start in range(0, len(points), AT_ONCE):
        some = points[start : start + AT_ONCE]
        samples = yard.together([keep_at(yard.layout, cell) for cell in some])
        ratios |= {cell: mean_ratio(samples.ms[str(i)], samples.ms[DENSE]) for i, cell in enumerate(some)}
        dense += [float(np.median(block)) for block in samples.ms[DENSE]]
        progress(len(ratios), len(points))
    dense_ns = round(NS * percentile(dense, 50))
    return table_of(
        yard.layout, dense_ns, {cell: round(dense_ns * ratio) for cell, ratio in ratios.items()}, yard.setting
    )


def within_time(
    target: TimeTarget, table: LatencyTable, yard: Yardstick, pick: Pick, *, stage: Stage = silent_stage
) -> tuple[Keep, list[Round]]:
    """Choose widths whose measured time is within the target, and near it.

    Raises: InfeasibleBudget: the time cannot be met; says what can.
    """
    dense_ms = table.dense_ns / NS
    goal = target.limit_ms(dense_ms, yard.batch)
    target.check_needed(dense_ms, yard.batch)
    costs = costs_of(yard.layout)
    cost = TimeCost(table, costs.macs)
    tried: list[tuple[Round, Keep]] = []
    asked_ms, too_much_ns = AIM * goal, table.dense_ns + 1
    while len(tried) < ROUNDS:
        allowed = min(int(asked_ms * NS), too_much_ns - 1)
        try:
            keep = pick([Limit(cost, allowed, str(target))])
        except InfeasibleBudget:
            if not tried:
                raise
            break
        if any(keep == known for _, known in tried):
            break
        predicted = cost.of(costs.widths(keep)) / NS
        with stage(f"try plan {len(tried) + 1}, {allowed / NS:.3g} ms") as progress:
            measured = measured_ms(target, yard.against_dense(keep, progress), dense_ms)
        if LEAST * goal <= measured <= goal:  # by luck, perhaps: measured once more, and what both say counts
            with stage(f"confirm plan {len(tried) + 1}") as progress:
                again = measured_ms(target, yard.against_dense(keep, progress), dense_ms)
            measured = math.sqrt(measured * again)
        tried.append((Round(allowed, predicted, measured), keep))
        if LEAST * goal <= measured <= goal:
            break
        if measured > goal:  # these widths must not come again, however coarse the steps are
            too_much_ns = min(too_much_ns, math.floor(predicted * NS))
        asked_ms = predicted * AIM * goal / measured
    rounds = [each for each, _ in tried]
    fast = [(each, keep) for each, keep in tried if each.measured_ms <= goal]
    if not fast:
        least = min(each.measured_ms for each in rounds)
        raise InfeasibleBudget(
            f"{target} is {goal:.3g} ms a batch; the fastest of {len(rounds)} plans took {least:.3g} ms on "
            f"{yard.target.engine}. Use {as_asked(target, least, dense_ms, yard.batch)}."
        )
    return min(fast, key=lambda each: abs(each[0].measured_ms - AIM * goal))[1], rounds
