"""Stored files that were edited, damaged or are foreign: one line with file and next step, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from optin_deploy.errors import BadInput
from optin_deploy.files.storage import read_json, read_metadata
from support import tiny_checkpoint as tiny

Tree = Any


@pytest.fixture(name="job")
def _job(tmp_path: Path) -> Path:
    return tiny.copy_of(tiny.finished_job(), tmp_path / "job")


# --- the files of FAULTS, each with its command ---------------------------------------------------------------


def put(*path: str | int, value: object) -> Callable[[Path], None]:
    """Replace one field of a JSON file; ... removes it."""

    def change(file: Path) -> None:
        data = json.loads(file.read_text())
        inner = data
        for part in path[:-1]:
            inner = inner[part]
        if value is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value
        file.write_text(json.dumps(data))

    return change


def renamed(file: Path) -> None:
    save_file({f"x{name}": values for name, values in load_file(file).items()}, file)


def one_row_less(file: Path) -> None:
    tensors = load_file(file)
    save_file({**tensors, "pruned.logits": tensors["pruned.logits"][1:].clone()}, file)


def described(*path: str, value: object) -> Callable[[Path], None]:
    """Replace one field of what scores.safetensors says of itself."""

    def change(file: Path) -> None:
        about = json.loads(read_metadata(file, "")["about"])
        inner = about
        for part in path[:-1]:
            inner = inner[part]
        inner[path[-1]] = value
        save_file(load_file(file), file, {"about": json.dumps(about)})

    return change


PLAN = ["plan", "--dry-run", "--allocation", "uniform"]
CASES: tuple[tuple[str, Callable[[Path], None], list[str], str], ...] = (
    ("report.json", put("hashes", value=None), ["ship", "--dry-run"], "optin-export MODEL"),
    ("report.json", put("hashes", value=None), ["report", "--dry-run"], "optin-export MODEL"),
    ("report.json", put("latency", 0, "pruned", value=...), ["ship", "--dry-run"], "optin-export MODEL"),
    ("report.json", put("latency", 0, "batch", value="8"), ["ship", "--dry-run"], "optin-export MODEL"),
    ("samples.safetensors", renamed, ["ship", "--dry-run"], "optin-export"),
    ("samples.safetensors", one_row_less, ["ship", "--dry-run"], "optin-export"),
    ("plan.json", put("keep", value=[]), ["show"], "optin plan"),
    ("plan.json", put("keep", "bert.encoder.layer.0: neurons", value=["0"]), ["ship", "--dry-run"], "optin plan"),
    ("plan.json", put("cost", "macs_pruned", value=10**19), ["show"], "optin plan"),
    ("model/optin.json", put("params", value=None), ["ship", "--dry-run"], "optin-export"),
    ("model/optin.json", put("attributes", value=[]), ["ship", "--dry-run"], "optin-export"),
    ("model/optin.json", put("params", "dense", value=...), ["ship", "--dry-run"], "optin-export"),
    ("model/optin.json", put("plan_hash", value=5), ["ship", "--dry-run"], "optin-export"),
    ("model/optin.json", put("attributes", "bert.encoder", value={"x": "1"}), ["ship", "--dry-run"], "optin-export"),
    ("scores.safetensors", described("schema_version", value=1), ["show", "scores"], "optin score"),
    ("scores.safetensors", described("groups", value=[]), ["show", "scores"], "optin score"),
    ("scores.safetensors", described("network", value="0" * 64), PLAN, "optin score"),
    ("scores.safetensors", described("provenance", value=[]), ["show", "scores"], "optin score"),
    ("scores.safetensors", renamed, ["show", "scores"], "optin score"),
    ("source.json", put("seq_len", value=-1), ["show"], "optin score"),
    ("source.json", put("schema_version", value="1"), ["ship", "--dry-run"], "optin score"),
)


@pytest.mark.parametrize(("name", "damage", "command", "next_step"), CASES)
def test_a_damaged_file_is_named_with_the_command_that_makes_it_again(
    job: Path, shell: tiny.Shell, name: str, damage: Callable[[Path], None], command: list[str], next_step: str
) -> None:
    damage(job / name)
    before = tiny.snapshot(job)
    arguments = ["show", "scores", job] if command == ["show", "scores"] else [command[0], job, *command[1:]]
    done = shell("optin", *arguments)
    assert done.code == 2
    assert f"{job / name}" in done.err
    assert next_step in done.err
    assert tiny.snapshot(job) == before


@pytest.mark.parametrize("number", ["1e999", "NaN", "-Infinity", "9" * 400, "1" * 5000])
def test_numbers_that_no_file_of_ours_holds_are_refused(job: Path, number: str) -> None:
    path = job / "x.json"
    path.write_text(f'{{"a": [{number}]}}')
    with pytest.raises(BadInput, match=rf"{path} is not JSON"):
        read_json(path, "", ours=True)


def test_a_tensor_of_a_type_that_is_not_known_is_refused(job: Path, shell: tiny.Shell) -> None:
    path = job / "samples.safetensors"
    header = json.dumps({"input.x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    done = shell("optin", "ship", job, "--dry-run")
    assert (done.code, str(path) in done.err) == (2, True)
    save_file({"heads.0": torch.ones(6, dtype=torch.complex64)}, job / "scores.safetensors")
    done = shell("optin", "show", "scores", job)
    assert (done.code, str(job / "scores.safetensors") in done.err) == (2, True)


# --- any JSON value in any field ------------------------------------------------------------------------------

READERS: dict[str, tuple[list[str], ...]] = {
    "plan.json": (["show"], ["ship", "--dry-run"]),
    "report.json": (["ship", "--dry-run"], ["report", "--dry-run"], ["show"]),
    "curves.json": (["plan", "--dry-run"],),
    "source.json": (["show"], ["ship", "--dry-run"]),
    "measurements.json": (["report", "--dry-run"],),
    "model/optin.json": (["bench", "--dry-run"], ["ship", "--dry-run"]),
    "model/plan.json": (["report", "--dry-run"], ["ship", "--dry-run"]),
    "config.json": (["doctor"],),
}
"""Files of a job, and the commands that read them."""

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.sampled_from([0, 1, -1, 2**31, 2**53, 2**63, 1e308, 1e-320, 0.5, "", "1", "\x00", "../..", "/", "\ud800"]),
        st.floats(),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=5,
)


def places(tree: Tree, above: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every field of a JSON tree; of long lists the first and the last entries."""
    yield above
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    for part, inner in items if len(items) < 40 else [*items[:3], *items[-2:]]:
        yield from places(inner, (*above, part))


@st.composite
def bent(draw: st.DrawFn, trees: dict[str, Tree]) -> tuple[str, str]:
    """A file's name, and what it holds after one field was replaced, removed, or given a neighbour."""
    name = draw(st.sampled_from(sorted(trees)))
    tree = json.loads(json.dumps(trees[name]))
    place = draw(st.sampled_from(sorted(places(tree), key=str)))
    value = draw(VALUES)
    if not place:
        return name, json.dumps(value)
    inner = tree
    for part in place[:-1]:
        inner = inner[part]
    how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if how == "replace":
        inner[place[-1]] = value
    elif how == "remove":
        del inner[place[-1]]
    elif isinstance(inner, list):
        inner.append(value)
    else:
        inner[draw(st.text(max_size=3))] = value
    return name, json.dumps(tree)


@pytest.fixture(name="whole", scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job with every file that a command reads."""
    folder = tiny.copy_of(tiny.finished_job(), tmp_path_factory.mktemp("stored") / "job")
    report = json.loads((folder / "report.json").read_text())
    again = {name: report[name] for name in ("schema_version", "latency", "environment")}
    (folder / "measurements.json").write_text(json.dumps(again))
    return folder


def run(folder: Path, command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    arguments = ["show", "scores", folder, "--dry-run"] if command == ["scores"] else [command[0], folder, *command[1:]]
    return tiny.run("optin", *arguments, monkeypatch=monkeypatch)


def commands_hold(whole: Path, bending: tuple[str, str], commands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name, content = bending
    kept = (whole / name).read_text()
    try:
        (whole / name).write_text(content)
        for command in commands:
            assert run(whole, command, monkeypatch) in (0, 2), command
    finally:
        (whole / name).write_text(kept)


def trees_of(folder: Path) -> dict[str, Tree]:
    return {name: json.loads((folder / name).read_text()) for name in READERS if name != "config.json"}


def any_value(whole: Path, monkeypatch: pytest.MonkeyPatch, cases: int, *, every: bool = False) -> None:
    trees = trees_of(whole)
    few = settings(
        max_examples=cases,
        derandomize=not every,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )

    @few
    @given(bent(trees), st.randoms())
    def holds(bending: tuple[str, str], random: Random) -> None:
        commands = READERS[bending[0]]
        commands_hold(whole, bending, commands if every else [random.choice(commands)], monkeypatch)

    holds()
    assert trees_of(whole) == trees


@pytest.mark.slow
def test_any_value_in_any_field_of_any_file_is_no_traceback(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    any_value(whole, monkeypatch, 100)


@pytest.mark.skipif("OPTIN_FUZZ" not in os.environ, reason="minutes: set OPTIN_FUZZ=1")
def test_any_value_in_any_field_of_any_file_is_no_traceback_at_length(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    any_value(whole, monkeypatch, 1500, every=True)


def test_a_folder_of_which_any_file_is_absent_is_no_traceback(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in READERS:
        shutil.move(whole / name, whole / "away")
        try:
            for command in READERS[name]:
                assert run(whole, command, monkeypatch) in (0, 1, 2), (name, command)
        finally:
            shutil.move(whole / "away", whole / name)
