"""README's table of models, of the recorded results of the zoo: python -m benchmarks.zoo.table writes it.

A test compares both, so that the table is never older than the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.zoo.families import FAMILIES, Family
from optin_deploy.bench.report import to_table
from optin_deploy.storage import read_json, write_text

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- models: python -m benchmarks.zoo.table -->", "<!-- end of models -->"
HEADER = ("read", "families of the zoo", "groups found", "cut = masked, of the largest output")
FORMS = ("dynamo", "torchscript")
"""Both exporters of torch."""
KINDS: Mapping[str, str] = {"ids": "texts", "picture": "pictures", "real": "pictures, sound or features"}
"""Kind of the first input -> what a family reads."""


def main() -> None:
    """Write the table into the README."""
    before, rest = README.read_text(encoding="utf-8").split(START)
    write_text(README, f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}")


def table() -> str:
    """One row for each kind of input."""
    results = read_json(RESULTS / "zoo.json", "Make it with `python -m benchmarks.zoo --all --record`.")["networks"]
    of: dict[str, list[Family]] = {}
    for family in FAMILIES.values():
        of.setdefault(_reads(family), []).append(family)
    rows = [_row(kind, [family.name for family in families], results) for kind, families in of.items()]
    return to_table(HEADER, rows)


def _reads(family: Family) -> str:
    kinds = [each.kind for each in family.inputs]
    return "texts, twice" if kinds.count("ids") > 1 else KINDS.get(kinds[0], KINDS["real"])


def _row(kind: str, names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    mine = [each for each in results if each["name"] in names and each["form"] in FORMS]
    found, expected = (sum(each[name] for each in mine) for name in ("groups", "expected"))
    worst = max(each["some"] for each in mine)
    return (kind, ", ".join(names), f"{found} of {expected}", f"{worst:.0e}")


if __name__ == "__main__":
    main()
