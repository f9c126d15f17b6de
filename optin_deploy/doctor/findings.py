"""What `optin doctor` finds: a level, where, what it means, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]
HEADER = ("", "where", "finding")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    """`problem` makes the exit code 1; `warning` does not."""
    subject: str
    """A package, a device or a file."""
    message: str
    remedy: str = ""
    """What to do next; empty if nothing is to be done."""


def summary(findings: Iterable[Finding]) -> str:
    """How many problems and warnings there are, as a sentence."""
    levels = [finding.level for finding in findings]
    counts = [(levels.count("problem"), "problem"), (levels.count("warning"), "warning")]
    named = [f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts if count]
    return f"{' and '.join(named) or 'No problems'} found."


def finding_rows(findings: Iterable[Finding]) -> list[tuple[str, str, str]]:
    """Rows under HEADER, the worst first, in their order otherwise."""
    ranked = sorted(findings, key=lambda finding: ("problem", "warning", "ok").index(finding.level))
    return [
        (each.level, each.subject, f"{each.message}\n-> {each.remedy}" if each.remedy else each.message)
        for each in ranked
    ]
