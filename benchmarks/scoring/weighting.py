"""What of the trajectory should count? The three weightings on real tasks, by what pruned models still can.

Two fine-tuned classifiers and one sentence embedder; scores by the sketch without labels, masks by both allocations,
compensation in closed form, judged on rows that nothing has seen. Run: python -m benchmarks.scoring.weighting --record
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.data import bbc_articles, minilm_folder
from benchmarks.record import RESULTS, write_result
from benchmarks.tasks.task import text_batches_of
from benchmarks.tasks.text import sentiment, topics
from optin_deploy.arch.resolve import resolve
from optin_deploy.bench.report import to_table
from optin_deploy.budget import Budget
from optin_deploy.cost.macs import mac_cost
from optin_deploy.data.calibration import Batches, Sample
from optin_deploy.layout import ModelLayout
from optin_deploy.loading import load_dense
from optin_deploy.masking import inference
from optin_deploy.progress import Progress
from optin_deploy.pruning import cut
from optin_deploy.quality import outputs_of
from optin_deploy.scoring import Scores, Terms, exact_terms, sketch_terms
from optin_deploy.scoring.noise import drawn, sample_keys
from optin_deploy.scoring.terms import (
    WEIGHTINGS,
    attention_branches,
    combined,
    ffn_branches,
    mean_scores,
    weights_of,
)
from optin_deploy.search import make_plan, search
from optin_deploy.terminal import quiet_libraries, stage_bar
from optin_deploy.token_weights import measure_token_weights

PROBES, HEAD_SAMPLES = range(6), 48
ALLOCATIONS = ("uniform", "paper")
MOST_TOKENS = 64
"""Texts are cut there: the articles say what they are about in their first sentences."""


@dataclass(frozen=True, eq=False)
class Case:
    """A model, rows to score and compensate by, and unseen rows."""

    name: str
    model: nn.Module
    seq_len: int
    calibration: Batches
    test: Batches


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
    """To the dense outputs: mean KL divergence, or 1 - mean cosine."""


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
        before = outputs_of(case.model, case.test.batches)
        if case.test.labels[0] is not None:
            dense[case.name] = accuracy(before, case.test)
        rows += compare(case, before, options.flops)
    text = page(rows, dense)
    print(text)
    folder = RESULTS if options.record else options.out
    command = shlex.join(["python", "-m", "benchmarks.scoring.weighting", *sys.argv[1:]])
    write_result(folder, "scoring_weighting", {"dense": dense, "rows": [asdict(row) for row in rows]}, text, command)


def cases(cache: Path, most: int, unseen: int) -> Iterator[Case]:
    """The classifiers, then all-MiniLM-L6-v2 as it comes."""
    for make in (sentiment, topics):
        task = make(cache)
        length = min(task.seq_len, MOST_TOKENS)
        rows = (task.calibration[:most], task.test[:unseen])
        yield Case(task.name, task.model, length, *(task.batches(some, seq_len=length) for some in rows))
    loaded = load_dense(str(minilm_folder()))
    texts = tuple(Sample(text=text) for text, _ in bbc_articles()[: most + unseen])
    parts = (texts[:most], texts[most:])
    data = (text_batches_of(loaded.model, some, loaded.preprocessor, MOST_TOKENS) for some in parts)
    yield Case("embeddings", loaded.model, MOST_TOKENS, *data)


def compare(case: Case, dense: Tensor, budgets: Sequence[float]) -> list[Row]:
    """Prune the model by each weighting, allocation and budget."""
    layout = resolve(case.model)
    cost = mac_cost(case.model, layout, seq_len=case.seq_len)
    rows = []
    with stage_bar(f"{case.name}, scores") as progress:
        sketched, masked = terms_of(case, layout, progress)
    batches = case.calibration.batches
    token_weights = measure_token_weights(case.model, layout, batches)
    for weighting in WEIGHTINGS:
        weights = weights_of(weighting, None, layout, sketched)
        heads = mean_scores(masked, attention_branches(layout), weights)
        neurons = mean_scores(sketched, ffn_branches(layout), weights)
        scores = Scores(tuple(heads), tuple(neurons), layout.hash, {"weighting": weighting})
        for flops in budgets:
            for allocation in ALLOCATIONS:
                plan = make_plan(search(scores, layout, cost, Budget(flops), allocation=allocation), layout, cost)
                pruned = cut(case.model, layout, plan, batches, token_weights=token_weights).model
                after = outputs_of(pruned, case.test.batches)
                right = None if case.test.labels[0] is None else accuracy(after, case.test)
                rows.append(Row(case.name, flops, allocation, weighting, right, distance(dense, after)))
                print(rows[-1], flush=True)
    return rows


def terms_of(case: Case, layout: ModelLayout, progress: Progress) -> tuple[Terms, Terms]:
    """Both terms of all units by the sketch, and of heads exactly: the weightings differ only in how they join them."""
    batches, branches = case.calibration.batches, attention_branches(layout)
    keys = sorted(key for batch in batches for key in sample_keys(batch))
    units = {branch: range(branch.units) for branch in branches}
    with inference(case.model), torch.no_grad():
        sketched = sketch_terms(
            case.model, layout, batches, probes=PROBES, output_probes=PROBES, seed=0, progress=progress
        )
        masked = exact_terms(case.model, layout, drawn(batches, keys[:HEAD_SAMPLES]), units)
    return combined([[sketched]]), combined([[masked]])


def accuracy(logits: Tensor, data: Batches) -> float:
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
