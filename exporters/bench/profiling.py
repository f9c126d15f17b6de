"""Measure a latency table: what heads and FFN widths take on an engine, inside the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporters.bench.measuring import Point
from exporters.bench.yardstick import DENSE, Yardstick, yardstick
from exporters.ready import check_timeable, ready
from exporters.tensorrt_plan import EngineOptions
from optin_deploy.bench.stats import percentile
from optin_deploy.bench.timing import Samples, mean_ratio
from optin_deploy.cost.latency import HeldOut, LatencyTable, Steps, is_table, read_table
from optin_deploy.errors import BadInput
from optin_deploy.layout import LayerSpec
from optin_deploy.ownership import free_name
from optin_deploy.progress import Progress, Stage, silent, silent_stage
from optin_deploy.storage import write_json
from optin_deploy.workspace import Source

BLOCKS = 6
"""Of a table's measurements: half of those that a verdict needs; neighbours in the table check each other."""
AT_ONCE = 3
"""Candidates that are open beside the dense model: each takes the memory of a model."""
HEAD_SHARES = (0.0, 0.25, 0.5, 0.75)
WIDTH_SHARES = (0.0, 0.125, 0.25, 0.5, 0.75)
"""Of a layer's units, beside all; heads also 1, neurons in multiples of the alignment."""


@dataclass(frozen=True)
class Cell:
    """All layers of one shape at one width."""

    layers: tuple[int, ...]
    kind: str
    """heads or neurons."""
    count: int


def profile_model(
    source: Source,
    out: Path,
    *,
    engine: str = "onnx",
    precision: str | None = None,
    point: Point | None = None,
    threads: int = 0,
    align: int | None = None,
    options: EngineOptions | None = None,
    check: int = 0,
    force: bool = False,
    dry_run: bool = False,
    stage: Stage = silent_stage,
) -> LatencyTable | None:
    """Measure a latency table and write it to a file.

    Args: check: random plans to measure beside it. force: keep a file of others under another name.
        dry_run: only check that it could be done; returns None.
    Raises: BadInput: the engine does not run here, `out` is not ours, and all that `ready` refuses.
    """
    free_name(out, is_table, force=force, dry_run=True)
    point = point or Point()
    target, spec, prepared = ready(
        source, engine=engine, precision=precision, align=align, points=[point], threads=threads, options=options
    )
    check_timeable(target, spec)
    if dry_run:
        return None
    with yardstick(prepared, target, spec, point, threads=threads, align=align) as yard:
        with stage("profile") as progress:
            table = measure_table(yard, progress=progress)
        free_name(out, is_table, force=force)
        write_json(out, table.to_json())
        if check:
            with stage("check") as progress:
                table = with_held_out(table, yard, check, seed=source.seed, progress=progress)
            write_json(out, table.to_json())
    return table


def measure_table(yard: Yardstick, *, progress: Progress = silent) -> LatencyTable:
    """Time every width of the grid in the whole model, beside the dense one."""
    layers = yard.prepared.layout.layers
    cells = list(grid(layers, yard.align))
    dense: list[float] = []
    ratios: dict[Cell, float] = {}
    for start in range(0, len(cells), AT_ONCE):
        some = cells[start : start + AT_ONCE]
        samples = yard.together([yard.plan(*_widths(layers, cell)) for cell in some], blocks=BLOCKS)
        ratios |= {cell: _ratio(samples, str(i)) for i, cell in enumerate(some)}
        dense += [float(np.median(block)) for block in samples.ms[DENSE]]
        progress(len(ratios), len(cells))
    dense_ms = percentile(dense, 50)
    saved = {cell: dense_ms * (1 - ratio) / len(cell.layers) for cell, ratio in ratios.items()}
    heads, neurons = (
        tuple(_steps(i, kind, units, saved) for i, units in enumerate(all_units))
        for kind, all_units in (("heads", [x.heads for x in layers]), ("neurons", [x.neurons for x in layers]))
    )
    return LatencyTable(dense_ms, heads, neurons, yard.prepared.layout.hash, yard.setting)


def grid(layers: Sequence[LayerSpec], align: int) -> Iterator[Cell]:
    """The widths to measure: of all layers of a shape at once, whose times must be alike."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, x in enumerate(layers):
        shapes.setdefault((x.hidden, x.heads, x.head_dim, x.neurons, len(x.ffn.inputs)), []).append(i)
    for (_, heads, _, neurons, _), alike in shapes.items():
        for count in sorted({1, *(round(share * heads) for share in HEAD_SHARES)} - {heads}):
            yield Cell(tuple(alike), "heads", count)
        for count in sorted({int(share * neurons) // align * align for share in WIDTH_SHARES} - {neurons}):
            yield Cell(tuple(alike), "neurons", count)


def with_held_out(
    table: LatencyTable, yard: Yardstick, count: int, *, seed: int = 0, progress: Progress = silent
) -> LatencyTable:
    """The table, and how wrong it is for `count` random plans with other widths in every layer."""
    rng = np.random.default_rng(seed % 2**64)  # which takes no negative one
    layers = yard.prepared.layout.layers
    found: list[HeldOut] = []
    plans = [_drawn(rng, layers, yard.align) for _ in range(count)]
    for start in range(0, count, AT_ONCE):
        some = plans[start : start + AT_ONCE]
        samples = yard.together([yard.plan(*widths) for widths in some], blocks=BLOCKS)
        for i, (heads, neurons) in enumerate(some):
            # Beside the dense model of the same run, as the table was.
            measured = table.dense_ms * _ratio(samples, str(i))
            found.append(HeldOut(heads, neurons, table.predict_ms(heads, neurons), measured))
        progress(len(found), count)
    return replace(table, held_out=tuple(found))


def _drawn(
    rng: np.random.Generator, layers: Sequence[LayerSpec], align: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Widths around a share of their own for every plan: from nearly dense to nearly empty."""
    share = rng.uniform(0.2, 0.9)
    shares = np.clip(rng.normal(share, 0.2, (2, len(layers))), 0, 1)
    heads = tuple(round(s * x.heads) for s, x in zip(shares[0], layers, strict=True))
    neurons = tuple(round(s * x.neurons / align) * align for s, x in zip(shares[1], layers, strict=True))
    return heads, tuple(min(n, x.neurons) for n, x in zip(neurons, layers, strict=True))


def table_at(path: Path, yard: Yardstick, *, progress: Progress = silent) -> LatencyTable:
    """The table in a file, measured and written if there is none for this model and setting."""
    try:
        return read_table(path, yard.prepared.layout, yard.setting)
    except BadInput:
        table = measure_table(yard, progress=progress)
        write_json(path, table.to_json())
        return table


def _widths(layers: Sequence[LayerSpec], cell: Cell) -> tuple[list[int], list[int]]:
    heads, neurons = [x.heads for x in layers], [x.neurons for x in layers]
    for i in cell.layers:
        (heads if cell.kind == "heads" else neurons)[i] = cell.count
    return heads, neurons


def _ratio(samples: Samples, name: str) -> float:
    """Time of a candidate / time of the dense model."""
    return mean_ratio(samples.ms[name], samples.ms[DENSE])


def _steps(layer: int, kind: str, units: int, saved: dict[Cell, float]) -> Steps:
    """Args: saved: milliseconds that a layer of a cell takes less than a dense one."""
    mine = {cell.count: ms for cell, ms in saved.items() if layer in cell.layers and cell.kind == kind}
    none = mine[0]  # what the whole branch takes
    counts = (*sorted(mine), units)
    return Steps(counts, tuple(none - mine.get(count, 0.0) for count in counts))
