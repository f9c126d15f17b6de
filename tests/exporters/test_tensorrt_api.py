"""No call to a name that TensorRT 10.12, TensorRT 11 or TensorRT-RTX lacks: the stand-in against the real bindings.

All tests of plans and their runtime run on tests/support/fake_tensorrt.py, so what it does not have is never called.
"""

from __future__ import annotations

import enum
import inspect
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support import fake_tensorrt
from support.project import ROOT
from support.tensorrt_names import classes

Names = Mapping[str, Mapping[str, int | None]]
VERSIONS = {"tensorrt-10": "10.12.0.36", "tensorrt-11": "11.4.0.106"}
"""Folder in the environment that `make venv` put the bindings into -> the version they must have."""


@pytest.fixture(params=[*VERSIONS, "tensorrt-rtx"])
def names(request: pytest.FixtureRequest, tmp_path: Path) -> Names:
    """Classes of the real bindings, their members and numbers of arguments."""
    import tensorrt_rtx_bindings
    import tensorrt_rtx_libs

    if request.param == "tensorrt-rtx":
        return classes(tensorrt_rtx_bindings)
    bindings = Path(sys.prefix) / request.param
    assert bindings.is_dir(), "run `make venv`: it fetches the bindings of both versions"
    libraries = Path(tensorrt_rtx_libs.__path__[0])
    script = ROOT / "tests/support/tensorrt_names.py"
    command = [sys.executable, script, bindings, libraries, tmp_path]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert told["version"] == VERSIONS[request.param]
    return dict(told["classes"])


def test_every_class_and_member_that_is_used_exists(names: Names) -> None:
    used = {(name, member) for name, kind in fakes().items() for member in public(kind)}
    assert len(used) > 50
    missing = {(name, member) for name, member in used if member not in names.get(name, {})}
    assert not missing
    assert set(fakes()) <= set(names)


def test_every_method_takes_as_many_arguments_as_it_is_given(names: Names) -> None:
    compared = 0
    for name, kind in fakes().items():
        for member in public(kind):
            method, real = inspect.getattr_static(kind, member), names[name][member]
            if inspect.isfunction(method) and real is not None:
                ours = list(inspect.signature(method).parameters.values())[1:]
                required = [p for p in ours if p.default is p.empty]
                assert len(required) <= real, (name, member)
                compared += 1
    assert compared > 25


def test_a_name_that_a_version_removed_would_be_found(names: Names) -> None:
    removed = {("BuilderFlag", "NO_SUCH_FLAG"), ("IExecutionContext", "execute_async_v2")}
    assert all(member not in names[name] for name, member in removed)


def test_the_real_log_severities_fall_with_importance() -> None:
    import tensorrt_rtx_bindings as trt

    severity = trt.ILogger.Severity
    assert severity.ERROR < severity.WARNING < severity.INFO < severity.VERBOSE


def fakes() -> dict[str, Any]:
    """The classes of the stand-in that stand for TensorRT's."""
    return {
        name: kind
        for name, kind in inspect.getmembers(fake_tensorrt, inspect.isclass)
        if kind.__module__ == fake_tensorrt.__name__ and not name.startswith("_")
    }


def public(kind: Any) -> list[str]:
    """Members that the class itself defines."""
    if issubclass(kind, enum.Enum):
        return list(kind.__members__)
    return [name for name in vars(kind) if not name.startswith("_")]
