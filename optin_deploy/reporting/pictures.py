"""Pictures: the scores of units, and quality against cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optin_deploy.common.extras import require
from optin_deploy.files.storage import atomic_file
from optin_deploy.reporting.score_table import LIGHT, colour_levels, colour_range, facts_of, parted, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from optin_deploy.quality.quality import Quality
    from optin_deploy.scoring.unit_scores import UnitScores

DPI = 120
ANNOTATED_COLUMNS = 16
"""Most units of a small group for which each cell says its rank."""
CELL_INCHES, SMALL_CELL_INCHES = 0.36, 0.2
"""Side of a cell with and without its rank."""
CURVES_INCHES = 5.0
"""Width of the curves, and their height where there are many groups."""
TITLE = ("scorer", "weighting", "samples", "probes", "rank_stability")
UNIT_COLOURS, GROUP_COLOURS = "viridis", "plasma"
"""Both rise evenly in lightness: the same to colour-blind people, and in grey."""
LIGHTEST_LINE = 0.87
"""Share of GROUP_COLOURS that lines use: its yellow end does not show on white."""


def draw_scores(scores: UnitScores, path: Path) -> None:
    """Write a PNG: small groups (groups x units) by colour, large ones as one curve each.

    Raises: MissingDependency.
    """
    require("matplotlib")
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    named, many = parted(scores)[0], [*parted(scores)[1].values()]
    few = [*named.values()]
    sizes: list[tuple[float, float]] = []
    draw: list[Callable[[Axes], None]] = []
    if few:
        columns = max(map(len, few))
        cell = CELL_INCHES if columns <= ANNOTATED_COLUMNS else SMALL_CELL_INCHES
        sizes.append((max(3.0, cell * columns) + 1.1, cell * len(few)))
        draw.append(lambda axes: _draw_few(axes, [*named], few))
    if many:
        sizes.append((CURVES_INCHES + 1.6, 3.2))
        draw.append(lambda axes: _draw_many(axes, many))
    widths, highest = [width for width, _ in sizes], max(height for _, height in sizes)
    figure = Figure((sum(widths), max(3.2, highest) + 1.2), dpi=DPI, layout="constrained")
    for axes, drawn in zip(figure.subplots(1, len(draw), width_ratios=widths, squeeze=False)[0], draw, strict=True):
        drawn(axes)
        axes.set_anchor("N")
    if many and highest > CURVES_INCHES:
        figure.axes[len(draw) - 1].set_box_aspect(1)  # many groups make the heatmap long, not the curves
    figure.suptitle(", ".join(f"{name} {value}" for name, value in facts_of(scores.provenance, TITLE)), fontsize=10)
    save_figure(figure, path)


def draw_sweep(kept: Sequence[float], qualities: Sequence[Quality], path: Path) -> None:
    """Write a PNG: the metric over the share of the MACs that stays, and the dense model as a line.

    Raises: MissingDependency.
    """
    require("matplotlib")
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    found = sorted(zip(kept, (quality.pruned for quality in qualities), strict=True))
    first = qualities[0]
    figure = Figure((CURVES_INCHES + 1, CURVES_INCHES - 1), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.axhline(first.dense, color="#888888", linewidth=1, linestyle="--", label=f"dense {first.dense:.4g}")
    axes.plot(*zip(*found, strict=True), marker="o", markersize=4, label="pruned")
    axes.set(xlabel="MACs that stay", ylabel=first.metric.replace("_", " "), title=f"{first.samples:,} rows")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    plain(axes)
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def plain(axes: Axes) -> None:
    """A light grid, and no frame above and right."""
    axes.grid(color="#e0e0e0", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_file(path) as temporary:
        # The temporary name does not end in .png; no version of matplotlib in the bytes.
        figure.savefig(temporary, format="png", bbox_inches="tight", metadata={"Software": None})


def _draw_few(axes: Axes, names: Sequence[str], groups: Sequence[Tensor]) -> None:
    from matplotlib.ticker import MaxNLocator
    from numpy.ma import masked_invalid

    low, high = colour_range(groups)
    levels = _grid(colour_levels(groups))
    rows, columns = levels.shape
    annotated = columns <= ANNOTATED_COLUMNS
    mesh = axes.pcolormesh(
        masked_invalid((low + levels * (high - low)).numpy()),
        cmap=UNIT_COLOURS,
        vmin=low,
        vmax=high if high > low else low + 1,
        edgecolors="white",
        linewidth=0.8 if annotated else 0.3,
    )
    title = f"{sum(map(len, groups)):,} units of small groups" + (", numbered by rank" if annotated else "")
    axes.set(title=title, xlabel="unit", ylim=(rows, 0), aspect="equal")
    units = range(0, columns, 1 if annotated else 4)
    axes.xaxis.set_ticks([unit + 0.5 for unit in units], [str(unit) for unit in units])
    axes.yaxis.set_ticks([row + 0.5 for row in range(rows)], [shortened(name) for name in names], fontsize=7)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if annotated:
        ranks = _grid(_ranks(groups))
        for row, column in levels.isfinite().nonzero().tolist():
            colour = "black" if levels[row, column] > LIGHT else "white"
            rank = f"{ranks[row, column]:.0f}"
            axes.text(column + 0.5, row + 0.5, rank, ha="center", va="center", fontsize=7, color=colour)
    if high == low:
        axes.set_title(_all_equal(groups))
        return
    below = any(bool((values.log10() < low).any()) for values in groups)
    bar = axes.figure.colorbar(
        mesh,
        cax=_beside(axes),
        label="score (higher = keep)",
        extend="min" if below else "neither",
        ticks=MaxNLocator(6, integer=high - low > 2),
        format=lambda log10, _: f"$10^{{{log10:g}}}$",
    )
    bar.outline.set_visible(False)


def _draw_many(axes: Axes, groups: Sequence[Tensor]) -> None:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import PercentFormatter

    low, high = colour_range(groups)
    depth, counts = len(groups), sorted({len(values) for values in groups})
    colours = matplotlib.colormaps[GROUP_COLOURS](torch.linspace(0, LIGHTEST_LINE, depth).numpy())
    for values, colour in zip(groups, colours, strict=True):
        best_first = values.sort(descending=True).values.cpu()
        share = torch.arange(1, len(values) + 1) / len(values)  # groups of other widths on one axis
        axes.plot(share.numpy(), best_first.numpy(), color=colour, linewidth=1.2)
    many = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    axes.set(title=f"{sum(map(len, groups)):,} units of large groups", xlim=(0, 1), ylabel="score")
    axes.set_xlabel(f"share of the {many} units of a group, best first")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    plain(axes)
    if high > low:
        margin = 0.05 * (high - low)
        axes.set_ylim(10 ** (low - margin), 10 ** (high + margin))
        axes.set_yscale("log", nonpositive="mask")  # a curve ends where its scores are 0
    else:
        axes.set_title(_all_equal(groups))
    if depth > 1:
        key = ScalarMappable(BoundaryNorm(torch.arange(depth + 1).sub(0.5).tolist(), depth), ListedColormap(colours))
        bar = axes.figure.colorbar(
            key, cax=_beside(axes), label="group, in the order of work", ticks=range(0, depth, -(-depth // 16))
        )
        bar.outline.set_visible(False)
        bar.minorticks_off()
        bar.ax.tick_params(length=0)
        bar.ax.invert_yaxis()  # as in the heatmap: the first group on top


def _beside(axes: Axes) -> Axes:
    """Room for a colour bar as high as the axes are drawn."""
    return axes.inset_axes((1.04, 0, 0.04, 1))


def _all_equal(groups: Sequence[Tensor]) -> str:
    return f"all scores are {float(groups[0][0]):.3g}"


def _grid(groups: Sequence[Tensor]) -> Tensor:
    """(groups, most units) in float64 on the CPU; NaN where a group has fewer."""
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence([values.cpu().double() for values in groups], batch_first=True, padding_value=torch.nan)


def _ranks(groups: Sequence[Tensor]) -> list[Tensor]:
    """1 for the highest score of all groups."""
    order = torch.cat(tuple(groups)).argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1, device=order.device)
    return list(torch.split(ranks, [len(values) for values in groups]))
