"""Options that cannot be, or would do nothing, are refused by name, before work; in a dry run as in a real one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import optin_deploy
from optin_deploy import __version__
from optin_deploy.commands.amounts import align_of
from optin_deploy.common.validation import parse_size, positive_number, whole_number
from optin_deploy.errors import BadInput
from optin_deploy.jobs.bench import inputs_in
from optin_deploy.jobs.prepared import prepare
from optin_deploy.jobs.suites import read_suite
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.measuring import room
from optin_deploy.measuring.points import Point, parse_point
from optin_deploy.measuring.room import check_room, least_bytes, widest
from optin_deploy.network.run import Program
from optin_deploy.planning.budget import TimeTarget
from optin_deploy.planning.widths import Choice, aligned, ladders_of
from optin_deploy.pruning.source import Source
from optin_deploy.scoring.settings import ScoreSettings
from optin_deploy.tuning.settings import Tuning
from support.tiny_checkpoint import (
    FFN,
    HIDDEN,
    POSITIONS,
    SEQ_LEN,
    Shell,
    bert,
    classifier,
    finished_job,
    labelled,
    lines,
    photos,
    snapshot,
    vit,
)


def refused(shell: Shell, out: Path, command: list[object], *says: str) -> None:
    """With and without `--dry-run`: exit code 2, the words, nothing written."""
    for more in ([], ["--dry-run"]):
        ran = shell("optin", *command, *more)
        assert ran.code == 2, (ran.out, ran.err)
        flat = " ".join(ran.err.replace("│", " ").split())
        assert [each for each in says if each not in flat] == [], flat
        assert "load ..." not in ran.err.replace("load ...\nerror", "error"), "the work had begun"
        assert not out.exists()


# --- numbers


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--threads", "999", "--threads 999: possible are 0 to"),
        ("--threads", "-1", "--threads -1: possible are 0 to"),
        ("--at", "batch=99999999999", "--at batch=99999999999: possible are 1 to 2147483647"),
        ("--at", "batch=2000000000", "a batch of 2000000000 takes"),
        ("--at", f"seq={POSITIONS + 1}", f"--at batch=1,seq={POSITIONS + 1}: possible are 1 to {POSITIONS} tokens"),
        ("--at", "batch=1,batch=2", "batch is given twice"),
        ("--at", "batch=1,size=3", "'size' is not known; possible are batch and seq"),
        ("--at", "batch=²", "'²' is no whole number"),
        ("--at", "batch=1.5", "'1.5' is no whole number"),
        ("--seq-len", "99999999999999999999999", "--seq-len 99999999999999999999999: possible are 1 to 1048576"),
        ("--samples", "0", "--samples 0: possible are 1 to"),
        ("--samples", "3", "3 calibration samples are too few for error curves: give at least 4 (--samples)"),
        ("--samples", "99999999999999999999999", "--samples"),
        ("--seed", str(2**32), f"--seed {2**32}: possible are 0 to {2**32 - 1}"),
        ("--seed", "-1", f"--seed -1: possible are 0 to {2**32 - 1}"),
        ("--align", "10000", f"--align 10000: the widest group that is cut in multiples has {FFN} units"),
        ("--align", str(FFN + 1), f"Give --align {FFN} or less"),
        ("--size", "99999999999999999999", "--size '99999999999999999999'"),
        ("--size", "²MiB", "--size '²MiB'"),
        ("--size", "4 GB", "--size '4 GB': give a size such as 512MiB or 4GiB"),
        ("--size", "4gib", "--size '4gib'"),
        ("--size", "0", "--size '0'"),
        ("--memory-budget", "9" * 5000, "--memory-budget"),
        ("--flops", "60%%", "is not a share such as 0.6 or 60%"),
        ("--flops", "0,6", "--flops"),
        ("--flops", "1e-400", "--flops 0.0"),
        ("--flops", "nan", "--flops nan"),
        ("--params", "inf", "--params inf"),
        ("--max-drop", "nan", "--max-drop nan"),
        ("--speedup", "1e300", "--speedup 1e+300"),
        ("--throughput", "1e-300", "--throughput 1e-300"),
        ("--latency", "9" * 400 + "ms", "--latency infms"),
        ("--latency", "0.0000001us", "--latency 1e-10ms"),
        ("--kl-weight", "nan", "--kl-weight"),
        ("--kl-weight", "1e300", "--kl-weight 1e+300"),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_name(
    shell: Shell, tmp_path: Path, option: str, value: str, says: str
) -> None:
    out = tmp_path / "out"
    length = [] if option == "--seq-len" else ["--seq-len", SEQ_LEN]
    refused(shell, out, ["export", bert(), "--calibration", lines(), "--out", out, *length, f"{option}={value}"], says)


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("score", ["--probes", 10**12], "--probes 1000000000000: possible are 1 to 65536"),
        ("score", ["--tokens", 1], "--tokens 1: possible are 2 to"),
        ("score", ["--ray", 10**9], "--ray 1000000000: possible are 1 to 65536"),
        ("score", ["--ray", 0], "--ray 0"),
        ("score", ["--shard", f"1/{'9' * 5000}"], "--shard"),
        ("score", ["--shard", "2/1"], "--shard 2/1: possible are 1/1 to 1/1"),
        ("profile", ["--check", 10**9], "--check 1000000000: possible are 0 to 1000"),
        ("profile", ["--check", -1], "--check -1"),
    ],
)
def test_numbers_of_other_commands(
    shell: Shell, tmp_path: Path, command: str, options: list[object], says: str
) -> None:
    out = tmp_path / "out"
    data = ["--calibration", lines(), "--seq-len", SEQ_LEN, "--out", out]
    refused(shell, out, [command, bert(), *data, *options], says)


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("plan", ["--align", 10_000], f"Give --align {FFN} or less"),
        ("plan", ["--align", 10_000, "--allocation", "uniform"], f"Give --align {FFN} or less"),
        ("sweep", ["--align", 10_000], f"Give --align {FFN} or less"),
        ("sweep", ["--flops", "0.5,nan"], "--flops nan"),
        ("bench", ["--at", "batch=2000000000"], "a batch of 2000000000 takes"),
        ("bench", ["--at", "batch=2", "--at", "batch=2"], "--at batch=2 is given twice"),
        ("bench", ["--protocol", "mlperf", "--seconds", "1e300"], "--seconds 1e+300: give a positive number, at most"),
        ("bench", ["--protocol", "mlperf", "--seconds", "nan"], "--seconds nan"),
        ("ship", ["--threads", 10**9], "--threads 1000000000: possible are 1 to 65536"),
        ("ship", ["--instances", 0], "--instances 0"),
        ("ship", ["--preferred", "9" * 5000], "--preferred"),
        ("serve-check", ["--seconds", "inf"], "--seconds inf: give a positive number"),
        ("serve-check", ["--timeout", "nan"], "--timeout nan"),
        ("serve-check", ["--concurrency", "999999"], "--concurrency 999999: possible are 1 to 1024"),
        ("serve-check", ["--concurrency", ""], "after --concurrency there is an empty value"),
        ("serve-check", ["--batch", -1], "--batch -1: possible are 1 to 65536"),
    ],
)
def test_numbers_of_commands_on_a_finished_folder(
    shell: Shell, tmp_path: Path, command: str, options: list[object], says: str
) -> None:
    out = ["--out", tmp_path / "out"] if command == "ship" else []
    before = snapshot(finished_job())
    refused(shell, tmp_path / "out", [command, finished_job(), *out, *options], says)
    assert snapshot(finished_job()) == before


def test_what_was_accepted_still_is(shell: Shell, tmp_path: Path) -> None:
    data = ["--calibration", lines(), "--seq-len", " 16 ", "--align", FFN, "--seed", 2**32 - 1, "--flops", "6e-1"]
    ran = shell("optin-export", bert(), *data, "--at", " batch = 2 , seq=1_2", "--dry-run", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    data = [*data[:-2], "--flops", "83.3%", "--params", " 80% "]
    ran = shell("optin-export", bert(), *data, "--dry-run", "--out", tmp_path / "out")
    assert "--flops 0.833: " in ran.out, ran.out + ran.err
    assert "--params 0.8: " in ran.out
    (tmp_path / "job.toml").write_text('flops = "60%"')
    ran = shell("optin-export", bert(), *data[:-4], "--config", tmp_path / "job.toml", "--dry-run")
    assert "--flops 0.6: " in ran.out, ran.out + ran.err
    assert [parse_size(text, "--size") for text in ("4GiB", " 512 MiB ", "7")] == [4 * 2**30, 512 * 2**20, 7]
    assert parse_point("seq=8") == Point(1, 8)


def test_bounds_are_in_the_error() -> None:
    assert [whole_number(each, "--x", 1, 3) for each in (1, 2, 3)] == [1, 2, 3]
    for value in (0, 4, -(10**30)):
        with pytest.raises(BadInput, match=rf"--x {value}: possible are 1 to 3\. Try 2\.$"):
            whole_number(value, "--x", 1, 3, "Try 2.")
    assert positive_number(0.5, "--x", 1) == 0.5
    for bad in (0.0, -0.0, float("nan"), float("inf"), 1.1, -1.0):
        with pytest.raises(BadInput, match=r"--x .*: give a positive number, at most 1"):
            positive_number(bad, "--x", 1)
    for option, near in (("--latency", 1e9), ("--throughput", 1e-6), ("--speedup", 1e9)):
        with pytest.raises(BadInput, match=option):
            TimeTarget(option, near)


# --- sizes of input against memory


def test_a_batch_is_held_against_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_in(Workspace(finished_job()))
    feeds = inputs.feeds(Point(1))
    each = least_bytes(inputs.network, feeds, "fp32")
    assert each == SEQ_LEN * (3 * 8 + 4 * (HIDDEN + FFN))  # three inputs of 8 bytes, and both sides of the FFN
    assert least_bytes(inputs.network, feeds, "fp16") == SEQ_LEN * (3 * 8 + 2 * (HIDDEN + FFN))
    assert widest(inputs.network) == HIDDEN + FFN
    monkeypatch.setattr(room, "current_gpu", lambda: None)
    monkeypatch.setattr(room, "free_bytes", lambda device: 7 * each + 1)
    check_room(each, "--at batch=7", 7)
    with pytest.raises(BadInput, match=r"--at batch=8: a batch of 8 takes .* Give a batch of 7 or less"):
        check_room(each, "--at batch=8", 8)


def test_the_estimate_is_less_than_what_a_forward_takes() -> None:
    import torch

    from optin_deploy.scoring.memory import PeakBytes

    for folder, data, seq in ((bert(), lines(), SEQ_LEN), (vit(), photos(), None)):
        prepared = prepare(Source(str(folder), calibration=str(data), seq_len=seq))
        network = prepared.dense.network
        batch = {port.name: prepared.ready.rows.calibration.widest[port.name][:8] for port in network.inputs}
        estimate = sum(
            least_bytes(network, {name: value[row : row + 1].numpy() for name, value in batch.items()}, "fp32")
            for row in range(8)
        )
        program = Program(network)
        with torch.inference_mode(), PeakBytes() as peak:
            program(batch)
        given = sum(each.nbytes for each in batch.values())
        assert given <= estimate <= peak.most + given


def test_images_have_no_length(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for wrong, says in (
        (("--at", "batch=1,seq=8"), "seq=8: the inputs of ViTForImageClassification have fixed sizes"),
        (("--seq-len", "16"), "--seq-len 16: images have a size of their own"),
    ):
        ran = shell("optin", "export", vit(), "--calibration", photos(), "--out", out, *wrong)
        assert ran.code == 2
        assert says in ran.err
        assert not out.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batch = [1, 1]", "batch names one value twice"),
        ('engines = ["onnx", "onnx"]', "engines names one value twice"),
        ("batch = [99999999999]", "--at batch=99999999999"),
        (f"batch = [{'9' * 5000}]", "cannot be read"),
        (f"batch = [0x{'f' * 5000}]", "--suite"),
        (f"batch = {list(range(1, 40))}\nseq = {list(range(1, 40))}", "500 points"),
        (f"threads = {list(range(20_000))}\nprecisions = {json.dumps([str(i) for i in range(20_000)])}", "500 cases"),
    ],
)
def test_suites_go_through_the_same_checks(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "suite.toml"
    file.write_text(text)
    with pytest.raises(BadInput) as raised:
        read_suite(file)
    assert says in str(raised.value)


def test_a_suite_of_too_many_threads_or_a_length_for_nothing_is_refused(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "suite.toml"
    for text, says in (("threads = [999]", "--threads 999"), (f"seq = [{POSITIONS + 1}]", f"1 to {POSITIONS} tokens")):
        file.write_text(text)
        refused(shell, tmp_path / "out", ["bench", finished_job(), "--suite", file], says)


def test_an_alignment_that_no_group_holds_is_refused() -> None:
    layout = prepare(Source(str(bert()), calibration=str(lines()), seq_len=SEQ_LEN)).ready.layout
    assert aligned(layout, Choice(), FFN).align == FFN
    with pytest.raises(BadInput, match=f"{FFN} units.*Give --align {FFN} or less"):
        aligned(layout, Choice(), FFN + 1)
    assert aligned(layout, Choice(kinds=("heads",)), FFN + 1), "heads are whole"
    assert aligned(layout, Choice(align=FFN + 1), None).align <= FFN
    with pytest.raises(BadInput, match=f"--align neurons={FFN + 1}: .* Give --align neurons={FFN} or less"):
        aligned(layout, Choice(), {"neurons": FFN + 1})


def test_kinds_have_multiples_of_their_own() -> None:
    layout = prepare(Source(str(bert()), calibration=str(lines()), seq_len=SEQ_LEN)).ready.layout
    choice = aligned(layout, Choice(("heads", "neurons", "qk-width"), 2), {"neurons": 3})
    steps = {each.kind: {*np.diff(each.counts[:-1])} for each in ladders_of(layout, choice)}
    assert steps == {"heads": {1}, "neurons": {3}, "qk-width": {2}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("16", 16),
        ("neurons=16,channels=8", {"neurons": 16, "channels": 8}),
        ("neurons=4", {"neurons": 4}),
    ],
)
def test_multiples_are_read(text: str | None, expected: object) -> None:
    assert align_of(text) == expected


@pytest.mark.parametrize("text", ["x", "", "1.5", "-1", "neurons", "neurons=", "8,16", "neurons=8,neurons=9", "a=1,2"])
def test_multiples_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"as in neurons=16,channels=8"):
        align_of(text)


@pytest.mark.parametrize("kind", ["heads", "tokens", "x"])
def test_only_kinds_that_are_cut_in_multiples_have_one(kind: str) -> None:
    with pytest.raises(BadInput, match=f"--align {kind}=2: possible are neurons, channels"):
        Choice(by_kind=((kind, 2),))


# --- options that would do nothing


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (["--profile", "batch=1,8,32 seq=16,128,512"], "--profile"),  # the defaults are refused too
        (["--weights", "fixed"], "--weights"),
        (["--workspace", "4GiB"], "--workspace"),
        (["--timing-cache", "x.cache"], "--timing-cache"),
        (["--compatible", "version"], "--compatible"),
        (["--text-column", "text"], "--text-column"),
        (["--label-column", "label"], "--label-column"),
        (["--no-dense", "--at", "batch=1"], "--at"),
        (["--no-dense", "--threads", "0"], "--threads"),
        (["--no-dense", "--at", "batch=1", "--threads", "1"], "--at and --threads would do nothing"),
    ],
)
def test_export_refuses_what_would_do_nothing(shell: Shell, tmp_path: Path, options: list[object], idle: str) -> None:
    out = tmp_path / "out"
    command = ["export", bert(), "--calibration", lines(), "--seq-len", SEQ_LEN, "--out", out]
    refused(shell, out, [*command, *options], idle, "would do nothing", "Leave")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--compatible", "version", "--compatible", "version"], "--compatible version is given twice"),
        (["--profile", "batch=4", "--profile", "batch=4,4,4"], "is given twice"),
        (["--threads", "2"], "--threads 2: engine trt runs on the GPU"),
        (["--profile", "batch=1,1,2000000000"], "a batch of 2000000000 takes"),
        (["--profile", "batch=1,1,99999999999"], "--profile batch=1,1,99999999999"),
    ],
)
def test_trt_refuses_what_it_has_not(shell: Shell, tmp_path: Path, options: list[object], says: str) -> None:
    out = tmp_path / "out"
    command = ["export", bert(), "--calibration", lines(), "--seq-len", SEQ_LEN, "--out", out, "--engine", "trt"]
    refused(shell, out, [*command, *options], says)


@pytest.mark.parametrize(
    ("command", "options", "idle"),
    [
        ("plan", ["--compensation"], "--compensation"),
        ("plan", ["--no-compensation"], "--no-compensation"),
        ("build", ["--weights", "fixed"], "--weights"),
        ("build", ["--profile", "batch=1,8,32"], "--profile"),
        ("bench", ["--suite", "s.toml", "--engine", "onnx"], "--engine"),
        ("bench", ["--suite", "s.toml", "--at", "batch=1"], "--at"),
        ("bench", ["--suite", "s.toml", "--threads", 0], "--threads"),
        ("bench", ["--suite", "s.toml", "--memory"], "--memory"),
        ("ship", ["--longest", 9], "--longest"),
        ("ship", ["--too-long", "truncate"], "--too-long"),
        ("ship", ["--canary", 9], "--canary"),
        ("ship", ["--storage-uri", "s3://a/b"], "--storage-uri"),
        ("ship", ["--server", "ovms", "--queue-delay", 100], "--queue-delay"),
        ("ship", ["--server", "mlserver", "--instances", 1], "--instances"),
        ("serve-check", ["--no-latency", "--seconds", 1], "--seconds"),
        ("serve-check", ["--no-latency", "--concurrency", 4], "--concurrency"),
    ],
)
def test_other_commands_refuse_what_would_do_nothing(
    shell: Shell, tmp_path: Path, command: str, options: list[object], idle: str
) -> None:
    out = ["--out", tmp_path / "out"] if command == "ship" else []
    refused(shell, tmp_path / "out", [command, finished_job(), *out, *options], f"{idle} would do nothing")


def test_a_rollback_takes_no_setting_of_a_new_version(shell: Shell, tmp_path: Path) -> None:
    command = ["ship", "--rollback", "--out", tmp_path / "out", "--name", "x", "--max-batch", 32, "--text"]
    refused(shell, tmp_path / "out", command, "--max-batch and --text would do nothing: --rollback")


def test_score_refuses_projections_of_the_exact_scorer(shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["score", bert(), "--calibration", lines(), "--seq-len", SEQ_LEN, "--out", out, "--scorer", "exact"]
    refused(shell, out, [*command, "--probes", 4], "--probes would do nothing")


def test_columns_are_taken_where_a_table_is_read(shell: Shell, tmp_path: Path) -> None:
    options: list[Any] = ["--seq-len", SEQ_LEN, "--out", tmp_path / "out", "--text-column", "text", "--dry-run"]
    assert shell("optin-export", classifier(), "--calibration", labelled(), *options).code == 0
    ran = shell("optin-export", classifier(), "--calibration", lines(), "--eval", labelled(), *options)
    assert "would do nothing" not in ran.err


# --- refused before work


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pool", "mean", "--engine", "torch"], "--pool needs a graph"),
        (["--no-dense", "--latency", "1us"], "leave out --no-dense"),
        (["--latency-table", "t.json"], "--latency-table t.json is for --latency"),
    ],
)
def test_what_was_refused_late_is_refused_before_work(
    shell: Shell, tmp_path: Path, options: list[object], says: str
) -> None:
    out = tmp_path / "out"
    command = ["export", bert(), "--calibration", lines(), "--seq-len", SEQ_LEN, "--out", out]
    refused(shell, out, [*command, *options], says)


def test_a_pool_that_the_engine_has_not_is_refused_by_build(shell: Shell, tmp_path: Path) -> None:
    before = snapshot(finished_job())
    refused(shell, tmp_path / "out", ["build", finished_job(), "--engine", "torch", "--pool", "mean"], "--pool")
    assert snapshot(finished_job()) == before


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_too_few_samples_are_found_before_the_curves(shell: Shell, finished: Path, command: str) -> None:
    source = json.loads((finished / "source.json").read_text())
    (finished / "source.json").write_text(json.dumps({**source, "samples": 2}))
    (finished / "curves.json").unlink()
    refused(shell, finished / "none", [command, finished], "2 calibration samples are too few for error curves")


# --- the version


@pytest.mark.parametrize("program", ["optin", "optin-export"])
def test_the_version_is_told(shell: Shell, program: str) -> None:
    ran = shell(program, "--version")
    assert (ran.code, ran.out) == (0, f"optin-deploy {__version__}\n")


def test_a_rollback_of_nothing_makes_no_folder(shell: Shell, tmp_path: Path) -> None:
    refused(shell, tmp_path / "out", ["ship", "--rollback", "--out", tmp_path / "out", "--name", "x"], "x")


def test_no_two_seeds_draw_the_same() -> None:
    assert random.Random(-1).random() == random.Random(1).random(), "this is why there are no negative ones"
    makers: tuple[Callable[[Any], object], ...] = (
        lambda seed: Source("bert", seed=seed),
        lambda seed: ScoreSettings(seed=seed),
        lambda seed: Tuning(seed=seed),
        lambda seed: optin_deploy.prune(torch.nn.Linear(2, 2), [torch.zeros(1, 2)], seed=seed),
    )
    for make in makers:
        for seed in (-1, 2**32):
            with pytest.raises(BadInput, match=rf"seed {seed}: possible are 0 to 4294967295"):
                make(seed)
        with pytest.raises(BadInput, match=r"seed 0\.5: give a whole number"):
            make(0.5)
