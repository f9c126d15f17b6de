"""Quality at many budgets, and the smallest budget at which it holds; scores and curves are made once."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from optin_deploy.common.progress import Stage, silent_stage
from optin_deploy.common.validation import STORED, validated
from optin_deploy.errors import BadInput, InfeasibleBudget, MissingDependency, QualityLimit
from optin_deploy.files.storage import read_json, sha256_json, write_json, write_text
from optin_deploy.jobs.planner import Planner
from optin_deploy.jobs.stages import curve_stage
from optin_deploy.planning.budget import SHARES, Limits
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.pruning import make
from optin_deploy.pruning.tokens import check
from optin_deploy.quality.quality import Quality
from optin_deploy.reporting.pictures import draw_sweep

log = logging.getLogger(__name__)

HEADER = ("flops", "kept", "parameters", "metric", "dense", "pruned", "drop")
HINT = "It will be made again."
T = TypeVar("T")


@dataclass(frozen=True)
class SweepPoint:
    """One budget, and what the model within it is worth."""

    flops: float
    """Share of the dense MACs that was allowed."""
    kept: float
    """Share that the model takes."""
    params: int
    """Its parameters."""
    quality: Quality
    seconds: float
    """Seconds of compensation, cut and judging."""

    @property
    def row(self) -> tuple[str, ...]:
        """The row of a table with HEADER; the drop is in points."""
        found = self.quality
        figures = (f"{found.dense:.4f}", f"{found.pruned:.4f}", f"{found.drop:.2f}")
        return (f"{self.flops:g}", f"{self.kept:.4f}", str(self.params), found.metric, *figures)


@dataclass(frozen=True)
class _Stored:
    """sweep.json."""

    __pydantic_config__ = STORED

    key: str
    settings: dict[str, Any]
    """How the models were made; for people."""
    points: tuple[SweepPoint, ...]


@dataclass(frozen=True, eq=False)
class BudgetTrials:
    """Models of one workspace at any budget, judged on the held-out rows; those in sweep.json are not made again."""

    planner: Planner
    compensation: bool = True
    stage: Stage = silent_stage

    def made_at(self, flops: float) -> SweepPoint:
        """The point at this share of the MACs.

        Raises: BadInput, InfeasibleBudget.
        """
        if flops not in self._points:
            if not self._points:  # a table and a picture of models that were made in another way
                for name in ("sweep.csv", "sweep.png"):
                    self.planner.workspace.record.remove(name)
            self._points[flops] = self._made(flops)
            points = sorted(self._points.values(), key=lambda point: -point.flops)
            write_json(self._path, asdict(_Stored(self._key, self._settings, tuple(points))))
        return self._points[flops]

    def _made(self, flops: float) -> SweepPoint:
        ready = self.planner.prepared.ready
        plan = self.planner.plan(Limits(flops=flops))
        cost = plan.cost
        assert cost is not None, "plans of jobs tell what they cost"
        with self.stage(f"try {flops:g}") as progress:
            if self.compensation:
                ready.token_weights(progress)
            started = time.perf_counter()
            made = make(ready, plan, compensation=self.compensation, progress=progress)
            quality = ready.quality_of(made.network)
        seconds = round(time.perf_counter() - started, 2)
        return SweepPoint(flops, cost.macs_pruned / max(1, cost.macs_dense), cost.weights_pruned, quality, seconds)

    @cached_property
    def _points(self) -> dict[float, SweepPoint]:
        try:
            stored = validated(_Stored, read_json(self._path, HINT, ours=True), str(self._path), HINT)
        except BadInput:
            return {}  # absent or damaged
        return {point.flops: point for point in stored.points if stored.key == self._key}

    @cached_property
    def _key(self) -> str:
        prepared, scores = self.planner.prepared, self.planner.workspace.read_scores().provenance.get("key")
        return sha256_json([prepared.key, scores, prepared.ready.judging_key, self._settings])

    @property
    def _settings(self) -> dict[str, Any]:
        evaluation = self.planner.prepared.source.evaluation
        return {**asdict(self.planner.choice), "compensation": self.compensation, "evaluation": evaluation}

    @property
    def _path(self) -> Path:
        return self.planner.workspace.root / "sweep.json"


def planned(
    planner: Planner, limits: Limits, *, compensation: bool = True, stage: Stage = silent_stage
) -> tuple[NetworkPlan, SweepPoint | None]:
    """Write the plan, after the curves that it needs, and after the search for the budget if a loss is given instead.

    Returns: the plan, and what its network is worth if that was looked for.
    Raises: BadInput, InfeasibleBudget, QualityLimit.
    """
    measure_curves(planner, stage)
    best, drop, macs = None, limits.max_drop, planner.prepared.ready.costs_with(planner.choice.merges).macs
    noted = {}
    if drop is not None:
        fixed = macs.total({group.name: 0 for group in planner.prepared.ready.layout.groups})
        best = smallest_within(drop, fixed / max(1, macs.dense), BudgetTrials(planner, compensation, stage).made_at)
        limits, noted = Limits(flops=best.flops), {"max_drop": drop}
    with stage("plan"):
        plan = planner.plan(limits, noted=noted)
        plan.write(planner.workspace.root / "plan.json")
    return plan, best


def smallest_within(drop: float, least: float, at: Callable[[float], SweepPoint]) -> SweepPoint:
    """Bisect whole percents of the MACs for the smallest model that loses at most `drop` points.

    Quality is taken to fall with the budget; the model that is returned was judged itself.
    Args: least: share of the MACs that no plan can cut. at: the point at a share.
    Raises: QualityLimit: every smaller model loses more.
    """
    low, high = int(100 * least), 100  # low: too small; high: good enough
    best: SweepPoint | None = None
    while high - low > 1:
        middle = (low + high) // 2
        try:
            point = at(middle / 100)
        except InfeasibleBudget:  # nothing that computes would be left
            low = middle
            continue
        if point.quality.holds(drop):
            high, best = middle, point
        else:
            low = middle
    if best is None:
        quality = at(0.99).quality
        lost = quality.drop
        if lost <= drop:
            raise QualityLimit(
                f"--max-drop {drop:g}: with 99% of the MACs {quality.metric} goes from {quality.dense:.4f} to "
                f"{quality.pruned:.4f}: these labelled rows do not measure what pruning loses. Give --eval rows on "
                "which the dense model is good."
            )
        raise QualityLimit(
            f"--max-drop {drop:g}: no smaller model loses so little; 99% of the MACs lose {lost:.2f} "
            "points. Allow more, or calibrate on more data that is like that of --eval."
        )
    return best


def sweep(
    planner: Planner, shares: Sequence[float] = SHARES, *, compensation: bool = True, stage: Stage = silent_stage
) -> list[SweepPoint]:
    """Make and judge a network at each share of the MACs; writes sweep.json, sweep.csv and sweep.png.

    A share that cannot be met is left out, with a warning. Without matplotlib there is no sweep.png, which is said.
    Raises: BadInput. InfeasibleBudget: no share can be met.
    """
    shares = check_shares(planner, shares)
    measure_curves(planner, stage)
    trials, root = BudgetTrials(planner, compensation, stage), planner.workspace.root
    points = feasible(shares, trials.made_at)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([HEADER, *(point.row for point in points)])
    write_text(root / "sweep.csv", text.getvalue())
    try:
        draw_sweep([p.kept for p in points], [p.quality for p in points], root / "sweep.png")
    except MissingDependency as err:
        planner.workspace.record.remove("sweep.png")  # of an earlier sweep, perhaps at other shares
        log.warning("%s was not drawn: %s", root / "sweep.png", err)
    return points


def measure_curves(planner: Planner, stage: Stage) -> None:
    """`curve_stage`, if this allocation needs it."""
    if planner.choice.allocation == "curves":
        with stage("curves") as progress:
            curve_stage(planner.workspace, planner.prepared, progress=progress)


def check_shares(planner: Planner, shares: Sequence[float]) -> tuple[float, ...]:
    """Refuse what is impossible before the long work.

    Returns: the shares that may be met.
    Raises: BadInput. InfeasibleBudget: none may.
    """

    def checked(share: float) -> float:
        check(planner.prepared.ready, Limits(flops=share), planner.choice)
        return share

    return tuple(feasible(shares, checked))


def feasible(shares: Sequence[float], made: Callable[[float], T]) -> list[T]:
    """What is made at each share that can be met; of each other share a warning tells why it cannot.

    Raises: InfeasibleBudget: of the last share, if none can be met.
    """
    found: list[T] = []
    for share in shares:
        try:
            found.append(made(share))
        except InfeasibleBudget as err:
            if not found and share == shares[-1]:
                raise
            log.warning("--flops %g is left out: %s", share, err)
    return found
