"""Packages of an extra are needed by few commands; where one is absent, these say which and the others go on."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optin_deploy.common.extras import EXTRAS, require
from optin_deploy.data.bundled import bundled_samples
from optin_deploy.data.images import open_image
from optin_deploy.errors import MissingDependency
from optin_deploy.files.storage import read_json
from support.project import ROOT

WITHOUT = "PIL", "matplotlib", "jinja2"
"""Modules that nothing of the core needs, and no package that the core brings."""
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(sys.argv[1:])
import optin_deploy
for module in pkgutil.walk_packages(optin_deploy.__path__, "optin_deploy."):
    if not module.name.startswith(("optin_deploy.__main__", "optin_deploy.serving.payload.")):
        importlib.import_module(module.name)
"""
EXPORT = """
import sys
sys.modules |= dict.fromkeys(sys.argv.pop(1).split(","))
from optin_deploy.cli import export_main
export_main()
"""


def run(code: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def names(requirements: list[str]) -> set[str]:
    return {requirement.partition(">")[0].partition("[")[0] for requirement in requirements}


def test_each_optional_package_is_in_its_extra_and_not_in_the_core() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for package, extra in EXTRAS.values():
        assert package in names(project["optional-dependencies"][extra])
        assert package not in names(project["dependencies"])


@pytest.mark.parametrize("module", EXTRAS)
def test_an_absent_package_is_told_with_the_line_that_installs_it(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require(module)
    monkeypatch.setitem(sys.modules, module, None)
    package, extra = EXTRAS[module]
    with pytest.raises(MissingDependency, match=rf"{package} is not installed.*'optin-deploy\[{extra}\]'"):
        require(module)


def test_every_module_is_imported_without_them() -> None:
    done = run(IMPORT_ALL, *WITHOUT)
    assert done.returncode == 0, done.stderr


def test_images_need_pillow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for read in (lambda: bundled_samples("image"), lambda: open_image(tmp_path / "photo.png")):
        with pytest.raises(MissingDependency, match="pillow"):
            read()
    assert len(bundled_samples("text")) > 100


def test_what_was_asked_for_is_refused_before_the_work(
    shell: Callable[..., Any], finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = tmp_path / "network.png"
    for asked in (("inspect", finished / "model.onnx", "--picture", picture), ("report", finished)):
        ran = shell("optin", *asked)
        assert (ran.code, "'optin-deploy[report]'" in ran.err) == (2, True), ran.err
        assert ran.out == ""
    assert not picture.exists()
    assert not (finished / "report.html").exists()


def test_the_page_needs_its_templates(
    shell: Callable[..., Any], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    ran = shell("optin", "report", finished)
    assert (ran.code, "jinja2 is not installed" in ran.err) == (2, True)


def test_a_picture_that_comes_beside_something_else_is_left_out_with_a_sentence(
    shell: Callable[..., Any], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = shell("optin", "show", "scores", finished)
    assert ran.code == 0
    assert f"{finished / 'scores.png'} was not drawn: matplotlib is not installed" in ran.out
    assert not (finished / "scores.png").exists()


def test_a_sweep_without_its_picture_keeps_its_table_and_no_older_picture(
    shell: Callable[..., Any], finished: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = ("optin", "sweep", finished, "--allocation", "uniform", "--flops")
    assert shell(*asked, "0.8").code == 0
    assert (finished / "sweep.png").is_file()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = shell(*asked, "0.8,0.6")
    assert ran.code == 0, ran.err
    assert "sweep.png was not drawn: matplotlib is not installed" in caplog.text
    assert f"Wrote {finished / 'sweep.csv'}." in ran.out
    assert len((finished / "sweep.csv").read_text(encoding="utf-8").splitlines()) == 3
    assert not (finished / "sweep.png").exists()


@pytest.mark.slow
def test_a_model_of_texts_is_exported_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_tiny_checkpoint.py", str(tmp_path / "tiny")])
    runpy.run_path(str(ROOT / "docker" / "make_tiny_checkpoint.py"), run_name="__main__")
    options = ("--flops", 0.7, "--at", "batch=1,seq=16", "--samples", 16, "--seq-len", 16, "--threads", 1)
    done = run(EXPORT, ",".join(WITHOUT), "tiny", *options, "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "out" / "report.json", "")["macs"]["kept"] <= 0.7
