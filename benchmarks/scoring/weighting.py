"""What of the trajectory should count? The three weightings on real tasks, by what pruned models still can.

Two fine-tuned classifiers and one sentence embedder; scores by the sketch without labels, masks by both allocations,
compensation in closed form, judged on rows that nothing has seen. Run:
`python -m benchmarks.scoring.weighting --record`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.data import bbc_articles, minilm_folder
from benchmarks.record import RESULTS, command_of, write_result
from benchmarks.scoring.rivals import KINDS
from benchmarks.tasks.text import sentiment, topics
from optin_deploy.checkpoint.loading import load_model
from optin_deploy.data.samples import Sample
from optin_deploy.feeds.feeds import Halves
from optin_deploy.feeds.ports import takes
from optin_deploy.feeds.preprocessor import load_preprocessor
from optin_deploy.feeds.rows import Batching, Feeds
from optin_deploy.feeds.text_feeds import text_feeds, text_inputs
from optin_deploy.network.run import Program
from optin_deploy.planning.budget import Limits
from optin_deploy.planning.costs import limits_within
from optin_deploy.planning.widths import Choice
from optin_deploy.pruning.networks import Found, find_in
from optin_deploy.pruning.pruning import make, pick, planned, ready_of
from optin_deploy.quality.outputs import readouts
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar
from optin_deploy.scoring.parts import MemoryStore
from optin_deploy.scoring.settings import WEIGHTINGS, ScoreSettings
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.unit_job import score_units

PROBES, HEAD_SAMPLES = 6, 48
ALLOCATIONS = ("uniform", "paper")
MOST_TOKENS = 64
"""Texts are cut there: the articles say what they are about in their first sentences."""


@dataclass(frozen=True, eq=False)
class Case:
    """A network, rows to score and compensate by, and unseen rows."""

    name: str
    found: Found
    calibration: Feeds
    test: Feeds


@dataclass(frozen=True)
class Row:
    """One pruned model."""

    task: str
    flops: float
    allocation: str
    weighting: str
    accuracy: float | None
    """Share of right predictions; None for embeddings."""
    distance: float
    """Distance to the dense outputs: mean KL divergence, or 1 - mean cosine."""


def main() -> None:
    """Compare on all cases, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flops", type=float, nargs="+", default=[0.6, 0.4])
    parser.add_argument("--rows", type=int, default=128, help="most calibration rows")
    parser.add_argument("--test-rows", type=int, default=400, help="most unseen rows")
    parser.add_argument("--cache", type=Path, default=Path("out/tasks"), help="keeps the fine-tuned models")
    parser.add_argument("--out", type=Path, default=Path("out/scoring"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    rows: list[Row] = []
    dense: dict[str, float] = {}
    for case in cases(options.cache, options.rows, options.test_rows):
        before = outputs_of(Subject.make(case.found.layout), case.test)
        if case.test.labels[0] is not None:
            dense[case.name] = accuracy(before, case.test)
        rows += compare(case, before, options.flops)
    text = page(rows, dense)
    print(text)
    folder = RESULTS if options.record else options.out
    command = command_of("benchmarks.scoring.weighting")
    write_result(folder, "scoring_weighting", {"dense": dense, "rows": [asdict(row) for row in rows]}, text, command)


def cases(cache: Path, most: int, unseen: int) -> Iterator[Case]:
    """The classifiers, then all-MiniLM-L6-v2 as it comes."""
    for fine_tuned in (sentiment, topics):
        task = fine_tuned(cache)
        parts = (task.calibration[:most], task.test[:unseen])
        yield case(task.name, task.model, task.preprocessor, min(task.seq_len, MOST_TOKENS), parts)
    texts = tuple(Sample(text=text) for text, _ in bbc_articles()[: most + unseen])
    model, _ = load_model(str(minilm_folder()))
    tokenizer = load_preprocessor(minilm_folder(), model)
    yield case("embeddings", model, tokenizer, MOST_TOKENS, (texts[:most], texts[most:]))


def case(name: str, model: nn.Module, tokenizer: object, length: int, parts: Sequence[Sequence[Sample]]) -> Case:
    """Read the model's network, and feed it."""
    found = find_in(model)
    inputs = text_inputs(takes(found.network))
    feeds = [text_feeds(inputs, some, tokenizer, seq_len=length, batching=Batching(), origin=name) for some in parts]
    return Case(name, found, *feeds)


def compare(case: Case, dense: Tensor, budgets: Sequence[float]) -> list[Row]:
    """Prune the network by each weighting, allocation and budget."""
    ready = ready_of(case.found, Halves(case.calibration, None), kinds=KINDS)
    subject = ready.subject
    found: list[Row] = []
    slopes = MemoryStore()  # of the trajectory; without it other projections of the output are taken
    for weighting in WEIGHTINGS:
        settings = ScoreSettings(weighting=weighting, probes=PROBES, head_samples=HEAD_SAMPLES)
        store = MemoryStore() if weighting == "output" else slopes
        with stage_bar(f"{case.name}, {weighting}") as progress:
            scores = score_units(
                subject, case.calibration.batches, settings, kinds=KINDS, store=store, progress=progress
            )
        for flops in budgets:
            for allocation in ALLOCATIONS:
                choice = Choice(kinds=KINDS, allocation=allocation)
                keep = pick(ready, scores, limits_within(ready.costs, Limits(flops=flops)), choice)
                smaller = make(ready, planned(ready, keep, scores, {"flops": flops})).network
                after = outputs_of(subject, case.test, Program(smaller))
                right = None if case.test.labels[0] is None else accuracy(after, case.test)
                found.append(Row(case.name, flops, allocation, weighting, right, distance(dense, after)))
                print(found[-1], flush=True)
    return found


def outputs_of(subject: Subject, feeds: Feeds, program: Program | None = None) -> Tensor:
    """What is compared of a network, or of a smaller one: logits, or unit embeddings, (rows, values)."""
    return torch.cat([each.values[:, 0] for each in readouts(program or subject.program, subject.reading, feeds)])


def accuracy(logits: Tensor, data: Feeds) -> float:
    """Share of right predictions."""
    return float((logits.argmax(1) == torch.tensor(data.labels)).float().mean())


def distance(dense: Tensor, pruned: Tensor) -> float:
    """Mean KL divergence of predictions, or for unit embeddings 1 - mean cosine."""
    if torch.allclose(dense.norm(dim=1), torch.ones(len(dense))):
        return float(1 - (dense * pruned).sum(1).mean())
    p, q = dense.log_softmax(1), pruned.log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def page(rows: Sequence[Row], dense: Mapping[str, float]) -> str:
    """The result for people."""
    found = {(row.task, row.flops, row.allocation, row.weighting): row for row in rows}
    header = ("task", "kept MACs", "allocation", *WEIGHTINGS)
    lines = []
    for task, flops, allocation in dict.fromkeys((row.task, row.flops, row.allocation) for row in rows):
        cells = []
        for weighting in WEIGHTINGS:
            row = found[task, flops, allocation, weighting]
            cells.append(f"{row.distance:.4f}" + ("" if row.accuracy is None else f" ({row.accuracy:.1%})"))
        name = f"{task} (dense {dense[task]:.1%})" if task in dense else task
        lines.append((name, f"{flops:g}", allocation, *cells))
    return (
        "# Weighting of the trajectory\n\nDistance of the pruned model's outputs to the dense ones on unseen rows, "
        "after compensation: mean KL divergence (accuracy), for embeddings 1 - mean cosine. Lower is better.\n\n"
        + to_table(header, lines)
    )


if __name__ == "__main__":
    main()
