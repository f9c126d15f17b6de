"""Kind `profile`: which kernels hold the time, dense beside pruned."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu.cells import Cell
from benchmarks.gpu.engines import Launch, open_engine
from benchmarks.gpu.workbench import SEED, Workbench

RUNS = 5
SHOWN = 15
"""Kernels listed a model; the rest is in the groups."""
NAME_LENGTH = 100

GROUPS = {
    "attention": ("flash", "fmha", "attention", "sdpa", "softmax"),
    "norm": ("norm",),
    "gemm": ("gemm", "nvjet", "cutlass", "addmm", "::mm", "bmm", "linear", "xmma", "splitk"),
    "copy": ("memcpy", "memset", "copy", "cat"),
    "elementwise": ("elementwise", "gelu", "add", "vectorized"),
}
"""Group -> parts of lower-case kernel names, tried in this order."""


def profile(cell: Cell, bench: Workbench) -> dict[str, Any]:
    """Milliseconds a run by kernel and by group of kernels.

    Returns: for dense, ragged and aligned: total_ms, groups, and the largest kernels as [name, ms, calls] a run.
    """
    models = {"dense": bench.dense(cell.model)} | {n: v.model for n, v in bench.variants(cell).items()}
    inputs = bench.inputs(cell)
    found = {}
    for name, model in models.items():
        with open_engine(cell.engine, model, inputs, cell.precision) as launch:
            found[name] = kernels(launch, bench)
    return {"seed": SEED, "runs": RUNS, "variants": found}


def kernels(launch: Launch, bench: Workbench) -> dict[str, Any]:
    """Profile a few runs of a warm engine."""
    on_gpu = bench.device.type == "cuda"
    for _ in range(3):
        launch()
    bench.synchronize()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(RUNS):
            launch()
        bench.synchronize()
    wanted = "CUDA" if on_gpu else "CPU"
    events: list[Any] = [e for e in profiler.key_averages() if e.device_type.name == wanted]
    # Microseconds; of the kernels alone, not of the calls that launched them.
    taken = [
        (e.key, (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1000 / RUNS, e.count / RUNS)
        for e in events
    ]
    taken.sort(key=lambda row: -row[1])
    groups: Counter[str] = Counter()
    for name, ms, _ in taken:
        groups[group_of(name)] += ms
    return {
        "total_ms": sum(ms for _, ms, _ in taken),
        "groups": dict(groups.most_common()),
        "kernels": [[name[:NAME_LENGTH], ms, calls] for name, ms, calls in taken[:SHOWN]],
    }


def group_of(kernel: str) -> str:
    """The group of a kernel, by its name."""
    name = kernel.lower()
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "other")
