"""The accuracy of all methods at all budgets: a page with a table, and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.methods import METHODS, PEERS, RANKINGS
from optin_deploy.reporting.pictures import DPI, plain, save_figure
from optin_deploy.reporting.report import to_table

Cell = tuple[str, int, str, float]
"""Task, seed, method, share of the MACs."""
Found = dict[Cell, dict[str, Any]]
"""Finished cells, each with value (the metric), rows (a figure for each test row), calibration_rows, stages
(seconds)."""
DENSE, OURS, PUBLISHED = "dense", "ours", "OPTIN"


def page(found: Found, refused: Mapping[Cell, str] | None = None) -> str:
    """The result for people.

    Args: refused: why cells have no figure.
    """
    tasks = list(dict.fromkeys(task for task, *_ in found))
    budgets = list(dict.fromkeys(flops for *_, method, flops in found if method != DENSE))
    methods = [method for method in METHODS if any(cell[2] == method for cell in found)]
    dense = {task: found[task, -1, DENSE, 1.0]["value"] for task in tasks}
    lines, lost = [], {}
    for method in methods:
        row = [method]
        for flops in budgets:
            drops = []
            for task in tasks:
                some = _values(found, task, method, flops)
                row.append(_spread(some))
                drops.append(100 * (dense[task] - statistics.mean(some)) if some else float("nan"))
            lost[method, flops] = statistics.mean(drops)
            row.append("-" if math.isnan(lost[method, flops]) else f"{lost[method, flops]:.2f}")
        lines.append((*row, *_spent([c["stages"] for (_, _, m, _), c in found.items() if m == method])))
    columns = [x for flops in budgets for x in (*(f"{t} {flops:g}" for t in tasks), f"drop {flops:g}")]
    header = ("method", *columns, "seconds", "forwards")
    told = ", ".join(f"{task} {100 * value:.2f}%" for task, value in dense.items())
    sizes = {task: found[task, -1, DENSE, 1.0] for task in tasks}
    rows = ", ".join(f"{task} {len(cell['rows']):,} ({cell['calibration_rows']:,})" for task, cell in sizes.items())
    seeds = len({seed for _, seed, *_ in found} - {-1})
    spent = [c["stages"] for (_, _, m, _), c in found.items() if m == OURS]
    stages = [
        f"{stage} {statistics.mean(x[stage] / x['forward'] for x in spent):.0f}"
        for stage in ("scores", "token weights", "curves", "own")
        if spent and all(stage in x for x in spent)
    ]
    return (
        "# Accuracy without retraining\n\nAccuracy on test rows (stsb: Spearman's correlation) in percent at shares of "
        f"the dense MACs: mean and standard deviation over {seeds} calibration seeds (fewer where it says so). Drop: "
        f"mean points lost over the tasks. Seconds: of all that a method needs; forwards: in dense forwards over the "
        f"calibration rows. Dense: {told}. Test (calibration) rows: {rows}.\n\n"
        f"{to_table(header, lines)}\n\n"
        + "\n".join([*_paired(found, tasks, budgets), *_gone(lost, budgets)])
        + (f"\n\nOurs in dense forwards: {', '.join(stages)} (compensation, cut, proof)." if stages else "")
        + (_of_rival(tasks) if "onnxsim" in methods else "")
        + "".join(f"\n\n{method} on {task} at {f:g}: {why}" for (task, _, method, f), why in _first(refused or {}))
    )


def _first(refused: Mapping[Cell, str]) -> Iterator[tuple[Cell, str]]:
    """Yield the reason of the first seed for each task, method and budget."""
    seen = set()
    for (task, seed, method, flops), why in refused.items():
        if (task, method, flops) not in seen:
            seen.add((task, method, flops))
            yield (task, seed, method, flops), why


def _of_rival(tasks: Sequence[str]) -> str:
    """How onnxsim was run."""
    rankings = ", ".join(f"{task} {RANKINGS[task]}" for task in tasks if task in RANKINGS)
    return (
        "\n\nonnxsim is given torch's export with all sizes as numbers, without which it leaves heads alone, the part "
        "of each group that goes searched for the same MACs, and the same rows for its ridge regression. Its ranking "
        f"is the best on calibration rows of seed 0: {rankings}."
    )


def draw(found: Found, path: Path) -> None:
    """Write a PNG: of each task, what the methods keep of the metric at each budget; bars span the seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    tasks = list(dict.fromkeys(task for task, *_ in found))
    budgets = sorted({flops for *_, method, flops in found if method != DENSE})
    figure = Figure((4 * len(tasks) + 1.8, 3.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        axes.axhline(found[task, -1, DENSE, 1.0]["value"], color="#888888", linewidth=1, linestyle="--", label=DENSE)
        for method in (OURS, *PEERS):
            values = {flops: some for flops in budgets if (some := _values(found, task, method, flops))}
            if not values:
                continue
            means = {flops: statistics.mean(some) for flops, some in values.items()}
            spans = [[mean - min(values[x]), max(values[x]) - mean] for x, mean in means.items()]
            style = {"linewidth": 2.2, "zorder": 3} if method == OURS else {"linewidth": 1.1}
            errors = torch.tensor(spans).T.numpy()  # (below and above, budgets)
            axes.errorbar([*means], [*means.values()], errors, marker="o", markersize=3.5, label=method, **style)
        axes.set(title=task, xlabel="MACs that stay")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        plain(axes)
    panels[0].set_ylabel("accuracy (stsb: Spearman's correlation)" if "stsb" in tasks else "accuracy")
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def _spent(cells: Sequence[Mapping[str, float]]) -> tuple[str, str]:
    """Mean seconds, and mean dense forwards."""
    totals = [sum(s for stage, s in stages.items() if stage != "forward") for stages in cells]
    forwards = [total / stages["forward"] for total, stages in zip(totals, cells, strict=True)]
    return f"{statistics.mean(totals):.0f}", f"{statistics.mean(forwards):.0f}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{100 * values[0]:.1f} (1 seed)"
    return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"


def _paired(found: Found, tasks: Sequence[str], budgets: Sequence[float]) -> Iterator[str]:
    """Ours against the best peer of each cell, on the same rows and the seeds that both have."""
    gains: dict[float, list[tuple[float, float]]] = {}
    for flops, task in product(budgets, tasks):
        ours = _rows(found, task, OURS, flops)
        if any(figure < 0 for row in ours.values() for figure in row):
            continue  # numbers, whose rows are no points
        best: tuple[float, str, torch.Tensor, list[int]] | None = None
        for peer in PEERS:
            theirs = _rows(found, task, peer, flops)
            seeds = sorted(ours.keys() & theirs.keys())
            if seeds:
                mine, other = (torch.tensor([x[seed] for seed in seeds]).double().mean(0) for x in (ours, theirs))
                if best is None or float(other.mean()) > best[0]:
                    best = (float(other.mean()), peer, mine - other, seeds)
        if best is not None:
            _, peer, gain, seeds = best
            told = f" (seed {', '.join(map(str, seeds))})" if len(seeds) < len(ours) else ""
            error = float(gain.std() / len(gain) ** 0.5)
            gains.setdefault(flops, []).append((float(gain.mean()), error))
            points = f"{100 * float(gain.mean()):+.2f} ± {100 * error:.2f} points"
            yield f"- {task} at {flops:g}: {points} over {peer}{told}."
    for flops, some in gains.items():
        mean, error = statistics.mean(g for g, _ in some), sum(e**2 for _, e in some) ** 0.5 / len(some)
        yield f"- on average at {flops:g}: {100 * mean:+.2f} ± {100 * error:.2f} points over each task's best peer."


def _gone(lost: Mapping[tuple[str, float], float], budgets: Sequence[float]) -> Iterator[str]:
    """What share of the published method's mean loss ours avoids."""
    for flops in budgets:
        if {(OURS, flops), (PUBLISHED, flops)} <= lost.keys() and lost[PUBLISHED, flops] > 0:
            gone = 1 - lost[OURS, flops] / lost[PUBLISHED, flops]
            yield f"- of the points that {PUBLISHED} loses at {flops:g}, {gone:.0%} are not lost."


def _values(found: Found, task: str, method: str, flops: float) -> list[float]:
    """Metrics of a method, one for each seed."""
    return [cell["value"] for (t, _, m, f), cell in found.items() if (t, m, f) == (task, method, flops)]


def _rows(found: Found, task: str, method: str, flops: float) -> dict[int, Sequence[float]]:
    """Figures of each test row, by seed."""
    return {s: cell["rows"] for (t, s, m, f), cell in found.items() if (t, m, f) == (task, method, flops)}
