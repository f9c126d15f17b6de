"""Searches by embeddings of a cut sentence-transformers folder: does a headline still find its article?

all-MiniLM-L6-v2 as its folder describes it (mean, unit length). Queries are the headlines of BBC articles, what they
search are the bodies of as many articles; headlines and bodies of other articles calibrate, in no pairs. What is
finished is not done again. Run: `python -m benchmarks.retrieval --record`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from benchmarks.data import bbc_headlines, minilm_folder
from benchmarks.record import RESULTS, command_of, write_result
from optin_deploy.files.storage import write_text
from optin_deploy.jobs.checked import checked_job
from optin_deploy.jobs.export import export_model
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.planner import Planner
from optin_deploy.jobs.sweep import SweepPoint, sweep
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.planning.budget import Limits
from optin_deploy.pruning.source import Source
from optin_deploy.quality.metrics import METRICS
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar

NAME = "retrieval"
FIGURES = ("recall_at_10", "recall_at_1", "ndcg_at_10", "mrr", "cosine_to_dense")


def main() -> None:
    """Do all, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=minilm_folder(), help="a folder of sentence-transformers")
    parser.add_argument("--flops", type=float, nargs="+", default=[0.6, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="each draws its own calibration texts")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1024, help="texts that score and repair")
    parser.add_argument("--out", type=Path, default=Path("out/retrieval"), help="keeps the jobs")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    calibration, searches = written(options.out, options.queries)
    found: dict[int, list[SweepPoint]] = {}
    for seed in options.seeds:
        source = Source(
            str(options.model),
            calibration=str(calibration),
            evaluation=str(searches),
            samples=options.samples,
            seed=seed,
        )
        home = options.out / f"{options.model.parent.name}-{options.queries}-{options.samples}-seed{seed}"
        found[seed] = swept(source, options.flops, home)
    text = page(found, options.queries)
    print(text)
    data = {str(seed): [vars(point) | {"quality": point.quality.to_json()} for point in p] for seed, p in found.items()}
    where = RESULTS if options.record else options.out
    write_result(where, NAME, {"points": data}, text, command_of("benchmarks.retrieval"))


def written(out: Path, queries: int) -> tuple[Path, Path]:
    """Write texts that calibrate, and rows of a headline with its body; none is in both."""
    articles = bbc_headlines()
    random.Random(0).shuffle(articles)
    judging, others = articles[:queries], articles[queries:]
    texts = [text for article in others for text in article]
    calibration, searches = out / "texts.jsonl", out / f"searches-{queries}.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    write_text(calibration, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    rows = [{"query": title, "positive": body} for title, body in judging]
    write_text(searches, "".join(json.dumps(row) + "\n" for row in rows))
    return calibration, searches


def swept(source: Source, shares: Sequence[float], out: Path) -> list[SweepPoint]:
    """What models at these shares of the MACs find; scores and curves are made once."""
    job = Job(source, Limits(flops=shares[0]), points=(), dense=False)
    if not (out / "report.json").is_file():
        export_model(job, out, stage=stage_bar)
    asked = checked_job(job, out)
    return sweep(Planner(Workspace(out), asked.prepared, asked.choice), shares, stage=stage_bar)


def page(found: dict[int, list[SweepPoint]], queries: int) -> str:
    """Means over the calibration sets, and the drop of each."""
    rows: list[tuple[str, ...]] = []
    for at_share in zip(*found.values(), strict=True):
        figures = [figures_of(point) for point in at_share]
        if not rows:
            rows.append(("dense", *(f"{figures[0][name][0]:.3f}" for name in FIGURES), ""))
        drops = [100 * (each[FIGURES[0]][0] - each[FIGURES[0]][1]) for each in figures]
        losses = f"{mean(drops):.2f} ({', '.join(f'{drop:.2f}' for drop in drops)})"
        means = (f"{mean(each[name][1] for each in figures):.3f}" for name in FIGURES)
        rows.append((f"{at_share[0].flops:.0%}", *means, losses))
    header = ("MACs", *(METRICS[name].title for name in FIGURES), "points of recall@10 lost")
    return "\n\n".join(
        [
            f"# Searches: {queries} headlines, each for its article among {queries}",
            f"all-MiniLM-L6-v2, nothing trained, means over {len(found)} calibration sets (each in brackets).",
            to_table(header, rows),
        ]
    )


def figures_of(point: SweepPoint) -> dict[str, tuple[float, float]]:
    """Figures of the dense and the cut network, by name."""
    return {point.quality.metric: (point.quality.dense, point.quality.pruned), **point.quality.beside}


if __name__ == "__main__":
    main()
