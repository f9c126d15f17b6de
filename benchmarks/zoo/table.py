"""Tables of models in README and docs, of the recorded results of the zoo: python -m benchmarks.zoo.table writes them.

A test compares both, so that the tables are never older than the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.zoo.families import FAMILIES
from benchmarks.zoo.family import Family
from optin_deploy.files.storage import read_json, write_text
from optin_deploy.reporting.report import to_table

ROOT = Path(__file__).parents[2]
START, END = "<!-- models: python -m benchmarks.zoo.table -->", "<!-- end of models -->"
REAL_START, REAL_END = "<!-- real models: python -m benchmarks.zoo.table -->", "<!-- end of real models -->"
REAL_HEADER = ("model", "at 60% of the MACs", "faster", "at 40%", "faster")
BUDGETS = (0.6, 0.4)
METRICS: Mapping[str, str] = {
    "cosine_to_dense": "cosine {pruned:.3f}",
    "same_prediction": "same class {pruned:.1%}",
    "same_prediction_per_token": "same at each place {pruned:.1%}",
    "perplexity": "perplexity {pruned:.2f} (dense {dense:.2f})",
    "relative_error": "relative error {pruned:.3f}",
}
"""How a metric is told; the dense network is its own measure where nothing else is said."""
HEADER = ("read", "families of the zoo", "groups found", "cut = masked, of the largest output")
FORMS = ("dynamo", "torchscript")
"""Both exporters of torch."""
KINDS: Mapping[str, str] = {"ids": "texts", "picture": "pictures", "real": "pictures, sound or features"}
"""Kind of the first input -> what a family reads."""


def main() -> None:
    """Write each table where it stands."""
    for name, text in pages().items():
        write_text(ROOT / name, text)


def pages() -> dict[str, str]:
    """Path of each file with tables -> its text with those of the recorded results."""
    found = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/networks.md")}
    for start, written, end in ((START, table(), END), (REAL_START, real_models(), REAL_END)):
        for name in [name for name, text in found.items() if start in text]:
            before, rest = found[name].split(start)
            found[name] = f"{before}{start}\n{written}\n{end}{rest.split(end)[1]}"
    return found


def table() -> str:
    """One row for each kind of input."""
    results = read_json(RESULTS / "zoo.json", "Make it with `python -m benchmarks.zoo --all --record`.")["networks"]
    of: dict[str, list[Family]] = {}
    for family in FAMILIES.values():
        of.setdefault(_reads(family), []).append(family)
    rows = [_row(kind, [family.name for family in families], results) for kind, families in of.items()]
    return to_table(HEADER, rows)


def real_models() -> str:
    """One row for each real model that went through the whole job."""
    results = read_json(RESULTS / "zoo_chain.json", "Make it with `python -m benchmarks.zoo.chain --record`.")["models"]
    found: dict[str, dict[float, Mapping[str, Any]]] = {}
    for each in results:
        found.setdefault(each["model"], {})[each["flops"]] = each
    return to_table(REAL_HEADER, [_real_row(name, cells) for name, cells in found.items()])


def _real_row(name: str, cells: Mapping[float, Mapping[str, Any]]) -> tuple[str, ...]:
    columns: list[str] = []
    for flops in BUDGETS:
        cell = cells.get(flops)
        if cell is None:
            columns += ["", ""]
            continue
        seen = "".join(f"; {what} {value}" for what, value in cell["seen"].items())
        columns += [METRICS[cell["quality"]["metric"]].format(**cell["quality"]) + seen]
        columns += [f"{cell['latency'][0]['speedup']:.2f}x"]
    what = next(iter(cells.values()))["what"]
    return (f"{name}: {what}", *columns)


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
