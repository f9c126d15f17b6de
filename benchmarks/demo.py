"""The demo: make a real sentence embedder smaller, prove that it computes the same, measure, show the quality.

all-MiniLM-L6-v2 with BBC news: calibrated on 320 articles without labels, cut to 60% of its MACs, exported to ONNX,
timed against the dense model, and judged on articles that calibration never saw. Run: `make demo`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import bbc_articles, minilm_folder, write_calibration
from benchmarks.record import RESULTS, command_of, write_result
from optin_deploy.data.samples import Sample
from optin_deploy.feeds.ports import takes
from optin_deploy.feeds.rows import Batching, Feeds
from optin_deploy.feeds.text_feeds import text_feeds, text_inputs
from optin_deploy.files.names import PRUNED
from optin_deploy.jobs.export import export_model
from optin_deploy.jobs.job import Job
from optin_deploy.jobs.planner import Planner
from optin_deploy.jobs.prepared import Prepared, prepare
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.measuring.points import Point
from optin_deploy.network.graph import Network
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.run import Program
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.widths import Choice
from optin_deploy.pruning.pruning import make
from optin_deploy.pruning.source import Source
from optin_deploy.quality.outputs import readouts
from optin_deploy.reporting.report import LATENCY_HEADER, SUMMARY_HEADER, Report, latency_rows, summary_rows, to_table
from optin_deploy.reporting.terminal import print_table, quiet_libraries, stage_bar

CALIBRATION, HELD_OUT = 256, 64
PROBE_TRAIN, PROBE_TEST = 500, 500
FLOPS, ALIGN = 0.6, 16
OTHERS = ("uniform", "paper")
"""Allocations that the exported one is compared with."""
THREADS = 2
Embeddings = np.ndarray
"""(articles, hidden), rows of unit length."""


def main() -> None:
    """Run the demo; `--record` writes the result into benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/demo.{json,md}")
    options = parser.parse_args()
    quiet_libraries()
    started = time.perf_counter()
    print("Pruning all-MiniLM-L6-v2 to 60% of its MACs on BBC news: no labels, no training.", flush=True)
    rows = bbc_articles()
    seen = CALIBRATION + HELD_OUT
    source = Source(
        model=str(minilm_folder()),
        calibration=str(write_calibration(rows[:seen], options.out / "calibration.jsonl")),
        samples=CALIBRATION,
    )
    points = (Point(batch=1), Point(batch=8))
    asked = Job(source, Limits(flops=FLOPS), align=ALIGN, points=points, threads=THREADS)
    report = export_model(asked, options.out / "pruned", stage=stage_bar)
    unseen = rows[seen : seen + PROBE_TRAIN + PROBE_TEST]
    quality = judge(options.out / "pruned", source, unseen)
    header = ("keeping 60% of the MACs", "dense", "pruned", *(f"--allocation {name}" for name in OTHERS))
    tables: tuple[tuple[str, Sequence[str], Sequence[Sequence[str]]], ...] = (
        (f"Quality on {len(unseen)} articles not used for calibration", header, quality_rows(quality)),
        ("Size", SUMMARY_HEADER, summary_rows(report)),
        (f"Latency on ONNX Runtime, {THREADS} threads", LATENCY_HEADER, latency_rows(report.latency)),
    )
    for title, columns, lines in tables:
        print_table(columns, lines, title)
    print(f"Done in {time.perf_counter() - started:.0f} s. The pruned model is in {options.out / 'pruned'}.")
    if options.record:
        page = "# Demo\n\n" + "\n\n".join(f"{title}:\n\n{to_table(columns, lines)}" for title, columns, lines in tables)
        command = command_of("benchmarks.demo")
        write_result(RESULTS, "demo", {"quality": quality, "report": shareable(report)}, page, command)


def judge(folder: Path, source: Source, articles: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """Probe accuracy and cosine to the dense embeddings: of the dense model, the pruned one, and other allocations."""
    prepared = prepare(source, folder)
    ready = prepared.ready
    texts = tuple(Sample(text=text, label=label) for text, label in articles)
    how: dict[str, Any] = {"seq_len": prepared.dense.seq_len(None), "batching": Batching(), "origin": "articles"}
    data = text_feeds(text_inputs(takes(ready.network)), texts, prepared.dense.tokenizer, **how)
    networks = {
        "dense": ready.network,
        "pruned": read_file(folder / PRUNED),
        **{name: by(name, folder, prepared) for name in OTHERS},
    }
    embeddings: dict[str, Embeddings] = {}
    with stage_bar("embed articles") as progress:
        for done, (name, network) in enumerate(networks.items()):
            found = [each.values[:, 0].numpy() for each in readouts(Program(network), ready.subject.reading, data)]
            embeddings[name] = np.concatenate(found)
            progress(done + 1, len(networks))
    return {
        name: {"probe": probe(found, data), "cosine": cosine(found, embeddings["dense"])}
        for name, found in embeddings.items()
    }


def by(allocation: str, folder: Path, prepared: Prepared) -> Network:
    """The same scores and budget, compensated too, but with another allocation."""
    planner = Planner(Workspace(folder), prepared, Choice(align=ALIGN, allocation=allocation))
    with stage_bar(f"rewrite ({allocation})") as progress:
        return make(prepared.ready, planner.plan(Limits(flops=FLOPS)), progress=progress).network


def probe(embeddings: Embeddings, data: Feeds) -> float:
    """Accuracy of a logistic regression, trained on one part of the articles and tested on the other."""
    from sklearn.linear_model import LogisticRegression

    order = np.random.default_rng(0).permutation(len(embeddings))
    train, test = order[:PROBE_TRAIN], order[PROBE_TRAIN:]
    labels = np.array(data.labels)
    classifier = LogisticRegression(max_iter=1000, C=10.0).fit(embeddings[train], labels[train])
    return float(classifier.score(embeddings[test], labels[test]))


def cosine(found: Embeddings, dense: Embeddings) -> float:
    """Mean cosine to the dense embeddings of the same articles."""
    return float((found * dense).sum(1).mean())


def quality_rows(quality: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """Rows of the quality table."""
    return [
        (f"linear probe, accuracy on {PROBE_TEST}", *(f"{found['probe']:.1%}" for found in quality.values())),
        ("mean cosine to the dense embedding", *(f"{found['cosine']:.3f}" for found in quality.values())),
    ]


def shareable(report: Report) -> dict[str, object]:
    """The report without the paths of the machine it was made on."""
    settings = {k: v for k, v in report.settings.items() if k not in ("model", "calibration")}
    return replace(report, settings=settings).to_json()


if __name__ == "__main__":
    main()
