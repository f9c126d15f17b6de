"""What the files of docker/ must keep to; that they build is shown by docker/build_without_docker.sh, in minutes."""

from __future__ import annotations

import json
import re
import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from optin_deploy import __version__
from support.dockerfiles import instructions, pins, run, tool, values
from support.project import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = tuple(sorted(path for path in DOCKER.glob("Dockerfile.*") if path.suffix != ".dockerignore"))
SCRIPT = DOCKER / "build_without_docker.sh"


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


every_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def test_there_is_one_dockerfile_for_cpu_and_one_for_gpu() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]


@every_dockerfile
def test_the_base_is_a_pinned_default_that_everyone_can_replace(path: Path) -> None:
    first = instructions(path)[0]
    assert first.keyword == "ARG"
    name, _, image = first.value.partition("=")
    assert name == "BASE"
    assert re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*", image), f"{image} has no tag with a version"
    assert {value.split()[0] for value in values(path, "FROM")} == {"${BASE}"}
    assert 'PIP_ARGS=""' in values(path, "ARG")


@every_dockerfile
def test_the_image_runs_optin_and_not_as_root(path: Path) -> None:
    last_stage = path.read_text().rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.+)$", last_stage, re.MULTILINE) == ["1000:1000"]
    assert [json.loads(value) for value in values(path, "ENTRYPOINT")] == [["optin"]]
    assert "optin" in project()["project"]["scripts"]


@every_dockerfile
def test_only_pip_brings_anything_into_the_image(path: Path) -> None:
    assert not values(path, "ADD")
    for command in values(path, "RUN"):
        assert not re.search(r"\b(curl|wget|git|apt|apt-get)\b|://", command)


@every_dockerfile
def test_every_install_keeps_to_the_tested_versions_and_leaves_no_cache(path: Path) -> None:
    steps = [step for command in values(path, "RUN") for step in command.split("&&")]
    installs = [step for step in steps if "pip" in step and " install " in step]
    assert len(installs) == 2
    for step in installs:
        assert "-c constraints.txt" in step
        assert "--no-cache-dir" in step
        assert "${PIP_ARGS}" in step
    named = dict(re.findall(r"([\w-]+)==([\w.]+)", " ".join(installs)))
    assert named["torch"] == pins()["torch"]
    assert "torch==" in installs[0], "torch comes first, so that the second step cannot swap its build"
    assert {name: pins().get(name, version) for name, version in named.items()} == named


def test_the_gpu_image_takes_tensorrt_from_its_base_and_one_onnxruntime() -> None:
    installed = re.findall(r"'\.\[([\w,-]+)\]'", " ".join(values(DOCKER / "Dockerfile.gpu", "RUN")))
    assert installed == ["gpu,images,report"]
    assert any("--system-site-packages" in command for command in values(DOCKER / "Dockerfile.gpu", "RUN"))


@every_dockerfile
def test_the_labels_say_what_pyproject_says(path: Path) -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.([\w.]+)="([^"]*)"', " ".join(values(path, "LABEL"))))
    said = project()["project"]
    assert (labels["title"], labels["version"], labels["licenses"]) == (said["name"], __version__, said["license"])


@every_dockerfile
def test_the_build_context_is_what_the_wheel_is_made_of(path: Path) -> None:
    lines = (DOCKER / f"{path.name}.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {line[1:] for line in rules if line.startswith("!")}
    copied = {name for value in values(path, "COPY") if "--from" not in value for name in value.split()[:-1]}
    assert allowed == copied
    assert all((ROOT / name).exists() for name in copied)
    packages = project()["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.rstrip("*") for pattern in packages} < copied


def test_compose_builds_both_images_and_reserves_a_gpu_for_one() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    services = compose["services"]
    assert {service["build"]["dockerfile"] for service in services.values()} == {
        str(path.relative_to(ROOT)) for path in DOCKERFILES
    }
    for name, service in services.items():
        dockerfile = ROOT / service["build"]["dockerfile"]
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert values(dockerfile, "WORKDIR")[-1] in {
            volume["target"] for volume in service["volumes"] if "target" in volume
        }
        assert not service.get("privileged")
        devices = service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
        assert ["gpu" in device["capabilities"] for device in devices] == ([True] if name == "optin-gpu" else [])
    named = {
        volume.partition(":")[0]
        for service in services.values()
        for volume in service["volumes"]
        if isinstance(volume, str)
    }
    assert named == set(compose["volumes"])


def test_the_tiny_checkpoint_is_a_model_with_its_own_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_tiny_checkpoint.py", str(tmp_path)])
    runpy.run_path(str(DOCKER / "make_tiny_checkpoint.py"), run_name="__main__")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path)
    # A folder without tokenizer files gives, silently, a tokenizer of five tokens.
    assert len(tokenizer) == model.config.vocab_size > 50
    assert tokenizer.unk_token_id not in tokenizer("a text of letters")["input_ids"]


def test_the_build_script_explains_itself_and_refuses_what_it_does_not_know() -> None:
    helped = run("bash", SCRIPT, "--help")
    assert helped.returncode == 0
    labels = re.findall(r"^ +(--[\w-]+(?: \| --?[\w-]+)*)\)", SCRIPT.read_text(), re.MULTILINE)
    options = {option for label in labels for option in re.findall(r"--[\w-]+", label)}
    assert {"--keep", "--mount"} < options
    assert {option for option in options if option not in helped.stdout} == set()
    for arguments in (["--nothing"], ["--ca"], ["--ca", "/no/such/file"]):
        refused = run("bash", SCRIPT, *arguments)
        assert refused.returncode == 2
        assert refused.stderr.startswith("error: ")


@every_dockerfile
def test_hadolint_has_no_complaint(path: Path) -> None:
    done = run(tool("hadolint"), "--no-color", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_has_no_complaint() -> None:
    done = run(tool("shellcheck"), SCRIPT)
    assert done.returncode == 0, done.stdout + done.stderr
