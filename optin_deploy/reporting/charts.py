"""Positions of lines, dots, bars and cells in a page's charts, in units of a viewBox; report.html draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from optin_deploy.common.extras import require
from optin_deploy.common.formatting import milliseconds
from optin_deploy.reporting.findings import SweepRow
from optin_deploy.reporting.latency_rows import LatencyRow

WIDTH, HEIGHT = 360, 210
"""Size of a chart: about as wide as a phone, so that text is readable there and larger elsewhere."""
LEFT, RIGHT, TOP, BOTTOM = 50, 322, 34, 168
"""Edges of the plot inside a chart; around it are the texts of ticks, axes and rules."""
UNITS_LEFT, BARS_RIGHT, UNITS_RIGHT = 34, 244, 356
"""Bars and cells begin right of the row's number; right of the bars their count is written."""
ROW, BAR = 20, 12
"""Height of a group, and of what is drawn of it."""
CURVE_POINTS = 200
"""Steps of a distribution curve."""
SHOWN_PERCENT = 99
"""Share of each model's runs that is shown; the slowest would squeeze all others."""


Ticks = tuple[tuple[float, str], ...]
"""Coordinates along an axis, and what is written there."""


@dataclass(frozen=True)
class ChartAxis:
    """Values along one side of a plot."""

    low: float
    high: float
    start: float
    """Coordinate of `low`."""
    end: float
    """Coordinate of `high`; of a y axis the smaller one."""

    def place(self, value: float) -> float:
        """Coordinate of a value."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, unit: str = "") -> Ticks:
        """Round values, written with their unit; `%` stands for hundredths.

        Raises: MissingDependency.
        """
        require("matplotlib")
        from matplotlib.ticker import MaxNLocator

        found = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        factor = 100 if unit == "%" else 1
        inside = [float(value) for value in found if self.low <= value <= self.high]
        return tuple((self.place(value), f"{factor * value:.6g}{unit}") for value in inside)


@dataclass(frozen=True)
class Rule:
    """A straight line across the plot, at a value that others are compared with."""

    at: float
    """x of an upright one, y of a level one."""
    upright: bool
    text: str
    row: int = 0
    """Line of text above the plot that an upright one's text stands in, so that two never cover each other."""

    @property
    def anchor(self) -> str:
        """The text of an upright rule runs towards the middle."""
        return "end" if self.at > (LEFT + RIGHT) / 2 else "start"


@dataclass(frozen=True)
class Chart:
    """A plot with two axes."""

    name: str
    """What it shows, in words and numbers, for those who do not see it."""
    x_label: str
    y_label: str
    x_ticks: Ticks
    y_ticks: Ticks
    lines: tuple[tuple[str, str], ...] = ()
    """(class, points) of polylines."""
    dots: tuple[tuple[float, float], ...] = ()
    rules: tuple[Rule, ...] = ()
    span: tuple[float, float, float, float] | None = None
    """An interval and what it is of: x of its ends, x of its centre, y."""


@dataclass(frozen=True)
class UnitRow:
    """One group in a chart of units."""

    group: str
    """Name of the group."""
    name: str
    """Which units stay, or how many."""
    y: float
    """Upper edge of the row."""
    units: int
    kept: int
    full_width: float
    """Width of the dense model's bar."""
    kept_width: float
    cells: tuple[tuple[float, bool], ...]
    """x of each unit, and whether it stays; empty where units are too many to be cells."""
    strip_width: float
    runs: str
    """Path along the kept units of a strip that is `units` wide and 2 high."""


@dataclass(frozen=True)
class Units:
    """One kind of unit in all its groups."""

    kind: str
    rows: tuple[UnitRow, ...]
    cell_width: float

    @property
    def height(self) -> float:
        """Height of the whole chart."""
        return ROW * len(self.rows)

    @property
    def kept(self) -> int:
        """Units that stay."""
        return sum(row.kept for row in self.rows)

    @property
    def units(self) -> int:
        """Units of the dense model."""
        return sum(row.units for row in self.rows)

    @property
    def counts(self) -> str:
        """The bars in words."""
        groups = (f"{row.group}: {row.kept:,} of {row.units:,}" for row in self.rows)
        return f"{self.kind} that stay. {'; '.join(groups)}."

    @property
    def places(self) -> str:
        """The cells in words."""
        return f"Which {self.kind} stay. {'; '.join(row.name for row in self.rows)}."


def units_chart(kind: str, groups: Sequence[Sequence[bool]], names: Sequence[str], *, cells: bool) -> Units:
    """Which units stay; groups may differ in length. `cells`: they are few enough to be drawn and named one by one."""
    most = max(map(len, groups))
    pitch = min(BAR + 4, (UNITS_RIGHT - UNITS_LEFT) / most)
    rows = []
    for index, keep in enumerate(groups):
        full = (BARS_RIGHT - UNITS_LEFT) * len(keep) / most
        units = ", ".join(str(unit) for unit, stays in enumerate(keep) if stays) or "none"
        rows.append(
            UnitRow(
                group=names[index],
                name=f"{names[index]}: {units if cells else f'{sum(keep):,} of {len(keep):,}'}",
                y=ROW * index + (ROW - BAR) / 2,
                units=len(keep),
                kept=sum(keep),
                full_width=round(full, 2),
                kept_width=round(full * sum(keep) / len(keep), 2),
                cells=tuple((round(UNITS_LEFT + pitch * i, 2), stays) for i, stays in enumerate(keep)) if cells else (),
                strip_width=round((UNITS_RIGHT - UNITS_LEFT) * len(keep) / most, 2),
                runs=_runs(keep),
            )
        )
    return Units(kind, tuple(rows), round(0.85 * pitch, 2))


def _runs(keep: Sequence[bool]) -> str:
    """A path through the middle of a strip of height 2, drawn along runs of kept units: `M3 1h2m4 0h1`."""
    parts: list[str] = []
    at = drawn = 0
    for stays, group in groupby(keep):
        length = len(list(group))
        if stays:
            parts.append(f"m{at - drawn} 0h{length}" if parts else f"M{at} 1h{length}")
            drawn = at + length
        at += length
    return "".join(parts)


def latency_chart(row: LatencyRow) -> Chart:
    """Share of the runs that were done within a time, dense and pruned; through the stated p50 and p95."""
    both = {name: np.concatenate(getattr(row.samples_ms, name)) for name in ("dense", "pruned")}
    ends = [end for ms in both.values() for end in np.percentile(ms, (0, SHOWN_PERCENT)).tolist()]
    x, y = _axis(ends, LEFT, RIGHT), ChartAxis(0.0, 1.0, BOTTOM, TOP)
    shares = np.linspace(0, 1, CURVE_POINTS + 1)
    lines = []
    for name, ms in both.items():
        times = np.percentile(ms, 100 * shares)
        shown = times <= x.high
        lines.append((name, _points(x, y, times[shown].tolist(), shares[shown].tolist())))
    rules = tuple(Rule(y.place(share), False, text) for share, text in ((0.5, "p50"), (0.95, "p95")))
    p50, p95 = (
        f"{milliseconds(getattr(row.dense, name))} dense and {milliseconds(getattr(row.pruned, name))} pruned"
        for name in ("p50_ms", "p95_ms")
    )
    name = f"Distribution of latency: median {p50}; 95% of the runs within {p95}."
    return Chart(name, "milliseconds", "runs done", x.ticks(), y.ticks("%"), tuple(lines), rules=rules)


def ratio_chart(row: LatencyRow) -> Chart:
    """Speed-up of each block, one below the other in the order of measurement, over that of all with its interval."""
    ratios, (low, high) = row.samples_ms.block_ratios, row.ci95
    count = len(ratios)
    x = _axis([1.0, row.ideal, low, high, row.speedup, *ratios], LEFT, RIGHT)
    y = ChartAxis(count + 1.5, -0.5, BOTTOM, TOP)  # blocks 0, 1, ... downwards, then the interval
    dots = tuple((x.place(ratio), y.place(block)) for block, ratio in enumerate(ratios))
    span = (x.place(low), x.place(high), x.place(row.speedup), y.place(count + 0.5))
    rules = (Rule(x.place(1.0), True, "1x: no gain"), Rule(x.place(row.ideal), True, f"{row.ideal:.2f}x: ideal", row=1))
    sides = ((y.place(0), "first"), (y.place(count - 1), "last"), (y.place(count + 0.5), "all"))
    name = (
        f"Speed-up in each of {count} blocks, from {min(ratios):.2f}x to {max(ratios):.2f}x; of all together "
        f"{row.speedup:.2f}x, 95% interval {low:.2f} to {high:.2f}; {row.ideal:.2f}x if time were MACs."
    )
    return Chart(name, "dense / pruned latency", "", x.ticks("x"), sides, dots=dots, rules=rules, span=span)


def sweep_chart(sweep: Sequence[SweepRow], kept: float) -> Chart:
    """The metric over the share of the MACs that stays; `kept` is that of the model of the page."""
    found, dense = sorted((row.kept, row.pruned) for row in sweep), sweep[0].dense
    metric = sweep[0].metric.replace("_", " ")
    shares, values = zip(*found, strict=True)
    x, y = _axis([kept, *shares], LEFT, RIGHT), _axis([dense, *values], BOTTOM, TOP)
    dots = tuple((x.place(share), y.place(value)) for share, value in found)
    rules = (Rule(y.place(dense), False, "dense"), Rule(x.place(kept), True, "this model", row=1))
    listed = ", ".join(f"{value:.3f} at {share:.0%}" for share, value in reversed(found))
    name = f"{metric} over the MACs that stay: {dense:.3f} dense, {listed}."
    lines = (("pruned", _points(x, y, shares, values)),)
    return Chart(name, "MACs that stay", metric, x.ticks("%"), y.ticks(), lines, dots, rules)


LEAST = 1e-300
"""A twentieth of less may be nothing."""


def _axis(values: Sequence[float], start: float, end: float) -> ChartAxis:
    """An axis from the lowest to the highest value with a margin, also if all values are equal."""
    low, high = min(values), max(values)
    span, largest = high - low, max(abs(low), abs(high))
    if span <= max(1e-6 * largest, LEAST):
        span = largest if largest > LEAST else 1.0
    return ChartAxis(low - 0.05 * span, high + 0.05 * span, start, end)


def _points(x: ChartAxis, y: ChartAxis, xs: Sequence[float], ys: Sequence[float]) -> str:
    return " ".join(f"{x.place(a):g},{y.place(b):g}" for a, b in zip(xs, ys, strict=True))
