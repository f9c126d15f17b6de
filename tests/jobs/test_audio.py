"""Models of sound hear recordings, or take arrays, and a cut classifier gives what its ONNX file does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES

import optin_deploy
from optin_deploy.checkpoint.tasks import task_with
from support import tiny_checkpoint as tiny
from support.tiny_files import save_recording

pytestmark = pytest.mark.usefixtures("by_torchscript")

WAVES = {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
}
SPECTRA = {"max_length": 32, "num_mel_bins": 32, "patch_size": 16, "frequency_stride": 16, "time_stride": 16}
WHISPER = {
    "d_model": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 96,
    "num_mel_bins": 20,
    "max_source_positions": 20,
    "vocab_size": 60,
    "init_std": 0.3,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
}
MODELS: dict[str, tuple[Any, dict[str, Any], str, tuple[int, ...]]] = {
    "wav2vec2": (transformers.Wav2Vec2ForSequenceClassification, WAVES, "input_values", (400,)),
    "ast": (transformers.ASTForAudioClassification, SPECTRA, "input_values", (32, 32)),
    "whisper": (transformers.WhisperForAudioClassification, WHISPER, "input_features", (20, 40)),
}
"""Class, entries of its config, its input and the sizes of a row."""


@pytest.mark.parametrize("name", list(MODELS))
def test_a_classifier_of_sound_is_cut_and_judged(name: str, tmp_path: Path, shell: tiny.Shell) -> None:
    kind, options, wanted, sizes = MODELS[name]
    own = {} if name == "whisper" else tiny._sizes()
    dense = tiny._spread(kind, kind.config_class(**own, **options, **tiny._classes()), seed=3)
    dense.save_pretrained(tmp_path / "dense")
    extractor = transformers.Wav2Vec2FeatureExtractor()
    extractor.save_pretrained(tmp_path / "dense")
    rows = torch.randn(60, *sizes, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        labels = dense(**{wanted: rows}).logits.argmax(-1).numpy()
    np.savez(tmp_path / "rows.npz", **{wanted: rows.numpy(), "labels": labels})
    out = tmp_path / "out"
    ran = shell("optin-export", tmp_path / "dense", "--calibration", tmp_path / "rows.npz", "--align", 8, "--no-dense",
                "--out", out)  # fmt: skip
    assert ran.code == 0, ran.err
    report = json.loads((out / "report.json").read_text())
    assert (report["quality"]["metric"], report["quality"]["dense"]) == ("accuracy", 1.0)
    assert report["macs"]["kept"] <= 0.6
    cut = optin_deploy.load(out)
    assert type(cut) is kind
    (logits,) = onnxruntime.InferenceSession(out / "model.onnx").run(["logits"], {wanted: rows[:4].numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(cut(**{wanted: rows[:4]}).logits, logits, atol=1e-4)
    assert (out / "preprocessor_config.json").read_bytes() == (tmp_path / "dense/preprocessor_config.json").read_bytes()
    if name == "wav2vec2":
        row = rows[0].numpy()
        found = transformers.pipeline("audio-classification", model=cut, feature_extractor=extractor)(row)
        heard = ((row - row.mean()) / np.sqrt(row.var() + 1e-7))[None]
        (scores,) = onnxruntime.InferenceSession(out / "model.onnx").run(["logits"], {wanted: heard})[0]
        expected = np.exp(scores) / np.exp(scores).sum()
        assert {each["label"]: each["score"] for each in found} == pytest.approx(
            dict(zip(tiny.CLASSES, expected, strict=True)), abs=1e-4
        )


EXTRACTORS = {
    "wav2vec2": transformers.Wav2Vec2FeatureExtractor(do_normalize=True),
    "ast": transformers.ASTFeatureExtractor(max_length=32, num_mel_bins=32),
    "whisper": transformers.WhisperFeatureExtractor(feature_size=20, chunk_length=1, hop_length=400),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_recordings_are_heard(name: str, tmp_path: Path, shell: tiny.Shell) -> None:
    kind, options, wanted, _ = MODELS[name]
    own = {} if name == "whisper" else tiny._sizes()
    dense = tiny._spread(kind, kind.config_class(**own, **options, **tiny._classes()), seed=3)
    extractor = EXTRACTORS[name]
    dense.save_pretrained(tmp_path / "dense")
    extractor.save_pretrained(tmp_path / "dense")
    heard: dict[str, tuple[torch.Tensor, str]] = {}
    draw = np.random.default_rng(2)
    for number in range(56):
        part = "judging" if number >= 40 else "calibration"
        loud = np.rint(draw.normal(size=(480, 640)[number % 2]).clip(-3, 3) * 2**13).astype("<i2")
        row = extractor(loud / np.float32(2**15), sampling_rate=16_000, return_tensors="pt")[wanted]
        with torch.inference_mode():
            label = tiny.CLASSES[int(dense(**{wanted: row}).logits.argmax())]
        save_recording(tmp_path / part / label / f"{number}.wav", loud)
        heard[str(number)] = row, label
    out = tmp_path / "out"
    rows = ["--calibration", tmp_path / "calibration", "--eval", tmp_path / "judging"]
    ran = shell("optin-export", tmp_path / "dense", *rows, "--align", 8, "--no-dense", "--out", out)
    assert ran.code == 0, ran.err
    quality = json.loads((out / "report.json").read_text())["quality"]
    cut = optin_deploy.load(out)
    with torch.inference_mode():
        found = [
            tiny.CLASSES[int(cut(**{wanted: row}).logits.argmax())] == label
            for number, (row, label) in heard.items()
            if int(number) >= 40
        ]
    assert (quality["metric"], quality["dense"], quality["samples"]) == ("accuracy", 1.0, 16)
    assert quality["pruned"] == pytest.approx(np.mean(found))
    assert (out / "preprocessor_config.json").read_bytes() == (tmp_path / "dense/preprocessor_config.json").read_bytes()


def test_what_cannot_be_heard_is_refused(tmp_path: Path, shell: tiny.Shell) -> None:
    dense = tiny._spread(transformers.Wav2Vec2Model, transformers.Wav2Vec2Config(**tiny._sizes(), **WAVES), seed=4)
    dense.save_pretrained(tmp_path / "dense")
    for number in range(16):
        save_recording(tmp_path / f"{number}.wav", np.arange(4 if number == 3 else 480) ** 2 % (number + 7))
    command = ["optin-export", tmp_path / "dense", "--no-dense", "--out", tmp_path / "out"]
    refused = shell(*command)
    assert refused.code == 2
    assert "hears recordings, and none are bundled. Give --calibration with a folder" in refused.err
    refused = shell(*command, "--calibration", tmp_path)
    assert refused.code == 2
    assert "holds no preprocessor_config.json" in refused.err
    refused = shell("optin-export", tiny.bert(), "--calibration", tmp_path, "--out", tmp_path / "out")
    assert refused.code == 2
    assert "a recording fills one input, and it takes input_ids" in refused.err
    settings = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 10**9}
    (tmp_path / "dense/preprocessor_config.json").write_text(json.dumps(settings))
    refused = shell(*command, "--calibration", tmp_path)
    assert refused.code == 2
    assert "'sampling_rate' is 1000000000" in refused.err
    (tmp_path / "dense/preprocessor_config.json").write_text(json.dumps(settings | {"sampling_rate": 16_000}))
    refused = shell(*command, "--calibration", tmp_path)
    assert refused.code == 2
    assert "does not run with input_values (1, 4)" in refused.err


def test_states_of_sound_are_embeddings(tmp_path: Path, shell: tiny.Shell) -> None:
    dense = tiny._spread(transformers.Wav2Vec2Model, transformers.Wav2Vec2Config(**tiny._sizes(), **WAVES), seed=4)
    dense.save_pretrained(tmp_path / "dense")
    waves = np.random.default_rng(0).normal(size=(40, 400)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", input_values=waves)
    options = ["--calibration", tmp_path / "rows.npz", "--align", 8, "--no-dense", "--out", tmp_path / "out"]
    ran = shell("optin-export", tmp_path / "dense", *options)
    assert ran.code == 0, ran.err
    quality = json.loads((tmp_path / "out" / "report.json").read_text())["quality"]
    assert (quality["metric"], quality["samples"]) == ("cosine_to_dense", 8)
    refused = shell("optin-export", tmp_path / "dense", *options[2:], "--calibration", tiny.lines(), "--force")
    assert refused.code == 2
    assert "Give every input by its name" in refused.err
    refused = shell("optin-export", tmp_path / "dense", *options, "--image-size", 32)
    assert "takes no images" in refused.err


def test_every_classifier_of_sound_is_known() -> None:
    for architecture in MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values():
        found = task_with(architecture)
        assert found is not None
        assert found.name == "audio-classification"
    assert task_with("BertForSequenceClassification") is not None
    assert task_with("BertForSequenceClassification").name == "text-classification"  # type: ignore[union-attr]
