"""What a person sees: progress bars, tables, warnings."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from optin_deploy.common.progress import Progress
    from optin_deploy.measuring.measurement import Measurement
    from optin_deploy.planning.plan import NetworkPlan
    from optin_deploy.reporting.report import Report

LOG_WIDTH = 120
"""Characters a line where the output is no terminal."""


def quiet_libraries() -> None:
    """Silence the bars and reports that transformers prints a load; what matters in them, load_dense says itself."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # read the environment when it was imported
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class Once(logging.Filter):
    """Lets a message of a logger pass once: each stage that reads the rows again has the same to say of them."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Is this the first time?"""
        message = record.getMessage()
        known = message in self._told
        self._told.add(message)
        return not known


@contextmanager
def stage_bar(title: str) -> Iterator[Progress]:
    """A progress bar on a terminal; elsewhere one line a stage."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.file.isatty():  # FORCE_COLOR makes rich take a log for a terminal
        typer.echo(f"{title} ...", err=True)
        yield lambda done, total: None
        return
    columns = (
        TextColumn("{task.description:>18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)
        whole = bars.tasks[0].total or 1
        bars.update(bar, completed=whole, total=whole)


def warn(text: str) -> None:
    """A warning, on the error stream."""
    typer.secho(f"warning: {text}", fg="yellow", err=True)


def print_plan(plan: NetworkPlan, units: Mapping[str, int], *, table: bool = True) -> None:
    """What a plan keeps: the shares, and a row for each block of the network.

    Args: units: of all groups, by name, as far as they are known. table: False: only the shares.
    """
    from optin_deploy.common.formatting import si
    from optin_deploy.planning.plan import describe_merges
    from optin_deploy.structure.kept import HEADER, kept_lines, kept_of, kept_rows

    cost = plan.cost
    if cost is not None:
        shapes = ", ".join(f"{name} {shape}" for name, shape in cost.inputs.items())
        typer.echo(
            f"keeps {cost.macs_pruned / max(1, cost.macs_dense):.1%} of {si(cost.macs_dense)} MACs at {shapes}, "
            f"{cost.weights_pruned / max(1, cost.weights_dense):.1%} of {cost.weights_dense:,} parameters"
        )
    if any(plan.merges):
        typer.echo(describe_merges(plan.merges, of_text=plan.of_text))
    if not table:
        return
    groups = kept_of(plan.keep, units)
    for line in kept_lines(groups):
        typer.echo(line)
    rows = kept_rows(groups)
    if rows:
        print_table(HEADER, rows)


def print_report(report: Report, folder: Path) -> None:
    """What a job found: quality first, then size and latency."""
    from optin_deploy.reporting.artifact_table import artifact_table
    from optin_deploy.reporting.report import SUMMARY_HEADER, quality_lines, summary_rows

    for line in (*quality_lines(report), *report.notes):
        typer.echo(line)
    print_table(SUMMARY_HEADER, summary_rows(report))
    if report.artifacts:
        print_table(*artifact_table(report.artifacts, report.latency))
    if report.latency:
        print_latency(report.latency)
    typer.echo(f"Everything is in {folder}; read {folder / 'report.md'}.")


def print_latency(latency: Sequence[Measurement]) -> None:
    """Dense against pruned, and a warning where dense differs from itself."""
    from optin_deploy.reporting.report import (
        DEVICE_HEADER,
        DEVICE_NOTE,
        LATENCY_HEADER,
        device_rows,
        latency_rows,
        machine_lines,
        memory_lines,
        unstable_lines,
    )

    print_table(LATENCY_HEADER, latency_rows(latency))
    on_device = device_rows(latency)
    if on_device:
        print_table(DEVICE_HEADER, on_device)
        typer.echo(DEVICE_NOTE)
    for line in (*memory_lines(latency), *machine_lines(latency)):
        typer.echo(line)
    for line in unstable_lines(latency):
        warn(line)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table on the terminal; wide enough for all columns where there is none (a log)."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))  # names from files may hold what rich takes for markup
    output_console().print(table)


def output_console() -> Console:
    """The output stream; LOG_WIDTH wide where it is no terminal (a log)."""
    from rich.console import Console

    console = Console()
    return console if console.file.isatty() else Console(width=LOG_WIDTH)
