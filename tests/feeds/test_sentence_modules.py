"""Sentence-transformers folders: their own pooling is judged and exported, their files travel, the rest is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import optin_deploy
from optin_deploy.checkpoint.config import head_in
from optin_deploy.checkpoint.loading import load_dense
from optin_deploy.data.samples import Sample
from optin_deploy.data.targets import Role
from optin_deploy.errors import BadInput
from optin_deploy.exporters.passes.pooled import head_of, pooled
from optin_deploy.feeds.embedding_head import EmbeddingHead
from optin_deploy.feeds.feeds import Preparation, read_judging
from optin_deploy.feeds.pooling import POOLINGS, pooled_states, pooling_of
from optin_deploy.feeds.preprocessor import load_beside
from optin_deploy.feeds.sentence_modules import ABOUT, Prompts
from optin_deploy.feeds.targets import prompted
from optin_deploy.network.read import read
from optin_deploy.network.write import write
from optin_deploy.quality.outputs import readouts
from optin_deploy.scoring.dense_run import dense_run
from optin_deploy.scoring.losses import Readout
from optin_deploy.scoring.reading import Reading
from optin_deploy.scoring.settings import ALL_TOKENS
from optin_deploy.scoring.subject import valid_of
from support import tiny_checkpoint as tiny
from support.tiny_checkpoint import Shell
from support.tiny_folders import prepared_of, sentence_model, uncut

FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def first_tokens(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Unit vectors of the first tokens, by transformers alone."""
    with torch.inference_mode():
        states = model(**batch).last_hidden_state[:, 0]
    return states / states.norm(dim=1, keepdim=True)


@pytest.mark.usefixtures("by_torchscript")
def test_scores_and_quality_are_of_the_first_token_where_the_folder_pools_by_it(tmp_path: Path) -> None:
    prepared = prepared_of(sentence_model(tmp_path / "model"))
    ready, model = prepared.ready, prepared.dense.model
    batch = ready.rows.calibration.batches[0]
    expected = first_tokens(model, batch)
    assert pooling_of(model) == ready.subject.reading.pooling == "cls"
    dense = dense_run(ready.subject, batch, ALL_TOKENS, 0)
    assert torch.allclose(dense.readout.values[:, 0], expected, atol=1e-5)
    assert ready.rows.held_out is not None

    def readouts(sign: int, others: int) -> Iterator[Readout]:
        """An engine whose first tokens, or whose others, are turned round."""
        assert ready.rows.held_out is not None
        for rows in ready.rows.held_out.batches:
            with torch.no_grad():
                states = model(**rows).last_hidden_state.clone()
            states[:, 0] *= sign
            states[:, 1:] *= others
            yield ready.subject.reading.read({ready.subject.reading.output: states}, valid_of(rows))

    assert ready.judge.compare(readouts(-1, 1)).pruned == pytest.approx(-1)
    assert ready.judge.compare(readouts(1, -1)).pruned == pytest.approx(1)


@pytest.mark.parametrize("pooling", ["mean", {"pooling_mode": "mean"}, {}])
def test_a_folder_that_pools_by_the_mean_is_judged_as_before(pooling: Any, tmp_path: Path) -> None:
    model, plain = load_dense(str(sentence_model(tmp_path / "m", pooling))).model, load_dense(str(tiny.bert())).model
    assert pooling_of(model) == pooling_of(plain) == "mean"
    assert model.config.to_dict().keys() == plain.config.to_dict().keys()


def test_a_sentence_embedder_is_one_though_its_config_speaks_of_masked_words(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    assert load_dense(str(folder)).task.name == "feature-extraction"
    (folder / "modules.json").unlink()
    with pytest.raises(BadInput, match="task 'fill-mask' needs"):
        load_dense(str(folder))


def test_the_first_real_token_is_taken_wherever_the_padding_is() -> None:
    states = torch.randn(3, 4, 5)
    valid = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1]]).float()
    assert torch.equal(pooled_states(states, valid, "cls"), states[[0, 1, 2], [0, 2, 1]])


@pytest.mark.parametrize("pooling", ["cls", {"pooling_mode": ["cls"], "embedding_dimension": tiny.HIDDEN}])
def test_the_folders_own_files_travel_and_sentence_transformers_loads_them(pooling: Any, tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "model", pooling)
    saved = uncut(folder).save(tmp_path / "saved")
    for name in FILES:
        assert (saved / name).read_bytes() == (folder / name).read_bytes()
    reloaded = optin_deploy.load(saved)
    assert pooling_of(reloaded) == "cls"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    expected = first_tokens(reloaded, tokenizer(["the river"], return_tensors="pt"))
    loads = pytest.importorskip("sentence_transformers").SentenceTransformer
    found = loads(str(saved), device="cpu").encode(["the river"])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)


def test_an_old_layout_is_saved_with_its_model_at_the_top(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "model")
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if (path.is_file() and path.name not in FILES) or path.name == "sentence_bert_config.json":
            path.rename(inner / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([{**modules[0], "path": "0_Transformer"}, *modules[1:]]))
    for name in (folder, inner):
        model = transformers.BertModel.from_pretrained(inner)
        found = load_beside(str(name), model)
        assert found.preprocessor("the river")["input_ids"][0] == found.preprocessor.cls_token_id
        assert pooling_of(model) == "cls"
        assert sorted(found.files) == sorted((*FILES, "tokenizer.json"))
        assert json.loads(found.files["modules.json"]) == modules


def test_pooling_inside_of_the_graph_is_the_models_own(tmp_path: Path) -> None:
    import onnxruntime

    model = load_dense(str(sentence_model(tmp_path / "model"))).model
    network = read(model)
    head_of(network, "cls", EmbeddingHead(pooling_of(model)))
    write(pooled(network, "cls"), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    batch = {"input_ids": torch.arange(10, 34).view(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    batch["attention_mask"][0, :3] = 0
    states, embedding = session.run(None, {name: values.numpy() for name, values in batch.items()})
    np.testing.assert_allclose(embedding, states[[0, 1], [3, 0]], atol=1e-6)


def test_another_pooling_than_the_models_own_is_refused(shell: Shell, tmp_path: Path) -> None:
    folder, out = sentence_model(tmp_path / "model"), tmp_path / "out"
    ran = shell("optin-export", folder, *tiny.text_options(tiny.lines(), out), "--pool", "mean")
    assert (ran.code, out.exists()) == (2, False)
    assert "--pool mean: this model is scored and judged by its cls" in ran.err
    assert "Give --pool cls" in ran.err
    with pytest.raises(BadInput, match=r"--pool cls: .* judged by its mean .*Give --pool mean"):
        head_of(read(load_dense(str(tiny.bert())).model), "cls", EmbeddingHead("mean"))


def test_a_job_of_a_folder_by_the_first_token(shell: Shell, tmp_path: Path) -> None:
    folder, out = sentence_model(tmp_path / "model"), tmp_path / "out"
    ran = shell("optin-export", folder, *tiny.text_options(tiny.lines(), out), "--engine", "torch", "--no-dense")
    assert ran.code == 0, ran.err
    recorded = load_file(out / "samples.safetensors")
    pairs = [recorded[f"{name}.last_hidden_state"][:, 0] for name in ("dense", "pruned")]
    cosine = float(torch.cosine_similarity(*pairs).mean())
    told = json.loads((out / "report.json").read_text())["quality"]
    assert told["metric"] == "cosine_to_dense"
    assert told["pruned"] == pytest.approx(cosine, abs=0.05)  # 8 of the 12 held-out rows
    for home in (out, out / "model"):
        assert [name for name in FILES if not (home / name).is_file()] == []


def changed(folder: Path, name: str, content: Any) -> Path:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 229\n"
PACKAGE = "sentence_transformers.models."
TRANSFORMER = {"path": "", "type": f"{PACKAGE}Transformer"}
POOLING = {"path": "1_Pooling", "type": f"{PACKAGE}Pooling"}
REFUSED: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "median": ("1_Pooling/config.json", {"pooling_mode": "median"}, ("['median']", "mean, cls")),
    "half a prompt": ("1_Pooling/config.json", {"include_prompt": "no"}, ("include_prompt", "'no'", "true or false")),
    "none": ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, ("[]", "mean, cls")),
    "pooler": (
        "sentence_bert_config.json",
        {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}},
        ("method_output_name is 'pooler_output'", "last_hidden_state"),
    ),
    "two": ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, ("['cls', 'mean']", "mean, cls")),
    "odd": ("1_Pooling/config.json", {"pooling_mode": {"cls": 1}}, ("{'cls': 1}",)),
    "width": ("1_Pooling/config.json", {"word_embedding_dimension": 768}, ("768", str(tiny.HIDDEN))),
    "list": ("1_Pooling/config.json", [], ("1_Pooling/config.json", "list")),
    "pointer": ("1_Pooling/config.json", POINTER, ("1_Pooling/config.json", "git lfs pull")),
    "order": (
        "modules.json",
        [TRANSFORMER, {**POOLING, "type": "sentence_transformers.models.Dense"}, POOLING],
        ("'Dense'", "in this order"),
    ),
    "prompts": ("config_sentence_transformers.json", {"prompts": ["query: "]}, ("prompts is ['query: ']",)),
    "no prompt": ("config_sentence_transformers.json", {"default_prompt_name": "q"}, ("default_prompt_name is 'q'",)),
    "a list": ("config_sentence_transformers.json", {"default_prompt_name": ["q"]}, ("default_prompt_name is",)),
    "own code": ("modules.json", [TRANSFORMER, {**POOLING, "type": "evil.Pooling"}], ("'evil.Pooling'",)),
    "model alone": ("modules.json", [TRANSFORMER], ("'Transformer'", "Pooling, any number of Dense")),
    "up": ("modules.json", [TRANSFORMER, {**POOLING, "path": "../1_Pooling"}], ("'../1_Pooling'", "inside")),
    "absolute": ("modules.json", [TRANSFORMER, {**POOLING, "path": "/etc"}], ("'/etc'", "inside")),
    "null": ("modules.json", "null", ("modules.json", "None")),
    "object": ("modules.json", {}, ("modules.json", "{}")),
    "empty": ("modules.json", "", ("modules.json",)),
    "words": ("modules.json", ["Transformer"], ("'Transformer'", "without path and type")),
    "pointer to modules": ("modules.json", POINTER, ("modules.json", "git lfs pull")),
    "lower case": ("sentence_bert_config.json", {"do_lower_case": "yes"}, ("do_lower_case", "'yes'")),
    "output": ("sentence_bert_config.json", {"module_output_name": "logits"}, ("module_output_name", "'logits'")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused(case: str, tmp_path: Path) -> None:
    name, content, says = REFUSED[case]
    folder = changed(sentence_model(tmp_path / "model"), name, content)
    with pytest.raises(BadInput) as refused:
        load_dense(str(folder))
    assert [part for part in (*says, name) if part not in str(refused.value)] == []


DENSE = {"in_features": tiny.HIDDEN, "out_features": 8, "activation_function": "torch.nn.modules.activation.Tanh"}


@pytest.mark.parametrize(
    ("config", "shape", "said"),
    [
        (
            {"activation_function": "my.code.Evil"},
            (8, tiny.HIDDEN),
            "my.code.Evil.* is not understood.*Identity, Tanh",
        ),
        ({"use_residual": True}, (8, tiny.HIDDEN), "use_residual.* is not understood"),
        ({"module_input_name": "token_embeddings"}, (8, tiny.HIDDEN), "module_input_name.* is not understood"),
        ({}, (8, 7), r"linear\.weight is \(8, 7\); it needs \(out, 48\)"),
        (
            {},
            None,
            r"model\.safetensors, which belongs to .*is missing.*pytorch_model\.bin is not read",
        ),
    ],
)
def test_a_dense_layer_that_is_not_understood_is_refused(
    config: dict[str, Any], shape: tuple[int, int] | None, said: str, tmp_path: Path
) -> None:
    folder = sentence_model(tmp_path / "model", "mean", "Transformer", "Pooling", "Dense")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    changed(folder, "2_Dense/config.json", {**DENSE, **config})
    if shape is not None:
        save_file({"linear.weight": torch.ones(shape)}, folder / "2_Dense" / "model.safetensors")
    with pytest.raises(BadInput, match=said):
        load_dense(str(folder))


def test_a_module_behind_a_link_that_leaves_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "model")
    shutil.move(folder / "1_Pooling", tmp_path / "elsewhere")
    (folder / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput, match=r"1_Pooling/config\.json is a link that leaves"):
        load_dense(str(folder))


def test_texts_that_only_sentence_transformers_lower_cases_are_refused(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "model", do_lower_case=True)
    assert load_dense(str(folder)).files  # BERT's tokenizer does so itself
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["normalizer"]["lowercase"] = False
    with pytest.raises(BadInput, match="do_lower_case, but the tokenizer tells capitals"):
        load_dense(str(changed(folder, "tokenizer.json", raw)))


def test_a_folders_own_prompt_stands_before_each_text(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "model", max_seq_length=14)
    about = {"prompts": {"usual": "the old song: "}, "default_prompt_name": "usual"}
    plain = prepared_of(folder)
    after = prepared_of(changed(folder, ABOUT, about))
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("the old song: ")["input_ids"][1:-1]
    assert after.dense.seq_len(None) == 14
    for batch in after.ready.rows.calibration.batches:
        assert all(row[1 : 1 + len(tokens)].tolist() == tokens for row in batch["input_ids"])
    rows = [row[1 : 1 + len(tokens)].tolist() for b in plain.ready.rows.calibration.batches for row in b["input_ids"]]
    assert tokens not in rows


def test_queries_and_what_they_search_have_prompts_of_their_own() -> None:
    prompts = Prompts("u: ", "q: ", "d: ")
    roles = (Role(0, (1,)), Role(1, candidate=True), Role(2, scores=((1, 0.5),)), None)
    found = prompted([Sample(text="x", label=role) for role in roles], prompts)
    assert [sample.text for sample in found] == ["q: x", "d: x", "u: x", "u: x"]


def test_a_text_that_asks_and_is_searched_has_both_prompts() -> None:
    both = Sample(text="x", label=Role(3, (1,), candidate=True, scores=((4, 0.5),)))
    found = prompted([both], Prompts("u: ", "q: ", "d: "))
    assert [(sample.text, sample.label) for sample in found] == [
        ("q: x", Role(3, (1,), scores=((4, 0.5),))),
        ("d: x", Role(3, candidate=True)),
    ]
    assert [(sample.text, sample.label) for sample in prompted([both], Prompts("", "a: ", "a: "))] == [
        ("a: x", both.label)
    ]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_embedding_of_what_stands_behind_a_prompt_is_that_of_sentence_transformers(
    pooling: str, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = sentence_model(tmp_path / "model", {"pooling_mode": pooling, "include_prompt": False})
    prompts = {"query": "the old song: ", "document": "a river "}
    changed(folder, "config_sentence_transformers.json", {"prompts": prompts, "default_prompt_name": "document"})
    judge = SentenceTransformer(str(folder), device="cpu")
    prepared = prepared_of(folder)
    loaded, ready = prepared.dense.loaded, prepared.ready
    assert loaded is not None
    roles = [Role(0, (1,)), Role(1, candidate=True), Role(2, candidate=True), Role(3, (2,))]
    samples = [Sample(text, label=role) for text, role in zip(tiny.texts()[:4], roles, strict=True)]
    preparation = Preparation(loaded.preprocessor, seq_len=32, prompts=prepared.dense.prompts)
    feeds = read_judging(ready.network, samples, ready.rows.calibration, preparation)
    (found,) = readouts(ready.subject.program, ready.subject.reading, feeds)
    for role, sample in zip(roles, samples, strict=True):
        wanted = judge.encode(sample.text, prompt_name="document" if role.candidate else "query")
        np.testing.assert_allclose(found.values[feeds.labels.index(role), 0], wanted, atol=1e-5)
    with pytest.raises(BadInput, match=f"--pool {pooling}: .*include_prompt is false"):
        head_of(ready.network, pooling, prepared.dense.head)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("dense", "side"), [(0, "left"), (2, "right")])
def test_embeddings_are_those_of_sentence_transformers(pooling: str, dense: int, side: str, tmp_path: Path) -> None:
    """Also with layers behind the pooling; in the read-out that is scored, and in the graph that is served."""
    import onnxruntime
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    sizes = [tiny.HIDDEN, 32, 20]
    torch.manual_seed(0)
    layers = [
        Dense(one, other, bias=bool(place), activation_function=[torch.nn.Tanh(), torch.nn.GELU()][place])
        for place, (one, other) in enumerate(itertools.pairwise(sizes))
    ]
    modules = [Transformer(str(tiny.bert())), Pooling(tiny.HIDDEN, pooling), *layers[:dense], Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / "model"))
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    changed(tmp_path / "model", "tokenizer_config.json", {**settings, "padding_side": side})
    texts = [*tiny.texts()[:4], "the"]
    wanted = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(texts)
    loaded = load_dense(str(tmp_path / "model"))
    assert loaded.sentence is not None
    head = loaded.sentence.head
    assert (loaded.preprocessor.padding_side, head_in(tmp_path / "model").digest) == (side, head.digest)
    batch = loaded.preprocessor(texts, padding=True, truncation=True, max_length=tiny.POSITIONS, return_tensors="pt")
    with torch.inference_mode():
        states = loaded.model(**batch).last_hidden_state
    np.testing.assert_allclose(head(states, batch["attention_mask"].to(states)), wanted, atol=1e-5)
    reading = Reading("y", "embedding", head.pooling, head.layers)
    found = reading.read({"y": states}, batch["attention_mask"].to(states)).values[:, 0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    write(pooled(read(loaded.model), head), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    fed = {each.name: batch[each.name].numpy() for each in session.get_inputs()}
    np.testing.assert_allclose(session.run(["sentence_embedding"], fed)[0], wanted, atol=1e-5)
    saved = uncut(tmp_path / "model").save(tmp_path / "saved")
    np.testing.assert_allclose(SentenceTransformer(str(saved), device="cpu").encode(texts), wanted, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_tokens_behind_a_prompt_are_pooled_as_sentence_transformers_does(pooling: str, side: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    states, skipped = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0)), 2
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
    places = mask * (torch.arange(7) + 1) * (torch.arange(7) >= skipped)
    if side == "left":  # the texts as they are, behind their padding
        states, mask, places = (
            torch.stack([row.roll(7 - int(length), 0) for row, length in zip(some, (7, 5, 3), strict=True)])
            for some in (states, mask, places)
        )
    features = {"token_embeddings": states, "attention_mask": mask, "prompt_length": skipped}
    wanted = Pooling(4, pooling, include_prompt=False)(features)["sentence_embedding"]
    assert torch.allclose(pooled_states(states, places, pooling), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", [transformers.DistilBertConfig, transformers.GPT2Config])
def test_the_head_of_a_folder_is_the_models_whatever_its_config_calls_its_width(kind: Any, tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "model", "cls")
    sizes = {"hidden_size": tiny.HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100}
    (folder / "config.json").unlink()
    kind(**sizes).save_pretrained(folder)
    assert "hidden_size" not in json.loads((folder / "config.json").read_text())
    head = head_in(folder)
    assert head is not None
    assert (head.pooling, head.normalized) == ("cls", True)


def test_a_classifier_does_not_read_modules(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.classifier(), tmp_path / "model"))
    (folder / "modules.json").write_text("[]")
    assert "modules.json" not in load_dense(str(folder)).files
