"""`optin ship` publishes what belongs together, all of it or nothing, and never over somebody else's files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest

import optin_deploy.serving
from optin_deploy.errors import BadInput
from optin_deploy.files.ownership import RECORD
from optin_deploy.files.storage import read_json, read_tensors, sha256_file, write_tensors
from optin_deploy.jobs.belonging import disagreements
from optin_deploy.network import sealed
from optin_deploy.serving import shipping
from optin_deploy.serving.manifest import ServingOptions, check_files
from optin_deploy.serving.repository import Repository
from optin_deploy.serving.shipments import shipments
from optin_deploy.serving.shipping import roll_back, ship_folder
from support import tiny_checkpoint as tiny
from support.shipped import changed, everything, order, published

NEURONS = "bert.encoder.layer.0: neurons"
URI = ServingOptions(storage_uri="s3://bucket/repository")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return tiny.copy_of(tiny.finished_job(), tmp_path / "job")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return tmp_path / "repo"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = read_json(path, "")
    change(data)
    path.write_text(json.dumps(data))


def fewer_neurons(path: Path) -> None:
    """Another plan for the same model that is right in itself, as `optin plan` with another budget writes it."""

    def change(plan: dict[str, Any]) -> None:
        plan["keep"][NEURONS].pop()
        plan["cost"]["macs_pruned"] -= 2 * tiny.SEQ_LEN * tiny.HIDDEN

    edit(path, change)


# --- what belongs together ------------------------------------------------------------------------------------


def test_a_finished_job_belongs_together(job: Path) -> None:
    assert disagreements(job) == []


def test_a_newer_plan_beside_an_older_model_is_not_published_and_told_everywhere(
    job: Path, repo: Path, shell: tiny.Shell
) -> None:
    fewer_neurons(job / "plan.json")
    done = shell("optin", "ship", job, "--out", repo)
    assert done.code == 2
    told = f"{job / 'plan.json'} is not the plan that {job / 'model.onnx'} and {job / 'model'} were cut by"
    for text in (told, f"optin rewrite {job}", f"optin build {job}"):
        assert text in done.err
    assert not repo.exists()
    commands = (["show", job], ["report", job], ["build", job, "--dry-run"], ["bench", job, "--dry-run"])
    for command in commands:
        said = shell("optin", *command)
        # What is ideal is told by plan.json, so that a model of another plan is neither measured nor built from.
        assert (said.code, told in said.err) == (2 if command[0] in ("build", "bench") else 0, True), said.err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda plan: plan["keep"].update({NEURONS: [99]}), f"keeps unit 99 of {NEURONS}; possible are 0 to 95"),
        (lambda plan: plan["keep"].update(heads=[0]), "names the group 'heads'"),
        (lambda plan: plan["keep"][NEURONS].pop(), "costs another amount than it says"),
        (lambda plan: plan["cost"].update(macs_pruned=1), "costs another amount than it says"),
        (lambda plan: plan.update(network="0" * 64), "was made for the network 000000000000"),
    ],
)
def test_a_plan_edited_by_hand_is_refused_where_it_would_be_used(
    job: Path, shell: tiny.Shell, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    edit(job / "plan.json", change)
    done = shell("optin", "ship", job, "--out", job.parent / "r")
    assert (done.code, "cut by: it is newer, or was edited" in done.err) == (2, True), done.err
    assert not (job.parent / "r").exists()
    done = shell("optin", "rewrite", job)
    assert (done.code, says in done.err) == (2, True), done.err


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "both plans": (
        lambda job: [fewer_neurons(job / "plan.json"), shutil.copy(job / "plan.json", job / "model/plan.json")],
        "model/plan.json is not the plan that made these weights",
    ),
    "the report's plan": (
        lambda job: edit(job / "report.json", lambda report: report["hashes"].update(plan="0" * 64)),
        "report.json is about plan 000000000000, but",
    ),
    "the report's dense model": (
        lambda job: edit(job / "report.json", lambda report: report["hashes"].update(network="0" * 64)),
        "report.json is about network 000000000000, but",
    ),
    "an artifact that the report knows": (
        lambda job: sealed_again(job / "model.onnx"),
        "model.onnx is not the file that report.json describes",
    ),
    "recorded samples of another model": (
        lambda job: write_tensors(
            job / "samples.safetensors",
            read_tensors(job / "samples.safetensors", ""),
            {"model": "0" * 64, "output": "logits"},
        ),
        "samples.safetensors was recorded from another network than",
    ),
    "the weights of model/": (
        lambda job: edit(job / "model/optin.json", lambda saved: saved.update(weights_sha256="0" * 64)),
        "model.safetensors is not the file that was saved there",
    ),
    "an artifact of another model": (
        lambda job: [(job / "report.json").unlink(), shutil.copy(job / "dense.onnx", job / "model.onnx")],
        "model.onnx was cut by",
    ),
    "another dense model": (
        lambda job: [(job / "report.json").unlink(), shutil.copy(job / "model.onnx", job / "dense.onnx")],
        "dense.onnx does not belong to the network that",
    ),
    "an artifact that was changed": (
        lambda job: [(job / "report.json").unlink(), flip_a_byte(job / "model.onnx")],
        "is not as it was written",
    ),
    "an artifact of an earlier version, without a report": (
        lambda job: [(job / "report.json").unlink(), without_entries(job / "model.onnx")],
        "Nothing says which model",
    ),
}


def of_another_model(path: Path) -> None:
    write_tensors(path, read_tensors(path, ""), {"model": "0" * 64, "output": "logits"})


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def sealed_again(path: Path) -> None:
    """By the same plan, with another note in it."""
    proto = onnx.load(path)
    entries = [entry for entry in proto.metadata_props if entry.key != sealed.SEAL]
    del proto.metadata_props[:]
    proto.metadata_props.extend(entries)
    onnx.save(proto, path)
    sealed.complete(path, {"a note": "of today"})


def without_entries(path: Path) -> None:
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_do_not_belong_together_are_not_published(job: Path, repo: Path, damage: str) -> None:
    change, says = DAMAGE[damage]
    change(job)
    with pytest.raises(BadInput, match=r"`optin[ -](rewrite|build|export)") as caught:
        ship_folder(job, order(repo))
    assert says in str(caught.value)
    assert not repo.exists()


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("content", ["{}", "[]", "", "\0"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_tokenizer_that_was_changed_is_not_published(
    job: Path, repo: Path, name: str, content: str, recorded: bool
) -> None:
    """Without a record, as in folders of earlier versions, what can be read is taken."""
    (job / "model" / name).write_text(content)
    if not recorded:
        (job / "model" / RECORD).unlink()
    if not recorded and content == "{}" and name != "tokenizer.json":
        return
    with pytest.raises(BadInput, match=r"`optin-export"):
        ship_folder(job, replace(order(repo), text=True))
    assert not repo.exists()


def test_artifacts_without_a_report_are_published(job: Path, repo: Path) -> None:
    (job / "report.json").unlink()
    _, new = ship_folder(job, order(repo))
    assert new


def test_an_artifact_of_an_earlier_version_is_published_by_its_report(job: Path, repo: Path) -> None:
    without_entries(job / "model.onnx")
    sha256 = sha256_file(job / "model.onnx")
    edit(job / "report.json", lambda report: report["hashes"].update({"model.onnx": sha256}))
    _, new = ship_folder(job, order(repo))
    assert new


def test_an_artifact_that_its_model_did_not_make_is_not_measured(job: Path, shell: tiny.Shell) -> None:
    shutil.copy(job / "dense.onnx", job / "model.onnx")
    done = shell("optin", "bench", job)
    assert done.code == 2
    assert f"{job / 'model.onnx'} does not belong to the plan {job / 'plan.json'}" in done.err


@pytest.mark.parametrize("content", [b"", b"text", b"\x08\x08", None])
def test_a_damaged_artifact_is_one_line_with_the_command_that_makes_it_again(
    job: Path, shell: tiny.Shell, content: bytes | None
) -> None:
    whole = (job / "model.onnx").read_bytes()
    (job / "model.onnx").write_bytes(whole[:5000] if content is None else content)
    (job / "report.json").unlink()
    for command in (["bench", job], ["ship", job, "--out", job.parent / "r"]):
        done = shell("optin", *command)
        assert done.code == 2
        assert str(job / "model.onnx") in done.err
        assert f"optin build {job}" in done.err


def test_weights_in_a_file_of_their_own_travel_along(job: Path, repo: Path) -> None:
    (job / "report.json").unlink()
    path = job / "model.onnx"
    proto = onnx.load(path)
    entries = {entry.key: entry.value for entry in proto.metadata_props if entry.key != sealed.SEAL}
    del proto.metadata_props[:]
    onnx.save(proto, path, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    sealed.complete(path, entries)
    ship_folder(job, order(repo))
    found = Repository(repo).manifest("tiny", 1)
    assert found.sha256["model.onnx.data"] == sha256_file(job / "model.onnx.data")
    assert found.size_bytes == path.stat().st_size + (job / "model.onnx.data").stat().st_size
    onnxruntime.InferenceSession(repo / "tiny/1/model.onnx", providers=["CPUExecutionProvider"])
    (job / "model.onnx.data").unlink()
    with pytest.raises(BadInput, match=r"model\.onnx.*optin build"):
        ship_folder(job, order(repo))


# --- all or nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["triton", "ovms"])
def test_a_disk_that_is_full_at_any_write_leaves_the_repository_as_it_was(
    job: Path, repo: Path, monkeypatch: pytest.MonkeyPatch, server: str
) -> None:
    asked: dict[str, Any] = {"server": server, "options": URI, "text": server == "triton"}
    for first in (True, False):
        before = published(everything(repo)) if repo.exists() else None
        models = shipments(job, order(repo, **asked), optin_deploy.serving.server(server))
        writes = 0
        while True:
            with monkeypatch.context() as patch:
                patch.setattr(shipping, "shipments", lambda *_, models=models: models)  # only reads, for long
                count = failing(patch, writes)
                try:
                    ship_folder(job, order(repo, **asked))
                except BadInput as err:
                    assert "Make room" in str(err)  # noqa: PT017
                if count() <= writes:
                    break
            assert (published(everything(repo)) if repo.exists() else None) == before, writes
            assert not first or not repo.exists()
            writes += 1
        assert writes > 8
        assert not list(repo.glob(".ship*"))
        changed(job)


def failing(patch: pytest.MonkeyPatch, after: int) -> Callable[[], int]:
    """So many writes succeed, then the disk is full; renames always fit, but each may fail once too."""
    counted = 0

    def limited(write: Callable[..., Any], renames: bool) -> Callable[..., Any]:
        def limit(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted == after + 1 or (counted > after and not renames):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*args, **kwargs)

        return limit

    for place, name in ((Path, "write_bytes"), (Path, "write_text"), (shutil, "copyfile"), (shutil, "copy2")):
        patch.setattr(place, name, limited(getattr(place, name), renames=False))
    patch.setattr(Path, "replace", limited(Path.replace, renames=True))
    patch.setattr(os, "fsync", lambda handle: None)  # hundreds of them
    return lambda: counted


class Killed(BaseException):
    """Nothing runs after it."""


def test_a_publication_that_is_killed_between_renames_is_finished_by_the_next(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    ship_folder(job, order(whole, text=True))
    replace, rmtree, interrupted = Path.replace, shutil.rmtree, 0
    for moves in (1, 2, 3, 4):
        repo, done = tmp_path / f"repo{moves}", 0

        def stops(path: Path, target: Path, repo: Path = repo, moves: int = moves) -> Path:
            nonlocal done
            if ".optin" not in str(path) and repo in (Path(target).parent, Path(target).parent.parent):
                done += 1
                if done > moves:
                    raise Killed
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", stops)
            patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            try:
                ship_folder(job, order(repo, text=True))
            except Killed:
                interrupted += 1
                assert list(repo.glob(".ship*")), "as a killed process leaves it"
        for name in Repository(repo).names():
            for manifest in Repository(repo).served(name):
                check_files(repo / name / str(manifest.version), manifest)
        ship_folder(job, order(repo, text=True))
        assert Repository(repo).names() == Repository(whole).names()
        for name in Repository(repo).names():
            found, expected = (Repository(each).served(name)[-1] for each in (repo, whole))
            assert found.sha256 == expected.sha256
            check_files(repo / name / str(found.version), found)
        assert not list(repo.glob(".ship*"))
        rmtree(repo)
    assert interrupted == 3, "one rename a model"


def test_nothing_is_published_where_one_of_the_models_cannot_be(job: Path, repo: Path) -> None:
    for name in ("tiny", "tiny-dense", "tiny-text", "tiny-tokenizer"):
        (repo / name).mkdir(parents=True)
        (repo / name / "mine.txt").write_text("mine")
        before = everything(repo)
        for dry_run in (True, False):
            with pytest.raises(BadInput, match=f"{name} exists, but `optin ship` did not make it"):
                ship_folder(job, order(repo, text=True), dry_run=dry_run)
            assert everything(repo) == before
        shutil.rmtree(repo)


FOREIGN = (
    *(("ovms", "config.json"), ("kserve", "tiny.yaml"), ("kserve", "tiny-dense.yaml")),
    *(("triton", "tiny/config.pbtxt"), ("triton", "tiny/warmup/2-input_ids"), ("mlserver", "tiny/model-settings.json")),
    *(("mlserver", "tiny-dense/onnx_tiny_dense.py"), ("kserve", "tiny/metadata.json"), ("triton", "tiny/2")),
)


@pytest.mark.parametrize(("server", "name"), FOREIGN)
def test_files_of_others_are_not_written_over(job: Path, repo: Path, server: str, name: str) -> None:
    if "/" in name:  # in the folder of a model of ours: edited, or put there by hand
        ship_folder(job, order(repo, server=server, options=URI))
        changed(job)
    (repo / name).parent.mkdir(parents=True, exist_ok=True)
    if name == "tiny/2":
        (repo / name).mkdir()
    else:
        (repo / name).write_text("mine")
    before = everything(repo)
    asked = order(repo, server=server, options=ServingOptions(storage_uri="s3://other", max_batch=8))
    if name == "tiny/2":
        assert [each.version for each in ship_folder(job, asked)[0]] == [3, 3], "a number that is taken is passed over"
        return
    with pytest.raises(BadInput, match=rf"{repo / name} is there, but `optin ship` did not write"):
        ship_folder(job, asked)
    assert everything(repo) == before


@pytest.mark.parametrize("server", ["ovms", "kserve", "triton", "mlserver"])
def test_a_repository_without_a_record_is_known_by_its_content(job: Path, repo: Path, server: str) -> None:
    ship_folder(job, order(repo, server=server, options=URI))
    (repo / ".optin-files.jsonl").unlink()  # as an earlier version left it
    changed(job)
    served, new = ship_folder(job, order(repo, server=server, options=URI))
    assert new
    assert served[-1].version == 2
    assert [each.version for each in roll_back(repo, "tiny")] == [1]


def test_links_inside_of_a_model_are_not_followed(job: Path, repo: Path, tmp_path: Path) -> None:
    ship_folder(job, order(repo))
    (tmp_path / "outside").mkdir()
    shutil.rmtree(repo / "tiny/warmup")
    (repo / "tiny/warmup").symlink_to(tmp_path / "outside")
    changed(job)
    with pytest.raises(BadInput, match="warmup"):
        ship_folder(job, order(repo))
    assert not list((tmp_path / "outside").iterdir())
    assert Repository(repo).versions("tiny") == (1,)


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(job: Path, repo: Path, tmp_path: Path) -> None:
    repo.mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (repo / ".optin.lock").symlink_to(tmp_path / "mine.txt")
    with pytest.raises(BadInput, match=r"\.optin\.lock is a link"):
        ship_folder(job, order(repo))
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert [path.name for path in repo.iterdir()] == [".optin.lock"]


@pytest.mark.parametrize("place", ["job", "job/repository", "job/model", ".", "other", "other/below"])
def test_a_repository_and_an_output_folder_do_not_mix(job: Path, tmp_path: Path, place: str) -> None:
    tiny.copy_of(tiny.finished_job(), tmp_path / "other")
    before = everything(tmp_path)
    for dry_run in (True, False):
        with pytest.raises(BadInput, match="of its own"):
            ship_folder(job, order(tmp_path / place), dry_run=dry_run)
    assert everything(tmp_path) == before


def test_going_back_in_a_repository_that_is_not_there_makes_none(repo: Path) -> None:
    with pytest.raises(BadInput, match="not a model of this repository"):
        roll_back(repo, "tiny")
    assert not repo.exists()
