"""Does the sketch rank units as the exact score does, at which cost, and what do other importance scores do?

all-MiniLM-L6-v2 on BBC news: all 72 heads and a seeded sample of neurons in every layer are scored exactly (one partial
forward a unit), then everything by the sketch as the product does it, several times with other noise, and by four
rivals on the same samples. Times are divided by those of dense forwards between them. Exact scores take an hour or
more: --exact RESULT.json takes those of an earlier run. Run: python -m benchmarks.scoring.accuracy --record
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.data import bbc_articles, minilm_folder
from benchmarks.record import RESULTS, write_result
from benchmarks.scoring.rivals import RIVALS, Importance, Loss, Rival
from optin_deploy.arch.resolve import resolve
from optin_deploy.bench.environment import environment
from optin_deploy.bench.report import to_table
from optin_deploy.budget import Budget
from optin_deploy.cost.macs import MacCost, mac_cost
from optin_deploy.data.calibration import Batches, Sample, text_batches
from optin_deploy.errors import BadInput
from optin_deploy.inputs import input_names
from optin_deploy.layout import Branch, ModelLayout
from optin_deploy.loading import load_dense
from optin_deploy.masking import Batch, inference
from optin_deploy.progress import Progress
from optin_deploy.quality import outputs_of
from optin_deploy.scoring import Scores, ScoreSettings, exact_terms, score, sketch_terms
from optin_deploy.scoring.features import valid_tokens
from optin_deploy.scoring.losses import pooled
from optin_deploy.scoring.terms import Terms, TermWeights, attention_branches, combined, ffn_branches, mean_scores
from optin_deploy.search import search
from optin_deploy.storage import read_json
from optin_deploy.terminal import quiet_libraries, stage_bar

FLOPS = 0.6
Units = Mapping[Branch, Sequence[int]]
MUST = {
    "Spearman, neurons": 0.99,
    "Spearman, heads": 0.97,
    "kept units shared, uniform": 0.97,
    "kept units shared, paper": 0.97,
    "exact / sketch time": 100.0,
}
"""Least values of what is asked."""
MOST_FORWARDS = {"forwards, neurons": 8.0}


def main() -> None:
    """Score in every way, compare, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=384)
    parser.add_argument("--seq-len", type=int, default=48)
    parser.add_argument("--neurons", type=int, default=80, help="exactly scored neurons a layer")
    parser.add_argument("--draws", type=int, default=4, help="sketches, each with its own noise")
    parser.add_argument("--exact", type=Path, help="result of an earlier run on the same samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/scoring"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    loaded = load_dense(str(minilm_folder()))
    rows = tuple(Sample(text=text, label=section) for text, section in bbc_articles(options.seed)[: options.samples])
    names = input_names(loaded.model)
    data = text_batches(rows, loaded.preprocessor, seq_len=options.seq_len, inputs=names)
    settings = {name: getattr(options, name) for name in ("samples", "seq_len", "neurons", "seed")}
    exact = None if options.exact is None else earlier(options.exact, settings)
    found = compare(
        loaded.model,
        data,
        neurons=options.neurons,
        seed=options.seed,
        seq_len=options.seq_len,
        draws=options.draws,
        exact=exact,
    )
    text = page(found, options.samples, options.seq_len)
    print(text)
    folder = RESULTS if options.record else options.out
    command = shlex.join(["python", "-m", "benchmarks.scoring.accuracy", *sys.argv[1:]])
    write_result(folder, "scoring_accuracy", {"settings": settings, **asdict(found)}, text, command)


@dataclass(frozen=True)
class Method:
    """One way to score, against exact."""

    name: str
    seconds: float
    forwards: float
    neurons: float
    """Spearman's rho over the exactly scored neurons of all layers."""
    heads: float
    """The same, heads."""
    neurons_in_a_layer: float
    """Mean over layers of the rho inside."""
    heads_in_a_layer: float
    shared: dict[str, float]
    """By allocation: share of the units kept at 60% of the MACs that exact keeps too."""


@dataclass(frozen=True)
class Exact:
    """Exact scores of all heads and of the seeded neurons, by layer."""

    heads: list[list[float]]
    neurons: list[list[float]]
    seconds: float
    """Of the scored units."""
    all_forwards: float
    """Extrapolated to all neurons (they are sampled evenly from the layers), in dense forwards."""
    date: str
    """When they were made."""

    @property
    def importance(self) -> Importance:
        """As tensors."""
        heads, neurons = (tuple(torch.tensor(x, dtype=torch.float64) for x in t) for t in (self.heads, self.neurons))
        return heads, neurons


@dataclass(frozen=True)
class Comparison:
    """Exact scoring and everything compared with it."""

    units: dict[str, int]
    forward_seconds: list[float]
    """Dense forwards over the samples, between the other work."""
    probes: int
    head_samples: int
    rank_stability: dict[str, float]
    peak_bytes: int
    draws: list[Method]
    """The sketches."""
    methods: list[Method]
    """Their mean, and the rivals."""
    figures: dict[str, float]
    """What must hold."""
    exact: Exact


def compare(
    model: nn.Module, data: Batches, *, neurons: int, seed: int, seq_len: int, draws: int, exact: Exact | None
) -> Comparison:
    """Score some units exactly, all units in other ways, and correlate the ranks."""
    layout = resolve(model)
    heads, ffns = attention_branches(layout), ffn_branches(layout)
    rng = np.random.default_rng(seed)
    chosen = [sorted(rng.choice(branch.units, neurons, replace=False).tolist()) for branch in ffns]
    clock = Clock(model, data.batches)
    sketches = []
    for draw in range(draws):
        sketches.append(clock(f"sketch {draw}", partial(_sketched, model, layout, data.batches, draw)))
    told = sketches[0][0].provenance

    def neurons_alone(progress: Progress) -> object:
        probes, output_probes = range(told["probes"]), range(told["output_probes"])
        with inference(model), torch.no_grad():
            return sketch_terms(
                model, layout, data.batches, probes=probes, output_probes=output_probes, seed=0, progress=progress
            )

    _, neuron_seconds = clock("sketch, neurons alone", neurons_alone)
    units = {b: range(b.units) for b in heads}, dict(zip(ffns, chosen, strict=True))
    exact = exact or exactly(model, layout, data.batches, *units, told["kl_weight"], clock)
    others: list[tuple[str, Importance, float]] = [
        (f"sketch {draw}", (found.heads, found.neurons), seconds) for draw, (found, seconds) in enumerate(sketches)
    ]
    loss = probe_loss(model, data)
    for name, rival in RIVALS.items():
        importance, seconds = clock(name, partial(_ranked_by, rival, model, layout, data.batches, loss))
        others.append((name, importance, seconds))
    forward = statistics.median(clock.forwards)
    cost, truth = mac_cost(model, layout, seq_len=seq_len), exact.importance
    methods = []
    for name, (some_heads, some_neurons), seconds in others:
        estimate = (some_heads, tuple(t[c] for t, c in zip(some_neurons, chosen, strict=True)))
        methods.append(
            Method(name, seconds, seconds / forward, *rhos(truth, estimate), kept_shared(layout, cost, truth, estimate))
        )
    ours = mean_of("sketch", methods[:draws])
    figures = {
        "Spearman, neurons": ours.neurons,
        "Spearman, heads": ours.heads,
        **{f"kept units shared, {allocation}": share for allocation, share in ours.shared.items()},
        "exact / sketch time": exact.all_forwards / ours.forwards,
        "forwards, neurons": neuron_seconds / forward,
    }
    return Comparison(
        units={
            "heads": sum(b.units for b in heads),
            "neurons": neurons * len(ffns),
            "all neurons": sum(b.units for b in ffns),
        },
        forward_seconds=clock.forwards,
        probes=told["probes"],
        head_samples=told["head_samples"],
        rank_stability=told["rank_stability"],
        peak_bytes=told["memory"]["peak_bytes"],
        draws=methods[:draws],
        methods=[ours, *methods[draws:]],
        figures=figures,
        exact=exact,
    )


def exactly(
    model: nn.Module,
    layout: ModelLayout,
    batches: Sequence[Batch],
    heads: Units,
    neurons: Units,
    kl_weight: float,
    clock: Clock,
) -> Exact:
    """Score these units one by one."""
    weights = TermWeights((1.0,) * len(layout.layers), kl_weight)

    def work(units: Units, progress: Progress) -> Terms:
        with inference(model), torch.no_grad():
            return combined([[exact_terms(model, layout, batches, units, progress=progress)]])

    of_heads, head_seconds = clock("exact, heads", partial(work, heads))
    of_neurons, neuron_seconds = clock("exact, neurons", partial(work, neurons))
    everything = sum(branch.units for branch in neurons) / sum(map(len, neurons.values()))
    return Exact(
        [t.tolist() for t in mean_scores(of_heads, tuple(heads), weights)],
        [
            t[list(c)].tolist()
            for t, c in zip(mean_scores(of_neurons, tuple(neurons), weights), neurons.values(), strict=True)
        ],
        head_seconds + neuron_seconds,
        (head_seconds + neuron_seconds * everything) / statistics.median(clock.forwards),
        str(environment()["date"]),
    )


def earlier(path: Path, settings: Mapping[str, int]) -> Exact:
    """Exact scores of a result file.

    Raises: BadInput: of other samples or units.
    """
    data = read_json(path, "Give a scoring_accuracy.json.")
    if data["settings"] != settings:
        raise BadInput(f"--exact {path}: made with {data['settings']}, not {settings}.")
    return Exact(**data["exact"])


def mean_of(name: str, draws: Sequence[Method]) -> Method:
    """Every figure's mean."""
    mean = {f.name: statistics.mean(getattr(draw, f.name) for draw in draws) for f in fields(Method)[1:-1]}
    shared = {key: statistics.mean(draw.shared[key] for draw in draws) for key in draws[0].shared}
    return Method(name, **mean, shared=shared)


def _sketched(model: nn.Module, layout: ModelLayout, batches: Sequence[Batch], draw: int, progress: Progress) -> Scores:
    return score(model, layout, batches, ScoreSettings(seed=draw), progress=progress)


def _ranked_by(
    rival: Rival, model: nn.Module, layout: ModelLayout, batches: Sequence[Batch], loss: Loss, progress: Progress
) -> Importance:
    return rival(model, layout, batches, loss)


class Clock:
    """Times pieces of work, and dense forwards over the samples before each and at the end."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.forwards: list[float] = []
        self._forward()
        self.forwards.clear()  # the first is slower

    def __call__(self, title: str, work: Callable[[Progress], Any]) -> tuple[Any, float]:
        """Result and seconds."""
        self._forward()
        with stage_bar(title) as progress:
            started = time.perf_counter()
            result = work(progress)
            return result, time.perf_counter() - started

    def _forward(self) -> None:
        started = time.perf_counter()
        with inference(self.model), torch.inference_mode():
            for batch in self.batches:
                self.model(**batch)
        self.forwards.append(time.perf_counter() - started)


def probe_loss(model: nn.Module, data: Batches) -> Loss:
    """Cross-entropy of a logistic regression on the embeddings, which rivals need: the model itself has no labels."""
    from sklearn.linear_model import LogisticRegression

    embeddings = outputs_of(model, data.batches).numpy()
    classes = sorted(set(data.labels), key=str)
    targets = torch.tensor([classes.index(label) for label in data.labels])
    fitted = LogisticRegression(max_iter=1000, C=10.0).fit(embeddings, targets.numpy())
    weight, bias = (torch.tensor(x, dtype=torch.float32) for x in (fitted.coef_, fitted.intercept_))
    starts = np.cumsum([0, *(len(batch["input_ids"]) for batch in data.batches)])

    def loss(output: Any, index: int) -> Tensor:
        states = output["last_hidden_state"]
        logits = pooled(states, valid_tokens(data.batches[index], states)) @ weight.T + bias
        labels = targets[starts[index] : starts[index + 1]]
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

    return loss


def rhos(truth: Importance, estimate: Importance) -> tuple[float, float, float, float]:
    """Spearman's rho of neurons and of heads over all layers, and their mean inside a layer."""
    (heads, neurons), (found_heads, found_neurons) = truth, estimate
    pairs = ((neurons, found_neurons), (heads, found_heads))
    whole = [rho(torch.cat(a), torch.cat(b)) for a, b in pairs]
    inside = [statistics.mean(rho(x, y) for x, y in zip(a, b, strict=True)) for a, b in pairs]
    return whole[0], whole[1], inside[0], inside[1]


def rho(exact: Tensor, found: Tensor) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(exact.numpy(), found.numpy()).statistic)


def kept_shared(layout: ModelLayout, cost: MacCost, truth: Importance, estimate: Importance) -> dict[str, float]:
    """Share of kept units that two scores have in common, by allocation, if each scored neuron stands for its share."""
    counts = [len(t) for t in truth[1]]
    small = replace(
        layout,
        layers=tuple(replace(x, ffn=replace(x.ffn, units=n)) for x, n in zip(layout.layers, counts, strict=True)),
    )
    scaled = tuple(c * x.neurons // n for c, x, n in zip(cost.neuron, layout.layers, counts, strict=True))
    shared = {}
    for allocation in ("uniform", "paper"):
        kept = []
        for heads, neurons in (truth, estimate):
            scores = Scores(heads, neurons, small.hash, {})
            masks = search(scores, small, replace(cost, neuron=scaled), Budget(FLOPS), align=1, allocation=allocation)
            kept.append(np.concatenate([np.array(mask) for mask in (*masks.heads, *masks.neurons)]))
        shared[allocation] = float((kept[0] & kept[1]).sum() / max(kept[0].sum(), kept[1].sum()))
    return shared


def page(found: Comparison, samples: int, seq_len: int) -> str:
    """The result for people."""
    header = (
        "score",
        "seconds",
        "forwards",
        "Spearman neurons (in a layer)",
        "Spearman heads (in a layer)",
        "kept shared",
    )
    lines = [
        (
            method.name,
            f"{method.seconds:.1f}",
            f"{method.forwards:.1f}",
            f"{method.neurons:.3f} ({method.neurons_in_a_layer:.3f})",
            f"{method.heads:.3f} ({method.heads_in_a_layer:.3f})",
            ", ".join(f"{name} {share:.1%}" for name, share in method.shared.items()),
        )
        for method in found.methods
    ]
    asked = [
        *(
            (name, f"{found.figures[name]:.4g}", f">= {least:g}", found.figures[name] >= least)
            for name, least in MUST.items()
        ),
        *(
            (name, f"{found.figures[name]:.4g}", f"<= {most:g}", found.figures[name] <= most)
            for name, most in MOST_FORWARDS.items()
        ),
    ]
    rows = [(name, value, limit, "holds" if holds else "**does not hold**") for name, value, limit, holds in asked]
    forward, exact, ours = statistics.median(found.forward_seconds), found.exact, found.methods[0]
    spread = ", ".join(
        f"{name} {min(d.shared[name] for d in found.draws):.1%} to {max(d.shared[name] for d in found.draws):.1%}"
        for name in ours.shared
    )
    return (
        f"# Scores against exact\n\nall-MiniLM-L6-v2, {samples} BBC articles of up to {seq_len} tokens. Exact: "
        f"{found.units['heads']} heads and {found.units['neurons']} of {found.units['all neurons']:,} neurons in "
        f"{exact.seconds:.0f} s ({exact.date}), so all in {exact.all_forwards:.0f} dense forwards (one over the "
        f"samples: {forward:.2f} s). The sketch took {found.probes} probes, and {found.head_samples} samples for "
        f"heads, by its stop rule; its figures are means of {len(found.draws)} draws of the noise (kept shared: "
        f"{spread}; one unit is 0.3%). Fisher and Taylor use the labels through a logistic regression on the "
        "embeddings. Torch-Pruning normalises inside a layer.\n\n"
        f"{to_table(header, lines)}\n\n{to_table(('must hold', 'found', 'asked', ''), rows)}"
    )


if __name__ == "__main__":
    main()
