"""What nobody meant to raise ends with one line, a file that holds the traceback, and an exit code of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from optin_deploy.errors import EXIT_CODES, OWN_FAULT
from support.exported_once import BY_TORCHSCRIPT
from support.tiny_checkpoint import Shell, bert, lines, temporary_files, text_options


def raising(error: BaseException) -> Any:
    def fail(*args: object, **options: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [KeyError("heads"), TypeError("a\nb"), RuntimeError(), AssertionError("")])
def test_an_error_of_our_own_is_one_line_and_a_file(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("optin_deploy.jobs.workspace.Workspace.source", raising(error))
    ran = shell("optin", "show", tmp_path)
    assert ran.code == OWN_FAULT == 5
    assert OWN_FAULT in EXIT_CODES
    assert ran.err.count("\n") == 1
    assert ran.err.startswith(f"error: {type(error).__name__}: ")
    found = re.search(r"the traceback is in (\S+\.txt)\. Please report", ran.err)
    assert found is not None
    kept = Path(found[1]).read_text()
    assert "Traceback (most recent call last)" in kept
    assert type(error).__name__ in kept
    assert f"optin show {tmp_path}" in kept


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_traceback_is_shown_where_it_is_asked_for(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("optin_deploy.jobs.workspace.Workspace.source", raising(KeyError("heads")))
    arguments: list[object] = ["show", tmp_path]
    arguments.insert(place, "--traceback")
    ran = shell("optin", *arguments)
    assert ran.code == OWN_FAULT
    assert "Traceback (most recent call last)" in ran.err


def test_where_no_file_can_be_written_the_line_still_comes(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    monkeypatch.setattr("optin_deploy.jobs.workspace.Workspace.source", raising(KeyError("heads")))
    ran = shell("optin", "show", tmp_path)
    assert ran.code == OWN_FAULT
    assert "could not be written" in ran.err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "not enough memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to get 1 bytes"),
            "not enough memory",
        ),
        (PermissionError(13, "Permission denied", "x"), "Check the path, its permissions"),
    ],
)
def test_what_the_machine_lacks_is_no_fault_of_ours(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    monkeypatch.setattr("optin_deploy.jobs.workspace.Workspace.source", raising(error))
    ran = shell("optin", "show", tmp_path)
    assert ran.code == 2
    assert said in ran.err


PRESSED = """
import os, signal, sys
from optin_deploy import cli
from optin_deploy.files import storage
pressed = lambda *args, **options: [os.kill(os.getpid(), signal.SIGINT) for _ in range(5)]
storage.save_file = pressed
unlink = storage.Path.unlink
def slowly(self, **options):
    os.kill(os.getpid(), signal.SIGINT)
    unlink(self, **options)
storage.Path.unlink = slowly
cli.export_main()
"""


@pytest.mark.slow
def test_ctrl_c_pressed_again_and_again_ends_cleanly(tmp_path: Path) -> None:
    """Five times in the middle of a file, and again while it is cleared away."""
    options = [str(bert()), *map(str, text_options(lines(), tmp_path / "out")), "--engine", "torch", "--no-dense"]
    ran = subprocess.run(
        [sys.executable, "-c", BY_TORCHSCRIPT + PRESSED, *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 130 != -signal.SIGINT, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "run the same command again" in ran.stderr
    assert temporary_files(tmp_path / "out") == []


ENDING = """
import atexit, os, signal
from optin_deploy import cli
press = lambda *args: os.kill(os.getpid(), signal.SIGINT)
{when}
cli.main()
"""


@pytest.mark.parametrize(("when", "code"), [("atexit.register(press)", 2), ("cli._report = press", 130)])
def test_ctrl_c_while_an_error_is_told_or_the_process_ends_is_no_traceback(
    tmp_path: Path, when: str, code: int
) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", ENDING.format(when=when), "show", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == code
    assert "Traceback" not in ran.stderr


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    script = f"{sys.executable} -m optin_deploy export --help | head -1; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert ran.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["", "--out", "x"], "after the command there is an empty value"),
        ([bert(), "--calibration", ""], "after --calibration there is an empty value"),
        ([bert(), "--out="], "--out= has an empty value"),
    ],
)
def test_an_unset_variable_of_the_shell_is_no_current_folder(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[object], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = shell("optin-export", *arguments)
    assert ran.code == 2
    assert says in ran.err
    assert list(tmp_path.iterdir()) == []
