"""Files are whole or absent, reading refuses what is not ours, and a workspace knows whose folder it is."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from optin_deploy.errors import BadInput
from optin_deploy.files import storage
from optin_deploy.files.names import LOCK
from optin_deploy.files.ownership import RECORD
from optin_deploy.files.storage import (
    atomic_file,
    atomic_folder,
    read_json,
    read_metadata,
    read_tensors,
    sha256_file,
    sha256_json,
    sha256_tensors,
    write_json,
    write_tensors,
    write_text,
)
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.planning.curve import Curve
from optin_deploy.planning.plan import NetworkPlan
from optin_deploy.pruning.source import Source
from optin_deploy.scoring.unit_scores import UnitScores

HINT = "Write it with `optin plan`."


def names(folder: Path) -> list[str]:
    """Of all but our records and locks."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (RECORD, LOCK))


# --- atomic writes --------------------------------------------------------------------------------------------


def test_a_file_appears_whole_with_its_folders_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "plan.json"
    with atomic_file(target) as temporary:
        assert temporary.parent == target.parent, "renaming must not cross file systems"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["plan.json"]
    assert target.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_writing_a_file_keeps_the_old_content_and_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "plan.json"
    for old in (None, "old"):
        if old:
            target.write_text(old)
        with pytest.raises(error), atomic_file(target) as temporary:
            temporary.write_text("half")
            raise error
        assert names(tmp_path) == (["plan.json"] if old else [])
    assert target.read_text() == "old"


def test_a_file_is_flushed_to_the_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "plan.json"
    seen: list[bool] = []
    monkeypatch.setattr(storage.os, "fsync", lambda handle: seen.append(target.exists()))
    write_text(target, "text")
    assert seen == [False]


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_folder(target) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / content).write_text(content)
            assert not (target / "deep" / content).exists()
        assert names(target / "deep") == [content]
        assert names(tmp_path) == ["model"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_writing_a_folder_keeps_the_old_one_and_leaves_nothing(
    tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "model"
    for old in (False, True):
        if old:
            with atomic_folder(target) as temporary:
                (temporary / "old").write_text("old")
        with pytest.raises(error), atomic_folder(target) as temporary:
            (temporary / "new").write_text("half")
            raise error
        assert names(tmp_path) == (["model"] if old else [])
    assert names(target) == ["old"]


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "old").write_text("old")
    replace = Path.replace

    def full_disk(self: Path, other: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("no space left on device")
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"), atomic_folder(target) as temporary:
        (temporary / "new").write_text("new")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["old"]


# --- JSON -----------------------------------------------------------------------------------------------------


def test_json_survives_the_disk_and_ends_with_a_newline(tmp_path: Path) -> None:
    data = {"text": "größer", "number": 0.1 + 0.2, "list": [1, None, True]}
    write_json(tmp_path / "x.json", data)
    assert read_json(tmp_path / "x.json", HINT) == data
    assert (tmp_path / "x.json").read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, object()])
def test_what_is_not_json_is_not_written_and_the_old_file_stays(tmp_path: Path, value: object) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"a": value})
    assert read_json(path, HINT) == {"a": 1}
    assert names(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[1, 2]", "holds a list, not an object"),
        (b"3", "holds a int, not an object"),
    ],
)
def test_a_file_that_holds_no_json_object_is_refused_with_path_and_hint(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read_json(path, HINT)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(HINT)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"], ids=["deep", "long number"])
def test_json_that_python_cannot_hold_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(BadInput):
        read_json(tmp_path / "plan.json", HINT)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(storage, "JSON_LIMIT_BYTES", path.stat().st_size)
    assert read_json(path, HINT) == {"a": 1}
    monkeypatch.setattr(storage, "JSON_LIMIT_BYTES", path.stat().st_size - 1)
    with pytest.raises(BadInput, match=f"is {path.stat().st_size} bytes; at most"):
        read_json(path, HINT)


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_an_absent_file_or_a_folder_is_refused_with_the_next_step(
    tmp_path: Path, read: Callable[[Path, str], object]
) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(BadInput, match=rf"{path} does not exist\. Write it with `optin plan`\."):
            read(path, HINT)


# --- tensors --------------------------------------------------------------------------------------------------


def test_tensors_survive_the_disk_also_transposed_ones_that_need_gradients(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).view(2, 3).T,
        "b": torch.randn(2, dtype=torch.bfloat16),
        "c": torch.ones(3, requires_grad=True),
        "d": torch.zeros(0, dtype=torch.long),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {"key": "k"})
    found = read_tensors(tmp_path / "x.safetensors", HINT)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"key": "k"}
    assert names(tmp_path) == ["x.safetensors"]


def test_equal_tensors_and_metadata_are_equal_files(tmp_path: Path) -> None:
    metadata = {"format": "pt", "text": 'a "b" \\ \n \x01 é \u2028', **{str(i): "x" for i in range(9)}}
    for name in "abc":
        write_tensors(tmp_path / name, {"two": torch.ones(3), "one": torch.zeros(2, 2)}, metadata)
    assert len({(tmp_path / name).read_bytes() for name in "abc"}) == 1
    assert read_metadata(tmp_path / "a", "") == metadata
    assert torch.equal(read_tensors(tmp_path / "a", "")["two"], torch.ones(3))


@pytest.mark.parametrize("keep", [0, 4, 8, 40, -1])
def test_truncated_tensors_are_refused_with_path_and_hint(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "scores.safetensors"
    write_tensors(path, {"a": torch.ones(10)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadInput, match="is truncated or not a safetensors file") as caught:
        read_tensors(path, HINT)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(HINT)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 a pickle of torch.save", struct.pack("<Q", 2**60) + b"{}", b"\x80" * 64]
)
def test_foreign_tensors_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BadInput, match="not a safetensors file"):
        read_tensors(tmp_path / "x.safetensors", HINT)


# --- hashes ---------------------------------------------------------------------------------------------------


def test_the_hash_of_tensors_sees_names_values_types_and_shapes_but_not_the_order() -> None:
    base = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
    wanted = sha256_tensors(base)
    assert sha256_tensors(dict(reversed(base.items()))) == wanted
    assert sha256_tensors({"a": torch.arange(4.0), "b": torch.ones(3, 2).T}) == wanted, "the memory's order has no part"
    changes: list[dict[str, torch.Tensor]] = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"] + 1e-6, "b": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"].view(2, 2), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({wanted, *map(sha256_tensors, changes)}) == len(changes) + 1


def test_small_odd_tensors_can_be_hashed() -> None:
    odd = {"empty": torch.zeros(0), "scalar": torch.tensor(True), "half": torch.ones(2, dtype=torch.bfloat16)}
    assert len(sha256_tensors(odd)) == 64


def test_the_hash_of_json_does_not_see_the_order_of_keys_and_that_of_a_file_sees_bytes(tmp_path: Path) -> None:
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1}) != sha256_json({"a": 1, "b": [3]})
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- workspace ------------------------------------------------------------------------------------------------


def some_scores(seed: int = 0) -> UnitScores:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"layer.0: heads": 2, "layer.1: heads": 3, "layer.0: neurons": 70}
    scores = {name: torch.rand(n, generator=generator, dtype=torch.float64) for name, n in sizes.items()}
    about = {"scorer": "exact", "seed": seed, "key": "key"}
    return UnitScores(scores, {name: value / 10 for name, value in scores.items()}, "0" * 64, about)


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_folder_can_be_claimed(tmp_path: Path, exists: bool) -> None:
    root = tmp_path / "a" / "out"
    if exists:
        root.mkdir(parents=True)
    source = Source("bert", task="text-classification", samples=7)
    workspace = Workspace.claim(root, source)
    assert workspace.source() == source
    assert names(root) == ["source.json"]


def test_a_foreign_folder_is_refused_unless_forced_and_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(BadInput, match=r"is not empty and was not made by optin-deploy\. Use another, or --force"):
        Workspace.claim(tmp_path, Source("bert"))
    assert names(tmp_path) == ["thesis.tex"]
    Workspace.claim(tmp_path, Source("bert"), force=True)
    assert names(tmp_path) == ["source.json", "thesis.tex"]


def test_an_own_folder_is_taken_again_and_its_stages_stay(tmp_path: Path) -> None:
    workspace = Workspace.claim(tmp_path / "out", Source("bert"))
    workspace.write_scores(some_scores())
    again = Workspace.claim(tmp_path / "out", Source("bert", samples=9))
    assert again.source().samples == 9
    assert again.has_scores("key")


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_never_a_workspace(tmp_path: Path, force: bool) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(BadInput, match=r"is a file\. Give a folder"):
        Workspace.claim(tmp_path / "out", Source("bert"), force=force)
    assert (tmp_path / "out").read_text() == "x"


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_job_never_writes_over_its_own_model(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "out"
    (folder / inside).mkdir(parents=True)
    (folder / inside / "config.json").write_text("{}")
    with pytest.raises(BadInput, match="would be lost"):
        Workspace.claim(folder, Source(str(folder / inside)), force=True)


def test_a_folder_with_a_source_file_of_its_own_is_foreign(tmp_path: Path) -> None:
    (tmp_path / "source.json").write_text('{"of": "somebody"}')
    with pytest.raises(BadInput, match="not made by optin-deploy"):
        Workspace.claim(tmp_path, Source("bert"))


def test_checking_writes_nothing(tmp_path: Path) -> None:
    Workspace.check(tmp_path / "out", Source("bert"))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "schema_version 1; .* reads 2"),
        ({"schema_version": 3}, "schema_version 3; .* reads 2"),
        ({"colour": "red"}, "colour"),
        ({"model": ...}, "model"),
    ],
)
def test_a_source_of_another_version_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    workspace = Workspace.claim(tmp_path / "out", Source("bert"))
    data = {**read_json(workspace.source_path, HINT), **change}
    write_json(workspace.source_path, {name: value for name, value in data.items() if value is not ...})
    with pytest.raises(BadInput, match=message):
        workspace.source()


def test_a_folder_without_source_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is not an output folder\. Write it with `optin score"):
        Workspace(tmp_path).source()


@pytest.fixture(name="scored")
def _scored(tmp_path: Path) -> Workspace:
    workspace = Workspace.claim(tmp_path / "out", Source("bert"))
    workspace.write_scores(some_scores())
    return workspace


def test_scores_survive_the_disk_with_their_key(scored: Workspace) -> None:
    scores, wanted = scored.read_scores(), some_scores()
    for found, expected in ((scores.scores, wanted.scores), (scores.errors, wanted.errors)):
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (scores.network, scores.provenance) == (wanted.network, wanted.provenance)
    assert scored.has_scores("key")
    assert not scored.has_scores("other settings")


def test_half_a_file_of_scores_is_not_finished(scored: Workspace) -> None:
    path = scored.root / "scores.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"scores\.safetensors"):
        scored.read_scores()
    assert not scored.has_scores("key")
    path.unlink()
    with pytest.raises(BadInput, match="does not exist"):
        scored.read_scores()
    assert not scored.has_scores("key")


@pytest.mark.parametrize("change", [{"schema_version": 1}, {"key": ...}, {"groups": ["layer.0: heads"]}], ids=str)
def test_scores_of_an_earlier_version_or_of_others_are_not_finished(scored: Workspace, change: dict[str, Any]) -> None:
    path = scored.root / "scores.safetensors"
    about = json.loads(read_metadata(path, HINT)["about"])
    target = about["provenance"] if "key" in change else about
    target.update(change)
    about["provenance"] = {name: value for name, value in about["provenance"].items() if value is not ...}
    write_tensors(path, read_tensors(path, HINT), {"about": json.dumps(about)})
    assert not scored.has_scores("key")


def test_new_scores_clear_away_what_came_of_the_old_ones(scored: Workspace) -> None:
    for name in ("curves.json", "plan.json", "scores.png", "report.md"):
        write_text(scored.root / name, "old")
    scored.write_scores(some_scores(1))
    assert names(scored.root) == ["report.md", "scores.safetensors", "source.json"]


def test_a_folder_in_which_another_worker_is_writing_its_source_file_can_be_claimed(tmp_path: Path) -> None:
    (tmp_path / ".source.json.0123456789abcdef.tmp").write_text("{")
    Workspace.claim(tmp_path, Source("bert"))
    assert (tmp_path / "source.json").is_file()


def test_curves_survive_the_disk_with_their_key(scored: Workspace) -> None:
    curves = {"layer.0: heads": Curve((0, 2), (1.0, 0.0), (1, 0))}
    scored.write_curves(curves, "key")
    assert scored.read_curves() == (curves, "key")


def test_a_plan_survives_the_disk(scored: Workspace) -> None:
    plan = NetworkPlan({"layer.0: heads": (1,)}, "0" * 64, settings={"flops": 0.6})
    plan.write(scored.root / "plan.json")
    assert scored.read_plan() == plan


def test_a_missing_plan_says_what_to_run(scored: Workspace) -> None:
    with pytest.raises(BadInput, match=r"plan\.json does not exist\. Write it with `optin plan DIR`"):
        scored.read_plan()
