"""Cut folders of sentence-transformers: each backend finds what it looks for, and all make the same embeddings."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from safetensors import safe_open
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.backend.utils import backend_should_export
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import optin_deploy
from optin_deploy import load_sentence_transformer
from optin_deploy.errors import BadInput, MissingDependency
from optin_deploy.files.hub import hub_id_of
from optin_deploy.files.storage import read_json
from optin_deploy.serving.hub import prepared_push
from support import tiny_checkpoint as tiny
from support.tiny_folders import sentence_model, uncut

PROMPT = "the old song: "
TEXTS = ["the river", "a long day at the office with music.", *tiny.texts()[:4]]
FROM_ONNX = {"file_name": "model.onnx", "export": False, "from_onnx": True}
"""What docs/tasks.md gives OpenVINO's backend, which looks for a file of its own else."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of sentence-transformers with a layer behind the pooling and prompts, and the output folder of a job."""
    dense, out = (tmp_path_factory.mktemp("sentence") / name for name in ("dense", "out"))
    torch.manual_seed(0)
    modules = [
        Transformer(str(tiny.bert())),
        Pooling(tiny.HIDDEN, "weightedmean"),
        Dense(tiny.HIDDEN, 20),
        Normalize(),
    ]
    prompts = {"STS": PROMPT, "query": "", "document": "her: "}
    SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name="STS", device="cpu").save(str(dense))
    with pytest.MonkeyPatch.context() as patch:
        options = (*tiny.text_options(tiny.lines(), out), "--pool", "weightedmean", "--threads", 1)
        assert tiny.run("optin-export", dense, *options, monkeypatch=patch) == 0
    return dense, out


@pytest.fixture
def out(folders: tuple[Path, Path]) -> Path:
    return folders[1]


def fed(model: SentenceTransformer, texts: list[str]) -> dict[str, np.ndarray]:
    """What the backends give to their engines."""
    features = model.preprocess(texts)
    return {name: features[name].numpy() for name in ("input_ids", "attention_mask", "token_type_ids")}


def embedded(model: SentenceTransformer, feeds: dict[str, np.ndarray], states: np.ndarray) -> np.ndarray:
    """What the modules of sentence-transformers make of an engine's states."""
    features: Any = {"token_embeddings": torch.from_numpy(states)}
    features["attention_mask"] = torch.from_numpy(feeds["attention_mask"])
    with torch.inference_mode():
        for module in list(model)[1:]:
            features = module(features)
    return np.asarray(features["sentence_embedding"])


def test_torch_makes_the_embeddings_of_the_cut_graph_with_the_folders_prompts(folders: tuple[Path, Path]) -> None:
    dense, out = folders
    model = load_sentence_transformer(out, device="cpu")
    wanted = onnxruntime.InferenceSession(out / "model.onnx")
    feeds = fed(model, [PROMPT + text for text in TEXTS])
    embeddings = wanted.run(["sentence_embedding"], feeds)[0]
    np.testing.assert_allclose(model.encode(TEXTS), embeddings, atol=1e-4)
    plain = wanted.run(["sentence_embedding"], fed(model, TEXTS))[0]
    np.testing.assert_allclose(model.encode_query(TEXTS), plain, atol=1e-4)
    assert np.abs(SentenceTransformer(str(dense), device="cpu").encode(TEXTS) - embeddings).max() > 0.01
    assert sum(each.numel() for each in model[0].parameters()) == read_json(out / "report.json", "")["params"]["pruned"]
    np.testing.assert_array_equal(
        load_sentence_transformer(out / "model", device="cpu").encode(TEXTS), model.encode(TEXTS)
    )
    assert load_sentence_transformer(out, device="cpu", truncate_dim=5).encode(TEXTS).shape == (len(TEXTS), 5)


def test_the_backends_find_the_cut_files_in_the_output_folder_and_on_the_hub(out: Path, tmp_path: Path) -> None:
    model, asked = load_sentence_transformer(out, device="cpu"), {"ONNX": {}, "OpenVINO": FROM_ONNX}
    pushed = prepared_push(out, "my-org/smaller")
    assert 'SentenceTransformer("my-org/smaller", backend="onnx")' in pushed.card
    types = [each["type"] for each in json.loads(pushed.files["modules.json"].read_text())]
    assert [each for each in types if not each.startswith("sentence_transformers.models.")] == []  # versions 2 to 6
    assert {"modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"} <= set(pushed.files)
    for name, path in pushed.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(path.resolve())
    names = {"ONNX": ("model.onnx", "*.onnx"), "OpenVINO": ("openvino_model.xml", "openvino*.xml")}
    feeds, found = fed(model, TEXTS), []
    for folder, kinds in ((out, names), (tmp_path, {"ONNX": names["ONNX"]})):
        for kind, looked_for in kinds.items():
            export, kwargs = backend_should_export(folder, True, dict(asked[kind]), *looked_for, kind)
            assert not export
            found.append((kind, folder / kwargs.get("subfolder", "") / kwargs.get("file_name", "model.onnx")))
    for kind, path in found:
        if kind == "ONNX":
            session = onnxruntime.InferenceSession(path)
            assert {each.name for each in session.get_inputs()} == set(feeds)
            states = session.run(["last_hidden_state"], feeds)[0]
        else:
            compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
            states = compiled(feeds)["last_hidden_state"]
        np.testing.assert_allclose(embedded(model, feeds, states), model.encode(TEXTS, prompt=""), atol=1e-4)
    assert len(found) == 3


def test_tokenizers_on_the_hub_are_read_by_transformers_4_too(out: Path, tmp_path: Path) -> None:
    config = out / "tokenizer_config.json"
    own = out / "model" / config.name
    assert prepared_push(out, "my-org/smaller").files[config.name] == config
    assert "TokenizersBackend" not in config.read_text()
    assert own.is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # old names that mteb itself calls
def test_mteb_takes_the_cut_model(out: Path) -> None:
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset, DatasetDict

    pairs = {
        "sentence1": list(tiny.texts()[:12]),
        "sentence2": list(tiny.texts()[12:24]),
        "score": [i % 5 for i in range(12)],
    }

    class Local(mteb.abstasks.AbsTaskSTS):  # type: ignore[misc]  # mteb is not installed where types are checked
        """Pairs of this test."""

        metadata = mteb.TaskMetadata(
            **{"name": "Local", "description": "", "reference": None, "type": "STS", "category": "t2t"},
            **{"modalities": ["text"], "eval_splits": ["test"], "eval_langs": ["eng-Latn"]},
            **{"dataset": {"path": "local", "revision": "1"}, "main_score": "cosine_spearman"},
        )

        def load_data(self, **_: Any) -> None:
            """No network."""
            self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_dict(pairs)), True

    model = load_sentence_transformer(out, device="cpu")
    (found,) = mteb.evaluate(model, Local(), cache=None, show_progress_bar=False).task_results
    one, other = (model.encode(pairs[name]) for name in ("sentence1", "sentence2"))
    wanted = spearmanr((one * other).sum(1), pairs["score"]).statistic
    assert found.get_score() == pytest.approx(wanted, abs=1e-4)


def test_weights_say_what_made_them_and_name_no_path(out: Path, tmp_path: Path) -> None:
    def said(folder: Path) -> dict[str, str]:
        with safe_open(folder / "model.safetensors", "pt") as file:
            return dict(file.metadata())

    plan = read_json(out / "model" / "optin.json", "")
    made = {"plan": plan["plan_hash"], "network": plan["network"], "optin_deploy": optin_deploy.__version__}
    assert said(out / "model") == {"format": "pt", **made}
    named = replace(uncut(tiny.bert()), report={"base_model": "org/dense@main"})
    assert said(named.save(tmp_path / "named"))["base_model"] == "org/dense@main"
    assert hub_id_of("org/dense@main") == "org/dense"
    assert [hub_id_of(name) for name in (str(tmp_path), "bert", f"{tmp_path}/none@v1")] == [None, None, None]


def test_what_is_no_cut_folder_of_sentence_transformers_is_refused(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match=r"has no modules\.json.*Use optin_deploy\.load"):
        load_sentence_transformer(uncut(tiny.bert()).save(tmp_path / "plain"))
    with pytest.raises(BadInput, match=r"optin\.json does not exist"):
        load_sentence_transformer(sentence_model(tmp_path / "dense"))
    with pytest.raises(BadInput, match="Copy the folder"):
        load_sentence_transformer(out, device="cpu").save(str(tmp_path / "saved"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    monkeypatch.delitem(sys.modules, "optin_deploy.checkpoint.sentence_transformer")
    with pytest.raises(MissingDependency, match=r"'optin-deploy\[sentence-transformers\]'"):
        _ = optin_deploy.load_sentence_transformer
