"""docker/triton: Triton on an emitted repository, scraped by Prometheus; docker/README.md says what was run."""

from __future__ import annotations

import re
from typing import Any

import yaml

from support.dockerfiles import instructions, pins, run, tool
from support.project import ROOT

FOLDER = ROOT / "docker/triton"


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def test_the_server_is_the_users_image_with_the_tested_tokenizers() -> None:
    first, *rest = instructions(FOLDER / "Dockerfile")
    assert re.fullmatch(r"BASE=nvcr\.io/nvidia/tritonserver:\d+\.\d+-py3", first.value)
    installs = [entry.value for entry in rest if entry.keyword == "RUN"]
    assert [re.findall(r"tokenizers==([\d.]+)", value) for value in installs] == [[pins()["tokenizers"]]]
    assert [entry.value for entry in rest if entry.keyword == "USER"] == ["1000:1000"]
    assert read("compose.yaml")["services"]["triton"]["build"]["args"]["BASE"] == f"${{TRITON_BASE:-{first.value[5:]}}}"


def test_the_repository_is_read_only_and_polled() -> None:
    triton = read("compose.yaml")["services"]["triton"]
    assert "--model-control-mode=poll" in triton["command"]
    (mount,) = triton["volumes"]
    assert mount["read_only"]
    assert f"--model-repository={mount['target']}" in triton["command"]


def test_no_port_is_open_to_others() -> None:
    for service in read("compose.yaml")["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["cap_drop"] == ["ALL"]


def test_prometheus_scrapes_the_metrics_of_that_service() -> None:
    prometheus = read("compose.yaml")["services"]["prometheus"]
    mounted = {volume["source"]: volume["target"] for volume in prometheus["volumes"]}
    assert mounted == {"./prometheus.yml": "/etc/prometheus/prometheus.yml"}
    targets = [
        target
        for job in read("prometheus.yml")["scrape_configs"]
        for entry in job["static_configs"]
        for target in entry["targets"]
    ]
    assert targets == ["triton:8002"]
    assert "triton" in read("compose.yaml")["services"]


def test_the_gpu_file_only_adds_a_gpu_to_the_server() -> None:
    assert set(read("compose.gpu.yaml")["services"]) == {"triton"}
    assert set(read("compose.gpu.yaml")["services"]["triton"]) == {"deploy"}


def test_hadolint_has_no_complaint() -> None:
    done = run(tool("hadolint"), "--no-color", FOLDER / "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr
