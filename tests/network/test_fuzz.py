"""Damaged ONNX files: a network or one clear sentence; never a traceback, a hang, a full memory or a foreign file."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from optin_deploy.errors import BadInput
from optin_deploy.jobs.stage_memory import StageMemory, resident_bytes
from optin_deploy.network.probe import probes
from optin_deploy.network.read import read
from optin_deploy.network.write import write
from optin_deploy.pruning.networks import cut, inspect
from support.damaged_graphs import damaged

LONGEST_SECONDS = 20
SLACK_BYTES = 64 * 2**20
"""What Python, protobuf and onnx_ir take beside the file, which is small here."""
RUNNING_BYTES = 2**30
"""The same where networks are run: sizes in a file may ask for values of any size, within what is free."""


def everything(path: Path) -> None:
    """Read a file, look at all of it, make its inputs, write it, and read that."""
    network = read(path)
    found = (network.nodes, network.inputs, network.outputs, network.producer, network.consumers, network.fixed)
    assert all(part is not None for part in found)
    values = {name: weight.numpy() for name, weight in network.weights.items()}
    written = path.with_name("written.onnx")
    write(network, written)
    again = read(written)
    assert [(node.op, node.inputs, node.outputs) for node in again.nodes] == [
        (node.op, node.inputs, node.outputs) for node in network.nodes
    ]
    assert {name: weight.numpy().tobytes() for name, weight in again.weights.items()} == {
        name: array.tobytes() for name, array in values.items()
    }
    next(probes(network))


def cut_and_proven(path: Path) -> None:
    """Find what can be cut in a file, cut every second unit, prove it, and write it."""
    layout = inspect(path)
    smaller = cut(path, {group.name: range(0, group.units, 2) for group in layout.groups})
    write(smaller, path.with_name("smaller.onnx"))


def fuzz(
    folder: Path, seeds: range, target: Callable[[Path], object] = everything, slack_bytes: int = SLACK_BYTES
) -> int:
    """Hand damaged files to a function that gives a result or raises BadInput; returns how many gave one."""
    good = 0
    for case in damaged(folder, seeds):
        outside = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        before, memory = resident_bytes(), StageMemory()
        with _explained(case.words), _limited(), memory("target"), suppress(BadInput):
            target(case.path)
            good += 1
        allowed = 2 * case.path.stat().st_size + slack_bytes
        assert memory.peaks["target"] - before < allowed, f"{case.words}: {memory.peaks} above {before}"
        assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == outside
    return good


@contextmanager
def _explained(words: str) -> Iterator[None]:
    try:
        yield
    except BaseException as err:
        err.add_note(words)
        raise


@contextmanager
def _limited() -> Iterator[None]:
    """A hang becomes an error."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"it took more than {LONGEST_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and alarms are of Unix")


def test_damaged_files_are_networks_or_refused(tmp_path: Path) -> None:
    good = fuzz(tmp_path, range(300))
    assert 30 < good < 270  # neither all refused nor all harmless


def test_what_is_cut_of_damaged_files_is_proven_or_refused(tmp_path: Path) -> None:
    good = fuzz(tmp_path, range(5000, 5060), cut_and_proven, RUNNING_BYTES)
    assert 3 < good < 57


@pytest.mark.skipif(os.environ.get("OPTIN_FUZZ") != "1", reason="minutes: set OPTIN_FUZZ=1")
def test_what_is_cut_of_many_damaged_files_is_proven_or_refused(tmp_path: Path) -> None:
    assert fuzz(tmp_path, range(5060, 7100), cut_and_proven, RUNNING_BYTES) > 100


@pytest.mark.skipif(os.environ.get("OPTIN_FUZZ") != "1", reason="minutes: set OPTIN_FUZZ=1")
def test_many_damaged_files_are_networks_or_refused(tmp_path: Path) -> None:
    assert fuzz(tmp_path, range(300, 4300)) > 400
