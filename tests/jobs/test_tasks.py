"""Tasks beyond embeddings and classes of rows: entities by token, and scorers of text, through the whole job."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from sklearn.metrics import f1_score, ndcg_score

import optin_deploy
from optin_deploy.checkpoint.tasks import infer_task
from optin_deploy.errors import NonFiniteActivation
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
        ("BertForQuestionAnswering", "question-answering"),
        ("GPT2LMHeadModel", "text-generation"),
        ("LlamaForCausalLM", "text-generation"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertModel", "feature-extraction"),
    ],
)
def test_the_task_follows_from_the_class(architecture: str, task: str) -> None:
    assert infer_task(transformers.PretrainedConfig(architectures=[architecture])).name == task


# ---- rows with labels of their own: those that the dense model gives, so that it is always right


def job(model: Path, rows: list[dict[str, Any]], tmp_path: Path, shell: tiny.Shell, *options: object) -> dict[str, Any]:
    """Report of a job that is calibrated on texts and judged by these rows."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ("--eval", tmp_path / "rows.jsonl", *tiny.text_options(tiny.lines(), tmp_path / "out"), "--no-dense")
    ran = shell("optin-export", model, *given, *options)
    assert ran.code == 0, ran.err
    report: dict[str, Any] = json.loads((tmp_path / "out" / "report.json").read_text())
    return report


def given(model: Any, folder: Path, *texts: Any, **options: Any) -> tuple[Any, Any]:
    """What a model puts out for a text, and the encoding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoding = tokenizer(*texts, truncation=True, max_length=tiny.SEQ_LEN, return_tensors="pt", **options)
    with torch.inference_mode():
        return model(**encoding), encoding


def unseen(count: int) -> list[str]:
    """Texts of few words that calibrate nothing."""
    rng = random.Random(7)
    return [" ".join(rng.sample(tiny.WORDS.split(), 4)) for _ in range(count)]


def test_rows_with_several_labels_are_judged_by_their_micro_f1(tmp_path: Path, shell: tiny.Shell) -> None:
    labels = {"id2label": dict(enumerate("abcd")), "label2id": {name: i for i, name in enumerate("abcd")}}
    options = {"problem_type": "multi_label_classification", **labels}
    folder = tiny._save_text(transformers.BertForSequenceClassification, "several", seed=8, **options)
    dense = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    rows = []
    for text in unseen(24):
        found = (given(dense, folder, text)[0].logits[0] > 0).tolist()
        rows.append({"text": text, "label": [name for name, there in zip("abcd", found, strict=True) if there]})
    quality = job(folder, rows, tmp_path, shell)["quality"]
    assert (quality["metric"], quality["dense"], quality["samples"]) == ("micro_f1", 1.0, 24)
    cut = optin_deploy.load(tmp_path / "out")
    told = [[name in row["label"] for name in "abcd"] for row in rows]
    after = [(given(cut, folder, row["text"])[0].logits[0] > 0).tolist() for row in rows]
    assert quality["pruned"] == pytest.approx(f1_score(told, after, average="micro"), abs=0.02)
    pipe = transformers.pipeline("text-classification", model=cut, tokenizer=str(folder), top_k=None)
    scores = {each["label"]: each["score"] for each in pipe([rows[0]["text"]])[0]}
    logits = run_file(tmp_path / "out" / "model.onnx", folder, rows[0]["text"])["logits"][0]
    assert [scores[name] for name in "abcd"] == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-4)


def run_file(path: Path, folder: Path, *texts: Any) -> dict[str, Any]:
    """Outputs of an ONNX file for a text."""
    session = onnxruntime.InferenceSession(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoding = tokenizer(*texts, truncation=True, max_length=tiny.SEQ_LEN, return_tensors="np")
    fed = {each.name: encoding[each.name] for each in session.get_inputs()}
    return dict(zip([each.name for each in session.get_outputs()], session.run(None, fed), strict=True))


def test_tagged_words_are_judged_by_their_entities(entities: Path, tmp_path: Path, shell: tiny.Shell) -> None:
    dense = transformers.BertForTokenClassification.from_pretrained(entities).eval()
    rows = []
    for text in unseen(24):
        words = text.split()
        found, encoding = given(dense, entities, words, is_split_into_words=True)
        ids, tags = encoding.word_ids(), found.logits[0].argmax(-1).tolist()
        seen = [NAMES[tags[ids.index(word)]] if word in ids else "O" for word in range(len(words))]
        rows.append({"tokens": words, "ner_tags": seen})
    quality = job(entities, rows, tmp_path, shell)["quality"]
    assert (quality["metric"], quality["dense"]) == ("entity_f1", 1.0)
    assert quality["beside"]["accuracy_per_token"][0] == 1.0


def test_answers_are_judged_as_parts_of_their_text(tmp_path: Path, shell: tiny.Shell) -> None:
    folder = tiny._save_text(transformers.BertForQuestionAnswering, "answers", seed=9)
    dense = transformers.BertForQuestionAnswering.from_pretrained(folder).eval()
    rows = []
    for text in unseen(24):
        question, context = text.split()[0], " ".join(text.split()[1:])
        found, encoding = given(dense, folder, question, context)
        second = [i for i, each in enumerate(encoding.sequence_ids()) if each == 1]
        sums = {
            (i, j): float(found.start_logits[0, i] + found.end_logits[0, j]) for i in second for j in second if i <= j
        }
        first, last = max(sums, key=lambda pair: sums[pair])
        offsets = encoding.encodings[0].offsets
        answer = context[offsets[first][0] : offsets[last][1]]
        rows.append({"question": question, "context": context, "answers": {"text": [answer], "answer_start": [0]}})
    quality = job(folder, rows, tmp_path, shell)["quality"]
    assert (quality["metric"], quality["dense"], quality["beside"]["exact_match"][0]) == ("answer_f1", 1.0, 1.0)
    assert type(optin_deploy.load(tmp_path / "out")) is transformers.BertForQuestionAnswering
    cut = given(optin_deploy.load(tmp_path / "out"), folder, rows[0]["question"], rows[0]["context"])[0]
    found = run_file(tmp_path / "out" / "model.onnx", folder, rows[0]["question"], rows[0]["context"])
    np.testing.assert_allclose(found["start_logits"], cut.start_logits, atol=1e-4)
    np.testing.assert_allclose(found["end_logits"], cut.end_logits, atol=1e-4)


def test_a_perplexity_that_is_no_number_is_refused_before_the_work(
    writer: Path, tmp_path: Path, shell: tiny.Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optin_deploy.quality.perplexity.MOST", 1.0)  # as if its weights overflowed
    ran = shell("optin", "score", writer, "--calibration", tiny.lines(), "--out", tmp_path / "out")
    assert ran.code == NonFiniteActivation.exit_code
    assert "nats on average" in ran.err
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_masked_words_are_what_a_filler_is_judged_by(tmp_path: Path, shell: tiny.Shell) -> None:
    from optin_deploy.jobs.prepared import prepare
    from optin_deploy.jobs.workspace import Workspace

    folder = tiny._save_text(transformers.BertForMaskedLM, "filler", seed=10)
    rows = [{"text": text} for text in unseen(24)]
    quality = job(folder, rows, tmp_path, shell)["quality"]
    assert quality["metric"] == "pseudo_perplexity"
    held_out = prepare(Workspace(tmp_path / "out").source(), tmp_path / "out").ready.rows.held_out
    assert held_out is not None
    dense, total, count, start = transformers.BertForMaskedLM.from_pretrained(folder).eval(), 0.0, 0, 0
    for batch in held_out.batches:
        labels = torch.stack(list(held_out.labels[start : start + len(batch["input_ids"])]))  # type: ignore[arg-type]
        start, masked = start + len(labels), labels >= 0
        assert (batch["input_ids"][masked] == 4).all()
        assert masked.sum(1).min() >= 1
        with torch.inference_mode():
            total += float(dense(**batch, labels=labels.masked_fill(~masked, -100)).loss) * int(masked.sum())
        count += int(masked.sum())
    assert quality["dense"] == pytest.approx(float(np.exp(total / count)), rel=1e-4)


def test_embeddings_are_judged_by_searches(tmp_path: Path, shell: tiny.Shell) -> None:
    texts = unseen(60)
    rows = [{"query": one, "positive": other} for one, other in zip(texts[:30], texts[30:], strict=True)]
    quality = job(tiny.bert(), rows, tmp_path, shell)["quality"]
    assert (quality["metric"], quality["samples"]) == ("recall_at_10", 30)
    dense, cut = transformers.BertModel.from_pretrained(tiny.bert()).eval(), optin_deploy.load(tmp_path / "out")
    for place, model in enumerate((dense, cut)):
        vectors = torch.stack([given(model, tiny.bert(), text)[0][0].mean(1)[0] for text in texts])
        scores = torch.cosine_similarity(vectors[:30, None], vectors[None, 30:], dim=-1)
        found = float((scores.argsort(descending=True)[:, :10] == torch.arange(30).unsqueeze(1)).any(1).double().mean())
        told = (quality["dense"], quality["pruned"])[place]
        assert told == pytest.approx(found, abs=0.07)  # near ties: rows are padded, and run by another engine


PAIRS = {
    "scores": {"sentence1": "the match", "sentence2": "a river", "score": 1.5},
    "texts": {"query": "the match", "positive": "a river", "negative": "a bank"},
    "lists": {"query": "the match", "positive": ["a river"], "negative": ["a bank"]},
}


@pytest.mark.parametrize("half", ["calibration", "evaluation"])
@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("scores", "--text-column sentence1 --pair-column sentence2 --label-column score"),
        ("texts", "for rankings rows of `query` and lists `positive` and `negative`"),
        ("lists", "Give a row for each `query` and `positive`, both of them texts"),
    ],
)
def test_rows_of_pairs_are_not_read_as_single_texts_nor_the_other_way(
    kind: str, told: str, half: str, tmp_path: Path
) -> None:
    from optin_deploy.errors import BadInput
    from optin_deploy.jobs.prepared import prepare
    from optin_deploy.pruning.source import Source

    one = tiny._save_text(transformers.BertForSequenceClassification, "rank", seed=11, num_labels=1)
    rows = [{name: _numbered(value, i) for name, value in PAIRS[kind].items()} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"calibration": str(tiny.lines()), half: str(tmp_path / "rows.jsonl")}
    with pytest.raises(BadInput, match=f"rows.jsonl: .*{told}"):
        prepare(Source(str(tiny.bert() if kind == "lists" else one), seq_len=16, **options))
    if kind == "scores":
        columns = {"text_column": "sentence1", "pair_column": "sentence2", "label_column": "score"}
        assert prepare(Source(str(one), seq_len=16, calibration=options[half], **columns)).ready.rows.pairs


def _numbered(value: Any, number: int) -> Any:
    """The same, different for each row."""
    words = tiny.WORDS.split()
    if isinstance(value, list):
        return [_numbered(each, number) for each in value]
    return f"{value} {words[number]}" if isinstance(value, str) else value + number


def test_a_reranker_is_judged_by_its_rankings(tmp_path: Path, shell: tiny.Shell) -> None:
    folder, texts = (
        tiny._save_text(transformers.BertForSequenceClassification, "rank", seed=11, num_labels=1),
        unseen(90),
    )
    rows = [{"query": texts[i], "positive": [texts[30 + i]], "negative": texts[60:66]} for i in range(30)]
    quality = job(folder, rows, tmp_path, shell)["quality"]
    assert (quality["metric"], quality["samples"]) == ("ndcg_at_10", 30)
    dense, cut = transformers.BertForSequenceClassification.from_pretrained(folder), optin_deploy.load(tmp_path / "out")
    for place, model in enumerate((dense.eval(), cut)):
        scores = [
            [
                float(given(model, folder, row["query"], other)[0].logits)
                for other in (*row["positive"], *row["negative"])
            ]
            for row in rows
        ]
        wanted = np.eye(1, 7).repeat(len(rows), 0)
        told = (quality["dense"], quality["pruned"])[place]
        assert told == pytest.approx(ndcg_score(wanted, scores, k=10), abs=0.03)  # near ties
