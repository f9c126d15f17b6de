"""The workflows name what exists, may do no more than they must, and test every version that the package claims."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.project import ROOT

FOLDER = ROOT / ".github"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in FOLDER.glob("workflows/*.yml")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_PEOPLE = ("SECURITY.md", "CODE_OF_CONDUCT.md", "RELEASE.md", "CONTRIBUTING.md", "CITATION.cff")
every_workflow = pytest.mark.parametrize("name", sorted(WORKFLOWS))


def jobs(name: str) -> dict[str, Any]:
    found: dict[str, Any] = WORKFLOWS[name]["jobs"]
    return found


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in jobs(name).values() for step in job.get("steps", [])]


def texts(*patterns: str) -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for pattern in patterns for path in ROOT.glob(pattern)}


def test_the_workflows_are_there() -> None:
    assert set(WORKFLOWS) == {"ci", "docs", "nightly", "release"}


@every_workflow
def test_a_workflow_reads_only_and_does_not_run_twice_or_without_end(name: str) -> None:
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    assert WORKFLOWS[name]["concurrency"]["group"].startswith(name)  # a called one must not share its caller's
    assert all("timeout-minutes" in job or "uses" in job for job in jobs(name).values())


@every_workflow
def test_actions_are_named_by_a_major_version_and_a_checkout_keeps_no_token(name: str) -> None:
    for step in steps(name):
        used = step.get("uses", "actions/run@v1")
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+|release/v\d+)", used), used
        if used.startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_no_secret_is_stored_and_only_two_jobs_may_sign() -> None:
    assert all("secrets." not in text for text in texts(".github/workflows/*.yml").values())
    signing = [
        job for name in WORKFLOWS for job, each in jobs(name).items() if "id-token" in each.get("permissions", {})
    ]
    assert sorted(signing) == ["attest", "pypi"]


def test_nothing_is_published_before_its_version_was_compared_and_all_was_tested() -> None:
    needs = {name: job.get("needs") for name, job in jobs("release").items()}
    assert needs == {"version": None, "ci": "version", "attest": "ci", "pypi": "attest", "github": "pypi"}
    assert jobs("release")["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in WORKFLOWS["ci"][True]  # YAML reads the key `on` as true


def test_every_claimed_python_is_tested() -> None:
    marked = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert jobs("ci")["test"]["strategy"]["matrix"]["python"] == marked
    assert PROJECT["requires-python"] == f">={marked[0]}"


def test_extras_that_are_asked_for_exist() -> None:
    asked = texts(
        ".github/workflows/*.yml", "docker/Dockerfile.*", "Makefile", "README.md", "docs/*.md", "constraints.txt"
    )
    named = {
        extra
        for text in asked.values()
        for found in re.findall(r"(?:'\.|whl\)|optin-deploy)\[([\w,-]+)\]", text)
        for extra in found.split(",")
    }
    assert {"cpu", "images", "report", "dev", "docs"} <= named <= set(PROJECT["optional-dependencies"])


@every_workflow
def test_files_that_a_command_names_exist(name: str) -> None:
    for step in steps(name):
        for path in re.findall(r"(?<![\w/])(?:tests|docker|\.ci)/[\w./-]+", step.get("run", "")):
            assert (ROOT / path).exists(), path


def test_who_reports_a_network_that_stays_whole_is_asked_what_inspect_prints() -> None:
    form = yaml.safe_load((FOLDER / "ISSUE_TEMPLATE" / "whole_network.yml").read_text(encoding="utf-8"))
    asked = {field["id"]: field for field in form["body"] if "id" in field}
    assert "optin inspect" in asked["inspect"]["attributes"]["label"]
    assert asked["inspect"]["validations"]["required"]


def test_nobody_is_sent_to_an_address_that_was_made_up() -> None:
    for path, text in texts(*FOR_PEOPLE, ".github/**/*.yml", ".github/*.md").items():
        assert not re.search(r"[\w.+-]+@[\w-]+\.[a-z]{2,}", text), path
