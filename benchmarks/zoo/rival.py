"""What onnxsim, another pruner of ONNX files, cuts of the zoo, and whether its files still compute what they should.

It cuts by matching patterns, given how much to remove: `apply_attention_head_pruning`, then all of its
`apply_structured_pruning` functions, each of which leaves alone what it does not know. It is given every file as it is,
after its own simplifier, and after its simplifier with fixed sizes; the best of the three counts. Its kept units are
read from its weights, so that its file can be compared with the network where all others are masked, and with ours.

Run:

    python -m benchmarks.zoo.rival --record           # needs onnxsim, of the `peers` extra
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from benchmarks.record import RESULTS, write_result
from benchmarks.zoo import dialects
from benchmarks.zoo.cases import Case, of_dialect, of_family, of_real
from benchmarks.zoo.check import BROKEN, Unrunnable, by_onnxruntime
from benchmarks.zoo.export import OPSETS
from benchmarks.zoo.families import FAMILIES
from benchmarks.zoo.fetching import Unavailable
from benchmarks.zoo.kept_units import besides, kept_units, weights_of
from benchmarks.zoo.real import REAL
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.masks import masks
from optin_deploy.cutting.proof import difference
from optin_deploy.network.read import read
from optin_deploy.network.run import Program
from optin_deploy.network.write import write
from optin_deploy.reporting.report import to_table
from optin_deploy.structure.find import find

REMOVED = 0.5
"""Its option `sparsity`: the part of each group's units that go."""
CUTS = (
    "attention_head_pruning", "structured_pruning", "structured_pruning_qdq", "structured_pruning_qoperator",
    "structured_pruning_matmul_nbits", "structured_pruning_dynamic_quantize_matmul",
    "structured_pruning_dynamic_quantize_conv",
)  # fmt: skip
BASES = ("as it is", "simplified", "simplified, fixed sizes")
ROUNDING = 1e-5
"""Largest difference in float32, as a part of the largest output; in fewer bits twice that of our own cut."""
COLUMNS = {"heads": ("heads", "groups", "queries"), "neurons": ("neurons",), "channels": ("channels",)}
"""Widths of heads it does not cut; they are counted among `all`."""
HEADER = (
    "network",
    "form",
    *COLUMNS,
    "all",
    "besides",
    "of the file",
    "runs",
    "to masked",
    "ours to masked",
    "changes",
)


@dataclass
class Result:
    """What it made of one base of one network."""

    base: str
    groups: dict[str, int] = field(default_factory=dict)
    """Groups that this project finds in the base, by kind."""
    cut: dict[str, int] = field(default_factory=dict)
    """Those of them that it cut."""
    besides: int = 0
    """Weights that it cut along axes which must stay whole, or in the midst of units."""
    runs: int = 0
    """Number of sizes at which ONNX Runtime runs its file."""
    sizes: int = 0
    """Number of sizes at which the base can be run."""
    masked: float | None = None
    """Difference of its file and the masked base; None: nothing to compare."""
    ours: float | None = None
    """The same for our cut to the same units."""
    dense: float | None = None
    """Difference of the masked and the whole base."""
    fault: str = ""

    @property
    def right(self) -> bool:
        """Whether its file runs wherever the base does, and equals the masked one."""
        bound = max(ROUNDING, 2 * (self.ours or 0))
        return self.runs == self.sizes and self.masked is not None and self.masked <= bound

    @property
    def rank(self) -> tuple[bool, int, int]:
        """More is better."""
        return self.right, sum(self.cut.values()), self.runs


def bases_and_cuts(source: Path, sizes: Mapping[str, Sequence[int]], folder: Path) -> list[str]:
    """Let onnxsim cut a file in three forms, into `base N.onnx` and `cut N.onnx`; returns what went wrong with each."""
    onnxsim: Any = import_module("onnxsim")
    faults = []
    for place, base in enumerate(BASES):
        try:
            model = onnx.load(source)
            if place:
                model, _ = onnxsim.simplify(model, overwrite_input_shapes=dict(sizes) if place == 2 else None)
            onnx.save(model, folder / f"base {place}.onnx")
            for name in CUTS:
                model = getattr(onnxsim, f"apply_{name}")(model, REMOVED)
            onnx.save(model, folder / f"cut {place}.onnx")
            faults.append("")
        except Exception as err:  # noqa: BLE001  # whatever it raises is its result
            faults.append(f"{base}: {type(err).__name__}: {' '.join(str(err).split())[:200]}")
    return faults


def judge(base: Path, made: Path, result: Result, feeds: Sequence[Mapping[str, Tensor]]) -> None:
    """Count what it cut, and compare."""
    network = read(base)
    layout = find(network)
    result.groups = dict(Counter(group.kind for group in layout.groups))
    whole, less = (weights_of(path) for path in (base, made))
    keep = kept_units(layout, whole, less)
    result.cut = dict(Counter(layout.by_name[name].kind for name in keep))
    result.besides = besides(layout, keep, whole, less)
    outputs: list[tuple[Mapping[str, Tensor], dict[str, Tensor]]] = []
    for one in feeds:
        try:
            by_onnxruntime(base, one)
        except Unrunnable:
            continue  # with fixed sizes at another one
        result.sizes += 1
        try:
            outputs.append((one, by_onnxruntime(made, one)))
        except Unrunnable as err:
            result.fault = str(err).replace(f"{made.parent}/", "")[:300]
    result.runs = len(outputs)
    if not keep:
        return
    dense, places = Program(network, dtype=torch.float32), masks(layout, keep)
    smaller = made.with_name("ours.onnx")
    write(cut(layout, keep), smaller)
    with torch.no_grad():
        masked = [(one, dense(one, masks=places).outputs) for one in feeds[: result.sizes]]
        result.dense = max(largest(dense(one).outputs, values) for one, values in masked)
        result.ours = max(largest(by_onnxruntime(smaller, one), values) for one, values in masked)
        if outputs and not result.besides:
            result.masked = max(largest(theirs, dense(one, masks=places).outputs) for one, theirs in outputs)


def largest(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Largest difference of any output."""
    return max(difference(value, others[name]) for name, value in some.items())


def compare(case: Case) -> list[Result]:
    """Let it cut one network in its three forms, in a process of its own, and judge each."""
    names = {value.name for value in onnx.load(case.path).graph.input}
    feeds = [{name: value for name, value in one.items() if name in names} for one in case.feeds]
    sizes = {name: list(value.shape) for name, value in feeds[0].items()}
    results = [Result(base) for base in BASES]
    with tempfile.TemporaryDirectory() as folder:
        try:
            with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
                faults = pool.submit(bases_and_cuts, case.path, sizes, Path(folder)).result()
        except BrokenProcessPool:
            faults = ["the process ended"] * len(BASES)
        for place, (result, fault) in enumerate(zip(results, faults, strict=True)):
            result.fault = fault
            if not fault:
                try:
                    judge(Path(folder) / f"base {place}.onnx", Path(folder) / f"cut {place}.onnx", result, feeds)
                except BROKEN as err:
                    result.fault = f"not judged: {type(err).__name__}: {' '.join(str(err).split())[:200]}"
    return results


def row(name: str, form: str, best: Result) -> tuple[str, ...]:
    """One line of the table."""
    total, theirs = Counter(best.groups), Counter(best.cut)
    counts = [(sum(theirs[kind] for kind in kinds), sum(total[kind] for kind in kinds)) for kinds in COLUMNS.values()]
    runs = f"{best.runs} of {best.sizes}" if theirs or best.besides else ""
    return (
        name,
        form,
        *(f"{cut} of {of}" if of else "" for cut, of in counts),
        f"{theirs.total()} of {total.total()}",
        str(best.besides or ""),
        best.base,
        runs,
        *("" if value is None else f"{value:.0e}" for value in (best.masked, best.ours, best.dense)),
    )


def page(found: Sequence[tuple[str, str, list[Result]]]) -> str:
    """The table, what it sums up to, and what went wrong."""
    best = [(name, form, max(results, key=lambda result: result.rank)) for name, form, results in found]
    cut = [result for _, _, result in best if result.cut or result.besides]
    totals = {
        kind: (
            sum(r.cut.get(k, 0) for r in cut for k in kinds),
            sum(r.groups.get(k, 0) for *_, r in best for k in kinds),
        )
        for kind, kinds in COLUMNS.items()
    }
    apart = ", ".join(f"{name} {form} ({r.besides})" for name, form, r in best if r.besides and not r.groups)
    words = ", ".join(f"{one} of {all_} groups of {kind}" for kind, (one, all_) in totals.items())
    lines = [
        "# What onnxsim cuts of the zoo",
        "",
        (__doc__ or "").split("\n\n")[1],
        "",
        "Groups that it cuts, of those that are found in the same file; besides: weights that it cuts along axes that "
        "must stay whole for the network to be a masked one, such as those under a LayerNorm. Runs: at how many of the "
        "sizes ONNX Runtime runs its file. To masked: largest difference of its file, and of our cut to the same units "
        "by ONNX Runtime, to the masked network, as a part of the largest output; changes: how far that is from the "
        "whole network.",
        "",
        f"It cuts {words}. Of {len(best)} networks it changes {len(cut)}, and {sum(r.right for r in cut)} of these run "
        "and equal their masked selves."
        + (f" In files that this project refuses it cuts weights that are not compared: {apart}." if apart else ""),
        "",
        to_table(HEADER, [row(name, form, result) for name, form, result in best]),
        "",
    ]
    lines += [f"- {name}, {form}, {r.base}: {r.fault}" for name, form, results in found for r in results if r.fault]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Compare, print, and keep."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.rival")
    parser.add_argument("only", nargs="*", help="families or real files instead of all")
    parser.add_argument("--record", action="store_true", help="write into benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    import_module("onnxsim")
    cases: list[tuple[str, str, Callable[[], Case]]] = [
        *((name, form, partial(of_family, name, form)) for form in OPSETS for name in FAMILIES),
        *((name, form, partial(of_dialect, name, form)) for name in dialects.FAMILIES for form in dialects.MADE
          if form in dialects.offered(name)),
        *((name, real.package, partial(of_real, name)) for name, real in REAL.items() if len(real.sizes) > 1),
    ]  # fmt: skip
    found = []
    for name, form, make in cases:
        if options.only and name not in options.only:
            continue
        try:
            results = compare(make())
        except Unavailable as err:
            print(f"{name}: {err}", file=sys.stderr)
            continue
        found.append((name, form, results))
        print(" | ".join(row(name, form, max(results, key=lambda result: result.rank))), flush=True)
    data = {"networks": [{"name": n, "form": f, "results": [asdict(r) for r in results]} for n, f, results in found]}
    folder = RESULTS if options.record else Path(tempfile.mkdtemp())
    write_result(
        folder, "zoo_rival", data, page(found), f"python -m benchmarks.zoo.rival {' '.join(arguments)}".strip()
    )
    print(f"written to {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
