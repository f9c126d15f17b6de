"""What Windows lacks is not used: locks of whole files, flags of `open`, syncing through a handle that only reads.

Elsewhere Windows is imitated, which shows what our code asks for, not how Windows answers. Locks are also tried as they
are on this system.
"""

from __future__ import annotations

import builtins
import errno
import mmap
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from optin_deploy.errors import BadInput
from optin_deploy.files import byte_lock, descriptors, locking, ownership, storage
from optin_deploy.files.locking import opened
from optin_deploy.files.ownership import RECORD, Record
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.network.write import take_away
from optin_deploy.pruning.source import Source
from optin_deploy.scoring.parts import FolderStore
from optin_deploy.serving.repository import Repository
from support.project import ROOT

ABSENT = "fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"
"""Modules of Python that are not there on Windows."""
FLAGS = "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"
IMPORT_ALL = """
import builtins, importlib, pkgutil, sys
real, absent = builtins.__import__, set(sys.argv[1:])
def asked(name, globals=None, *rest, **options):
    if name in absent and (globals or {}).get("__name__", "").startswith("optin_deploy"):
        raise ImportError(f"{globals['__name__']} imports {name}")
    return real(name, globals, *rest, **options)
builtins.__import__ = asked
import optin_deploy
for module in pkgutil.walk_packages(optin_deploy.__path__, "optin_deploy."):
    if not module.name.startswith(("optin_deploy.__main__", "optin_deploy.serving.payload.")):
        importlib.import_module(module.name)
"""


class FakeMsvcrt(ModuleType):
    """`msvcrt.locking`: bytes from the place of the file's pointer on, each for one holder, also within a process."""

    LK_UNLCK, LK_LOCK, LK_NBLCK = 0, 1, 2

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: list[tuple[tuple[int, int], int, int, int]] = []
        """(file, handle, first byte, one past the last)."""
        self._one = threading.Lock()

    def locking(self, handle: int, kind: int, count: int) -> None:
        about, start = os.fstat(handle), os.lseek(handle, 0, os.SEEK_CUR)
        assert start + count < 2**31
        file, wanted = (about.st_dev, about.st_ino), ((about.st_dev, about.st_ino), handle, start, start + count)
        with self._one:
            if kind == self.LK_UNLCK:
                if wanted not in self.held:
                    raise PermissionError(errno.EACCES, "not locked")
                self.held.remove(wanted)
            elif any(of == file and first < start + count and start < end for of, _, first, end in self.held):
                raise PermissionError(errno.EACCES, "locked")
            else:
                self.held.append(wanted)


def is_open(path: Any, dir_fd: int | None = None) -> bool:
    """Does this process hold a descriptor of the file?"""
    for handle in range(3, 512):
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(path, dir_fd=dir_fd, follow_symlinks=False)):
                return True
    return False


def refuse_open(path: Any, dir_fd: int | None = None) -> None:
    """Neither removed nor renamed, nor replaced."""
    if is_open(path, dir_fd):
        raise PermissionError(errno.EACCES, "it is being used by another process", str(path))


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMsvcrt]:
    """Take away what Windows lacks, and refuse what it refuses."""
    fcntl = pytest.importorskip("fcntl", reason="Windows need not be imitated here")
    fake = FakeMsvcrt()
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    for module in (descriptors, locking, ownership):
        monkeypatch.setattr(module, "WINDOWS", True)
    for name in (*FLAGS, "pread"):
        monkeypatch.delattr(os, name, raising=False)
    sync, unlink, close = os.fsync, os.unlink, os.close
    real_import = builtins.__import__

    def imported(name: str, globals: Any = None, *rest: Any, **options: Any) -> ModuleType:
        """Libraries of others choose by themselves what they use on Windows; ours finds no such module."""
        if name in ABSENT and (globals or {}).get("__name__", "").startswith("optin_deploy"):
            raise ModuleNotFoundError(name)
        return real_import(name, globals, *rest, **options)

    def writable_only(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        sync(handle)

    def closed_only(path: Any, *, dir_fd: int | None = None) -> None:
        refuse_open(path, dir_fd)
        unlink(path, dir_fd=dir_fd)

    def moving(move: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def moved(path: Any, target: Any) -> None:
            for each in (path, *Path(path).rglob("*"), target):
                refuse_open(each)
            move(path, target)

        return moved

    def closed(handle: int) -> None:
        assert all(held[1] != handle for held in fake.held), "a lock is let go of before its file is closed"
        close(handle)

    monkeypatch.setattr(builtins, "__import__", imported)
    monkeypatch.setattr(os, "fsync", writable_only)
    for name in ("unlink", "remove"):
        monkeypatch.setattr(os, name, closed_only)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, moving(getattr(os, name)))
    monkeypatch.setattr(os, "close", closed)
    yield fake
    assert fake.held == []


@pytest.fixture(params=["here", "as on Windows"])
def system(request: pytest.FixtureRequest) -> None:
    """This system, then Windows: locks mean the same on both."""
    if request.param != "here":
        request.getfixturevalue("windows")


def test_no_module_imports_what_windows_lacks() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_ALL, *ABSENT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("system")
def test_a_lock_is_shared_by_many_or_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with opened(path) as first, opened(path) as second, opened(path) as third:
        assert [lock.take(shared=True) for lock in (first, second, third)] == [True] * 3
        assert not first.take()  # two others share it; what it had is gone now
        assert second.take(shared=True)
        third.close()
        assert second.take()
        assert not first.take()
        assert not first.take(shared=True)
        assert second.take(shared=True)
        assert first.take(shared=True)
    with opened(path) as later:
        assert later.take()
        assert later.take()  # taking it again changes nothing


@pytest.mark.usefixtures("system")
def test_who_waits_gets_the_lock_when_it_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_lock, "PAUSE_SECONDS", 0.001)
    taken = threading.Event()

    def wait(shared: bool) -> None:
        with opened(tmp_path / "lock") as lock:
            assert lock.take(wait=True, shared=shared)
            taken.set()

    for shared in (True, False):
        taken.clear()
        with opened(tmp_path / "lock") as lock:
            assert lock.take()
            waiting = threading.Thread(target=wait, args=(shared,))
            waiting.start()
            assert not taken.wait(0.05)
        waiting.join()
        assert taken.is_set()


@pytest.mark.usefixtures("system")
def test_a_lock_leaves_what_its_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_bytes(b"somebody's\n")
    with opened(path) as lock:
        assert lock.take()
        assert path.read_bytes() == b"somebody's\n"
        lock.remove()
    assert path.read_bytes() == b"somebody's\n"


@pytest.mark.usefixtures("system")
def test_an_empty_lock_is_removed_and_a_foreign_link_or_folder_refused(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with opened(path) as lock:
        assert lock.take()
        assert lock.stands()
        lock.remove()
        assert not path.exists()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="is a link"), opened(path):
        pass
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(BadInput, match="is a link"), opened(tmp_path):
        pass


def test_a_lock_that_another_one_has_open_stays_on_windows(tmp_path: Path, windows: FakeMsvcrt) -> None:
    path = tmp_path / "lock"
    with opened(path) as waiting, opened(path) as lock:
        assert lock.take()
        lock.remove()
        assert path.exists()
        assert waiting.take()


@pytest.mark.usefixtures("windows")
def test_records_and_files_are_written_on_windows(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.begin()
    (tmp_path / "folder").mkdir()
    storage.write_text(tmp_path / "folder" / "text", "a\nb\n")
    with storage.atomic_folder(tmp_path / "whole") as folder:
        (folder / "part").write_bytes(b"part")
    assert (tmp_path / "folder" / "text").read_bytes() == b"a\nb\n"
    assert "folder/text" in record.names()
    assert record.owns(tmp_path / "whole")
    (tmp_path / RECORD).write_text("cut short")  # as a killed process leaves it
    record.note(tmp_path / "next", "0")
    assert record.names() == ("next",)
    (tmp_path / RECORD).unlink()
    (tmp_path / RECORD).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match="is a link"):
        record.begin()


@pytest.mark.usefixtures("windows")
def test_folders_are_kept_from_others_on_windows(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "parts" / "key", [])
    with store.shared(lambda: False), store.claimed("p", wait=False) as mine, store.claimed("p", wait=False) as again:
        assert (mine, again) == (True, False)
    assert list(tmp_path.iterdir()) == []
    out = tmp_path / "out"
    with Workspace.at_work(out, Source("bert")), pytest.raises(BadInput, match="another"), Workspace(out).locked():
        pass
    assert not out.exists()
    repository = Repository(tmp_path / "repository")
    with repository.locked(), pytest.raises(BadInput, match="another process"), repository.locked():
        pass


@pytest.mark.usefixtures("windows")
@pytest.mark.parametrize("change", ["replace", "remove", "set aside", "exchange", "take away"])
def test_a_file_that_only_garbage_holds_is_out_of_the_way_on_windows(change: str, tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.begin()
    path = tmp_path / "model" / "model.onnx"
    with storage.atomic_folder(path.parent) as folder:
        (folder / path.name).write_text("old")

    def changed() -> None:
        if change == "replace":
            storage.write_text(path, "new")
        elif change == "exchange":
            with storage.atomic_folder(path.parent) as folder:
                (folder / path.name).write_text("new")
        elif change == "set aside":
            ownership.set_aside(path)
        elif change == "take away":
            take_away(path)
        else:
            record.remove("model")

    with path.open() as file:
        held: list[Any] = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)]
    held.append(held)  # refers to itself, as the values and nodes of a graph do
    with pytest.raises(PermissionError):
        changed()
    assert path.read_text() == "old"
    del held
    changed()
    if change in ("replace", "exchange"):
        assert path.read_text() == "new"
    else:
        assert not path.exists()
    assert not list(tmp_path.rglob(".*.tmp")) + list(tmp_path.rglob(".*.old"))


@pytest.mark.slow
@pytest.mark.usefixtures("windows")
def test_a_whole_job_asks_for_nothing_that_windows_lacks(
    shell: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_tiny_checkpoint.py", str(tmp_path / "tiny")])
    runpy.run_path(str(ROOT / "docker" / "make_tiny_checkpoint.py"), run_name="__main__")
    brief = ("--at", "batch=1,seq=16", "--samples", 16, "--seq-len", 16, "--threads", 1, "--out", tmp_path / "out")
    for flops in (0.7, 0.6):  # the second replaces what the first made
        ran = shell("optin-export", tmp_path / "tiny", "--flops", flops, *brief)
        assert ran.code == 0, ran.err
    assert not list(tmp_path.rglob("*.kept*"))
    ran = shell("optin", "ship", tmp_path / "out", "--server", "triton", "--out", tmp_path / "models")
    assert ran.code == 0, ran.err
