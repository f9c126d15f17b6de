"""The GPU suite on a CPU: cells, plans, timing, workers that crash, resuming, and a smoke run end to end."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.__main__ import main
from benchmarks.gpu.cells import Cell, load_suite
from benchmarks.gpu.engines import Skipped, open_engine
from benchmarks.gpu.kinds import measure_cell
from benchmarks.gpu.kinds.pair import check_parity, parity_error, reference
from benchmarks.gpu.kinds.profile import group_of
from benchmarks.gpu.models import MODELS, Plan, build, costs, cut, equal_plan, model_inputs, pruning_plan
from benchmarks.gpu.process import WorkerDied, WorkerProcess
from benchmarks.gpu.report import page, requirement_lines
from benchmarks.gpu.rows import append_row, read_rows
from benchmarks.gpu.runner import run_cells
from benchmarks.gpu.timing import back_to_back, single_calls, speedup, times
from benchmarks.gpu.workbench import Workbench
from optin_deploy.errors import BadInput
from optin_deploy.exporters.precisions import TOLERANCES
from optin_deploy.exporters.to_ort_gpu import OrtCudaExporter
from optin_deploy.measuring.device_clock import CpuTimer
from optin_deploy.measuring.state import gpu_state
from optin_deploy.runtimes.ort import PROVIDER
from support.project import ROOT

CELLS = ROOT / "benchmarks/gpu/cells.toml"
SMOKE = ROOT / "benchmarks/gpu/cells_smoke.toml"
CPU = torch.device("cpu")
QUICK = "^(?!.*(compile|aoti))"
"""Smoke cells without a compiler at work."""

FAKE_WORKER = """
import json, sys, time
print(json.dumps({"device": "fake", "torch": "0"}), flush=True)
for line in sys.stdin:
    key = json.loads(line)["key"]
    if "b2" in key:
        print("RuntimeError: CUDA error: an illegal memory access in " + sys.argv[0], file=sys.stderr)
        sys.exit(1)
    if "b3" in key:
        time.sleep(600)
    print(json.dumps({"status": "ok", "result": {"key": key}, "seconds": 0}), flush=True)
"""


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tiny matrices."""


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(CPU)


@pytest.fixture
def cell() -> Cell:
    return load_suite(SMOKE).cells[0]


def fake_command(tmp_path: Path) -> list[str]:
    script = tmp_path / "fake_worker.py"
    script.write_text(FAKE_WORKER, encoding="utf-8")
    return [sys.executable, str(script)]


def run_suite(*arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `first` is Python that runs before it."""
    start = "runpy.run_module('benchmarks.gpu', run_name='__main__')"
    code = f"{first}\nimport runpy, sys; sys.argv[1:] = {list(arguments)!r}; {start}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", [CELLS, SMOKE])
def test_the_cells_are_valid_unique_and_ordered_by_priority(path: Path) -> None:
    suite = load_suite(path)
    keys = [cell.key for cell in suite.cells]
    assert len(keys) == len(set(keys)) > 5
    assert all(Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell for cell in suite.cells)
    assert suite.must_hold[0].any_of[0] in keys[:3]


def test_the_most_important_cells_come_first() -> None:
    first = load_suite(CELLS).cells[:3]
    assert {(c.model, c.keep, c.engine, c.batch, c.seq) for c in first} == {("bert-base", 0.5, "graph", 32, 128)}
    assert {c.precision for c in first} == {"fp16", "fp32", "tf32"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('model = ["tiny"]', 'model = ["tiny", "tiny"]', "come twice"),
        ('model = ["tiny"]', 'model = ["huge"]', "unknown model 'huge'"),
        ("seq = [16]", "sequence = [16]", "sequence"),
        ('model = ["tiny"]', 'model = ["tiny-vit"]', "`seq` is for text models"),
        ("keep0.5/torch/fp32", "keep0.7/torch/fp32", "must_hold names what is not measured"),
    ],
)
def test_wrong_cells_are_refused_with_the_reason(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "cells.toml"
    path.write_text(SMOKE.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(BadInput, match=re.escape(said)):
        load_suite(path)


@pytest.mark.parametrize("name", ["tiny", "tiny-vit"])
@pytest.mark.parametrize("keep", [0.6, 0.5, 0.4])
def test_plans_stay_within_the_budget_and_aligned_ones_have_multiples_of_64(name: str, keep: float) -> None:
    cost, model = costs(name, None if name == "tiny-vit" else 16), build(name, CPU)
    inputs = model_inputs(model, CPU, batch=1, seq=None if name == "tiny-vit" else 16)
    assert cost.dense == counted(model, inputs)
    for variant in ("ragged", "aligned"):
        plan = pruning_plan(cost, variant, keep)
        smaller = cut(model, MODELS[name], plan)
        assert cost.of(plan) == counted(smaller, inputs)
        assert keep - 0.2 < cost.of(plan) / cost.dense <= keep
        heads, neurons = [*map(len, plan.heads)], [*map(len, plan.neurons)]
        if variant == "aligned":
            assert len(set(heads)) == len(set(neurons)) == 1
            assert neurons[0] % 64 == 0
        else:
            assert any(count % 64 for count in neurons)


def counted(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Multiply-accumulates by torch's own counter, under eager attention: sdpa hides the products of tokens."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(**inputs)
    return int(counter.get_total_flops()) // 2


@pytest.mark.parametrize("engine_inputs", ["full", "padded"])
def test_a_variant_computes_what_the_masked_dense_model_computes(
    cell: Cell, bench: Workbench, engine_inputs: str
) -> None:
    cell = replace(cell, inputs=engine_inputs)
    dense, inputs = bench.dense("tiny"), bench.inputs(cell)
    assert ("attention_mask" in inputs) == (engine_inputs == "padded")
    unpruned = reference(dense, inputs)
    for variant in bench.variants(cell).values():
        found = reference(variant.model, inputs)
        assert parity_error(reference(zeroed(dense, variant.plan), inputs), found) < 1e-5
        assert parity_error(unpruned, found) > 0.01


def zeroed(model: Any, plan: Plan) -> Any:
    """The dense model without its cut units: their columns of the output projections are zero."""
    masked, width = copy.deepcopy(model), 8
    with torch.no_grad():
        for layer, heads, neurons in zip(masked.encoder.layer, plan.heads, plan.neurons, strict=True):
            for weight, kept, size in (
                (layer.attention.output.dense.weight, heads, width),
                (layer.output.dense.weight, neurons, 1),
            ):
                for unit in set(range(weight.shape[1] // size)) - set(kept):
                    weight[:, unit * size : (unit + 1) * size] = 0
    return masked


def test_the_suites_attention_equals_eager_attention_with_and_without_padding() -> None:
    model: Any = build("tiny", CPU)
    for padded in (False, True):
        inputs = model_inputs(model, CPU, batch=3, seq=16, padded=padded)
        found = reference(model, inputs)
        model.set_attn_implementation("eager")
        assert parity_error(reference(model, inputs), found) < 1e-5
        model = build("tiny", CPU)


@pytest.mark.slow
def test_the_smoke_runs_without_optional_packages_and_a_second_call_skips_what_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--smoke", "--out", str(tmp_path), "--only", QUICK)
    absent = ("pydantic", "typer", "rich", "onnxruntime", "PIL", "openvino", "onnx", "onnxscript")
    block = f"import os, sys; sys.modules.update(dict.fromkeys({absent!r}))"
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(block, encoding="utf-8")  # the worker process has them blocked too
    first = run_suite(*arguments, first=f"{block}; os.environ['PYTHONPATH'] = {str(site)!r}")
    assert first.returncode == 0, first.stdout + first.stderr
    lines = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [cell.key for cell in load_suite(SMOKE).cells if re.search(QUICK, cell.key)]
    assert [line["cell"] for line in lines] == expected
    statuses = {line["cell"]: line["status"] for line in lines}
    assert {key for key, status in statuses.items() if status != "ok"} == {
        k for k in expected if "/torch/" not in k or k.startswith("score")
    }
    report = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [row["cell"] for row in report["rows"]] == expected
    assert report["machine"]["torch"] == torch.__version__
    variants = report["rows"][0]["result"]["variants"]
    assert set(variants) == {"dense", "ragged", "aligned"}
    assert len(variants["aligned"]["block_ms"]) == 2
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert re.search(r"must hold: smoke.*measured fp32 [\d.]+x \[[\d.]+, [\d.]+\].*: holds", text)
    assert "engine graph needs a CUDA device" in text
    for heading in (
        "## tiny",
        "## tiny-vit",
        "## Parity",
        "## Widths",
        "## Kernels",
        "## Failed and skipped",
    ):
        assert heading in text

    # Half a line of an interrupted run: its cell is measured again, the others are not.
    jsonl = tmp_path / "cells.jsonl"
    whole = jsonl.read_bytes()
    jsonl.write_bytes(whole[:-40])
    assert main(arguments) == 0
    assert f"{len(expected) - 1} cells were there" in capsys.readouterr().out
    assert jsonl.read_bytes().startswith(whole[: whole.rfind(b"\n", 0, -1) + 1])
    assert [json.loads(line)["cell"] for line in jsonl.read_bytes().splitlines()] == expected


def test_a_crash_and_a_hang_fail_their_cells_and_the_rest_goes_on(tmp_path: Path, cell: Cell) -> None:
    class Impatient(WorkerProcess):
        def ask(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
            return super().ask(job, 1.0 if job["batch"] == 3 else limit_s)

    cells = [replace(cell, batch=batch) for batch in (1, 2, 3, 4)]
    started: list[Impatient] = []
    rows: dict[int, dict[str, Any]] = {}

    def start() -> Impatient:
        started.append(Impatient(fake_command(tmp_path), tmp_path / "worker.log"))
        return started[-1]

    left_out = run_cells(cells, start, lambda c, row: rows.update({c.batch: row}), seconds=100)
    assert left_out == []
    assert [rows[batch]["status"] for batch in (1, 2, 3, 4)] == ["ok", "failed", "failed", "ok"]
    assert "the worker ended with code 1" in rows[2]["error"]
    assert "illegal memory access" in rows[2]["error"]
    assert "no answer within 1 s" in rows[3]["error"]
    assert "illegal" not in rows[3]["error"]
    assert len(started) == 3
    assert all(worker._process.returncode is not None for worker in started)


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(WorkerDied, match=r"code 1.*no_such_module"):
        WorkerProcess([sys.executable, "-c", "import no_such_module"], tmp_path / "log")


class FakeWorker:
    """Answers at once; each cell takes as long as expected, by the fake clock."""

    def __init__(self, clock: list[float], *, slower: float = 1.0) -> None:
        self.clock, self.slower, self.closed = clock, slower, False

    def ask(self, job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        needed = job["seconds"] * self.slower
        self.clock[0] += min(needed, limit_s)
        if needed > limit_s:
            raise WorkerDied("no answer")
        return {"status": "ok", "result": {}, "seconds": needed}

    def close(self, *, patience_s: float = 10.0) -> None:
        self.closed = True


def run_fake(cells: list[Cell], seconds: float, slower: float = 1.0) -> tuple[dict[str, str], list[Cell], float]:
    clock, rows = [1000.0], {}
    worker = FakeWorker(clock, slower=slower)
    left_out = run_cells(
        cells,
        lambda: worker,
        lambda c, row: rows.update({c.key: row["status"]}),
        seconds=seconds,
        clock=lambda: clock[0],
    )
    return rows, left_out, clock[0] - 1000


def test_the_time_limit_is_kept_and_cheaper_cells_fill_what_is_left(cell: Cell) -> None:
    cells = [replace(cell, batch=batch, seconds=s) for batch, s in ((1, 30), (2, 50), (3, 10), (4, 15))]
    rows, left_out, spent = run_fake(cells, 60)
    assert list(rows) == [cells[0].key, cells[2].key, cells[3].key]
    assert left_out == [cells[1]]
    assert spent == 55


def test_no_time_measures_nothing(cell: Cell) -> None:
    assert run_fake([cell], 0) == ({}, [cell], 0)


def test_a_cell_that_the_end_of_the_run_cuts_off_is_not_a_failure(cell: Cell) -> None:
    slow = replace(cell, seconds=50)
    rows, left_out, spent = run_fake([slow], 60, slower=3)
    assert (rows, left_out) == ({}, [slow])
    assert spent <= 80  # the limit and the grace


def test_an_interrupt_ends_the_worker_and_goes_through(cell: Cell) -> None:
    worker = FakeWorker([0.0])

    def interrupted(job: dict[str, Any], limit_s: float) -> dict[str, Any]:
        raise KeyboardInterrupt

    worker.ask = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_cells([cell], lambda: worker, lambda c, row: None, seconds=100)
    assert worker.closed


def test_rows_of_another_device_or_torch_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    for device, version, status in (("A", "1", "failed"), ("B", "1", "ok"), ("A", "2", "ok"), ("A", "1", "ok")):
        append_row(path, {"cell": "x", "device": device, "torch": version, "status": status})
    assert read_rows(path, device="A", torch="1")["x"]["status"] == "ok"
    assert read_rows(path, device="C", torch="1") == {}
    path.write_bytes(b"no row\n" + path.read_bytes())
    with pytest.raises(BadInput, match=r"cells.jsonl:1"):
        read_rows(path, device="A", torch="1")


def test_a_half_written_last_line_is_dropped_on_reading_and_on_writing(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    row = {"cell": "x", "device": "A", "torch": "1"}
    append_row(path, row)
    path.write_bytes(path.read_bytes() + b'{"cell": "y", "dev')
    assert list(read_rows(path, device="A", torch="1")) == ["x"]
    append_row(path, {**row, "cell": "z"})
    assert list(read_rows(path, device="A", torch="1")) == ["x", "z"]
    assert b'"y"' not in path.read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_parity_passes_for_the_right_weights_and_fails_for_bent_ones(
    precision: str, cell: Cell, bench: Workbench
) -> None:
    inputs, variant = bench.inputs(cell), bench.variants(cell)["aligned"]
    expected = reference(variant.model, inputs)
    with open_engine("torch", variant.model, inputs, precision) as run:
        assert check_parity(expected, run, precision)["ok"]
    bent = Workbench(CPU).variants(cell)["aligned"].model
    layer: Any = bent.get_submodule("encoder.layer.1.output.dense")
    with torch.no_grad():
        layer.weight *= 1 + 20 * TOLERANCES[precision]
    with open_engine("torch", bent, inputs, precision) as run:
        found = check_parity(expected, run, precision)
    assert not found["ok"]
    assert found["error"] > found["limit"] == TOLERANCES[precision]


def test_an_engine_that_writes_no_output_or_no_numbers_fails_parity() -> None:
    stale = torch.ones(2, 3)
    assert check_parity(torch.ones(2, 3), lambda: stale, "bf16") == {"error": None, "limit": 6e-2, "ok": False}
    assert not check_parity(torch.ones(2, 3), lambda: torch.ones(2, 4), "bf16")["ok"]


def test_a_cell_over_its_parity_limit_stays_in_the_results_and_meets_no_requirement(
    cell: Cell, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCES, "bf16", 1e-9)
    bad = replace(cell, precision="bf16")
    result = measure_cell(bad, bench)
    assert not result["ok"]
    assert result["variants"]["aligned"]["speedup"] > 0
    suite = load_suite(SMOKE)
    rows = {cell.key: {"status": "ok", "config": bad.to_json(), "result": result}}
    assert requirement_lines(suite.must_hold, rows)[0].endswith("(parity fails): does not hold")
    assert "| NO |" in page(suite, rows)
    assert requirement_lines(suite.must_hold, {})[0].endswith("; not measured")


def test_scoring_is_timed_where_the_packages_that_read_graphs_are(bench: Workbench) -> None:
    (cell,) = (each for each in load_suite(SMOKE).cells if each.kind == "score")
    found = measure_cell(cell, bench)
    assert found["samples"] == cell.samples
    assert found["sketch_s"] > 0
    assert found["exact_extrapolated_from"]["of_units"] == 2 * (8 + 512)


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        ("graph", "needs a CUDA device"),
        ("ort-cuda", "no CUDAExecutionProvider"),
        ("ort-trt", "no TensorrtExecutionProvider"),
        ("trt", "TensorRT is not installed"),
        ("trt-rtx", "TensorRT-RTX|no CUDA device is visible"),
        ("onnx", "cannot launch without transfers"),
    ],
)
def test_engines_of_a_gpu_are_skipped_on_a_cpu_with_the_reason(
    engine: str, why: str, cell: Cell, bench: Workbench
) -> None:
    with (
        pytest.raises(Skipped, match=f"engine {engine}.*({why})"),
        open_engine(engine, bench.dense("tiny"), bench.inputs(cell), "fp16"),
    ):
        pass


def test_a_precision_that_an_engine_lacks_is_skipped(
    cell: Cell, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OrtCudaExporter, "obstacle", lambda self, precision: None)
    with (
        pytest.raises(Skipped, match="engine ort-cuda has no precision bf16; possible: fp32, tf32, fp16"),
        open_engine("ort-cuda", bench.dense("tiny"), bench.inputs(cell), "bf16"),
    ):
        pass


@pytest.mark.parametrize("name", ["tiny", "tiny-vit"])
def test_an_engine_of_files_runs_on_inputs_that_are_there(
    name: str, cell: Cell, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A GPU's provider is not here; the way through export, session and binding is the same with the CPU's.
    monkeypatch.setattr(OrtCudaExporter, "obstacle", lambda self, precision: None)
    monkeypatch.setattr(OrtCudaExporter, "provider", PROVIDER)
    monkeypatch.setattr(OrtCudaExporter, "options", lambda self, path, precision: {})
    cell = replace(cell, model=name, seq=None if name == "tiny-vit" else 16)
    inputs, variant = bench.inputs(cell), bench.variants(cell)["ragged"].model
    with open_engine("ort-cuda", variant, inputs, "fp32") as launch:
        assert check_parity(reference(variant, inputs), launch, "fp32")["ok"]
        assert launch() is launch()


def test_the_state_of_the_gpu_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho '580.159.04, 1980, 2619, 1980, 41, 310.25, 700.00, [N/A]'\n", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    state = gpu_state(torch.device("cuda"))
    assert state is not None
    assert state["driver"] == "580.159.04"
    assert (state["sm_mhz"], state["temperature_c"], state["power_w"]) == (1980.0, 41.0, 310.25)
    assert state["memory_used_mib"] == "[N/A]"
    command.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    assert gpu_state(torch.device("cuda")) is None
    assert gpu_state(CPU) is None


def ticking() -> tuple[Callable[[], float], Callable[[float], Callable[[], torch.Tensor]]]:
    """A clock, and runs that take so many milliseconds of it."""
    now = [0.0]

    def run_of(ms: float) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            now[0] += ms / 1000
            return torch.zeros(1)

        return run

    return lambda: now[0], run_of


@pytest.mark.parametrize("way", [back_to_back, single_calls])
def test_timing_finds_the_ratio_and_keeps_to_its_seconds(way: Any) -> None:
    clock, run_of = ticking()
    runs = {"dense": run_of(2.0), "aligned": run_of(1.0), "ragged": run_of(1.5)}
    found = way(runs, CpuTimer(clock), timed_s=1.5, blocks=8)
    assert 1.5 * 0.7 < clock() < 1.5 * 1.4  # with the warm-up of each block
    ratio = speedup(found["dense"], found["aligned"], "call_")
    assert ratio["call_speedup"] == pytest.approx(2.0)
    assert ratio["call_ci95"] == pytest.approx((2.0, 2.0))
    shown = times(found["ragged"])
    assert (shown["p50_ms"], shown["p95_ms"]) == pytest.approx((1.5, 1.5))
    assert shown["block_ms"] == pytest.approx([1.5] * 8)


def test_launches_back_to_back_fill_a_stretch_and_single_calls_do_not() -> None:
    stretches: list[int] = []

    class Noting(CpuTimer):
        def stretch_ms(self, run: Callable[[], object], runs: int) -> float:
            stretches.append(runs)
            return super().stretch_ms(run, runs)

    clock, run_of = ticking()
    runs = {"dense": run_of(2.0), "pruned": run_of(1.0)}
    single_calls(runs, Noting(clock), timed_s=0.1, blocks=2)
    assert set(stretches) == {1}
    stretches.clear()
    back_to_back(runs, Noting(clock), timed_s=0.1, blocks=2)
    assert set(stretches[-10:]) <= {4, 5}  # 4 ms of the faster one, rounded up


def test_timing_interleaves_the_variants_in_changing_order() -> None:
    clock, run_of = ticking()
    order: list[str] = []

    def noted(name: str) -> Callable[[], torch.Tensor]:
        run = run_of(5.0)

        def noting() -> torch.Tensor:
            order.append(name)
            return run()

        return noting

    found = back_to_back({name: noted(name) for name in "abc"}, CpuTimer(clock), timed_s=0.5, blocks=2)
    timed = "".join(order)[-3 * len(found["a"][1]) :]  # a stretch of one run of each
    turns = {timed[i : i + 3] for i in range(0, len(timed), 3)}
    assert {frozenset(turn) for turn in turns} == {frozenset("abc")}
    assert len(turns) > 1


def test_equal_plans_keep_the_same_width_in_all_layers() -> None:
    plan = equal_plan(MODELS["tiny"], heads=3, neurons=65)
    assert plan.heads == ((0, 1, 2),) * 2
    assert plan.neurons == (tuple(range(65)),) * 2


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "attention"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "gemm"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::Half>", "norm"),
        ("void at::native::vectorized_elementwise_kernel<8, GeluCUDAKernelImpl>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("something_new", "other"),
    ],
)
def test_kernels_are_grouped_by_their_names(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_without_a_gpu_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: no CUDA device")
    assert "python -m benchmarks.gpu --smoke" in error


def test_the_list_needs_no_device_and_shows_the_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "graph/fp16/b32/s128/full$"]) == 0
    keys = capsys.readouterr().out.splitlines()
    assert keys[0] == "pair/bert-base/keep0.5/graph/fp16/b32/s128/full"
    assert all("graph/fp16/b32" in key for key in keys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "no such cell"], "matches no cell"),
        (["--only", "("], "not a regular expression"),
        (["--smoke", "--record"], "nothing worth recording"),
        (["--device", "cpu"], "no CUDA device"),
    ],
)
def test_impossible_options_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "python -m benchmarks.gpu --minutes 9" in capsys.readouterr().out
