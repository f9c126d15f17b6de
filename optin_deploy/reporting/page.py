"""`report.html`: what a job found, as one page that loads nothing; report.html beside it is its template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from optin_deploy.common.extras import require
from optin_deploy.common.formatting import figures, milliseconds, si, size
from optin_deploy.common.version import __version__
from optin_deploy.errors import BadInput
from optin_deploy.files.ownership import free_name
from optin_deploy.files.storage import write_text
from optin_deploy.reporting import charts
from optin_deploy.reporting.artifact_table import artifact_table
from optin_deploy.reporting.charts import latency_chart, ratio_chart, sweep_chart, units_chart
from optin_deploy.reporting.findings import Findings, StoredReport, read_findings
from optin_deploy.reporting.latency_rows import LatencyRow
from optin_deploy.reporting.score_table import facts_of
from optin_deploy.structure.kept import KeptGroup, kept_lines, kept_rows

GENERATOR = '<meta name="generator" content="optin-deploy">'
"""Tag in the head of the template by which a page of ours is recognised."""
PAGE_HEAD_BYTES = 2**16
FEW = ("heads", "groups", "queries")
"""Kinds whose units are drawn one by one."""
FOLDERS = re.compile(r"(?<![\w.:/~@=-])(?:[A-Za-z]:[\\/]|/)(?:[^\\/\s`'\",;:()<>|]+[\\/])+")
"""The folders of an absolute path within a text."""


def write_page(folder: Path, out: Path | None = None, *, force: bool = False, dry_run: bool = False) -> Path:
    """Write the page about a finished output folder.

    Args: out: the file; default: report.html in the folder. force: keep a file of others under another name.
        dry_run: only check that it could be done.
    Returns: the file.
    Raises: BadInput, PlanMismatch: the folder is not finished or damaged, or `out` is no .html file, or not ours.
        MissingDependency.
    """
    path = out or folder / "report.html"
    if path.is_dir() or path.suffix.lower() not in (".html", ".htm"):
        raise BadInput(f"--out {path}: give a file that ends in .html; any other would be replaced by a page.")
    html = render(read_findings(folder))
    free_name(path, _is_page, force=force, dry_run=dry_run)
    if not dry_run:
        write_text(path, html)
    return path


def _is_page(path: Path) -> bool:
    """Is this a page of an earlier `optin report`?"""
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(PAGE_HEAD_BYTES)


def render(found: Findings) -> str:
    """The page; every text from a file is escaped.

    Raises: MissingDependency.
    """
    require("jinja2")
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("optin_deploy", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": milliseconds, "si": si, "size": size, "figures": figures, "facts_of": facts_of}
    environment.filters |= {"named": named, "foldered": without_folders}
    report, bench = found.report, found.bench
    measured = [("", report.latency, report.environment)]
    if bench is not None:
        measured.append(("Measured again with optin bench", bench.latency, bench.environment))
    groups = [KeptGroup(group.name, group.kind, group.kept, group.units) for group in report.groups]
    cut = {group.kind for group in groups if not group.whole}
    drawn = {kind: of for kind, of in found.kept.items() if kind in cut or not cut}
    return environment.get_template("report.html").render(
        c=charts,
        report=report,
        title=named(report.model) or report.model,
        sizes=size_rows(report),
        artifacts=artifact_table(report.artifacts, report.latency),
        units=[units_chart(kind, of.stay, of.names, cells=kind in FEW) for kind, of in drawn.items()],
        kept_lines=kept_lines(groups),
        kept_rows=kept_rows(groups),
        measured=[(title, _points(rows), facts) for title, rows, facts in measured if rows],
        sweep=found.sweep,
        sweep_chart=sweep_chart(found.sweep, report.macs.kept) if found.sweep else None,
        report_sha256=found.report_sha256,
        version=__version__,
    )


def named(value: Any) -> Any:
    """The value with the name alone of each path from the root: a page is sent around, whose folders stay at home."""
    if isinstance(value, Mapping):
        return {name: named(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [named(inner) for inner in value]
    if isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(value).name or value  # which takes both kinds of slashes
    return value


def without_folders(text: str) -> str:
    """The text with the name alone of each path from the root in it."""
    return FOLDERS.sub("", text)


def _points(rows: Sequence[LatencyRow]) -> list[dict[str, Any]]:
    return [{"row": row, "latency": latency_chart(row), "ratios": ratio_chart(row)} for row in rows]


def size_rows(report: StoredReport) -> list[tuple[str, str, str, str]]:
    """Rows (what, dense, pruned, kept) of the table of sizes."""
    params, macs, files = report.params, report.macs, report.size_bytes
    rows = [
        ("parameters", si(params.dense), si(params.pruned), f"{params.pruned / params.dense:.1%}"),
        ("MACs a sample", si(macs.dense), si(macs.pruned), f"{macs.kept:.1%}"),
    ]
    if files.dense is None:
        return [*rows, ("file", "", size(files.pruned), "")]
    return [*rows, ("file", size(files.dense), size(files.pruned), f"{files.pruned / files.dense:.1%}")]
