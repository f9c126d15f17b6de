"""Rows -> the page: speed by model, parity, scoring, latency table, kernels, failures, and what must hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.cells import Cell, Requirement, Suite
from benchmarks.gpu.models import PRUNED
from benchmarks.gpu.rows import Row
from optin_deploy.measuring.state import ranges_of
from optin_deploy.reporting.report import to_table

Found = Sequence[tuple[Cell, Row]]
GPU_SHOWN = ("sm_mhz", "temperature_c", "power_w")


def page(suite: Suite, rows: Mapping[str, Row]) -> str:
    """The whole report as Markdown."""
    found = [(cell, rows[cell.key]) for cell in suite.cells if cell.key in rows]
    good = [(cell, row) for cell, row in found if row["status"] == "ok"]
    pairs = [(cell, row) for cell, row in good if cell.kind == "pair"]
    parts = ["# GPU suite", *(f"- {line}" for line in requirement_lines(suite.must_hold, rows))]
    parts.append(
        f"{len(good)} of {len(suite.cells)} cells measured. Random weights. ms: median of back-to-back runs by the "
        "device's clock; (times as fast as dense, 95% interval). ideal: dense MACs / pruned MACs."
    )
    for model in dict.fromkeys(cell.model for cell, _ in pairs):
        parts += [f"## {model}", speed_table([(c, r) for c, r in pairs if c.model == model])]
    if pairs:
        parts += ["## One synchronised call", call_table(pairs), "## Parity with eager fp32", parity_table(pairs)]
    states = [row["gpu"] for _, row in good if row.get("gpu")]
    if states:
        parts.append(f"Right after the cells: {ranges_of(states, GPU_SHOWN) or 'nvidia-smi gave no numbers'}.")
    parts += score_parts([(c, r) for c, r in good if c.kind == "score"])
    for cell, row in good:
        parts += width_table(cell, row) if cell.kind == "table" else []
        parts += kernel_tables(cell, row) if cell.kind == "profile" else []
    bad = [(cell.key, row["status"], row["error"]) for cell, row in found if row["status"] != "ok"]
    if bad:
        parts += ["## Failed and skipped", to_table(("cell", "status", "reason"), [*map(_escaped, bad)])]
    return "\n\n".join(parts).replace("\n\n- ", "\n- ")


def requirement_lines(must_hold: Sequence[Requirement], rows: Mapping[str, Row]) -> list[str]:
    """One line each: what was asked, what was measured, whether it holds."""
    return [_requirement_line(requirement, rows) for requirement in must_hold]


def _requirement_line(requirement: Requirement, rows: Mapping[str, Row]) -> str:
    measured = [
        (rows[key]["config"]["precision"], rows[key]["result"]["variants"][requirement.variant])
        for key in requirement.any_of
        if key in rows and rows[key]["status"] == "ok"
    ]
    if not measured:
        return f"must hold: {requirement.text}; not measured"
    # A fast engine that computes something else does not count.
    holds = any(v["speedup"] >= requirement.at_least and v["parity"]["ok"] for _, v in measured)
    said = ", ".join(
        f"{precision} {v['speedup']:.2f}x {_interval(v['ci95'])}{'' if v['parity']['ok'] else ' (parity fails)'}"
        for precision, v in measured
    )
    return f"must hold: {requirement.text}; measured {said}: {'holds' if holds else 'does not hold'}"


def speed_table(pairs: Found) -> str:
    """Device time of dense and pruned, a row a cell."""
    header = ("engine", "precision", "batch", "seq", "keep", "dense ms", *(f"{name} ms" for name in PRUNED), "ideal")
    return to_table(header, [(*_where(cell), *_times(row, "")) for cell, row in pairs])


def call_table(pairs: Found) -> str:
    """What one caller sees: a launch until its result is there; medians, and the 95th percentile of the calls."""
    header = (
        "model",
        "engine",
        "precision",
        "batch",
        "seq",
        "keep",
        "dense ms",
        *(f"{n} ms" for n in PRUNED),
        "p95 ms",
    )
    return to_table(
        header,
        [
            (cell.model, *_where(cell), *_times(row, "call_")[:-1], _each(row, lambda v: f"{v['call_p95_ms']:.3f}"))
            for cell, row in pairs
        ],
    )


def parity_table(pairs: Found) -> str:
    """Errors against the limit of the precision."""
    header = ("model", "engine", "precision", "batch", "seq", "keep", "dense / ragged / aligned", "limit", "ok")
    return to_table(
        header,
        [
            (
                cell.model,
                *_where(cell),
                _each(row, lambda v: "none" if v["parity"]["error"] is None else f"{v['parity']['error']:.1e}"),
                f"{row['result']['variants']['dense']['parity']['limit']:.0e}",
                "yes" if row["result"]["ok"] else "NO",
            )
            for cell, row in pairs
        ],
    )


def score_parts(scores: Found) -> list[str]:
    """Seconds and forward-equivalents of the scorers."""
    if not scores:
        return []
    lines = [_score_line(cell, row["result"]) for cell, row in scores]
    header = ("model", "samples", "forward s", "sketch s (forwards)", "exact s (forwards)", "exact extrapolated from")
    return ["## Scoring", to_table(header, lines)]


def _score_line(cell: Cell, result: Mapping[str, Any]) -> tuple[str, ...]:
    origin = result["exact_extrapolated_from"]
    return (
        cell.model,
        str(result["samples"]),
        f"{result['forward_s']:.3f}",
        f"{result['sketch_s']:.2f} ({result['sketch_forwards']:.0f})",
        f"{result['exact_s']:.0f} ({result['exact_forwards']:.0f})",
        f"{origin['units']} of {origin['of_units']} units, {origin['batches']} batches",
    )


def width_table(cell: Cell, row: Row) -> list[str]:
    """The latency table: relative to dense, with the milliseconds."""
    points = row["result"]["rows"]
    cells = [
        (str(p["heads"]), str(p["neurons"]), f"{p['macs_kept']:.3f}", f"{p['relative']:.3f}", f"{p['ms']:.3f}")
        for p in points
    ]
    return [f"## Widths: {cell.key}", to_table(("heads", "neurons", "MACs kept", "time / dense", "ms"), cells)]


def kernel_tables(cell: Cell, row: Row) -> list[str]:
    """Groups of kernels side by side, then the largest kernels of each variant."""
    variants = row["result"]["variants"]
    groups = list(dict.fromkeys(group for v in variants.values() for group in v["groups"]))
    lines = [(group, *(f"{v['groups'].get(group, 0.0):.3f}" for v in variants.values())) for group in groups]
    lines.append(("all", *(f"{v['total_ms']:.3f}" for v in variants.values())))
    parts = [f"## Kernels: {cell.key}", to_table(("group, ms a run", *variants), lines)]
    for name, v in variants.items():
        kernels = [_escaped((text, f"{ms:.3f}", f"{calls:g}")) for text, ms, calls in v["kernels"]]
        parts.append(to_table((f"kernel, {name}", "ms a run", "calls"), kernels))
    return parts


def _where(cell: Cell) -> tuple[str, ...]:
    engine = cell.engine if cell.inputs == "full" else f"{cell.engine}, {cell.inputs}"
    return engine, cell.precision, str(cell.batch), str(cell.seq or "-"), f"{cell.keep}"


def _times(row: Row, prefix: str) -> tuple[str, ...]:
    variants = row["result"]["variants"]
    pruned = [variants[name] for name in PRUNED]
    return (
        f"{variants['dense'][f'{prefix}p50_ms']:.3f}",
        *(f"{v[f'{prefix}p50_ms']:.3f} ({v[f'{prefix}speedup']:.2f}x {_interval(v[f'{prefix}ci95'])})" for v in pruned),
        " / ".join(f"{v['ideal']:.2f}x" for v in pruned),
    )


def _each(row: Row, form: Any) -> str:
    return " / ".join(form(row["result"]["variants"][name]) for name in ("dense", *PRUNED))


def _interval(ci: Sequence[float]) -> str:
    return f"[{ci[0]:.2f}, {ci[1]:.2f}]"


def _escaped(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(value.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for value in values)
