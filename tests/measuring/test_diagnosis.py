"""Operator times are those of the profile, by block; each reason has its sentence, and no reason none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optin_deploy.jobs.operator_times import RUNS, WARMUP, operator_times, summed
from optin_deploy.measuring.diagnosis import (
    OUTSIDE,
    Operators,
    PrunedFacts,
    Width,
    explained,
    layer_rows,
    operator_rows,
)
from optin_deploy.network.read import read
from optin_deploy.network.write import write
from support.tiny_checkpoint import LAYERS, Shell
from support.tiny_models import tiny_batch, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE = Operators(10.0, {"MatMul": 8.0, "Softmax": 0.5, "SkipLayerNormalization": 1.0}, {"0": 5.0, "1": 4.5})
GOOD = Operators(5.5, {"MatMul": 4.0, "Softmax": 0.3, "SkipLayerNormalization": 0.5}, {"0": 2.5, "1": 2.3})
WIDTHS = [Width("0", "heads", 6, 6), Width("0", "neurons", 32, 96), Width("1", "heads", 5, 6)]
WIDTHS += [Width("1", "neurons", 64, 96), Width(OUTSIDE, "neurons", 50, 50)]
CUT = PrunedFacts(kept=0.5, widths=WIDTHS, align=16, rows=128)


def slower(**operators: float) -> Operators:
    """A pruned model whose named operators take so long."""
    by_operator = {**GOOD.by_operator, **operators}
    return Operators(sum(by_operator.values()) + 0.5, by_operator, {"0": 3.0, "1": 3.0})


def test_time_that_fell_with_the_macs_needs_no_explanation() -> None:
    assert explained(DENSE, GOOD, CUT) == ["The time fell to 55%, with the MACs (50%): nothing to explain."]


@pytest.mark.parametrize(
    ("pruned", "cut", "said"),
    [
        (replace(GOOD, wall_ms=9.0), CUT, "Launch bound: 47% of the pruned model's time is between operators"),
        (
            slower(MatMul=6.0),
            replace(CUT, widths=[*WIDTHS, Width("2", "neurons", 70, 96)]),
            "Misaligned widths: MACs fell to 50%, the time of matrix products to 75%; 1 of 4 groups keep "
            "units that are no multiple of 16 (block 2: 70 neurons). Use --align 16.",
        ),
        (slower(MatMul=6.0), replace(CUT, rows=8), "Memory bound: MACs fell to 50%"),
        (slower(MatMul=6.0), CUT, "Small products: MACs fell to 50%"),
        (slower(Softmax=2.0, Transpose=1.0), CUT, "Unfused attention: 38% of the pruned model's time"),
        (slower(SkipLayerNormalization=1.0, Softmax=1.0), CUT, "SkipLayerNormalization takes 15%"),
    ],
)
def test_each_reason_has_its_sentence(pruned: Operators, cut: PrunedFacts, said: str) -> None:
    found = explained(DENSE, pruned, cut)
    assert [line for line in found if line.startswith(said)], found


def test_only_the_reasons_that_hold_are_told() -> None:
    (only,) = explained(DENSE, slower(MatMul=6.0), CUT)
    assert only.startswith("Small products")
    fused = slower(Softmax=2.0, MultiHeadAttention=1.0)
    assert not [line for line in explained(DENSE, fused, CUT) if "Unfused" in line]


def test_where_no_reason_is_found_that_is_said() -> None:
    assert explained(DENSE, slower(Cast=1.0, Slice=0.6), CUT)[-1].endswith("no operator stands out as the reason.")
    assert not [line for line in explained(DENSE, slower(Cast=3.0), CUT) if line.startswith("Cast")]  # dense has none


def test_tables_have_every_block_and_add_up() -> None:
    rows = layer_rows(DENSE, GOOD, CUT)
    assert rows == [
        ("0", "6 heads, 32 neurons", "5.00", "2.50", "0.50"),
        ("1", "5 heads, 64 neurons", "4.50", "2.30", "0.51"),
    ]
    outside = {OUTSIDE: 1.0}
    rows = layer_rows(replace(DENSE, by_layer=outside), replace(GOOD, by_layer=outside), CUT)
    assert rows[-1] == (OUTSIDE, "50 neurons", "1.00", "1.00", "1.00")
    rows = operator_rows(DENSE, GOOD)
    assert rows[0] == ("MatMul", "8.00", "4.00", "0.50")
    assert rows[-2:] == [("between operators", "0.50", "0.70", "1.40"), ("all", "10.00", "5.50", "0.55")]
    assert sum(float(row[1]) for row in rows[:-1]) == pytest.approx(10.0)


def event(name: str, ts: int, dur: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "ts": ts, "dur": dur, **more}


def node(name: str, operator: str, ts: int, dur: int) -> dict[str, Any]:
    return event(f"{name}_kernel_time", ts, dur, cat="Node", args={"op_name": operator})


def test_fused_nodes_count_for_the_block_before_them_and_warm_up_is_left_out() -> None:
    events = []
    for run in range(WARMUP + 3):
        start, slow = 10_000 * run, 10 if run < WARMUP else 1
        events += [
            event("model_run", start, 900 * slow),
            event("SequentialExecutor::Execute", start, 800),
            node("embed", "Gather", start + 1, 10 * slow),
            node("q", "MatMul", start + 50, 100 * slow),
            node("made by fusion", "SkipLayerNormalization", start + 200, 20 * slow),
            node("up", "MatMul", start + 300, 200 * slow),
            node("head", "Gemm", start + 600, 5 * slow),
            event("up_fence_before", start + 299, 1, cat="Node", args={"op_name": "MatMul"}),
        ]
    blocks = {"embed": OUTSIDE, "q": "0", "up": "1", "head": OUTSIDE}
    found = summed(events[::-1], blocks)
    assert found.wall_ms == 0.9
    assert found.by_operator == {"MatMul": 0.3, "SkipLayerNormalization": 0.02, "Gather": 0.01, "Gemm": 0.005}
    assert found.by_layer == pytest.approx({"0": 0.12, "1": 0.2, OUTSIDE: 0.015})
    assert found.busy_ms == pytest.approx(0.335)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert+head", "vit", "gpt2"])
def test_a_real_profile_finds_every_block(name: str, tmp_path: Path) -> None:
    model, path = tiny_model(name), tmp_path / "model.onnx"
    write(read(model), path)
    feeds = {key: value.numpy() for key, value in tiny_batch(model, batch=2).items()}
    found = operator_times(path, feeds, threads=1)
    assert set(found.by_layer) == {"0", "1", "2", OUTSIDE}
    assert all(ms > 0 for ms in found.by_layer.values())
    assert 0 < found.busy_ms < found.wall_ms
    assert RUNS >= 20


def test_bench_prints_layers_operators_and_keeps_them(shell: Shell, finished: Path) -> None:
    ran = shell("optin", "bench", finished, "--operators", "--threads", 1, "--at", "batch=1", "--at", "batch=2,seq=8")
    assert ran.code == 0, ran.err
    assert "by ONNX Runtime's profiler" in ran.out
    stored = json.loads((finished / "operators.json").read_text())
    assert [(point["batch"], point["seq_len"]) for point in stored["points"]] == [(1, 16), (2, 8)]
    widths = stored["points"][0]["cut"]["widths"]
    assert {each["block"] for each in widths if each["kind"] == "neurons"} >= set(map(str, range(LAYERS)))
    assert stored["points"][1]["dense"]["by_operator"]["MatMul"] > 0
    assert {"environment", "precision", "threads"} <= set(stored)


def test_operators_of_another_engine_are_refused(shell: Shell, finished: Path) -> None:
    ran = shell("optin", "bench", finished, "--operators", "--engine", "torch")
    assert ran.code == 2
    assert "--operators is ONNX Runtime's profiler" in ran.err
