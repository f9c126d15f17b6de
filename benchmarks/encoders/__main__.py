"""What encoders as they are served lose when they are cut, with nothing trained after the cut.

Real models: all-MiniLM-L6-v2 and all-mpnet-base-v2 as folders of sentence-transformers, a tagger of personal data, and
models that a committed recipe trains in minutes. What is finished is not done again, and a record keeps the models that
are not asked for. Run: `python -m benchmarks.encoders --record`; `--models reranker` for one of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean

from benchmarks.data import minilm_folder
from benchmarks.encoders import recipes, rows
from benchmarks.record import RESULTS, command_of, write_result
from benchmarks.zoo.models import mpnet, rampart
from optin_deploy.common.environment import environment
from optin_deploy.files.storage import read_json, write_json
from optin_deploy.jobs.checked import checked_job
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.planner import Planner
from optin_deploy.jobs.stages import dense_stage, score_stage
from optin_deploy.jobs.sweep import SweepPoint, measure_curves, sweep
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.planning.budget import Limits
from optin_deploy.pruning.pruning import make
from optin_deploy.pruning.source import Source
from optin_deploy.quality.metrics import METRICS
from optin_deploy.quality.quality import Quality
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar

NAME = "encoders"
SHARES = (0.6, 0.4)
NARROWER = ("heads", "neurons", "qk-width", "v-width")


@dataclass(frozen=True)
class Encoder:
    """A model with its rows."""

    what: str
    folder: Callable[[Path], Path]
    """Takes the folder that keeps trained models and downloads."""
    rows: Callable[[Path, Path], rows.Paths]
    task: str | None = None
    samples: int = 1024
    seq_len: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws its own rows that calibrate."""
    units: tuple[str, ...] = Source.units
    """Kinds that may be cut."""


MINILM = Encoder("all-MiniLM-L6-v2, 1,000 headlines for their articles", lambda _: minilm_folder(), rows.searches)
MPNET = Encoder(
    "all-mpnet-base-v2 by 256 texts, 500 headlines for their articles",
    lambda _: mpnet(),
    partial(rows.searches, queries=500),
    samples=256,
    seq_len=128,
)
ENCODERS = {
    "minilm": MINILM,
    "minilm-narrow": replace(MINILM, what="all-MiniLM-L6-v2 with narrower heads, the same headlines", units=NARROWER),
    "mpnet": MPNET,
    "mpnet-narrow": replace(
        MPNET,
        what="all-mpnet-base-v2 with narrower heads by 1,024 texts, 1,000 headlines for their articles",
        rows=rows.searches,
        samples=1024,
        seeds=(0,),
        units=NARROWER,
    ),
    "first-token": Encoder(
        "MiniLM fine-tuned to embed by its first token, 1,000 headlines", recipes.embedder, rows.searches, seq_len=128
    ),
    "reranker": Encoder(
        "MiniLM fine-tuned as cross-encoder, 400 headlines with ten articles each",
        recipes.reranker,
        rows.rankings,
        task="text-ranking",
        seq_len=128,
    ),
    "reader": Encoder(
        "MiniLM fine-tuned for answers, sentences with a gap about 400 articles",
        recipes.reader,
        rows.answers,
        seq_len=144,
    ),
    "entities": Encoder("Tagger of personal data (rampart), 1,000 filled letters", lambda _: rampart(), rows.entities),
    "labels": Encoder("MiniLM fine-tuned for R8, each topic a yes or a no", recipes.labeller, rows.labels, seq_len=64),
}
FIRST_TOKEN = "first-token"


def main() -> None:
    """Do all, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(ENCODERS), choices=list(ENCODERS))
    parser.add_argument("--flops", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of each model's seeds")
    parser.add_argument("--out", type=Path, default=Path("out/encoders"), help="keeps the jobs")
    parser.add_argument("--tasks", type=Path, default=Path("out/tasks"), help="keeps trained models and downloads")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    found: dict[str, dict[int, list[SweepPoint]]] = {}
    by_mean: dict[int, list[Quality]] = {}
    for name in options.models:
        encoder = ENCODERS[name]
        calibration, evaluation = encoder.rows(options.out / name, options.tasks)
        for seed in options.seeds or encoder.seeds:
            source = Source(
                str(encoder.folder(options.tasks)),
                task=encoder.task,
                calibration=str(calibration),
                evaluation=str(evaluation),
                samples=encoder.samples,
                units=encoder.units,
                seq_len=encoder.seq_len,
                seed=seed,
            )
            home = options.out / name / f"seed{seed}"
            found.setdefault(name, {})[seed] = swept(source, options.flops, home)
            if name == FIRST_TOKEN:
                by_mean[seed] = chosen_by_mean(source, options.flops, home)
    place = RESULTS if options.record else options.out
    points, means, runs = earlier(place / f"{NAME}.json")
    command, env = command_of("benchmarks.encoders"), environment()
    runs |= dict.fromkeys(found, f"`{command}`, {env['date']}, {env['cpu_model']}")
    points, means = points | found, means | by_mean
    text = page({name: points[name] for name in ENCODERS if name in points}, means, runs)
    print(text)
    data = {
        name: {
            str(seed): [vars(point) | {"quality": point.quality.to_json()} for point in p] for seed, p in each.items()
        }
        for name, each in points.items()
    }
    chosen = {str(seed): [each.to_json() for each in p] for seed, p in means.items()}
    write_result(place, NAME, {"points": data, "chosen_by_mean": chosen, "runs": runs}, text, command)


def earlier(path: Path) -> tuple[dict[str, dict[int, list[SweepPoint]]], dict[int, list[Quality]], dict[str, str]]:
    """What was found before: by model and seed, what the first token's model is worth by the mean, and by which run."""
    if not path.is_file():
        return {}, {}, {}
    stored = read_json(path, "Delete it.")
    points = {
        name: {
            int(seed): [SweepPoint(**{**each, "quality": Quality(**each["quality"])}) for each in rows]
            for seed, rows in by_seed.items()
        }
        for name, by_seed in stored["points"].items()
    }
    env = stored["environment"]
    before = f"`{stored['command']}`, {env['date']}, {env['cpu_model']}"
    means = {int(seed): [Quality(**each) for each in rows] for seed, rows in stored["chosen_by_mean"].items()}
    return points, means, stored.get("runs", dict.fromkeys(points, before))


def swept(source: Source, shares: Sequence[float], out: Path) -> list[SweepPoint]:
    """What models at these shares of the MACs are worth; scores and curves are made once."""
    return sweep(planner_of(source, shares, out), shares, stage=stage_bar)


def planner_of(source: Source, shares: Sequence[float], out: Path) -> Planner:
    """Plans of a job whose scores are made."""
    job = Job(source, Limits(flops=shares[0]), points=(), dense=False)
    with stage_bar("load"):
        asked = checked_job(job, out)
        workspace = Workspace.claim(out, source)
    with stage_bar("score") as progress:
        dense_stage(workspace, asked.prepared)
        score_stage(workspace, asked.prepared, job.scoring, progress=progress)
    return Planner(workspace, asked.prepared, asked.choice)


def chosen_by_mean(source: Source, shares: Sequence[float], out: Path) -> list[Quality]:
    """What an embedder by its first token is worth where scores, curves and repairs are of the mean of its tokens."""
    place = out / "by-mean.json"
    if not place.is_file():
        folder = recipes.pooled_by_mean(Path(source.model), out.parent / "mean")
        own = planner_of(source, shares, out).prepared.ready
        planner = planner_of(replace(source, model=str(folder)), shares, out.with_name(f"{out.name}-mean"))
        measure_curves(planner, stage_bar)
        ready = planner.prepared.ready
        found = []
        for share in shares:
            made = make(ready, planner.plan(Limits(flops=share)))
            found.append(own.quality_of(made.network).to_json())
        write_json(place, {"qualities": found})
    return [Quality(**each) for each in read_json(place, "Delete it.")["qualities"]]


def page(
    found: Mapping[str, Mapping[int, Sequence[SweepPoint]]],
    by_mean: Mapping[int, Sequence[Quality]],
    runs: Mapping[str, str],
) -> str:
    """What each model loses, as means over its calibration sets with each of them in brackets."""
    rows = []
    for name, swept in found.items():
        for place, points in enumerate(zip(*swept.values(), strict=True)):
            qualities = [point.quality for point in points]
            rows.append((ENCODERS[name].what, f"{points[0].flops:.0%}", *_figures(qualities)))
            if name == FIRST_TOKEN and by_mean:
                others = [each[place] for each in by_mean.values()]
                what = "the same, scored and repaired for the mean of its tokens"
                rows.append((what, f"{points[0].flops:.0%}", *_figures(others)))
    lines = [
        "# Encoders as they are served",
        "Nothing is trained after the cut. Means over calibration sets, with each in brackets; judged on other rows.",
        to_table(("model and rows", "MACs", "judged by", "dense", "cut", "points lost", "beside"), rows),
        "\n".join(f"- {name}: {run}" for name, run in runs.items()),
    ]
    return "\n\n".join(lines)


def _figures(qualities: Sequence[Quality]) -> tuple[str, ...]:
    first = qualities[0]
    drops = [each.drop for each in qualities]
    told = f"{mean(drops):.2f}" + (f" ({', '.join(f'{drop:.2f}' for drop in drops)})" if len(drops) > 1 else "")
    beside = ", ".join(
        f"{METRICS[name].title} {dense:.3f} to {mean(each.beside[name][1] for each in qualities):.3f}"
        for name, (dense, _) in first.beside.items()
    )
    cut = mean(each.pruned for each in qualities)
    return METRICS[first.metric].title, f"{first.dense:.4f}", f"{cut:.4f}", told, beside


if __name__ == "__main__":
    main()
