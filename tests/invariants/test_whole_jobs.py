"""Networks of several kinds through the whole job: scored, planned, repaired, cut, proven, written, and read again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import optin_deploy
from benchmarks.zoo.export import export
from benchmarks.zoo.families import FAMILIES
from benchmarks.zoo.family import SIZES
from optin_deploy.jobs.export import export_model
from optin_deploy.jobs.job import Job
from optin_deploy.planning.budget import Limits
from optin_deploy.pruning.source import Source
from optin_deploy.scoring.settings import ScoreSettings

ROWS = 40
KINDS = ("bert", "llama", "vit", "swin", "resnet", "efficientnet", "whisper-encoder")
"""Of texts, of a decoder, of pictures by patches, by windows and by convolutions, also depthwise ones, and of sound."""


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a job on an ONNX file, with prepared inputs as calibration data."""
    family = FAMILIES[request.param]
    home = tmp_path_factory.mktemp(request.param)
    generator = torch.Generator().manual_seed(0)
    rows = {each.name: each.values(generator, {**SIZES, "batch": ROWS}).numpy() for each in family.inputs}
    np.savez(home / "rows.npz", **rows)
    source = Source(str(export(request.param, "torchscript").path), calibration=str(home / "rows.npz"))
    asked = Job(
        source=source,
        limits=Limits(flops=0.6),
        align=4,
        allocation="uniform",
        scoring=ScoreSettings(probes=2, head_samples=8),
        points=(),
        threads=1,
    )
    export_model(asked, home / "out")
    return home / "out"


def test_the_budget_holds_and_what_was_cut_is_proven(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert 0.4 < report["macs"]["kept"] <= 0.6
    assert report["parity"]["masked_vs_rewritten"] < 1e-9
    assert report["params"]["pruned"] < report["params"]["dense"]
    assert sum(group["kept"] for group in report["groups"]) < sum(group["units"] for group in report["groups"])


def test_both_files_give_in_onnx_runtime_what_was_recorded(folder: Path) -> None:
    samples = load_file(folder / "samples.safetensors")
    feeds = {name.removeprefix("input."): x.numpy() for name, x in samples.items() if name.startswith("input.")}
    for role, file in (("dense", "dense.onnx"), ("pruned", "model.onnx")):
        session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_outputs()]
        for name, found in zip(names, session.run(None, feeds), strict=True):
            expected = samples[f"{role}.{name}"].numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))


def test_the_folder_loads_as_a_module_that_gives_the_same(folder: Path) -> None:
    samples = load_file(folder / "samples.safetensors")
    feeds = {name.removeprefix("input."): x for name, x in samples.items() if name.startswith("input.")}
    with torch.inference_mode():
        found = optin_deploy.load(folder)(**feeds)
    for name, value in found.items():
        torch.testing.assert_close(value, samples[f"pruned.{name}"], rtol=0, atol=1e-4)
