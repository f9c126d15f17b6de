"""Every example runs as a reader runs it, in a copy of examples/ and offline; what it prints and writes is checked."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from support.dockerfiles import tool
from support.project import ROOT, environment

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "walkthrough.ipynb"
HELPERS = ("README.md", "made_pictures.py")
SECONDS = 1800
"""Any example; a busy machine takes many times longer than an idle one."""
NOTEBOOK_BYTES = 400_000
RUN_NOTEBOOK = """
import nbclient, nbformat
notebook = nbformat.read("walkthrough.ipynb", as_version=4)
nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3").execute()
nbformat.write(notebook, "again.ipynb")
"""


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A copy of the folder, without what earlier runs left."""
    return Path(shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("out", "__pycache__")))


def run(folder: Path, *command: object, site: Path | None = None, codes: tuple[int, ...] = (0,)) -> str:
    """What a command prints to stdout.

    Args: site: a folder of installed packages. codes: exit codes that are right.
    """
    env = environment()
    if site is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), env.get("PYTHONPATH"))))
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**env, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode in codes, f"{command}\n{done.stdout[-3000:]}{done.stderr[-5000:]}"
    return done.stdout


def installed(package: Path) -> Path:
    """The folder that a package was installed into, without an index."""
    site = package / "site"
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(package, sys.executable, "-m", "pip", "install", *offline, "--target", site, ".")
    return site


def shares(text: str) -> list[float]:
    """All percentages in a line, as shares."""
    return [float(number) / 100 for number in re.findall(r"([\d.]+)%", text)]


def line(text: str, start: str) -> str:
    """The line that starts so."""
    (found,) = [each for each in text.splitlines() if each.startswith(start)]
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_table_names_every_example() -> None:
    told = re.findall(r"^\| `([^`]+)` \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    there = {f"{path.name}/" if path.is_dir() else path.name for path in EXAMPLES.iterdir()}
    assert {*told} == there - {*HELPERS, "out/", "__pycache__/"}


def test_the_first_line_of_every_script_says_what_it_shows() -> None:
    for path in EXAMPLES.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
    for path in EXAMPLES.rglob("*.sh"):
        first, second, third = path.read_text().splitlines()[:3]
        assert first == "#!/usr/bin/env bash", path
        assert re.match(r"# [A-Z].*\.$", second), path
        assert third == "set -euo pipefail", path
        assert os.access(path, os.X_OK), path


def test_shellcheck_has_no_complaint() -> None:
    run(EXAMPLES, tool("shellcheck"), *sorted(EXAMPLES.rglob("*.sh")))


@pytest.mark.slow
def test_bert_keeps_its_class_and_most_of_its_embeddings(examples: Path) -> None:
    said = run(examples, sys.executable, "bert.py")
    assert line(said, "class:") == "class:      BertModel -> BertModel"
    assert 0.55 < shares(line(said, "MACs:"))[-1] <= 0.6
    assert 0.7 < shares(line(said, "parameters:"))[-1] < 0.9
    known, other = (float(number) for number in re.findall(r"cosine: +([\d.]+)", said))
    assert 0.7 < other <= known < 1
    assert (examples / "out/bert/model.safetensors").is_file()


@pytest.mark.slow
def test_vit_stays_a_vit_until_tokens_are_merged(examples: Path) -> None:
    said = run(examples, sys.executable, "vit.py")
    (dense,) = shares(line(said, "dense:"))
    assert dense > 0.85
    for way, kind in (("heads and neurons:", "ViTForImageClassification"), ("heads, neurons and", "NetworkModule")):
        told = line(said, way)
        macs, accuracy = shares(told)
        assert macs <= 0.6
        assert accuracy > dense - 0.1
        assert told.endswith(f"a {kind}")
    assert len(re.findall(r"^  \d of 6, \d+ of 96$", said, re.MULTILINE)) == 3
    merged = json.loads(line(said, "tokens merged").partition(": ")[2])
    assert len(merged) == 3
    assert sum(merged) > 0


@pytest.mark.slow
def test_cnn_keeps_its_accuracy_with_half_of_its_macs(examples: Path) -> None:
    said = run(examples, sys.executable, "cnn.py")
    assert 0.4 < shares(line(said, "MACs:"))[-1] <= 0.5
    dense, pruned = shares(line(said, "accuracy:"))
    assert dense > 0.9
    assert pruned > dense - 0.05
    assert {path.name for path in (examples / "out/cnn").iterdir()} >= {"model.onnx", "plan.json"}


@pytest.mark.slow
def test_onnx_file_is_cut_by_commands_alone(examples: Path) -> None:
    said = run(examples, examples / "onnx_file/run.sh")
    out = examples / "onnx_file/out"
    assert (out / "network.png").read_bytes().startswith(b"\x89PNG")
    assert "proven: it differs from the masked network by" in said
    for cut in (out / "smaller.onnx", out / "pruned/model.onnx"):
        assert cut.stat().st_size < (out / "network.onnx").stat().st_size
        assert onnx.load(cut).graph.input[0].name == "pixels"
    assert read(out / "gate.json")["limit"]
    report = read(out / "pruned/report.json")
    assert report["macs"]["kept"] <= 0.5
    assert report["quality"]["metric"] == "accuracy"
    assert [row["batch"] for row in report["latency"]] == [1, 8]


@pytest.mark.slow
def test_own_operator_is_understood_once_its_package_is_installed(examples: Path) -> None:
    folder = examples / "own_operator"
    before = run(folder, sys.executable, "show.py")
    assert before.startswith("not understood: Snake: ")
    assert "nothing can be cut: run `pip install .`" in before
    after = run(folder, sys.executable, "show.py", site=installed(folder))
    assert "can be cut: first: neurons, 8 of them" in after
    assert sorted(re.findall(r"\(\d, \d\)", after)) == ["(4, 3)", "(5, 4)"]


@pytest.mark.slow
def test_own_engine_builds_proves_and_measures_once_its_package_is_installed(examples: Path) -> None:
    folder = examples / "own_engine"
    said = run(folder, "./show.sh", site=installed(folder))
    assert re.search(r"reference\W+yes", said)
    report = read(folder / "out/pruned/report.json")
    assert [row["engine"] for row in report["latency"]] == ["reference"]
    assert report["parity"]["torch_vs_engine"] < 1e-4
    assert [row["engine"] for row in read(folder / "out/pruned/measurements.json")["latency"]] == ["onnx"]


def test_own_engine_gives_what_onnx_runtime_gives(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optin_deploy.errors import BadInput
    from optin_deploy.runtimes.ort import OrtRuntime

    folder = examples / "own_engine"
    run(folder, sys.executable, "make_network.py")
    monkeypatch.syspath_prepend(str(folder))
    import optin_reference

    feeds = {"features": np.load(folder / "rows.npz")["features"]}
    with optin_reference.ReferenceExporter().open(folder / "network.onnx") as own:
        found = own.run(feeds)
        with OrtRuntime(folder / "network.onnx", threads=1) as ort:
            np.testing.assert_allclose(found["logits"], ort.run(feeds)["logits"], atol=1e-5)
        with pytest.raises(BadInput, match="features"):
            own.run({})
    with pytest.raises(BadInput, match="closed"):
        own.run(feeds)
    with pytest.raises(BadInput, match="OMP_NUM_THREADS"):
        optin_reference.ReferenceExporter().threads(2)


@pytest.mark.slow
def test_ci_gate_lets_the_faster_model_pass_and_stops_the_slower_one(examples: Path) -> None:
    folder = examples / "ci_gate"
    run(folder, "./pin.sh")
    assert read(folder / "baseline.json")["artifact"] == "release/model.onnx"
    steps = yaml.safe_load((folder / ".github/workflows/latency.yaml").read_text())["jobs"]["latency"]["steps"]
    commands = [step["run"].split(" #")[0] for step in steps if "run" in step]
    (gate,) = [command for command in commands if command.startswith("optin gate")]
    (test,) = [command for command in commands if command.startswith("pytest")]
    unstable = 4
    run(folder, *gate.split(), codes=(0, unstable))
    assert read(folder / "gate.json")["limit"]["max_ratio"] == 1.05
    told = run(folder, sys.executable, "-m", *test.split(), "-p", "no:cacheprovider")
    assert re.search(r"1 (passed|skipped)", told)
    (folder / "new/model.onnx").unlink()
    shutil.copy(folder / "release/model.onnx", folder / "new/model.onnx")
    run(folder, *gate.replace("1.05", "0.5").replace("gate.json", "no.json").split(), codes=(1, unstable))


@pytest.mark.slow
def test_triton_canary_publishes_and_goes_back(examples: Path) -> None:
    folder = examples / "triton_canary"
    run(folder, "./make_versions.sh")
    said = run(folder, "./publish.sh")
    assert "would publish in repository" in said
    repository = folder / "out/repository"
    assert {path.name for path in (repository / "pictures").iterdir() if path.is_dir()} >= {"1", "2"}
    config = (repository / "pictures/config.pbtxt").read_text()
    assert re.search(r"versions: \[?1\b", config)
    assert "max_batch_size: 16" in config
    run(folder, "./canary.sh")
    out, found = folder / "out", []
    for path in (out / "pictures-canary.yaml", out / "pictures-all.yaml", out / "cluster/pictures.yaml"):
        service = yaml.safe_load(path.read_text())
        version = service["metadata"]["annotations"]["optin-deploy/version"]
        found.append((version, service["spec"]["predictor"].get("canaryTrafficPercent")))
    assert found == [("2", 10), ("2", None), ("1", None)]


def test_the_notebook_is_committed_with_its_outputs_and_names_no_machine() -> None:
    assert NOTEBOOK.stat().st_size < NOTEBOOK_BYTES
    cells = read(NOTEBOOK)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) >= 3
    texts = "".join("".join(output.get("text", "")) for output in outputs)
    assert not re.search(r"(^|[\s\"'(=:])/\w+/", texts)


@pytest.mark.slow
def test_the_notebook_runs(examples: Path) -> None:
    missing = [package for package in ("nbclient", "nbformat", "ipykernel") if find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed; pip install '.[examples]'")
    run(examples, sys.executable, "-c", RUN_NOTEBOOK)
    cells = read(examples / "again.ipynb")["cells"]
    assert len(cells) == len(read(NOTEBOOK)["cells"])
