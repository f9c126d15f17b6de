"""The wheel works where there is no checkout: built, installed into an environment of its own, and used there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import runpy
import shutil
import site
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest

from optin_deploy import __version__
from support.project import ROOT

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "optin_deploy", "exporters")
"""What is built; a copy of it, so that nothing is left in the checkout, and nothing that lies there gets in."""
LEAST_SETUPTOOLS = 77
OFFLINE = ("--no-deps", "--no-index")
IMPORT_ALL = """
import importlib, json, pkgutil
import optin_deploy
imported, absent = [], {}
for module in pkgutil.walk_packages(optin_deploy.__path__, "optin_deploy."):
    if module.name == "optin_deploy.__main__" or module.name.startswith("optin_deploy.serving.payload."):
        continue
    try:
        importlib.import_module(module.name)
        imported.append(module.name)
    except ModuleNotFoundError as err:
        absent[module.name] = err.name
print(json.dumps({"file": optin_deploy.__file__, "imported": imported, "absent": absent}))
"""
"""The payload runs inside of servers, whose packages are not here."""


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel."""

    folder: Path

    def run(self, program: str, *arguments: object, cwd: Path) -> str:
        """What a program of the environment prints; fails with what it says if it fails."""
        path = self.folder / ("Scripts" if os.name == "nt" else "bin") / program
        hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        command = [str(path), *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


def pip(*arguments: object, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the sources."""
    try:
        found = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        found = "0"
    if int(found.partition(".")[0]) < LEAST_SETUPTOOLS:
        pytest.skip(f"building offline needs setuptools {LEAST_SETUPTOOLS} or newer here; there is {found}")
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels = folder / "source", folder / "wheels"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
            )
        else:
            shutil.copyfile(ROOT / name, source / name)
    pip("wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", wheels, source, cwd=folder)
    (built,) = wheels.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in an environment that sees this one's packages, but not the checkout."""
    environment = tmp_path_factory.mktemp("installed") / "environment"
    venv.create(environment, symlinks=os.name != "nt")
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip("--python", python, "install", *OFFLINE, wheel, cwd=environment)
    inner = subprocess.run(
        [str(python), "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    # A path file adds a folder but reads none of the path files in it: an editable install there stays unseen.
    packages = Path(inner.stdout.strip())
    (packages / "outer.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()), encoding="utf-8")
    return Installed(environment)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_tiny_checkpoint.py", str(folder)])
        runpy.run_path(str(ROOT / "docker" / "make_tiny_checkpoint.py"), run_name="__main__")
    return folder


def sources() -> set[str]:
    """Python files of the checkout, as they are named in the wheel."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "optin_deploy").rglob("*.py")}
    return found | {f"optin_deploy/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "exporters").rglob("*.py")}


def test_one_name_is_installed_with_all_of_its_files(wheel: Path) -> None:
    assert wheel.name == f"optin_deploy-{__version__}-py3-none-any.whl"
    with ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {name.partition("/")[0] for name in names} == {"optin_deploy", f"optin_deploy-{__version__}.dist-info"}
    assert {name for name in names if name.endswith(".py")} == sources()
    data = {name for name in names if name.startswith("optin_deploy/") and not name.endswith(".py")}
    assert data == {"optin_deploy/py.typed", "optin_deploy/data/calibration.txt", "optin_deploy/reporting/report.html"}


@pytest.mark.slow
def test_every_module_is_imported_from_the_environment(installed: Installed, tmp_path: Path) -> None:
    told = json.loads(installed.run("python", "-W", "ignore", "-c", IMPORT_ALL, cwd=tmp_path))
    assert Path(told["file"]).is_relative_to(installed.folder)
    assert len(told["imported"]) > 200
    # Nothing of ours is missing, and nothing that every user has; the rest are packages that are not installed here.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {requirement.partition(">")[0].replace("-", "_") for requirement in project["dependencies"]}
    missing = {name.partition(".")[0] for name in told["absent"].values()}
    assert not missing & {"optin_deploy", "exporters", *core}


@pytest.mark.slow
def test_its_commands_export_a_model_and_show_what_came_of_it(installed: Installed, tiny: Path, tmp_path: Path) -> None:
    assert "--flops" in installed.run("optin-export", "--help", cwd=tmp_path)
    assert installed.run("optin", "--version", cwd=tmp_path).strip() == f"optin-deploy {__version__}"
    brief = ("--at", "batch=1,seq=16", "--samples", 16, "--seq-len", 16, "--threads", 1)
    installed.run("optin-export", tiny, "--flops", 0.7, *brief, "--out", "out", cwd=tmp_path)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["macs"]["kept"] <= 0.7
    assert {"model.onnx", "dense.onnx", "report.md"} <= {path.name for path in (tmp_path / "out").iterdir()}
    installed.run("optin", "report", "out", cwd=tmp_path)
    assert "<svg" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    loaded = "import optin_deploy; print(type(optin_deploy.load('out')).__name__)"
    assert installed.run("python", "-W", "ignore", "-c", loaded, cwd=tmp_path).strip() == "BertModel"
