"""Every kind of stored file: what it holds on disk, literally, and that nothing else is taken for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from optin_deploy.checkpoint.smaller import Saved
from optin_deploy.common.stored import Stored
from optin_deploy.errors import BadInput
from optin_deploy.jobs.tuned_folder import TunedRecord
from optin_deploy.jobs.workspace import _Curves
from optin_deploy.measuring.pins import Pin
from optin_deploy.planning.latency import LatencyTable
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.source import Source
from optin_deploy.reporting.findings import StoredMeasurements, StoredReport
from optin_deploy.runtimes.record import _Records
from optin_deploy.scoring.unit_scores import _About
from optin_deploy.serving.manifest import Manifest
from optin_deploy.serving.repository import State

PAIR = '{"dense": 2.0, "pruned": 1.0}'
QUALITY = '{"metric": "accuracy", "dense": 0.9, "pruned": 0.8, "samples": 9, "beside": {}}'
ON_DISK: dict[type[Stored], tuple[str, str]] = {
    NetworkPlan: (
        '{"keep": {"a": [0, 2]}, "network": "n", "cost": null, "origin": null, "settings": {"flops": 0.5}, '
        '"schema_version": 2}',
        "optin plan FILE.onnx",
    ),
    LatencyTable: (
        '{"dense_ns": 9, "groups": {"a": {"counts": [0, 2], "ns": [5, 0]}}, "network": "n", "setting": {"threads": 1}, '
        '"held_out": [], "schema_version": 2}',
        "optin profile",
    ),
    Source: (
        '{"schema_version": 2, "model": "bert", "task": null, "calibration": null, "text_column": "text", '
        '"label_column": "label", "seq_len": 16, "samples": 512, "seed": 0, "evaluation": null, '
        '"pair_column": "text_pair", "tokenizer": null, "preprocessor": null, "image_size": null, "any_size": false, '
        '"mean": null, "std": null, "sizes": {"height": 32}, "units": ["heads"], "drop_tokens": false, '
        '"output": null, "read_as": null}',
        "optin score MODEL",
    ),
    _Curves: (
        '{"schema_version": 2, "key": "k", "curves": {"a": {"counts": [0, 2], "errors": [1.0, 0.0], "order": [1, 0]}}}',
        "optin plan DIR",
    ),
    _About: ('{"schema_version": 3, "network": "n", "groups": ["a"], "provenance": {"seed": 0}}', "optin score"),
    Pin: (
        '{"schema_version": 1, "artifact": "model.onnx", "sha256": "s", "size_bytes": 1, "engine": "onnx", '
        '"precision": null, "threads": 1, "points": [{"batch": 1, "seq": 8}]}',
        "optin gate BASELINE --pin FILE",
    ),
    _Records: (
        '{"schema_version": 1, "engines": {"model.engine": {"engine": "trt", "precision": "fp16", "sha256": "s", '
        '"size_bytes": 1, "device": "d", "capability": "9.0", "version": "10", "key": "k", "versions": {}, '
        '"options": {}, "onnx": null, "onnx_sha256": null, "onnx_data": {}, "any_version": false, '
        '"any_device": false, "stripped": false}}}',
        "optin build DIR",
    ),
    State: ('{"schema_version": 2, "server": "triton", "served": [2, 1], "canary": null}', "optin ship"),
    Manifest: (
        '{"schema_version": 1, "name": "n", "version": 1, "role": "dense", "engine": "onnx", "precision": "fp32", '
        '"file": "model.onnx", "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}], "outputs": [], '
        '"options": {"max_batch": 32, "preferred": [8], "queue_delay_us": 100, "instances": 1, "threads": null, '
        '"longest": null, "too_long": "truncate", "storage_uri": null, "canary": null}, "sha256": {}, '
        '"size_bytes": 1, "made_from": {}, "versions": {}}',
        "optin ship",
    ),
    Saved: (
        '{"schema_version": 2, "model_class": "BertModel", "plan_hash": "p", "network": null, "weights_sha256": "w", '
        '"config_sha256": "c", "attributes": {"": {"heads": 2}}, "params": {"dense": 2, "pruned": 1}, "about": {}}',
        "optin-export MODEL",
    ),
    TunedRecord: (
        '{"schema_version": 1, "tuning": {"epochs": 1.0, "learning_rate": 2e-05, "batch_size": 32, "distill": 0.5, '
        f'"seed": 0}}, "before": {QUALITY}, "after": {QUALITY}, "classes": ["a"]}}',
        "optin finetune",
    ),
    StoredMeasurements: ('{"schema_version": 2, "latency": [], "environment": {}}', "optin bench DIR"),
    StoredReport: (
        f'{{"schema_version": 2, "quality": {QUALITY}, "params": {PAIR}, '
        f'"macs": {{{PAIR[1:-1]}, "kept": 0.5, "prunable_kept": 0.5}}, '
        '"size_bytes": {"pruned": 1.0, "dense": null}, "parity": {}, "latency": [], "environment": {}, "hashes": {}, '
        '"seconds": {}, "settings": {}, "notes": [], "memory": {}, "groups": [], "artifacts": [], "tuned": null}',
        "optin-export MODEL --out DIR",
    ),
}
"""What each kind holds, with its fields in order, and the next step where it is refused."""
LENIENT = (Saved, StoredMeasurements, StoredReport)
"""Kinds of which later versions may hold more."""
WITHOUT_VERSION = (NetworkPlan, LatencyTable)
kinds = pytest.mark.parametrize("kind", ON_DISK)


def refused(kind: type[Stored], content: str, path: Path) -> str:
    """How a file is refused: with its name and the next step."""
    path.write_text(content)
    with pytest.raises(BadInput) as caught:
        kind.read(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert ON_DISK[kind][1].replace("DIR", str(path.parent)) in said
    assert not kind.is_at(path)
    return said


def test_every_kind_is_here() -> None:
    assert set(ON_DISK) == {kind for kind in Stored.__subclasses__() if kind.__module__.startswith("optin_deploy.")}


@kinds
def test_what_is_read_is_written_again_with_its_fields_in_order(kind: type[Stored], tmp_path: Path) -> None:
    path, (content, _) = tmp_path / "x.json", ON_DISK[kind]
    path.write_text(content)
    found = kind.read(path)
    assert kind.is_at(path)
    found.write(path)
    assert json.dumps(json.loads(path.read_text())) == content
    assert kind.read(path) == found
    assert found.hash == hashlib.sha256(json.dumps(json.loads(content), sort_keys=True).encode()).hexdigest()


@kinds
@pytest.mark.parametrize("version", [0, 99, True, 1.0, "2", [2], {}, "\ud800"], ids=ascii)
def test_another_version_is_refused_with_those_that_are_read(kind: type[Stored], version: Any, tmp_path: Path) -> None:
    content = json.loads(ON_DISK[kind][0])
    said = refused(kind, json.dumps({**content, "schema_version": version}), tmp_path / "x.json")
    assert f"schema_version {version!a}; this version of optin-deploy reads " in said
    assert f"{content['schema_version']}. " in said


@kinds
def test_a_version_is_needed_but_in_what_may_be_made_by_hand(kind: type[Stored], tmp_path: Path) -> None:
    content = json.dumps({name: each for name, each in json.loads(ON_DISK[kind][0]).items() if name[:6] != "schema"})
    if kind in WITHOUT_VERSION:
        assert kind.from_json(json.loads(content)) == kind.from_json(json.loads(ON_DISK[kind][0]))
    else:
        assert "schema_version is missing" in refused(kind, content, tmp_path / "x.json")


@kinds
def test_fields_that_are_unknown_missing_or_of_another_type_are_refused(kind: type[Stored], tmp_path: Path) -> None:
    path, content = tmp_path / "x.json", json.loads(ON_DISK[kind][0])
    first = next(name for name in content if name != "schema_version")
    more = json.dumps({**content, "colour": "red"})
    if kind in LENIENT:
        path.write_text(more)
        kind.read(path)
    else:
        assert "colour: " in refused(kind, more, path)
    assert f"{first}: " in refused(kind, json.dumps({**content, first: 0.5}), path)
    assert f"{first}: " in refused(kind, json.dumps({name: content[name] for name in content if name != first}), path)


@kinds
@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "\x00", '{"schema_version": 1e999}', "[" * 100_000], ids=len)
def test_damaged_files_are_refused(kind: type[Stored], damage: str, tmp_path: Path) -> None:
    refused(kind, damage, tmp_path / "x.json")
    assert "is not finite" in refused(kind, f'{ON_DISK[kind][0][:-1]}, "x": 1e999}}', tmp_path / "x.json")


@kinds
def test_a_file_that_is_absent_is_named_with_the_next_step_or_another_that_is_given(
    kind: type[Stored], tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(BadInput) as caught:
        kind.read(path)
    assert str(caught.value) == f"{path} does not exist. {kind.hint.replace('{folder}', str(tmp_path))}"
    for content in (None, "{}"):
        if content is not None:
            path.write_text(content)
        with pytest.raises(BadInput, match=r"Ask for it\.$"):
            kind.read(path, "Ask for it.")
