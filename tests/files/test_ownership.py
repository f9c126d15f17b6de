"""Files of others are never removed or written over; what killed processes left goes; one job a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optin_deploy.errors import BadInput
from optin_deploy.exporters import ENGINES, exporter
from optin_deploy.files import locking, storage
from optin_deploy.files.names import ARTIFACTS, LOCK, NAMES
from optin_deploy.files.ownership import RECORD, Record, free_name
from optin_deploy.files.storage import atomic_file, atomic_folder, read_json, sha256_file, write_json, write_text
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.pruning.source import Source
from support.exported_once import BY_TORCHSCRIPT
from support.tiny_checkpoint import (
    Shell,
    bert,
    classifier,
    copy_of,
    finished_job,
    labelled,
    lines,
    photos,
    temporary_files,
    text_options,
    vit,
)

TEMPTING = (
    *(name for name in NAMES if name not in ("model", "mlperf")),
    *("model.notes.md", "model.pt", "model.d/w", "dense.txt", "sweep.xlsx", "scores.bak", "report.pdf", "mlperf.d/log"),
    *("parts/notes.txt", "parts/0123456789abcdef/x.safetensors", "parts/0123456789abcdef/workers.lock"),
    *(".model.onnx.0123456789abcdef.tmp", ".model.0123456789abcdef.old/config.json", "plan.json.kept1"),
)
"""Names of our own, names like them, and names of what we leave for a moment."""
BRIEF = ("--engine", "torch", "--no-dense")


def tree(folder: Path) -> dict[str, bytes]:
    """Relative name -> content, of all but our records and locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (RECORD, LOCK))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def filled(folder: Path, names: tuple[str, ...] = TEMPTING) -> dict[str, bytes]:
    """Files of somebody else at these names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}, not of optin-deploy")
    return tree(folder)


def lost(before: dict[str, bytes], folder: Path) -> set[str]:
    """What is nowhere in the folder any more, under whatever name."""
    left = list(tree(folder).values())
    return {name for name, content in before.items() if content not in left}


@pytest.fixture(name="record")
def _record(tmp_path: Path) -> Record:
    record = Record(tmp_path)
    record.begin()
    return record


# --- the record -----------------------------------------------------------------------------------------------


def test_a_file_is_ours_by_its_name_and_by_what_it_holds(record: Record) -> None:
    mine, other = record.root / "plan.json", record.root / "notes.json"
    write_text(mine, "plan")
    other.write_text("plan")
    assert record.owns(mine)
    assert not record.owns(other)
    mine.write_text("edited")
    assert not record.owns(mine)
    assert record.strangers(mine) == []
    assert record.strangers(other) == [other]


def test_what_was_changed_is_kept_and_what_is_foreign_stays(record: Record) -> None:
    for name in ("ours", "edited"):
        write_text(record.root / name, "ours")
    (record.root / "edited").write_text("by hand")
    (record.root / "foreign").write_text("mine")
    for name in ("ours", "edited", "foreign", "absent"):
        record.remove(name)
    assert tree(record.root) == {"edited.kept1": b"by hand", "foreign": b"mine"}
    write_text(record.root / "foreign", "new")
    assert tree(record.root)["foreign.kept1"] == b"mine"


def test_a_folder_is_removed_without_what_others_put_into_it(record: Record) -> None:
    with atomic_folder(record.root / "mlperf") as written:
        (written / "run").mkdir()
        (written / "run" / "log").write_text("log")
        (written / "summary").write_text("ours")
    (record.root / "mlperf" / "run" / "notes").write_text("mine")
    record.remove("mlperf")
    assert tree(record.root) == {"mlperf/run/notes": b"mine"}
    (record.root / "mlperf" / "run" / "notes").unlink()
    record.remove("mlperf")
    assert not (record.root / "mlperf").exists()


def test_a_folder_of_others_keeps_even_its_empty_folders(record: Record) -> None:
    (record.root / "mlperf" / "empty").mkdir(parents=True)
    record.remove("mlperf")
    assert (record.root / "mlperf" / "empty").is_dir()


def test_links_are_nobody_of_ours(record: Record, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A record lists names; that a link stands there now must not lead out of the folder."""
    outside = tmp_path_factory.mktemp("outside")
    write_text(record.root / "plan.json", "plan")
    (outside / "plan.json").write_text("plan")
    (record.root / "plan.json").unlink()
    (record.root / "plan.json").symlink_to(outside / "plan.json")
    (record.root / "sub").symlink_to(outside)
    record.note(record.root / "sub" / "plan.json", sha256_file(outside / "plan.json"))
    record.remove("sub/plan.json")
    record.remove("plan.json")
    write_text(record.root / "plan.json", "new")
    assert (outside / "plan.json").read_text() == "plan"
    assert (record.root / "plan.json").read_text() == "new"


@pytest.mark.parametrize(
    "line",
    [
        {"temporary": "thesis.tex"},
        {"temporary": "../.thesis.0123456789abcdef.tmp"},
        {"file": "../thesis.tex", "sha256": "0"},
        {"temporary": ["x"]},
        {"file": 7, "sha256": None},
        {"temporary": "...0123456789abcdef.old"},
        {"temporary": "a\0/.x.0123456789abcdef.tmp"},
        {"temporary": f".{'x' * 300}.0123456789abcdef.tmp"},
        {"file": f"model.{'x' * 300}", "sha256": "0"},
        {"file": "model.\ud800", "sha256": "0"},
        [],
    ],
)
def test_a_record_that_somebody_wrote_removes_nothing_else(tmp_path: Path, line: Any) -> None:
    root = tmp_path / "out"
    root.mkdir()
    (root / "...0123456789abcdef.old").mkdir()  # like the old one of a folder named "."
    kept = [root / "thesis.tex", tmp_path / "thesis.tex", tmp_path / ".thesis.0123456789abcdef.tmp"]
    for path in kept:
        path.write_text("precious")
    (root / RECORD).write_text(json.dumps(line) + "\n\xff{not json\n[[[")
    record = Record(root)
    record.clear_temporaries()
    for name in record.names():
        record.remove(name)
    assert all(path.read_text() == "precious" for path in kept)


def test_a_line_that_a_killed_process_cut_short_spoils_no_other(record: Record) -> None:
    with (record.root / RECORD).open("a") as file:
        file.write('{"file": "plan.js')
    write_text(record.root / "plan.json", "plan")
    assert record.owns(record.root / "plan.json")


def test_a_line_that_the_disk_takes_in_part_is_an_error(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file would count as somebody else's ever after."""
    monkeypatch.setattr(os, "write", lambda handle, data: len(data) - 1)
    with pytest.raises(OSError, match="No space left"):
        record.note(record.root / "plan.json", "0")


@pytest.mark.parametrize("part", ["", "model"])
def test_without_its_record_a_folder_says_why_it_is_not_known_as_ours(shell: Shell, tmp_path: Path, part: str) -> None:
    """Such as a copy without hidden files."""
    folder = copy_of(finished_job(), tmp_path / "copy")
    (folder / part / RECORD).unlink()
    before = tree(folder)
    for command in (("plan", folder, "--allocation", "uniform"), ("rewrite", folder)):
        ran = shell("optin", *command)
        assert ran.code == 2
        assert f"the record {folder / part / RECORD} is missing" in ran.err
    assert tree(folder) == before


def test_a_record_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / RECORD).symlink_to(tmp_path / "target")
    with pytest.raises(BadInput, match="is a link"):
        Record(tmp_path).begin()
    assert (tmp_path / "target").read_text() == "precious"


# --- D1, D2: every command, in folders of others ---------------------------------------------------------------


def test_a_forced_job_loses_no_file_of_others(shell: Shell, tmp_path: Path) -> None:
    """And the next one, at another budget, neither."""
    before = filled(tmp_path / "u")
    for flops in (0.6, 0.5):
        ran = shell("optin-export", bert(), *text_options(lines(), tmp_path / "u"), *BRIEF, "--force", "--flops", flops)
        assert ran.code == 0, ran.err
        assert lost(before, tmp_path / "u") == set()
    after = tree(tmp_path / "u")
    moved = {name for name, content in before.items() if after.get(name) != content}
    assert moved <= set(NAMES), "only what stood in the way has another name"
    assert "model/model.safetensors" in after


def test_a_finished_folder_is_replaced_by_another_model_with_force_alone(shell: Shell, tmp_path: Path) -> None:
    assert shell("optin-export", bert(), *text_options(lines(), tmp_path / "u"), *BRIEF).code == 0
    before = tree(tmp_path / "u")
    command = ("optin-export", vit(), "--calibration", photos(), "--out", tmp_path / "u", *BRIEF)
    ran = shell(*command)
    assert (ran.code, tree(tmp_path / "u")) == (2, before)
    assert f"holds what was made of {bert()}" in ran.err
    assert "--force" in ran.err
    assert shell(*command, "--force").code == 0
    left = tree(tmp_path / "u").keys()
    assert "preprocessor_config.json" in left
    assert not [name for name in left if "tokenizer" in name]


def test_stale_artifacts_go_and_own_files_beside_them_stay(shell: Shell, tmp_path: Path) -> None:
    options = [*text_options(lines(), tmp_path / "u"), "--no-dense"]
    assert shell("optin-export", bert(), *options, "--flops", 0.6, "--precision", "fp16").code == 0
    assert (tmp_path / "u" / "model.fp16.onnx").exists()
    mine = filled(tmp_path / "u", ("model.notes.md", "model.pt", "model.d/w"))
    assert shell("optin-export", bert(), *options, "--engine", "torch", "--flops", 0.5).code == 0
    assert not (tmp_path / "u" / "model.fp16.onnx").exists()
    assert {name: content for name, content in mine.items() if name.startswith("model.")}.items() >= {
        name: content for name, content in tree(tmp_path / "u").items() if name in ("model.notes.md", "model.pt")
    }.items()
    assert lost({name: mine[name] for name in ("model.notes.md", "model.pt", "model.d/w")}, tmp_path / "u") == set()


@pytest.mark.parametrize("force", [False, True])
def test_a_foreign_model_folder_is_refused_before_anything_is_done(shell: Shell, tmp_path: Path, force: bool) -> None:
    before = filled(tmp_path / "u", ("model/mine", "model.pt", "sweep.csv"))
    ran = shell("optin-export", bert(), *text_options(lines(), tmp_path / "u"), *BRIEF, *["--force"] * force)
    assert ran.code == 2
    assert tree(tmp_path / "u") == before


@pytest.mark.parametrize("option", ["--calibration", "--eval"])
def test_inputs_inside_of_the_output_folder_are_refused(shell: Shell, tmp_path: Path, option: str) -> None:
    data = tmp_path / "u" / "model.jsonl"
    data.parent.mkdir()
    data.write_bytes(labelled().read_bytes())
    options = text_options(lines(), tmp_path / "u") if option == "--eval" else ["--out", tmp_path / "u"]
    ran = shell("optin-export", bert(), *options, option, data, "--force")
    assert ran.code == 2
    assert str(data) in ran.err
    assert tree(tmp_path / "u") == {"model.jsonl": labelled().read_bytes()}


@pytest.fixture(scope="module", name="job")
def _job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of(finished_job(), tmp_path_factory.mktemp("job") / "work")


FOREIGN = {
    "sweep": ("sweep", "--flops", "0.9", "--allocation", "uniform", "sweep.png"),
    "plan": ("plan", "--allocation", "uniform", "plan.json"),
    "rewrite": ("rewrite", "model/notes.md"),
    "build": ("build", "--precision", "fp16", "model.fp16.onnx"),
    "bench": ("bench", "measurements.json"),
    "report": ("report", "report.html"),
    "show": ("show", "scores.png"),
}


@pytest.mark.parametrize("command", FOREIGN)
def test_no_command_writes_over_a_file_of_others(shell: Shell, job: Path, tmp_path: Path, command: str) -> None:
    name, *options, file = FOREIGN[command]
    folder = copy_of(job, tmp_path / "work")
    (folder / file).unlink(missing_ok=True)
    (folder / RECORD).write_text(
        "".join(line for line in (folder / RECORD).read_text().splitlines(True) if f'"{file}"' not in line)
    )
    (folder / file).write_text("mine")
    before = tree(folder)
    ran = shell("optin", name, *(["scores"] if name == "show" else []), folder, *options)
    assert ran.code == 2
    assert file in ran.err
    assert "is no earlier result" in ran.err if name == "report" else "optin-deploy did not make this" in ran.err
    assert tree(folder) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("profile", bert(), "--out", "FILE"),
        ("gate", "JOB/dense.onnx", "JOB", "--max-ratio", 9, "--out", "FILE"),
        ("gate", "JOB/dense.onnx", "--pin", "FILE"),
        ("report", "JOB", "--out", "FILE"),
    ],
    ids=["profile", "gate", "pin", "report"],
)
def test_a_file_that_the_user_names_is_not_written_over(
    shell: Shell, job: Path, tmp_path: Path, arguments: tuple[object, ...]
) -> None:
    file = tmp_path / ("page.html" if arguments[0] == "report" else "config.json")
    file.write_text('{"hidden_size": 48, "schema_version": 1}')
    named = [str(each).replace("JOB", str(job)).replace("FILE", str(file)) for each in arguments]
    if "--pin" in named:
        file = file.rename(job / "config.mine.json")
        named[-1] = str(file)
    before = file.read_bytes()
    for more in ([], ["--dry-run"]):
        ran = shell("optin", *named, *more)
        assert ran.code == 2
        assert "no earlier result of this command" in ran.err
    assert file.read_bytes() == before
    file.unlink()


def test_a_name_is_free_for_what_is_ours_and_with_force_what_is_not_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    free_name(path, lambda file: False)
    write_json(path, {"mine": True})
    free_name(path, lambda file: "mine" in read_json(file, ""))
    with pytest.raises(BadInput, match="--force"):
        free_name(path, lambda file: False)
    free_name(path, lambda file: False, force=True, dry_run=True)
    assert path.exists()
    free_name(path, lambda file: False, force=True)
    assert tree(tmp_path).keys() == {"latency.json.kept1"}
    with pytest.raises(BadInput, match="is a folder"):
        free_name(tmp_path, lambda file: False, force=True)


# --- D5, D6, D7: links, leftovers, two jobs --------------------------------------------------------------------


@pytest.mark.parametrize("name", [LOCK, RECORD])
def test_a_lock_or_record_that_is_a_link_is_refused_and_its_target_stays(
    shell: Shell, tmp_path: Path, name: str
) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(target)
    ran = shell("optin-export", bert(), *text_options(lines(), out), *BRIEF)
    assert ran.code == 2
    assert name in ran.err
    assert target.read_text() == "precious"
    assert target.stat().st_mode & 0o777 == 0o666 & ~storage._umask()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_lock_that_is_no_file_is_refused_at_once(tmp_path: Path, make: Any) -> None:
    make(tmp_path / LOCK)
    if make is Path.mkdir:
        with pytest.raises(BadInput, match=LOCK), locking.opened(tmp_path / LOCK):
            pass
    else:
        with locking.opened(tmp_path / LOCK) as lock:  # a pipe locks as well, and is neither read nor waited for
            assert lock.take()


KILLED = """
import os, signal, sys
from pathlib import Path
from optin_deploy.files.storage import atomic_file, atomic_folder
root = Path(sys.argv[1])
with atomic_folder(root / "model") as folder:
    (folder / "config.json").write_text("half")
    with atomic_file(root / "model.onnx") as file:
        file.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_job_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    workspace = Workspace.claim(tmp_path / "out", Source("bert"))
    mine = filled(workspace.root, (".model.onnx.0123456789abcdef.tmp", ".model.fedcba9876543210.tmp/config.json"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(workspace.root)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(temporary_files(workspace.root)) > len(mine)
    with workspace.changing():
        pass
    assert tree(workspace.root) == mine


def test_a_folder_that_was_being_exchanged_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace.claim(tmp_path / "out", Source("bert"))
    for content in ("first", "second"):
        with monkeypatch.context() as patch:
            if content == "second":  # as if killed between the two renames, which clears nothing away
                patch.setattr(Path, "replace", half_way(Path.replace))
                patch.setattr(shutil, "rmtree", lambda *args, **options: None)
            try:
                with atomic_folder(workspace.root / "model") as written:
                    (written / "content").write_text(content)
            except InterruptedError:
                assert not (workspace.root / "model").exists()
    with workspace.changing():
        pass
    assert tree(workspace.root / "model") == {"content": b"first"}
    assert temporary_files(workspace.root) == []


def half_way(replace: Any) -> Any:
    """Only the first rename of an exchange succeeds."""

    def renamed(self: Path, target: Path) -> Any:
        if self.suffix == ".tmp" or target.name == "model":
            raise InterruptedError
        return replace(self, target)

    return renamed


def test_results_under_names_of_the_user_stay_when_the_model_is_made_again(shell: Shell, tmp_path: Path) -> None:
    folder = copy_of(finished_job(), tmp_path / "work")
    assert shell("optin", "report", folder, "--out", folder / "model.july.html").code == 0
    page = (folder / "model.july.html").read_bytes()
    assert shell("optin", "build", folder, "--precision", "fp16").code == 0
    assert shell("optin", "plan", folder, "--allocation", "uniform", "--flops", 0.4).code == 0
    assert shell("optin", "rewrite", folder).code == 0
    assert (folder / "model.july.html").read_bytes() == page
    assert not (folder / "model.fp16.onnx").exists()


def test_every_artifact_of_every_engine_is_known_by_name() -> None:
    made = {name for each in map(exporter, ENGINES) for kind in each.precisions for name in each.file_names(kind)}
    assert made - {"model", None} <= set(ARTIFACTS)


@pytest.mark.parametrize("force", [False, True])
def test_devices_and_pipes_are_not_replaced(tmp_path: Path, force: bool) -> None:
    os.mkfifo(tmp_path / "pipe.html")
    (tmp_path / "link").symlink_to("/dev/null")
    for path in (tmp_path / "pipe.html", tmp_path / "link"):
        with pytest.raises(BadInput, match="a device or a pipe"):
            free_name(path, lambda path: bool(path.read_bytes()), force=force)
        assert os.path.lexists(path)


HELD = """
import sys
from pathlib import Path
from optin_deploy.jobs.workspace import Workspace
with Workspace(Path(sys.argv[1])).locked(shared=len(sys.argv) > 2):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(name="another")
def _another() -> Iterator[Any]:
    """Starts another process that holds the lock of a folder."""
    running = []

    def start(folder: Path, *shared: str) -> None:
        command = [sys.executable, "-c", HELD, str(folder), *shared]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        running.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"

    yield start
    for child in running:
        child.communicate(b"")


def test_a_second_job_in_a_folder_is_told_so_at_once(shell: Shell, job: Path, tmp_path: Path, another: Any) -> None:
    folder = copy_of(job, tmp_path / "work")
    another(folder)
    before = tree(folder)
    options = text_options(lines(), folder)
    for command in (
        ("optin-export", classifier(), *options),
        ("optin", "plan", folder, "--allocation", "uniform"),
        ("optin", "sweep", folder),
        ("optin", "rewrite", folder),
        ("optin", "build", folder),
        ("optin", "bench", folder),
    ):
        ran = shell(*command)
        assert ran.code == 2
        assert f"another job is writing to {folder}" in ran.err
    assert tree(folder) == before


def test_scorers_share_a_folder_and_keep_other_jobs_out(
    tmp_path: Path, another: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace.claim(tmp_path / "out", Source("bert"))
    another(workspace.root, "shared")
    with workspace.locked(shared=True), pytest.raises(BadInput, match="another job"), workspace.locked():
        pass
    another_alone = Workspace.claim(tmp_path / "alone", Source("bert"))
    another(another_alone.root)
    monkeypatch.setattr("optin_deploy.jobs.workspace.PAUSE_SECONDS", 0.0)
    with pytest.raises(BadInput, match="another job"), another_alone.locked(shared=True):
        pass


def test_a_job_that_is_refused_leaves_no_folder(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    ran = shell("optin-export", bert(), "--calibration", tmp_path / "few.txt", "--out", tmp_path / "out")
    assert ran.code == 2
    assert not (tmp_path / "out").exists()


# --- B4, C9, B12: full disks, permissions ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(27, "File too large"),
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "plan.json"
    write_text(target, "old")
    said = r"plan\.json cannot be written.*run the same command again"
    with pytest.raises(BadInput, match=said), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(BadInput, match="model cannot be written"), atomic_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("half")
        raise error
    assert tree(tmp_path) == {"plan.json": b"old"}


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from optin_deploy.cli import export_main
sys.argv[1:] = sys.argv[2:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.orig_argv[3]), resource.RLIM_INFINITY))
export_main()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("by_torchscript")
def test_a_job_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_room(shell: Shell, tmp_path: Path) -> None:
    options = [str(bert()), *map(str, text_options(lines(), tmp_path / "out")), *BRIEF]
    ran = subprocess.run(
        [sys.executable, "-c", BY_TORCHSCRIPT + LIMITED, str(100_000), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
    )
    assert ran.returncode == 2, ran.stderr
    (said,) = [line for line in ran.stderr.splitlines() if line.startswith("error")]
    assert "File too large" in said
    assert "run the same command again" in said
    assert temporary_files(tmp_path / "out") == []
    assert not (tmp_path / "out" / "model").exists()
    assert shell("optin-export", *options).code == 0


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_and_folders_have_the_permissions_that_the_user_wants(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "plan.json", "plan")
        with atomic_folder(tmp_path / "model") as folder, atomic_file(folder / "config.json") as file:
            file.touch(mode=0o600)
    finally:
        os.umask(before)
    for path in (tmp_path / "plan.json", tmp_path / "model" / "config.json"):
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask
