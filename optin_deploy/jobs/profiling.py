"""Measure a latency table: what the widths of groups take on an engine, inside the whole network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from optin_deploy.common.progress import Progress, Stage, silent, silent_stage
from optin_deploy.errors import BadInput
from optin_deploy.files.ownership import free_name
from optin_deploy.jobs.checked import checked_job
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.width_timer import DENSE, WidthTimer, check_timeable, width_timer
from optin_deploy.measuring.points import Point
from optin_deploy.measuring.stats import percentile
from optin_deploy.measuring.timing import mean_ratio
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import costs_of
from optin_deploy.planning.latency import HeldOut, LatencyTable, TimeCost
from optin_deploy.planning.points import WidthCell, cells, keep_at, table_of
from optin_deploy.planning.widths import Choice, Keep, ladders_of
from optin_deploy.pruning.pruning import emptiable
from optin_deploy.structure.labels import TOKENS

BLOCKS = 6
"""Blocks of a table's measurements: half of those that a verdict needs; neighbours in the table check each other."""
AT_ONCE = 3
"""Candidates that are open beside the dense network: each takes the memory of a network."""
NS = 10**6
"""Nanoseconds of a millisecond."""


def profile_model(
    job: Job,
    out: Path,
    *,
    check: int = 0,
    force: bool = False,
    dry_run: bool = False,
    stage: Stage = silent_stage,
) -> LatencyTable | None:
    """Measure a latency table and write it to a file.

    Args: job: with one point. check: random plans to measure beside it. force: keep a file of others under another
        name. dry_run: only check that it could be done; returns None.
    Raises: BadInput: the engine does not run here, `out` is not ours, and all that `ready` refuses.
    """
    free_name(out, LatencyTable.is_at, force=force, dry_run=True)
    kinds = tuple(kind for kind in job.source.units if kind != TOKENS)  # a table serves whatever is merged
    source = replace(job.source, units=kinds)
    asked = checked_job(replace(job, source=source, limits=Limits(flops=1.0), allocation="uniform"))
    check_timeable(asked.target, asked.spec)
    if dry_run:
        return None
    with width_timer(
        asked.prepared, asked.target, asked.spec, (job.points or (Point(),))[0], threads=job.threads
    ) as yard:
        with stage("profile") as progress:
            table = measure_table(yard, asked.choice, progress=progress)
        free_name(out, LatencyTable.is_at, force=force)
        table.write(out)
        if check:
            with stage("check") as progress:
                table = with_held_out(table, yard, asked.choice, check, seed=job.source.seed, progress=progress)
            table.write(out)
    return table


def table_at(path: Path, yard: WidthTimer, choice: Choice, *, progress: Progress = silent) -> LatencyTable:
    """The table in a file, measured and written if there is none for this network and setting."""
    try:
        return read_table(path, yard, choice)
    except BadInput:
        table = measure_table(yard, choice, progress=progress)
        table.write(path)
        return table


def read_table(path: Path, yard: WidthTimer, choice: Choice) -> LatencyTable:
    """The table in a file.

    Raises: BadInput: it is of another network or setting, or of fewer kinds of units.
    """
    table = LatencyTable.read(path)
    table.check(yard.layout, yard.setting)
    unknown = [each.name for each in ladders_of(yard.layout, choice) if each.name not in table.groups]
    if unknown:
        raise BadInput(f"{path} was measured without {unknown[0]}: give the same --units as to `optin profile`.")
    return table


def measure_table(yard: WidthTimer, choice: Choice, *, progress: Progress = silent) -> LatencyTable:
    """Time a few widths of all groups of a shape, inside the whole network and beside the dense one."""
    yard = replace(yard, merges=())
    points = cells(yard.layout, choice, emptiable(yard.layout))
    ratios: dict[WidthCell, float] = {}
    dense: list[float] = []
    for start in range(0, len(points), AT_ONCE):
        some = points[start : start + AT_ONCE]
        samples = yard.together([keep_at(yard.layout, cell) for cell in some], blocks=BLOCKS)
        ratios |= {cell: mean_ratio(samples.ms[str(i)], samples.ms[DENSE]) for i, cell in enumerate(some)}
        dense += [float(np.median(block)) for block in samples.ms[DENSE]]
        progress(len(ratios), len(points))
    dense_ns = round(NS * percentile(dense, 50))
    return table_of(
        yard.layout, dense_ns, {cell: round(dense_ns * ratio) for cell, ratio in ratios.items()}, yard.setting
    )


def with_held_out(
    table: LatencyTable, yard: WidthTimer, choice: Choice, count: int, *, seed: int = 0, progress: Progress = silent
) -> LatencyTable:
    """The table, and how wrong it is for `count` random plans with other widths in every group."""
    yard, rng = replace(yard, merges=()), np.random.default_rng(seed)
    costs = costs_of(yard.layout, yard.prepared.ready.sizes)
    cost = TimeCost(table, costs.macs)
    found: list[HeldOut] = []
    plans = [_drawn(rng, yard, choice) for _ in range(count)]
    for start in range(0, count, AT_ONCE):
        some: Sequence[Keep] = plans[start : start + AT_ONCE]
        samples = yard.together(some, blocks=BLOCKS)
        for i, keep in enumerate(some):
            # Beside the dense network of the same run, as the table was.
            measured = table.dense_ns * mean_ratio(samples.ms[str(i)], samples.ms[DENSE])
            widths = costs.widths(keep)
            found.append(HeldOut(widths, cost.total(widths), round(measured)))
        progress(len(found), count)
    return replace(table, held_out=tuple(found))


def _drawn(rng: np.random.Generator, yard: WidthTimer, choice: Choice) -> Keep:
    """Widths around a share of their own for every plan: from nearly dense to nearly empty."""
    share = rng.uniform(0.2, 0.9)
    keep: Keep = {}
    for ladder in ladders_of(yard.layout, choice):
        wanted = float(np.clip(rng.normal(share, 0.2), 0, 1)) * ladder.units
        count = min(ladder.counts, key=lambda each: abs(each - wanted))
        keep[ladder.name] = tuple(range(count))
    return keep
