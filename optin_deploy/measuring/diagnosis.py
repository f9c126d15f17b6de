"""Why a model with fewer MACs is not as much faster: operator times of dense and pruned, read against what was cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from optin_deploy.planning.ladder import ALIGNED

OVERHEAD = 0.25
"""Share of the time outside of operators above which a model is bound by launches."""
NOTABLE = 0.1
"""Share of the pruned model's time below which an operator is not mentioned."""
UNCHANGED = 0.9
"""Pruned / dense time above which an operator did not get faster."""
BEHIND = 1.15
"""Products are behind if their time fell less than their MACs, by this factor."""
FEW_ROWS = 64
"""Batch times tokens below which a product reads its weights for too few rows to be bound by arithmetic."""
ATTENTION = ("Softmax", "Transpose", "FusedMatMul", "Where")
"""What attention is made of, beside a `MatMul`, where it is not one operator."""
OUTSIDE = "outside"
"""Embeddings, pooler, head: what belongs to no block."""
PRODUCTS = (
    *("MatMul", "Gemm", "FusedGemm", "MatMulNBits", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
    *("QLinearMatMul", "QGemm"),
)


@dataclass(frozen=True)
class Operators:
    """Median milliseconds of one run."""

    wall_ms: float
    """Time from feeds to outputs, as the profiler measured it."""
    by_operator: Mapping[str, float]
    by_layer: Mapping[str, float]
    """Milliseconds by number of the block, or OUTSIDE."""

    @property
    def busy_ms(self) -> float:
        """Milliseconds in operators."""
        return sum(self.by_operator.values())

    def share(self, *operators: str) -> float:
        """Share of the whole time that these operators take."""
        return sum(self.by_operator.get(name, 0.0) for name in operators) / self.wall_ms


@dataclass(frozen=True)
class Width:
    """What one group of units keeps."""

    block: str
    """Its number, or OUTSIDE."""
    kind: str
    kept: int
    units: int
    """All of them."""


@dataclass(frozen=True)
class PrunedFacts:
    """What is known of the pruned model."""

    kept: float
    """Share of the MACs."""
    widths: Sequence[Width]
    """Widths of all groups of the kinds that were cut, in the order of work."""
    align: int
    """Multiple of neurons and channels that the engine likes."""
    rows: int
    """Batch times tokens."""


def explained(dense: Operators, pruned: Operators, cut: PrunedFacts) -> list[str]:
    """A sentence, with its remedy, for each reason why the time fell less than the MACs."""
    took = pruned.wall_ms / dense.wall_ms
    if took <= cut.kept * (2 - UNCHANGED):
        return [f"The time fell to {took:.0%}, with the MACs ({cut.kept:.0%}): nothing to explain."]
    checks = (_launches(pruned), _products(dense, pruned, cut), _attention(pruned), *_unchanged(dense, pruned))
    found = [said for said in checks if said is not None]
    return found or [f"The time fell to {took:.0%}, the MACs to {cut.kept:.0%}; no operator stands out as the reason."]


def _launches(pruned: Operators) -> str | None:
    outside = 1 - pruned.busy_ms / pruned.wall_ms
    if outside < OVERHEAD:
        return None
    return (
        f"Launch bound: {outside:.0%} of the pruned model's time is between operators, which no cut makes fewer. Serve "
        "larger batches, or use an engine that launches once (CUDA graphs, TensorRT, AOTInductor)."
    )


def _products(dense: Operators, pruned: Operators, cut: PrunedFacts) -> str | None:
    before, after = (sum(each.by_operator.get(name, 0.0) for name in PRODUCTS) for each in (dense, pruned))
    if not before or after / before <= cut.kept * BEHIND:
        return None
    fell = f"MACs fell to {cut.kept:.0%}, the time of matrix products to {after / before:.0%}"
    aligned = [each for each in cut.widths if each.kind in ALIGNED]
    odd = [each for each in aligned if each.kept % cut.align and each.kept < each.units]
    if odd:
        first = odd[0]
        return (
            f"Misaligned widths: {fell}; {len(odd)} of {len(aligned)} groups keep units that are no multiple of "
            f"{cut.align} (block {first.block}: {first.kept} {first.kind}). Use --align {cut.align}."
        )
    if cut.rows < FEW_ROWS:
        return (
            f"Memory bound: {fell}; {cut.rows} rows are too few for the weights that are read for them. Serve larger "
            "batches, or make the weights smaller (--precision int8, fp16)."
        )
    return f"Small products: {fell}; narrow matrices use the hardware less well. Budget in time: --latency, --speedup."


def _attention(pruned: Operators) -> str | None:
    share = pruned.share(*ATTENTION)
    if share < 2 * NOTABLE or any("Attention" in name for name in pruned.by_operator):
        return None
    return (
        f"Unfused attention: {share:.0%} of the pruned model's time is in {', '.join(ATTENTION)}, which one fused "
        "operator would do. Try --engine openvino, trt or torch; a budget in time takes such costs into account."
    )


def _unchanged(dense: Operators, pruned: Operators) -> list[str]:
    """Operators on the residual stream."""
    return [
        f"{name} takes {pruned.share(name):.0%} of the pruned model's time, as long as in the dense one: its width is "
        "not cut. Only a lower --precision or an engine that fuses it makes it faster."
        for name, ms in sorted(pruned.by_operator.items(), key=lambda item: -item[1])
        if name not in (*PRODUCTS, *ATTENTION)
        and pruned.share(name) >= NOTABLE
        and ms >= UNCHANGED * dense.by_operator.get(name, math.inf)
    ]


LAYER_HEADER = ("block", "keeps", "dense ms", "pruned ms", "pruned / dense")
OPERATOR_HEADER = ("operator", "dense ms", "pruned ms", "pruned / dense")
SHOWN = 12
"""Operators listed; the others are one row."""


def layer_rows(dense: Operators, pruned: Operators, cut: PrunedFacts) -> list[tuple[str, ...]]:
    """A row a block, then what belongs to none."""
    kept: dict[str, dict[str, int]] = {}
    for each in cut.widths:
        of = kept.setdefault(each.block, {})
        of[each.kind] = of.get(each.kind, 0) + each.kept
    names = dict.fromkeys((*(name for name in kept if name != OUTSIDE), *dense.by_layer))
    return [
        (
            name,
            ", ".join(f"{count} {kind}" for kind, count in kept.get(name, {}).items()),
            *_both(dense.by_layer.get(name, 0.0), pruned.by_layer.get(name, 0.0)),
        )
        for name in names
    ]


def operator_rows(dense: Operators, pruned: Operators) -> list[tuple[str, ...]]:
    """The largest of the dense model first, then the others, the sum, and the time between them."""
    first, second = dense.by_operator, pruned.by_operator
    shown = sorted(first, key=lambda name: -first[name])[:SHOWN]
    rows = [(name, first[name], second.get(name, 0.0)) for name in shown]
    rows.append(("others", dense.busy_ms - sum(row[1] for row in rows), pruned.busy_ms - sum(row[2] for row in rows)))
    rows.append(("between operators", dense.wall_ms - dense.busy_ms, pruned.wall_ms - pruned.busy_ms))
    rows.append(("all", dense.wall_ms, pruned.wall_ms))
    return [(name, *_both(a, b)) for name, a, b in rows]


def _both(dense: float, pruned: float) -> tuple[str, str, str]:
    return f"{dense:.2f}", f"{pruned:.2f}", f"{pruned / dense:.2f}" if dense else "-"
