"""What scoring costs at BERT-base size: forward-equivalents by the product's own rules, and the peak of memory.

Random weights (12 layers, 12 heads, hidden 768, FFN 3072) on random tokens: time and memory do not depend on them, but
the stop rule does. Times are CPU seconds of one thread, divided by those of dense forwards between them. Memory is the
growth of resident memory of a fresh process on one micro-batch, beside that of an ordinary forward and backward with
all activations kept and no weight gradients. Run: `python -m benchmarks.scoring.cost`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertModel

from benchmarks.record import RESULTS, command_of, write_result
from benchmarks.scoring.accuracy import neurons_alone
from benchmarks.scoring.clock import Clock
from benchmarks.scoring.rivals import KINDS, groups_of
from optin_deploy.common.guard import inference
from optin_deploy.feeds.inputs import example_inputs
from optin_deploy.feeds.rows import Batch
from optin_deploy.pruning.networks import find_in
from optin_deploy.reporting.report import to_table
from optin_deploy.reporting.terminal import quiet_libraries, stage_bar
from optin_deploy.scoring.memory import PeakBytes, peak_bytes
from optin_deploy.scoring.precision import pass_dtype
from optin_deploy.scoring.slopes import Projections, slope_terms
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.unit_job import score_units

CPU = torch.device("cpu")
MEMORY_BATCH, MEMORY_LENGTH = 16, 128
MEMORY_WORK = ("ordinary", "sketch")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""Lets glibc return what is freed at once: else holes between blocks count, which depend on the order of sizes."""
MUST = {"forwards, neurons": 8.0, "forwards, all units": 12.0, "memory / ordinary, resident": 1.5}
"""Most of what is allowed."""


@dataclass(frozen=True)
class Found:
    """What was measured."""

    forward_seconds: float
    """Seconds of a dense forward over the samples."""
    forward_rows: int
    """Samples of the forwards that were run between."""
    neuron_seconds: float
    all_seconds: float
    probes: int
    output_probes: int
    head_samples: int
    rank_stability: dict[str, float]
    memory: dict[str, dict[str, int]]
    """Bytes by kind of work: `resident` growth, and `tensors` alive at once."""
    figures: dict[str, float]


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=384)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("out/scoring"))
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--memory-of", choices=MEMORY_WORK, help="internal: the work of one fresh process")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(growth(options.memory_of)))
        return
    found = measure(options.samples, options.seq_len)
    text = page(found, options.samples, options.seq_len)
    print(text)
    settings = {"samples": options.samples, "seq_len": options.seq_len}
    folder = RESULTS if options.record else options.out
    command = command_of("benchmarks.scoring.cost")
    write_result(folder, "scoring_cost", {"settings": settings, **asdict(found)}, text, command)


def bert_base() -> BertModel:
    """BERT-base with random weights."""
    torch.manual_seed(0)
    model: BertModel = BertModel(BertConfig(), add_pooling_layer=False)
    model.train(False)
    return model


def measure(samples: int, seq_len: int) -> Found:
    """Time scoring between dense forwards, then memory in processes of their own."""
    memory = {work: _fresh(work) for work in MEMORY_WORK}
    model, size = bert_base(), 32
    subject = Subject.make(find_in(model).layout)
    firsts = range(0, samples, size)
    batches = [example_inputs(model, batch=min(size, samples - i), seq_len=seq_len, seed=i) for i in firsts]
    clock = Clock(subject, batches)
    scores, all_seconds = clock("all units", lambda bar: score_units(subject, batches, kinds=KINDS, progress=bar))
    told = scores.provenance
    _, neuron_seconds = clock("neurons", lambda bar: neurons_alone(subject, batches, told, bar))
    forward = clock.forward
    figures = {
        "forwards, neurons": neuron_seconds / forward,
        "forwards, all units": all_seconds / forward,
        "memory / ordinary, resident": memory["sketch"]["resident"] / memory["ordinary"]["resident"],
        "memory / ordinary, tensors": memory["sketch"]["tensors"] / memory["ordinary"]["tensors"],
    }
    numbers = (told["probes"], told["output_probes"], told["masked_samples"], told["rank_stability"])
    return Found(forward, clock.forward_rows, neuron_seconds, all_seconds, *numbers, memory, figures)


def _fresh(work: str) -> dict[str, int]:
    with stage_bar(f"memory, {work}"):
        command = [sys.executable, "-m", "benchmarks.scoring.cost", "--memory-of", work]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **GIVE_BACK})
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def growth(work: str) -> dict[str, int]:
    """Bytes that one micro-batch takes beyond the model: resident, and in a second run as tensors alive at once."""
    model = bert_base()
    subject = Subject.make(find_in(model).layout)
    batch = example_inputs(model, batch=MEMORY_BATCH, seq_len=MEMORY_LENGTH)
    one_row = example_inputs(model, batch=1, seq_len=8)
    with inference(model), torch.no_grad():
        _work(work, model, subject, one_row)  # what the libraries allocate once
        _forget_peak()
        before = peak_bytes(CPU)
        _work(work, model, subject, batch)
        resident = peak_bytes(CPU) - before
        with PeakBytes() as tensors:
            _work(work, model, subject, batch)
    return {"resident": resident, "tensors": tensors.most}


def _forget_peak() -> None:
    """Give free memory back to Linux, and let the high-water mark of this process begin anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _work(work: str, model: nn.Module, subject: Subject, batch: Batch) -> None:
    if work == "sketch":
        some, own = Projections(range(4), range(1)), subject.dtype
        fastest = pass_dtype(torch.empty((), dtype=own))
        slope_terms(subject, [batch], some, groups=groups_of(subject), dtype=None if fastest == own else fastest)
        return
    with torch.enable_grad():
        hidden = model.embeddings(batch["input_ids"]).detach().requires_grad_()  # type: ignore[operator]
        output = model(inputs_embeds=hidden, attention_mask=batch["attention_mask"])
        output.last_hidden_state.square().mean().backward()


def page(found: Found, samples: int, seq_len: int) -> str:
    """The result for people."""
    forward, figures = found.forward_seconds, found.figures
    rows = [
        (
            name,
            f"{figures[name]:.2f}",
            f"<= {most:g}",
            "holds" if figures[name] <= most else "**does not hold**",
        )
        for name, most in MUST.items()
    ]
    sizes = [
        (work, *(f"{found.memory[work][kind] / 2**20:.0f} MiB" for kind in ("resident", "tensors")))
        for work in MEMORY_WORK
    ]
    return (
        f"# Cost of the sketch\n\nBERT-base size, random weights, {samples} samples of {seq_len} tokens. One dense "
        f"forward over them takes {forward:.1f} CPU seconds of one thread, all 36,864 neurons "
        f"{found.neuron_seconds:.0f} s ({found.probes} probes), all units {found.all_seconds:.0f} s (heads masked on "
        f"{found.head_samples} samples).\n\n"
        f"{to_table(('must hold', 'found', 'asked', ''), rows)}\n\nMemory beyond the model, {MEMORY_BATCH} samples of "
        f"{MEMORY_LENGTH} tokens:\n\n{to_table(('work', 'resident', 'tensors alive'), sizes)}"
    )


if __name__ == "__main__":
    main()
