"""How well does the sketch rank units? Against the exact score, on MiniLM with real text.

All 72 heads and a seeded sample of neurons in every layer are scored exactly (one partial forward a unit); the
sketch scores all units on the same samples. Run: python -m benchmarks.sketch_accuracy --record
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from benchmarks.data import bbc_articles, minilm_folder
from benchmarks.record import RESULTS, write_result
from optin_deploy.arch.resolve import resolve
from optin_deploy.bench.report import to_table
from optin_deploy.calibration import Batches, Sample, text_batches
from optin_deploy.inputs import input_names
from optin_deploy.loading import load_dense
from optin_deploy.masking import inference
from optin_deploy.scoring import exact_terms, sketch_terms
from optin_deploy.scoring.terms import attention_branches, ffn_branches
from optin_deploy.terminal import quiet_libraries, stage_bar


def main() -> None:
    """Score both ways, compare, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--neurons", type=int, default=40, help="exactly scored neurons a layer")
    parser.add_argument("--probes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/sketch_accuracy"))
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    quiet_libraries()
    loaded = load_dense(str(minilm_folder()))
    texts = tuple(Sample(text=text) for text, _ in bbc_articles(options.seed)[: options.samples])
    names = input_names(loaded.model)
    data = text_batches(texts, loaded.preprocessor, seq_len=options.seq_len, batch_size=16, inputs=names)
    found = compare(loaded.model, data, neurons=options.neurons, probe_counts=options.probes, seed=options.seed)
    text = page(found, options.samples, options.seq_len)
    print(text)
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "record")}
    folder = RESULTS if options.record else options.out
    command = shlex.join(["python", "-m", "benchmarks.sketch_accuracy", *sys.argv[1:]])
    write_result(folder, "sketch_accuracy", {"settings": settings, **asdict(found)}, text, command)


@dataclass(frozen=True)
class Comparison:
    """One exact scoring and several sketches of the same samples."""

    forward_seconds: float
    """One dense forward over the samples."""
    exact_seconds: float
    exact_neurons: int
    sketches: list[dict[str, float]]


def compare(model: nn.Module, data: Batches, *, neurons: int, probe_counts: list[int], seed: int) -> Comparison:
    """Score all heads and a sample of neurons exactly, everything by sketches, and correlate the ranks."""
    layout = resolve(model)
    heads, ffns = attention_branches(layout), ffn_branches(layout)
    rng = np.random.default_rng(seed)
    chosen = {b: sorted(rng.choice(b.units, neurons, replace=False).tolist()) for b in ffns}
    clock = time.perf_counter
    with inference(model), torch.no_grad():
        started = clock()
        for batch in data.batches:
            model(**batch)
        forward = clock() - started
        started = clock()
        with stage_bar("exact") as progress:
            units = {**{b: range(b.units) for b in heads}, **chosen}
            exact = exact_terms(model, layout, data.batches, units, progress=progress)
        exact_seconds = clock() - started
        rows = []
        for probes in probe_counts:
            started = clock()
            with stage_bar(f"sketch, {probes} probes") as progress:
                sketch = sketch_terms(model, layout, data.batches, probes=probes, seed=seed, progress=progress)
            seconds = clock() - started
            weight = sketch.kl_weight()
            pairs = {
                "neurons": [(exact.total(b, weight)[chosen[b]], sketch.total(b, weight)[chosen[b]]) for b in ffns],
                "heads": [(exact.total(b, weight), sketch.total(b, weight)) for b in heads],
            }
            row: dict[str, float] = {"probes": probes, "seconds": seconds, "forwards": seconds / forward}
            for name, layers in pairs.items():
                row[f"spearman_{name}"] = rank_correlation(*map(torch.cat, zip(*layers, strict=True)))
                row[f"least_in_a_layer_{name}"] = min(rank_correlation(*pair) for pair in layers)
            rows.append(row)
    return Comparison(forward, exact_seconds, sum(map(len, chosen.values())), rows)


def page(found: Comparison, samples: int, seq_len: int) -> str:
    """The result for people."""
    header = (
        "probes",
        "seconds, all units",
        "forwards",
        "Spearman neurons (least layer)",
        "Spearman heads (least layer)",
    )
    lines = [
        (
            f"{row['probes']:.0f}",
            f"{row['seconds']:.1f}",
            f"{row['forwards']:.1f}",
            *(f"{row[f'spearman_{n}']:.3f} ({row[f'least_in_a_layer_{n}']:.3f})" for n in ("neurons", "heads")),
        )
        for row in found.sketches
    ]
    return (
        f"# Sketch against exact\n\nall-MiniLM-L6-v2, {samples} BBC articles of up to {seq_len} tokens: 72 heads and "
        f"{found.exact_neurons} of 9,216 neurons scored exactly in {found.exact_seconds:.0f} s (one dense forward over "
        f"the samples: {found.forward_seconds:.2f} s). `--scorer sketch` scores heads exactly; the estimate of heads "
        f"is shown for comparison.\n\n{to_table(header, lines)}"
    )


def rank_correlation(exact: torch.Tensor, sketch: torch.Tensor) -> float:
    """Spearman's rho of two score vectors."""
    return float(spearmanr(exact.numpy(), sketch.numpy()).statistic)


if __name__ == "__main__":
    main()
