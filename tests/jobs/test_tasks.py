"""Tasks beyond embeddings and classes of rows: entities by token, and scorers of text, through the whole job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import optin_deploy
from optin_deploy.checkpoint.loading import infer_task
from support import tiny_checkpoint as tiny

pytestmark = pytest.mark.usefixtures("by_torchscript")

NAMES = ("O", "B-name", "I-name")


@pytest.fixture(scope="module")
def entities() -> Path:
    """A BertForTokenClassification."""
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    return tiny._save_text(transformers.BertForTokenClassification, "entities", seed=5, **labels)


@pytest.fixture(scope="module")
def writer() -> Path:
    """A GPT2LMHeadModel, whose embeddings are tied to its head."""
    return tiny._save_text(transformers.GPT2LMHeadModel, "writer", seed=6, pad_token_id=0, n_inner=tiny.FFN)


def test_entities_are_judged_token_by_token(entities: Path, tmp_path: Path, shell: tiny.Shell) -> None:
    out = tmp_path / "out"
    ran = shell("optin-export", entities, *tiny.text_options(tiny.lines(), out), "--no-dense")
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    assert report["quality"]["metric"] == "same_prediction_per_token"
    assert report["macs"]["kept"] <= 0.6
    model = optin_deploy.load(out)
    assert type(model) is transformers.BertForTokenClassification
    assert model.config.id2label == dict(enumerate(NAMES))


def test_a_scorer_of_text_is_judged_by_its_perplexity(writer: Path, tmp_path: Path, shell: tiny.Shell) -> None:
    out = tmp_path / "out"
    ran = shell("optin-export", writer, *tiny.text_options(tiny.lines(), out), "--no-dense")
    assert ran.code == 0, ran.err
    quality = json.loads((out / "report.json").read_text())["quality"]
    assert quality["metric"] == "perplexity"
    model = optin_deploy.load(out)
    assert type(model) is transformers.GPT2LMHeadModel
    assert model.lm_head.weight is model.transformer.wte.weight
    assert [quality["dense"], quality["pruned"]] == pytest.approx(_perplexities(writer, model, out), rel=1e-4)


def _perplexities(dense: Path, pruned: torch.nn.Module, out: Path) -> list[float]:
    """By transformers' own loss, over the rows that the job held out."""
    from optin_deploy.jobs.prepared import prepare
    from optin_deploy.jobs.workspace import Workspace

    rows = prepare(Workspace(out).source(), out).ready.rows.held_out
    assert rows is not None
    models = (transformers.GPT2LMHeadModel.from_pretrained(dense).eval(), pruned)
    found = []
    for model in models:
        total = count = 0.0
        for batch in rows.batches:
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            tokens = int((labels[:, 1:] != -100).sum())
            with torch.inference_mode():
                total += float(model(**batch, labels=labels).loss) * tokens
            count += tokens
        found.append(float(torch.tensor(total / count).exp()))
    return found


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForTokenClassification", "token-classification"),
        ("GPT2LMHeadModel", "text-generation"),
        ("LlamaForCausalLM", "text-generation"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertModel", "feature-extraction"),
    ],
)
def test_the_task_follows_from_the_class(architecture: str, task: str) -> None:
    assert infer_task(transformers.PretrainedConfig(architectures=[architecture])) == task
