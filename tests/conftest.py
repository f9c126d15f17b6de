"""Fixtures of all tests: exports that are kept, one thread, commands in this process, and a finished job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from optin_deploy.network import read_torch
from support.exported_once import exported_once

if TYPE_CHECKING:
    from support.tiny_checkpoint import Shell


@pytest.fixture(scope="session", autouse=True)
def _exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Most of the time of these tests would go into torch's exporter."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exported"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read_torch, "_by_dynamo", exported_once(read_torch._by_dynamo, folder))
        yield


@pytest.fixture
def by_torchscript(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules are read by the older exporter, in a twentieth of the time: where any graph of them will do."""

    def left_out(*_: object) -> None:
        raise NotImplementedError("left out by a test")

    monkeypatch.setattr(read_torch, "_by_dynamo", left_out)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny matrices are faster on one thread, and the sums come in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """Runs commands in this process."""
    from support.tiny_checkpoint import Shell  # needs typer and pillow, which a bare GPU machine may lack

    return Shell(monkeypatch, capsys)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A copy of the output folder of a finished `optin-export`."""
    from support.tiny_checkpoint import copy_of, finished_job

    return copy_of(finished_job(), tmp_path / "finished")
