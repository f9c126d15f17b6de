"""The whole measuring protocol on a simulated machine, whose true ratios are known: does the interval say the truth?

`measure_pair` and `judge` run as they are; only clock and runtimes are invented. Each session of a model draws a lucky
or unlucky placement for its block, the machine's speed drifts, runs vary, and some take much longer. Every run follows
from its seed, so none is stored. Run: `python -m benchmarks.latency.simulated`.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS, command_of, write_result
from optin_deploy.common.progress import Progress, silent
from optin_deploy.measuring.gate import OUTCOMES, LatencyLimit, Verdict, verdict_of
from optin_deploy.measuring.points import BLOCKS
from optin_deploy.measuring.timing import measure_pair
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import stage_bar
from optin_deploy.runtimes.base import Closing, Feeds

RUN_SECONDS, OPEN_SECONDS = 0.02, 0.05
"""Seconds of one run and of one opening, before luck, drift and noise."""
NOISE = 0.01
"""Sigma of the lognormal factor of every run."""
TAIL_SHARE, TAIL_FACTORS = 0.01, (1.5, 3.0)
"""This share of the runs takes longer by a factor drawn from this range."""
SINE, PERIOD_SECONDS = 0.03, 20.0
WANDER, WANDER_SECONDS = 0.02, 2.0
"""Drift of the machine's speed: a sine, and an AR(1) of this deviation and memory."""
SEEN = 1.03
"""The slowdown that must be seen."""
SLOWDOWNS = (1.0, SEEN, 1.10)
"""True ratios candidate / baseline."""
LIMIT = LatencyLimit("max_ratio", 1.05)
CHUNK = 4096
"""Random numbers drawn at once."""


@dataclass(frozen=True)
class Scenario:
    """One kind of machine."""

    name: str
    luck: float
    """Sigma of the lognormal factor that a session keeps for its block."""
    least_detected: float | None = None
    """Share of 3% slowdowns that must be seen; None: only reported."""


SCENARIOS = (Scenario("calm", 0.005, 0.9), Scenario("usual", 0.015, 0.9), Scenario("noisy", 0.04))
COVERAGE = (0.93, 0.97)
"""What 95% intervals must cover."""


class Machine:
    """A clock in seconds that only its own sessions move."""

    def __init__(self, luck: float, rng: np.random.Generator) -> None:
        """Args: luck: see `Scenario`. rng: of everything that happens on it."""
        self.luck, self.rng, self.now = luck, rng, 0.0
        self._phase, self._wander = rng.uniform(0, 2 * math.pi), WANDER * rng.standard_normal()
        self._draws = self._draw()

    def _draw(self) -> Iterator[tuple[float, float]]:
        """(step of the wandering speed, factor of the run) for each run."""
        while True:
            noise = np.exp(NOISE * self.rng.standard_normal(CHUNK))
            late = np.where(self.rng.random(CHUNK) < TAIL_SHARE, self.rng.uniform(*TAIL_FACTORS, CHUNK), 1.0)
            yield from zip(self.rng.standard_normal(CHUNK).tolist(), (noise * late).tolist(), strict=True)

    def clock(self) -> float:
        """Seconds since it was made."""
        return self.now

    def work(self, seconds: float) -> None:
        """Let a run pass that takes `seconds` at the machine's mean speed."""
        step, factor = next(self._draws)
        kept = math.exp(-seconds / WANDER_SECONDS)
        self._wander = kept * self._wander + WANDER * math.sqrt(1 - kept**2) * step
        drift = 1 + SINE * math.sin(2 * math.pi * self.now / PERIOD_SECONDS + self._phase) + self._wander
        self.now += seconds * drift * factor


class Session(Closing):
    """A runtime that takes time and computes nothing."""

    engine = "simulated"

    def __init__(self, machine: Machine, slowdown: float) -> None:
        """Draw this session's luck."""
        machine.now += OPEN_SECONDS
        self._machine = machine
        self._seconds = RUN_SECONDS * slowdown * math.exp(machine.luck * machine.rng.standard_normal())

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Take the time of one run."""
        self._machine.work(self._seconds)
        return {}

    def synchronize(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Nothing to free."""


@dataclass(frozen=True)
class Found:
    """What many runs of the protocol said about one true ratio on one kind of machine."""

    scenario: str
    luck: float
    slowdown: float
    runs: int
    covered: float
    """Share of the intervals that hold the true ratio."""
    detected: float
    """Share that exclude 1; of the ratio 1 itself these are the false alarms."""
    half_width: float
    """Median half width of the intervals, of the ratio."""
    outcomes: dict[str, float]
    """Shares of the gate's verdicts at LIMIT."""


def main() -> None:
    """Simulate, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000, help="of the protocol, for each scenario and true ratio")
    parser.add_argument("--out", type=Path, default=Path("out/latency"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    found = []
    for scenario in SCENARIOS:
        for slowdown in SLOWDOWNS:
            with stage_bar(f"{scenario.name}, {slowdown:g}") as progress:
                found.append(simulate(scenario, slowdown, options.runs, progress=progress))
    text = page(found)
    print(text)
    command = command_of("benchmarks.latency.simulated")
    data = {"settings": settings(), "found": [asdict(each) for each in found]}
    write_result(RESULTS if options.record else options.out, "latency_simulated", data, text, command)


def simulate(scenario: Scenario, slowdown: float, runs: int, *, progress: Progress = silent) -> Found:
    """Run the protocol on `runs` machines of a kind; run i follows from i, scenario and slowdown alone."""
    verdicts = []
    for i in range(runs):
        verdicts.append(one_run(scenario.luck, slowdown, seed=i))
        progress(i + 1, runs)
    return summed(scenario, slowdown, verdicts)


def one_run(luck: float, slowdown: float, *, seed: int) -> Verdict:
    """The gate's verdict on a candidate that really takes `slowdown` times as long."""
    machine = Machine(luck, np.random.default_rng([seed, round(luck * 1e6), round(slowdown * 1e6)]))
    timing = measure_pair(
        lambda: Session(machine, 1.0),
        lambda: Session(machine, slowdown),
        {},
        seed=seed,
        clock=machine.clock,
        watch=dict,
    )
    return verdict_of(timing, LIMIT)


def summed(scenario: Scenario, slowdown: float, verdicts: list[Verdict]) -> Found:
    """Shares over all runs."""
    lows, highs = np.array([verdict.ci95 for verdict in verdicts]).T
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    return Found(
        scenario=scenario.name,
        luck=scenario.luck,
        slowdown=slowdown,
        runs=len(verdicts),
        covered=float(np.mean((lows <= slowdown) & (slowdown <= highs))),
        detected=float(np.mean((lows > 1) | (highs < 1))),
        half_width=float(np.median(highs - lows) / 2),
        outcomes={outcome: outcomes[outcome] / len(verdicts) for outcome in OUTCOMES},
    )


def settings() -> dict[str, object]:
    """What was invented."""
    return {
        "blocks": BLOCKS,
        "run_seconds": RUN_SECONDS,
        "noise": NOISE,
        "tail": {"share": TAIL_SHARE, "factors": TAIL_FACTORS},
        "drift": {"sine": SINE, "period_seconds": PERIOD_SECONDS, "wander": WANDER, "wander_seconds": WANDER_SECONDS},
        "limit": LIMIT.value,
    }


def checks(found: list[Found]) -> list[tuple[str, ...]]:
    """Rows (what must hold, found, asked, verdict): coverage everywhere, detection where it is asked for."""
    rows: list[tuple[str, ...]] = []
    least = {scenario.name: scenario.least_detected for scenario in SCENARIOS}
    for each in found:
        if each.slowdown == 1:
            what, share, asked = "intervals of identical models that hold 1", each.covered, COVERAGE
        elif each.slowdown == SEEN and least[each.scenario] is not None:
            what, share, asked = "3% slowdowns seen", each.detected, (least[each.scenario] or 0.0, 1.0)
        else:
            continue
        told = "holds" if asked[0] <= share <= asked[1] else "**does not hold**"
        rows.append((f"{each.scenario}: {what}", f"{share:.1%}", f"{asked[0]:.0%} to {asked[1]:.0%}", told))
    return rows


def page(found: list[Found]) -> str:
    """The result for people."""
    header = ("machine", "luck", "true ratio", "holds it", "excludes 1", "half width", *OUTCOMES)
    rows = [
        (
            each.scenario,
            f"{each.luck:.1%}",
            f"{each.slowdown:.2f}",
            f"{each.covered:.1%}",
            f"{each.detected:.1%}",
            f"{each.half_width:.2%}",
            *(f"{each.outcomes[outcome]:.1%}" for outcome in OUTCOMES),
        )
        for each in found
    ]
    return (
        f"# The measuring protocol on simulated machines\n\n{found[0].runs} runs a row of `measure_pair` ({BLOCKS} "
        f"blocks) and of the gate at {LIMIT.value:g}, on an invented clock. Luck: sigma of the factor that each "
        f"session keeps for its block. On all machines runs take {1000 * RUN_SECONDS:g} ms and vary by {NOISE:.0%}, "
        f"{TAIL_SHARE:.0%} of them take {TAIL_FACTORS[0]:g} to {TAIL_FACTORS[1]:g} times as long, and the speed "
        f"drifts: a sine of {SINE:.0%} over {PERIOD_SECONDS:g} s and a wandering of {WANDER:.0%} with a memory of "
        f"{WANDER_SECONDS:g} s.\n\n"
        f"{to_table(('must hold', 'found', 'asked', ''), checks(found))}\n\n"
        "The 95% intervals of candidate / baseline time, and the gate's verdicts:\n\n"
        f"{to_table(header, rows)}"
    )


if __name__ == "__main__":
    main()
