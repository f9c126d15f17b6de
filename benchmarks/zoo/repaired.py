"""Make families smaller by data, as a user does: scored, planned by curves, repaired, cut and proven.

python -m benchmarks.zoo.repaired                          # every family, by both exporters
python -m benchmarks.zoo.repaired bert swin --exporter dynamo

What the repairs bring is measured on rows that they have not seen. Weights and inputs are random, so that this tells
what is repaired and that it is right, not how much it is worth.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.zoo.cases import FIXED_BATCH
from benchmarks.zoo.check import BROKEN
from benchmarks.zoo.export import OPSETS, export
from benchmarks.zoo.families import FAMILIES
from benchmarks.zoo.family import Family
from optin_deploy.cutting.graph import cut
from optin_deploy.feeds.feeds import Halves
from optin_deploy.feeds.rows import Feeds
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import limits_within
from optin_deploy.planning.widths import Choice
from optin_deploy.pruning.networks import find_in
from optin_deploy.pruning.pruning import curves_of, make, pick, planned, ready_of, score
from optin_deploy.scoring.settings import ScoreSettings

ROWS, UNSEEN = 40, 16
"""Rows that the repairs are fitted on, and rows that judge them."""


@dataclass
class Repairs:
    """What came of one network."""

    name: str
    form: str
    better: int = 0
    """Products that were changed."""
    as_good: int = 0
    """Products that no solution made better on unseen rows."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Reasons why products stay as they are, and how many."""
    proof: float = 0.0
    """Difference of cut and masked in float64."""
    cut: float = 0.0
    """Squared error of the outputs on unseen rows, as a part of their variance: cut alone."""
    repaired: float = 0.0
    """The same with the repairs."""
    seconds: float = 0.0


def repair(name: str, exporter: str, *, kept: float = 0.6, rows: int = ROWS, unseen: int = UNSEEN) -> Repairs:
    """Make a family smaller by random inputs; the outputs of the cut network are compared with the dense ones."""
    made, begin = export(name, exporter), time.perf_counter()
    found = find_in(Path(made.path))
    names = {port.name for port in found.network.inputs}
    some, others = (_feeds(made.family, names, count, seed) for seed, count in enumerate((rows, unseen)))
    ready = ready_of(found, Halves(some, others))
    choice = Choice(align=1, allocation="curves")
    scores = score(ready, ScoreSettings(probes=4, head_samples=4))
    limits = limits_within(ready.costs, Limits(flops=kept))
    keep = pick(ready, scores, limits, choice, curves_of(ready, scores))
    plan = planned(ready, keep, scores, {"flops": kept})
    smaller = make(ready, plan)
    done = smaller.compensation
    assert done is not None, "asked for"
    alone, repaired = (error(found.network, each, others) for each in (cut(found.layout, plan.keep), smaller.network))
    seconds = time.perf_counter() - begin
    skipped = dict(Counter(each.why for each in done.skipped))
    better = sum(each.ridge is not None for each in done.repaired)
    return Repairs(
        name, exporter, better, len(done.repaired) - better, skipped, smaller.proof.masked, alone, repaired, seconds
    )


def error(dense: Network, other: Network, rows: Feeds) -> float:
    """Mean squared difference of all outputs, each as a part of its variance."""
    one, two = Program(dense), Program(other)
    apart: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in rows.batches:
            feeds = {port.name: batch[port.name] for port in dense.inputs}
            expected, found = one(feeds).outputs, two(feeds).outputs
            for name, value in expected.items():
                apart.setdefault(name, []).append(torch.stack([value.double(), found[name].double()]).flatten(1))
    shares = []
    for pairs in apart.values():
        value, found = torch.cat(pairs, 1)
        shares.append(float((found - value).square().mean() / value.var(correction=0).clamp(min=1e-12)))
    return sum(shares) / len(shares)


def _feeds(family: Family, names: set[str], count: int, seed: int) -> Feeds:
    batch = {name: value for name, value in family.feeds(seed, batch=count).items() if name in names}
    return Feeds((batch,), (None,) * count, "random inputs")


COLUMNS = ("network", "form", "better", "as good", "left", "cut, float64", "error, cut", "error, repaired", "s")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def row(found: Repairs) -> str:
    """One line of the table."""
    left = ", ".join(f"{number} × {why}" for why, number in found.skipped.items())
    numbers = [f"{value:.1e}" for value in (found.proof, found.cut, found.repaired)]
    cells = (found.name, found.form, found.better, found.as_good, left, *numbers, f"{found.seconds:.0f}")
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main(arguments: Sequence[str]) -> int:
    """Returns 1 if a cut is wrong, or a network cannot be made smaller."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.repaired")
    parser.add_argument("only", nargs="*", help="families; all where none is named")
    parser.add_argument("--exporter", choices=OPSETS, help="one exporter instead of both")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    print(HEAD)
    faults = 0
    for exporter in [options.exporter] if options.exporter else OPSETS:
        for name in options.only or FAMILIES:
            if (name, exporter) in FIXED_BATCH:
                continue  # units are scored for each sample alone
            try:
                print(row(repair(name, exporter)), flush=True)
            except BROKEN as err:
                faults += 1
                print(f"| {name} | {exporter} | {type(err).__name__}: {' '.join(str(err).split())[:300]} |", flush=True)
    print(f"{faults} faults.")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
