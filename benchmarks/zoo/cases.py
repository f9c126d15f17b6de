"""One network to be checked, wherever it came from: a family by an exporter, a dialect of it, or a file of others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.zoo.dialects import dialect
from benchmarks.zoo.expected import expected
from benchmarks.zoo.export import Export, export
from benchmarks.zoo.real import REAL

SETTINGS: tuple[Mapping[str, int], ...] = ({}, {"batch": 5, "length": 17, "target": 7, "source": 15})
"""Sizes of free axes at which outputs are compared: those of the export, and others."""
FIXED_BATCH = (("rt-detr", "dynamo"),)
"""Exports that hold the batch they were made with: the model takes it as a Python number."""

UNUSED: Mapping[str, tuple[str, int]] = {"mask2former": ("Exported.model.class_predictor", 3)}
"""A module whose last call of so many is an output, and the others are not: no export holds them."""


@dataclass(frozen=True)
class Case:
    """A file, inputs for it in two sizes where it has several, and what is known of it."""

    name: str
    form: str
    """Exporter or dialect, or the package that it came from."""
    path: Path
    feeds: tuple[Mapping[str, Tensor], ...]
    groups: Counter[tuple[str, int]] | None = None
    """Expected groups by kind and size; None: nobody wrote them down."""
    torch_macs: Callable[[Mapping[str, Tensor]], int] | None = field(default=None, repr=False)
    """Counts the multiply-accumulates of the torch model for inputs of the graph."""


def of_family(name: str, exporter: str) -> Case:
    """Return a family by an exporter."""
    return _case(export(name, exporter), exporter, expected(name, exporter), (name, exporter) in FIXED_BATCH)


def of_dialect(name: str, form: str) -> Case:
    """Return a dialect of a family."""
    return _case(dialect(name, form), form, expected(name, form), fixed=False)


def of_real(name: str) -> Case:
    """Return a file of others.

    Raises: benchmarks.zoo.fetching.Unavailable.
    """
    real = REAL[name]
    feeds = tuple(real.feeds(setting, seed=setting) for setting in range(len(real.sizes)))
    return Case(name, real.package, real.path(), feeds)


def _case(made: Export, form: str, groups: Counter[tuple[str, int]] | None, fixed: bool) -> Case:
    settings = [setting if not fixed else {} for setting in SETTINGS]
    feeds = tuple(made.family.feeds(seed, **sizes) for seed, sizes in enumerate(settings))

    def macs(probe: Mapping[str, Tensor]) -> int:
        sizes = {
            name: probe[one.name].shape[place]
            for one in made.family.inputs
            if one.name in probe
            for place, name in one.free.items()
        }
        model = made.family.model()  # with eager attention and in float32: what the counter knows best
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*made.family.feeds(**sizes).values())
        module, calls = UNUSED.get(made.family.name, ("", 1))
        unused = sum(counter.get_flop_counts()[module].values()) * (calls - 1) // calls if module else 0
        return (int(counter.get_total_flops()) - unused) // 2

    return Case(made.family.name, form, made.path, feeds, groups, macs)
