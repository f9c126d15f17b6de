"""Kill workers at random moments: is the scoring always finished, with the same result, and nothing done twice?

Four workers of `optin score` share one folder; two of them get SIGKILL at random moments, ten times over. As torchrun's
workers the other two take over; as `--shard i/4` the killed ones are started again, as a scheduler would. Each worker's
finished parts are seen by their files. Run: `python -m benchmarks.scoring.kill --record`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.data import bbc_articles, minilm_folder, write_calibration
from benchmarks.record import RESULTS, command_of, write_result
from optin_deploy.files.storage import read_tensors
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import stage_bar

WORKERS, KILLED = 4, 2


@dataclass(frozen=True)
class Round:
    """One scoring with two killed workers."""

    mode: str
    killed_after_seconds: list[float]
    parts_when_killed: list[int]
    """Finished parts at each kill."""
    finished: bool
    equal: bool
    """Scores to 1e-6 those of the undisturbed run."""
    redone: int
    """Finished parts whose file was written again."""
    seconds: float


def main() -> None:
    """Kill, compare, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/scoring/kill"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    data = write_calibration(bbc_articles(options.seed)[: options.samples * 2], options.out / "calibration.jsonl")
    sizes = ["--samples", str(options.samples), "--seq-len", "64", "--probes", "4"]
    base = [sys.executable, "-m", "optin_deploy", "score", str(minilm_folder()), "--calibration", str(data), *sizes]
    run_id = f"{options.seed}-{time.time_ns()}"
    whole = options.out / f"whole-{run_id}"
    undisturbed = time.perf_counter()
    subprocess.run([*base, "--out", str(whole)], check=True, env=environment(None))
    undisturbed = time.perf_counter() - undisturbed
    rng = random.Random(options.seed)
    rounds = []
    with stage_bar("kill") as progress:
        for number in range(options.rounds):
            mode = ("helping", "shards")[number % 2]
            rounds.append(one_round(base, options.out / f"round-{number}-{run_id}", whole, mode, rng, undisturbed))
            progress(number + 1, options.rounds)
            print(rounds[-1], flush=True)
    text = page(rounds, undisturbed)
    print(text)
    folder = RESULTS if options.record else options.out
    command = command_of("benchmarks.scoring.kill")
    write_result(folder, "scoring_kill", {"rounds": [asdict(r) for r in rounds]}, text, command)


def environment(rank: int | None) -> dict[str, str]:
    """One thread a worker; the rank as torchrun sets it."""
    ranks = {} if rank is None else {"RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    return {**os.environ, "OMP_NUM_THREADS": "1", **ranks}


def one_round(base: Sequence[str], out: Path, whole: Path, mode: str, rng: random.Random, undisturbed: float) -> Round:
    """Start four workers, kill two, bring it to an end, compare."""
    started = time.perf_counter()

    def start(rank: int) -> subprocess.Popen[bytes]:
        shard = ["--shard", f"{rank + 1}/{WORKERS}"] if mode == "shards" else []
        ranks = environment(None if mode == "shards" else rank)
        return subprocess.Popen([*base, "--out", str(out), *shard], env=ranks, stdout=subprocess.DEVNULL)

    workers = [start(rank) for rank in range(WORKERS)]
    victims = rng.sample(range(WORKERS), KILLED)
    # From the first finished part on, so that there is something to lose.
    while not finished_parts(out) and any(worker.poll() is None for worker in workers):
        time.sleep(0.05)
    seen, killed_after, counts = finished_parts(out), [], []
    redone = 0
    for victim in victims:
        until = time.perf_counter() + rng.uniform(0, undisturbed / 4)
        while time.perf_counter() < until:
            redone += watched(out, seen)
            time.sleep(0.05)
        workers[victim].send_signal(signal.SIGKILL)
        killed_after.append(round(time.perf_counter() - started, 2))
        counts.append(len(seen))
    if mode == "shards":
        workers += [start(victim) for victim in victims]
    while any(worker.poll() is None for worker in workers):
        redone += watched(out, seen)
        time.sleep(0.05)
    done = (out / "scores.safetensors").is_file()
    return Round(mode, killed_after, counts, done, done and equal(out, whole), redone, time.perf_counter() - started)


def finished_parts(out: Path) -> dict[str, int]:
    """Part files and when each was written, in nanoseconds."""
    found = {}
    for path in out.glob("parts/*/*.safetensors"):
        if not path.name.startswith("."):
            try:
                found[path.name] = path.stat().st_mtime_ns
            except FileNotFoundError:  # cleared away after the end
                continue
    return found


def watched(out: Path, seen: dict[str, int]) -> int:
    """Take note of finished parts; how many of those seen before were written again."""
    now = finished_parts(out)
    again = sum(seen.get(name, written) != written for name, written in now.items())
    seen.update(now)
    return again


def equal(out: Path, whole: Path) -> bool:
    """Are all scores the same to 1e-6 of themselves?"""
    found, wanted = (read_tensors(folder / "scores.safetensors", "") for folder in (out, whole))
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[name], wanted[name], rtol=1e-6, atol=0) for name in wanted
    )


def page(rounds: Sequence[Round], undisturbed: float) -> str:
    """The result for people."""
    header = (
        "round",
        "workers",
        "killed after s",
        "parts finished then",
        "finished",
        "equal",
        "parts done again",
        "s in all",
    )
    lines = [
        (
            str(number + 1),
            each.mode,
            ", ".join(f"{seconds:.1f}" for seconds in each.killed_after_seconds),
            ", ".join(map(str, each.parts_when_killed)),
            "yes" if each.finished else "**no**",
            "yes" if each.equal else "**no**",
            str(each.redone),
            f"{each.seconds:.0f}",
        )
        for number, each in enumerate(rounds)
    ]
    return (
        f"# Killed workers\n\nTwo of {WORKERS} workers of `optin score` on all-MiniLM-L6-v2 got SIGKILL at random "
        f"moments. `helping`: as torchrun starts them, the others take over; `shards`: `--shard i/{WORKERS}`, the "
        f"killed ones started again. One process alone, one thread: {undisturbed:.0f} s.\n\n{to_table(header, lines)}"
    )


if __name__ == "__main__":
    main()
