"""Any text for any option of any command: done or refused, never a traceback, and a dry run writes nothing."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optin_deploy.cli import app
from support.tiny_checkpoint import SEQ_LEN, bert, classifier, finished_job, labelled, lines, photos, root, run, vit

COMMANDS: dict[str, Any] = typer.main.get_group(app).commands  # type: ignore[attr-defined]
TEXT_JOB = ("--calibration", lines, "--seq-len", SEQ_LEN)
BASES: dict[str, list[tuple[object, ...]]] = {
    "export": [(bert, *TEXT_JOB), (classifier, "--calibration", labelled), (vit, "--calibration", photos)],
    "score": [(bert, *TEXT_JOB, "--out", "scored")],
    "profile": [(bert, *TEXT_JOB)],
    "inspect": [(lambda: finished_job() / "model.onnx",)],
    "plan": [
        (finished_job,),
        (finished_job, "--allocation", "uniform"),
        (lambda: finished_job() / "model.onnx", "--magnitude", "--out", "plan.json"),
    ],
    "sweep": [(finished_job,)],
    "rewrite": [(finished_job,)],
    "finetune": [(finished_job, "--data", labelled, "--out", "tuned")],
    "build": [(finished_job,)],
    "bench": [(finished_job,)],
    "gate": [(lambda: finished_job() / "model.onnx", finished_job)],
    "ship": [(finished_job, "--out", "repository"), ("--rollback",), ("--rollback", "--name", "x")],
    "serve-check": [(finished_job,)],
    "show": [(finished_job,), ("scores", finished_job)],
    "report": [(finished_job,)],
    "push": [(finished_job, "my-org/smaller")],
}
"""A command that works, to which options are added."""
NUMBERS = (
    *("0", "1", "-1", "2", "16", "17", "65", "999", "100000", "99999999999", "99999999999999999999999", "9" * 5000),
    *("0.5", "1.0", "-0", "-0.0", "1e-400", "1e400", "1e-9", "nan", "inf", "-inf", "0x10", "1_000", " 3 ", "3.7"),
    *("0,6", "60%", "０.６", "８", "²", "½", "٣", "", " ", "true", "None", "1e3"),
)
UNITS = (
    *("4GiB", "512MiB", "²MiB", "0GiB", "4 GB", "4gib", "-1MiB", "MiB", "9" * 30 + "GiB"),
    *("4ms", "0ms", "1e3ms", "999999999999s", "0.0000001us", "4", "ms"),
    *(
        "batch=1",
        "batch=2,seq=8",
        "batch=0",
        "batch=",
        "batch=1,batch=2",
        "seq=65",
        "batch=99999999999",
        "size=3",
        "=,=",
    ),
    *("batch=1,8,32 seq=16,128,384", "batch=8,1,2", "seq=1,2", "batch=1,8,99999999999", "1/4", "5/4", "0/0", "1/²"),
    *("8,16", "1,4,16", ",", "0,1", "1,1", "0.8,0.6", "0.5,nan"),
)
WORDS = (
    *("onnx", "torch", "openvino", "trt", "trt-rtx", "aoti", "fp32", "fp16", "int8", "sketch", "exact", "curves"),
    *("uniform", "paper", "mean", "block", "ffn", "version", "hardware", "stripped", "mlperf", "server", "offline"),
    *("triton", "ovms", "mlserver", "kserve", "versions", "none", "refuse", "feature-extraction", "../x", "a\x00b"),
)
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(UNITS),
    st.sampled_from(WORDS),
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=12),
)
FILES = st.sampled_from(
    ["absent.json", "absent/x.html", ".", "", "a\x00b", "x" * 300, "page.html", "{lines}", "{labelled}"]
)
OF_FILES = ("--calibration", "--data", "--eval", "--latency-table", "--timing-cache", "--out", "--suite", "--pin")
"""Values of options that name files: text of any kind could name a file of this machine."""


@cache
def options_of(command: str) -> tuple[Any, ...]:
    hidden = ("help", "dry_run")
    return tuple(
        each for each in COMMANDS[command].params if each.param_type_name == "option" and each.name not in hidden
    )


@st.composite
def command_lines(draw: Callable[..., Any]) -> list[object]:
    command = draw(st.sampled_from(sorted(BASES)))
    base = draw(st.sampled_from(BASES[command]))
    arguments: list[object] = [command, *base]
    options = options_of(command)
    for option in draw(st.lists(st.sampled_from(options), max_size=3)) if options else ():
        typed = draw(st.sampled_from([*option.opts, *option.secondary_opts]))
        if option.is_flag:
            arguments.append(typed)
        else:
            value = draw(FILES if typed in OF_FILES else VALUES)
            arguments.append(f"{typed}={value}")
    return [*arguments, "--dry-run"]


def check(arguments: list[object]) -> None:
    arguments = [each() if callable(each) else each for each in arguments]
    arguments = [
        str(each).replace("{lines}", str(lines())).replace("{labelled}", str(labelled())) for each in arguments
    ]
    said, here = io.StringIO(), Path.cwd()
    with tempfile.TemporaryDirectory(dir=root()) as empty:
        os.chdir(empty)
        try:
            with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
                patch.setattr("optin_deploy.jobs.checked._check_needed", lambda *_: None)  # it measures: seconds
                code = run("optin", *arguments, monkeypatch=patch)
        finally:
            os.chdir(here)
        assert code in (0, 2), (arguments, code, said.getvalue())
        assert "Traceback" not in said.getvalue(), (arguments, said.getvalue())
        assert not os.listdir(empty), (arguments, "a dry run wrote")


def test_every_command_with_a_dry_run_is_tried() -> None:
    assert {*BASES} == {*COMMANDS} - {"doctor"}


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(command_lines())
def test_any_options_are_done_or_refused(arguments: list[object]) -> None:
    check(arguments)


@pytest.mark.skipif(os.environ.get("OPTIN_FUZZ") != "1", reason="minutes: set OPTIN_FUZZ=1")
@settings(max_examples=2000, deadline=None, suppress_health_check=[*HealthCheck], database=None)
@given(command_lines())
def test_any_options_are_done_or_refused_many_times(arguments: list[object]) -> None:
    check(arguments)
