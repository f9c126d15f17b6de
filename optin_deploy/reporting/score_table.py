"""Scores in the terminal: small groups as a heatmap, large ones as a row each, and where they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import typer
from rich.style import Style
from rich.text import Text
from torch import Tensor

from optin_deploy.reporting.terminal import output_console, print_table

if TYPE_CHECKING:
    from optin_deploy.scoring.unit_scores import UnitScores

DECADES = 6.0
"""Span of the colours: one dead head at 1e-15 must not leave a single colour for all others."""
PALETTE = (
    *("#440154", "#482878", "#3e4989", "#31688e", "#26828e"),
    *("#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"),
)
"""Viridis in ten steps, lowest first: the colours of scores.png."""
LIGHT = 0.45
"""Colours above this level need dark text."""
LABEL_WIDTH, CELL_WIDTH = 40, 5
QUANTILES = (0.05, 0.5, 0.95)


MOST_CELLS = 64
"""Units of a group that are shown one by one; those of larger groups as a distribution."""


def print_scores(scores: UnitScores) -> None:
    """Small groups unit by unit, large ones by how their scores spread, and the provenance."""
    console, few, many = output_console(), *parted(scores)
    if few:
        for line in heatmap([*few.values()], [*few], width=console.width):
            console.print(line, soft_wrap=True)
        errors = torch.cat([scores.errors[name] for name in few])
        if bool(errors.any()):
            error = relative_error(torch.cat([*few.values()]), errors)
            typer.echo(f"relative standard error of the median unit: {error}")
    if many:
        typer.echo("\nScores in each large group; higher = keep")
        print_table(*spread_table(many, scores.errors))
    print_provenance(scores)


def parted(scores: UnitScores) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Groups of few units, and those of many."""
    few = {name: values for name, values in scores.scores.items() if len(values) <= MOST_CELLS}
    return few, {name: values for name, values in scores.scores.items() if name not in few}


def print_provenance(scores: UnitScores) -> None:
    """How many units were scored, and how."""
    facts = list(facts_of(scores.provenance))
    units = sum(map(len, scores.scores.values()))
    typer.echo(f"{len(scores.scores)} groups, {units:,} units scored{':' if facts else ''}")
    width = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        typer.echo(f"  {name:<{width}}  {value}")


def heatmap(groups: Sequence[Tensor], names: Sequence[str], *, width: int) -> list[Text]:
    """Lines of a table, groups x units, of scores relative to the mean of all; coloured by log10 of the score.

    Args: groups: each (units,); counts may differ. width: characters a line; more units go into further blocks.
    """
    count = sum(map(len, groups))
    mean = float(torch.cat(tuple(groups)).mean())
    scale = f"score relative to the mean of all {count:,} ({mean:.1e} = 1.0)" if mean > 0 else "all scores are 0"
    levels, labels = colour_levels(groups), [shortened(name) for name in names]
    label_width = max(map(len, labels)) + 1
    most = max(map(len, groups))
    blocks = -(-most // max(1, (width - label_width) // CELL_WIDTH))
    step = -(-most // blocks)
    lines = [Text(f"Units: {scale}; higher = keep")]
    for start in range(0, most, step):
        columns = range(start, min(start + step, most))
        lines.append(Text("group".ljust(label_width) + "".join(f"{unit:>{CELL_WIDTH - 1}} " for unit in columns)))
        for label, values, shades in zip(labels, groups, levels, strict=True):
            if len(values) <= start:
                continue
            line = Text(label.ljust(label_width))
            for unit in columns[: len(values) - start]:
                cell = compact(float(values[unit]) / mean) if mean > 0 else "0"
                line.append(f"{cell:>{CELL_WIDTH - 1}} ", _style(float(shades[unit])))
            lines.append(line)
    return lines


def shortened(name: str, longest: int = LABEL_WIDTH) -> str:
    """The end of a long name."""
    return name if len(name) <= longest else f"...{name[3 - longest :]}"


def compact(ratio: float) -> str:
    """A non-negative number in at most four characters: 312, 47, 3.2, .41, .03, 5e-3."""
    if ratio == 0:
        return "0"
    if ratio < 0.5e-9:
        return "~0"
    if ratio < 0.0095:
        mantissa, exponent = f"{ratio:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if ratio < 0.995:
        return f"{ratio:.2f}"[1:]
    return f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}"


def spread_table(groups: Mapping[str, Tensor], errors: Mapping[str, Tensor]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a group: how many units, and how their scores spread."""
    header = ["group", "units", "mean", "5%", "median", "95%"]
    rows = []
    for name, values in groups.items():
        points = values.quantile(torch.tensor(QUANTILES, dtype=values.dtype, device=values.device))
        spread = (f"{x:.1e}" for x in (float(values.mean()), *points.tolist()))
        rows.append([shortened(name), f"{len(values):,}", *spread])
    if any(bool(errors[name].any()) for name in groups):
        header.append("relative standard error")
        for row, (name, values) in zip(rows, groups.items(), strict=True):
            row.append(relative_error(values, errors[name]))
    return header, rows


def relative_error(values: Tensor, errors: Tensor) -> str:
    """Median of standard error / score, in percent, over units whose score is not zero."""
    some = values > 0
    return f"{float((errors[some] / values[some]).median()):.1%}" if bool(some.any()) else "-"


def facts_of(provenance: Mapping[str, Any], names: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """Name and value of what a provenance tells, in words; `names` chooses some, in their order."""
    for name in provenance if names is None else names:
        value = provenance.get(name)
        words = name.removesuffix("_bytes").replace("_", " ")
        if isinstance(value, Mapping):
            yield from ((f"{words} {inner}", text) for inner, text in facts_of(value))
        elif value is not None:
            yield words, _worded(name, value)


def colour_range(layers: Sequence[Tensor]) -> tuple[float, float]:
    """Lowest and highest log10 of the scores that get colours of their own; equal if all scores are."""
    logs = torch.cat(tuple(layers)).log10()
    known = logs[logs.isfinite()]
    if not len(known):
        return 0.0, 0.0
    high = float(known.max())
    low = max(float(known.min()), high - DECADES)
    only_zeros_differ = low == high and len(known) < len(logs)
    return low - only_zeros_differ, high


def colour_levels(layers: Sequence[Tensor]) -> list[Tensor]:
    """Place of each score in `colour_range`, per layer, (units,) in [0, 1]; zeros are at 0."""
    low, high = colour_range(layers)
    return [((x.log10() - low) / (high - low or 1.0)).clamp(0, 1) for x in layers]


def _style(level: float) -> Style:
    return Style(color="#000000" if level > LIGHT else "#ffffff", bgcolor=PALETTE[round(level * (len(PALETTE) - 1))])


def _worded(name: str, value: object) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.2f} GiB"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_worded("", each) for each in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and name != "seed" else str(value)
