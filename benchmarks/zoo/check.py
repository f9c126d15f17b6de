"""Check one network: what is found, and whether what is cut is right, at two sizes and in three ways."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from benchmarks.zoo.cases import Case
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.masks import masks
from optin_deploy.cutting.proof import NotProven, difference, prove
from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read import read
from optin_deploy.network.run import Program
from optin_deploy.network.write import write
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.macs import macs

Keep = Mapping[str, Sequence[int]]
Feeds = Mapping[str, Tensor]


@dataclass
class Outcome:
    """What was found of one network."""

    name: str
    form: str
    groups: int = 0
    expected: int | None = None
    missing: dict[str, int] = field(default_factory=dict)
    """Expected groups that were not found: how many of each kind and size."""
    extra: dict[str, int] = field(default_factory=dict)
    identity: bool | None = None
    """Whether the network as it is, read and written, gives the same bits; None: ONNX Runtime cannot run it."""
    some: float | None = None
    """Difference of cut and masked, random units of every group, float64."""
    one: float | None = None
    """The same with one unit of every group."""
    float32: float | None = None
    """The same as `some` in float32: the written file by ONNX Runtime, the masked network by torch."""
    dense: float | None = None
    """Difference of masked and dense outputs: what the plan changes."""
    emptied: int = 0
    """Groups that can lose all of their units, one group at a time, and are proven to."""
    refused: int = 0
    """Groups that cannot, and say so."""
    macs: int = 0
    torch_macs: int | None = None
    recounted: bool | None = None
    """Whether the cut network, analysed again, has the multiply-accumulates that were foretold."""
    seconds: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Nodes that were not understood, and why."""
    faults: list[str] = field(default_factory=list)
    """What went wrong."""


def check(case: Case, *, emptied: bool = True, seed: int = 0) -> Outcome:
    """Check a network; what goes wrong is among the faults, and the rest is still done."""
    outcome = Outcome(case.name, case.form)
    begin = time.perf_counter()
    network = read(case.path)
    outcome.seconds["read"] = time.perf_counter() - begin
    begin = time.perf_counter()
    probes = probes_of(network)
    layout = find(network, probes)
    outcome.seconds["find"] = time.perf_counter() - begin
    _compare(outcome, case, layout)
    outcome.problems = [f"{network.nodes[n]}: {why}" for n, why in layout.structure.problems.items()]
    outcome.macs = macs(layout.structure)
    if case.torch_macs is not None:
        outcome.torch_macs = case.torch_macs(probes[0])
    names = {port.name for port in network.inputs}
    feeds = [{name: value for name, value in one.items() if name in names} for one in case.feeds]
    outcome.identity = _identity(case.path, network, feeds)
    if not layout.groups:
        return outcome
    rng = np.random.default_rng(seed)
    some = {group.name: _pick(rng, group.units, int(rng.integers(1, group.units + 1))) for group in layout.groups}
    one = {group.name: _pick(rng, group.units, 1) for group in layout.groups}
    begin = time.perf_counter()
    _prove(outcome, "some", layout, some, feeds)
    _prove(outcome, "one", layout, one, feeds)
    outcome.seconds["prove"] = time.perf_counter() - begin
    _float32(outcome, layout, some, feeds)
    _recount(outcome, layout, some, probes)
    for group in layout.groups if emptied else ():
        _empty(outcome, layout, group.name, feeds)
    return outcome


def _compare(outcome: Outcome, case: Case, layout: Layout) -> None:
    outcome.groups = len(layout.groups)
    if case.groups is None:
        return
    found = Counter((group.kind, group.units) for group in layout.groups)
    outcome.expected = case.groups.total()
    outcome.missing, outcome.extra = (_words(some) for some in (case.groups - found, found - case.groups))


def _words(groups: Counter[tuple[str, int]]) -> dict[str, int]:
    return {f"{kind} {units}": number for (kind, units), number in sorted(groups.items())}


def _identity(path: Path, network: Network, feeds: Sequence[Feeds]) -> bool | None:
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "again.onnx"
        write(network, again)
        try:
            pairs = [(by_onnxruntime(path, one), by_onnxruntime(again, one)) for one in feeds]
        except Unrunnable:
            return None
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def _prove(outcome: Outcome, plan: str, layout: Layout, keep: Keep, feeds: Sequence[Feeds]) -> None:
    try:
        proof = prove(layout, keep, cut(layout, keep), feeds)
    except BROKEN as err:
        outcome.faults.append(f"{plan}: {type(err).__name__}: {err}")
        return
    setattr(outcome, plan, proof.masked)
    if plan == "some":
        outcome.dense = proof.dense


def _float32(outcome: Outcome, layout: Layout, keep: Keep, feeds: Sequence[Feeds]) -> None:
    """Compare the written file, run by ONNX Runtime, with the masked network."""
    places = masks(layout, keep)
    dense = Program(layout.structure.network, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cut.onnx"
        try:
            write(cut(layout, keep), path)
            with torch.no_grad():
                pairs = [(dense(one, masks=places).outputs, by_onnxruntime(path, one)) for one in feeds]
        except Unrunnable as err:
            if outcome.identity is not None:
                outcome.faults.append(f"float32: ONNX Runtime does not run the cut file: {err}")
            return
        except BROKEN as err:
            outcome.faults.append(f"float32: {type(err).__name__}: {err}")
            return
    outcome.float32 = max(difference(ours[name], masked[name]) for masked, ours in pairs for name in ours)


def _recount(outcome: Outcome, layout: Layout, keep: Keep, probes: Sequence[Feeds]) -> None:
    sizes = {leaf: len(units) for leaf, units in layout.leaves(keep).items()}
    try:
        again = find(cut(layout, keep), probes)
    except BROKEN as err:
        outcome.faults.append(f"analysed again: {type(err).__name__}: {err}")
        return
    foretold, counted = macs(layout.structure, sizes), macs(again.structure)
    outcome.recounted = foretold == counted
    if foretold != counted:
        outcome.faults.append(f"MACs of the cut network: {foretold} foretold, {counted} counted")


def _empty(outcome: Outcome, layout: Layout, name: str, feeds: Sequence[Feeds]) -> None:
    try:
        smaller = cut(layout, {name: []})
    except BadInput:
        outcome.refused += 1
        return
    except BROKEN as err:
        outcome.faults.append(f"emptied {name}: {type(err).__name__}: {err}")
        return
    try:
        prove(layout, {name: []}, smaller, feeds)
    except BROKEN as err:
        outcome.faults.append(f"emptied {name}: {type(err).__name__}: {err}")
        return
    outcome.emptied += 1


BROKEN = (NotProven, BadInput, RuntimeError, AssertionError, ArithmeticError, LookupError, TypeError, ValueError)
"""What a wrong cut ends with: our own errors, and those of torch, numpy and Python."""


class Unrunnable(Exception):
    """ONNX Runtime does not run a file on this CPU."""


def by_onnxruntime(path: Path, feeds: Feeds) -> dict[str, Tensor]:
    """Run a file as it is, without optimisations.

    Raises: Unrunnable.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    state = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        values = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    except (state.Fail, state.InvalidArgument, state.NotImplemented, state.InvalidGraph, state.RuntimeException) as err:
        raise Unrunnable(str(err).splitlines()[0]) from err
    outputs = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(outputs, values, strict=True)}


def _pick(rng: np.random.Generator, units: int, kept: int) -> list[int]:
    return sorted(int(unit) for unit in rng.choice(units, kept, replace=False))
