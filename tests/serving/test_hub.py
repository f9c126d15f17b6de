"""Models go to the Hub in one commit with a card, and come from it at one revision; a local fake stands for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import optin_deploy
from optin_deploy.errors import BadInput
from optin_deploy.files.hub import revision_of, snapshot
from optin_deploy.files.ownership import RECORD
from optin_deploy.reporting.card import card_of
from optin_deploy.reporting.findings import read_report
from support import tiny_checkpoint as tiny
from support.fake_hub import FakeHub, fake_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub that huggingface_hub talks to in place of the real one."""
    with fake_hub() as found:
        for name, value in {"ENDPOINT": found.url, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        yield found


def test_a_finished_folder_is_pushed_in_one_commit(hub: FakeHub, shell: tiny.Shell, tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.finished_job(), tmp_path / "work")
    ran = shell("optin", "push", folder, "my-org/smaller", "--private", "--branch", "first")
    assert ran.code == 0, ran.err
    made = hub.repositories["my-org/smaller"]
    assert made.get("private") or made.get("visibility") == "private"  # as newer versions of the client say it
    assert (hub.branches, len(hub.commits)) == ({"first"}, 1)
    assert f"{hub.url}/my-org/smaller/commit/abc" in ran.out
    expected = {
        "README.md",
        "onnx/model.onnx",
        "config.json",
        "model.safetensors",
        "plan.json",
        "tokenizer.json",
        "optin.json",
    }
    assert expected <= set(hub.files)
    assert not [name for name in hub.files if "dense" in name or name in ("report.json", "job.toml", "source.json")]
    assert hub.files["onnx/model.onnx"] == (folder / "model.onnx").read_bytes()
    for name, content in hub.files.items():
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    model = optin_deploy.load(tmp_path / "got")
    assert (
        sum(p.numel() for p in model.parameters())
        == json.loads((folder / "report.json").read_text())["params"]["pruned"]
    )


def test_the_card_tells_what_was_measured_and_no_path_of_this_machine(shell: tiny.Shell, tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.finished_job(), tmp_path / "work")
    ran = shell("optin", "push", folder, "my-org/smaller", "--dry-run")
    assert ran.code == 0, ran.err
    report = json.loads((folder / "report.json").read_text())
    card = ran.out
    assert card.startswith(
        '---\ntags: ["optin-deploy", "pruned", "onnx"]\npipeline_tag: "text-classification"\n---\n\n# smaller\n'
    )
    assert f"{report['macs']['dense']:,}" in card
    assert f"Accuracy {report['quality']['dense']:.1%} dense" in card
    assert f"{report['latency'][0]['speedup']:.2f}x" in card
    assert 'hf_hub_download("my-org/smaller", "onnx/model.onnx")' in card
    assert str(tmp_path) not in card
    assert str(tiny.root()) not in card
    assert "dry run: nothing was sent" in card


def test_what_cannot_be_pushed_is_refused(hub: FakeHub, shell: tiny.Shell, tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.finished_job(), tmp_path / "work")
    assert "is no id of a repository" in shell("optin", "push", folder, "smaller").err
    hub.repositories = {"my-org/open": {"private": False}, "my-org/closed": {"private": True}}
    ran = shell("optin", "push", folder, "my-org/open", "--private")
    assert (ran.code, hub.files) == (2, {})
    assert "my-org/open is there and not private" in ran.err
    assert shell("optin", "push", folder, "my-org/closed", "--private").code == 0
    hub.refused = (403, "Forbidden")
    ran = shell("optin", "push", folder, "my-org/smaller")
    assert ran.code == 2
    assert "my-org/smaller cannot be had from the Hub" in ran.err
    (folder / "model.onnx").unlink()
    assert "optin build" in shell("optin", "push", folder, "my-org/smaller").err
    shutil.rmtree(folder)
    folder.mkdir()
    assert "has no report.json" in shell("optin", "push", folder, "my-org/smaller").err
    (folder / "tuned.json").write_text("{}")
    assert "holds a fine-tuned model, which has no report.json" in shell("optin", "push", folder, "my-org/x").err


def test_only_what_we_wrote_and_what_belongs_together_is_pushed(
    hub: FakeHub, shell: tiny.Shell, tmp_path: Path
) -> None:
    folder = tiny.copy_of(tiny.finished_job(), tmp_path / "work")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "model" / "notes.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "model" / ".env").write_text("secret")
    (folder / "model_old.onnx").write_text("secret")
    (folder / "model.onnx.d").mkdir()
    assert shell("optin", "push", folder, "my-org/smaller").code == 0
    assert not any(b"secret" in content for content in hub.files.values())
    config = folder / "model" / "config.json"
    config.rename(tmp_path / "config.json")
    config.symlink_to(tmp_path / "config.json")
    assert "is a link that leads out of" in shell("optin", "push", folder, "my-org/smaller").err
    config.unlink()
    shutil.copy(tmp_path / "config.json", config)
    (folder / RECORD).rename(tmp_path / "record")
    assert f"has no {RECORD}" in shell("optin", "push", folder, "my-org/smaller").err
    (tmp_path / "record").rename(folder / RECORD)
    for strange in ("notes.txt", ".env"):
        (folder / "model" / strange).unlink()
    assert shell("optin", "plan", folder, "--flops", "0.9", "--allocation", "uniform").code == 0
    ran = shell("optin", "push", folder, "my-org/smaller")
    assert (ran.code, len(hub.commits)) == (2, 1)
    assert "plan.json is not the plan that" in ran.err


@pytest.mark.parametrize(
    ("settings", "tuned", "said"),
    [
        ({"compensation": True}, None, "cut, the weights that stay repaired in closed form, without training, by"),
        ({"compensation": False}, None, "cut, without training, by"),
        ({}, {"steps": 5}, "repaired in closed form and then tuned towards the dense outputs, without labels, by"),
    ],
)
def test_the_card_says_what_became_of_the_weights(settings: Any, tuned: Any, said: str) -> None:
    report = read_report(tiny.finished_job())
    assert report is not None
    changed = replace(report, settings={**report.settings, **settings}, tuned=tuned)
    assert said in card_of(changed, "my-org/smaller", ["onnx/model.onnx"])


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "GatedRepo", "a/b is gated: accept its terms at https://huggingface.co/a/b and log in"),
        (404, "RepoNotFound", "a/b is not on the Hub, or it is private"),
        (404, "RevisionNotFound", "a/b has no revision 'v1'. Give a branch, a tag or a commit"),
        (500, "", "or cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_told(
    status: int, code: str, said: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub.refused = (status, code)
    with pytest.raises(BadInput, match=said):
        snapshot("a/b@v1", ["config.json"])


def test_without_a_connection_the_cache_is_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadInput, match=r"neither a folder nor in the Hub's cache.*hf download a/b --revision v1"):
        snapshot("a/b@v1", ["config.json"])
    with pytest.raises(BadInput, match="is no folder, and no id of the Hub"):
        snapshot("a/b@", ["config.json"])
    assert revision_of("a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    assert revision_of("a/b") == ("a/b", None)
