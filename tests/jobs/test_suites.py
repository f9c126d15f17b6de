"""A suite is every combination of its lists, checked before anything is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from optin_deploy.errors import BadInput
from optin_deploy.jobs.bench import BenchSettings, write_measurements
from optin_deploy.jobs.suites import MOST_CASES, read_suite
from optin_deploy.measuring.measurement import Measurement
from optin_deploy.measuring.points import Point
from optin_deploy.reporting.report import latency_rows
from support.made_timings import MEASURED
from support.tiny_checkpoint import Shell


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_combination_is_a_case(tmp_path: Path) -> None:
    text = 'engines = ["onnx", "openvino"]\nbatch = [1, 8]\nseq = [16, 32]\nthreads = [1, 2]\nprecisions = ["fp32"]\n'
    suite = read_suite(written(tmp_path / "suite.toml", text))
    points = (Point(1, 16), Point(1, 32), Point(8, 16), Point(8, 32))
    assert list(suite.benches()) == [
        BenchSettings("onnx", "fp32", points, 1),
        BenchSettings("onnx", "fp32", points, 2),
        BenchSettings("openvino", "fp32", points, 1),
        BenchSettings("openvino", "fp32", points, 2),
    ]


def test_an_empty_suite_is_one_case_of_the_defaults(tmp_path: Path) -> None:
    assert list(read_suite(written(tmp_path / "s.toml", "")).benches()) == [BenchSettings("onnx", None, (Point(1),), 0)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch = 8", "batch"),
        ("batches = [8]", "batches"),
        ("batch = [0]", "positive"),
        ("batch = []", f"1 to {MOST_CASES} cases"),
        (f"threads = {list(range(MOST_CASES + 1))}", f"1 to {MOST_CASES} cases"),
        ("batch = [", "cannot be read"),
    ],
)
def test_a_broken_suite_says_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        read_suite(written(tmp_path / "s.toml", text))
    assert "s.toml" in str(raised.value)


def test_a_missing_suite_says_what_one_looks_like(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"absent\.toml cannot be read.*engines = "):
        read_suite(tmp_path / "absent.toml")


def test_rows_say_their_engine_where_engines_differ() -> None:
    assert latency_rows([MEASURED])[0][0] == "3 x 16"
    both = latency_rows([MEASURED, replace(MEASURED, engine="openvino")])
    assert [row[0] for row in both] == ["3 x 16, onnx fp32 2t", "3 x 16, openvino fp32 2t"]


@pytest.mark.slow
def test_bench_measures_a_suite_and_keeps_all_rows(shell: Shell, finished: Path, tmp_path: Path) -> None:
    text = 'engines = ["onnx", "openvino"]\nbatch = [1, 2]\nseq = [8]\nthreads = [1]\n'
    ran = shell("optin", "bench", finished, "--suite", written(tmp_path / "suite.toml", text))
    assert ran.code == 0, ran.err
    assert "Memory at" not in ran.out
    rows = json.loads((finished / "measurements.json").read_text())["latency"]
    assert [(row["engine"], row["batch"], row["seq_len"]) for row in rows] == [
        ("onnx", 1, 8),
        ("onnx", 2, 8),
        ("openvino", 1, 8),
        ("openvino", 2, 8),
    ]
    assert "openvino" in ran.out


def test_a_case_that_is_not_built_is_refused_before_anything_is_measured(
    shell: Shell, finished: Path, tmp_path: Path
) -> None:
    text = 'precisions = ["fp32", "fp16"]\n'
    ran = shell("optin", "bench", finished, "--suite", written(tmp_path / "suite.toml", text))
    assert ran.code == 2
    assert "model.fp16.onnx does not exist" in ran.err or "dense.fp16.onnx does not exist" in ran.err
    assert not (finished / "measurements.json").exists()


def test_rows_of_other_cases_stay_and_those_of_the_same_case_are_replaced(tmp_path: Path) -> None:
    def kept(*measured: Measurement) -> list[tuple[str, str, int, int, float]]:
        write_measurements(tmp_path, measured)
        rows = json.loads((tmp_path / "measurements.json").read_text())["latency"]
        return [(row["engine"], row["precision"], row["batch"], row["threads"], row["ideal"]) for row in rows]

    first, other = ("onnx", "fp32", 3, 2, 2.0), ("openvino", "fp32", 3, 2, 2.0)
    assert kept(MEASURED) == [first]
    assert kept(replace(MEASURED, engine="openvino")) == [first, other]
    assert kept(replace(MEASURED, ideal=1.5)) == [other, (*first[:4], 1.5)]
    more = (replace(MEASURED, precision="fp16"), replace(MEASURED, batch=8), replace(MEASURED, threads=1))
    assert len(kept(*more)) == 5
    assert len(kept(*more)) == 5
    path = tmp_path / "measurements.json"
    stored = json.loads(path.read_text())
    for changed in ({"cpu_model": "another"}, {"versions": {"onnxruntime": "0"}}):
        path.write_text(json.dumps({**stored, "environment": {**stored["environment"], **changed}}))
        assert kept(MEASURED) == [first]
    path.write_text("{")
    assert kept(MEASURED) == [first]
