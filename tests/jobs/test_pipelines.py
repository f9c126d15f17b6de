"""For each task `transformers.pipeline` of a cut, reloaded model gives what ONNX Runtime and numpy do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from PIL import Image

import optin_deploy
from optin_deploy.network.write import write
from support import tiny_checkpoint as tiny

pytestmark = pytest.mark.usefixtures("by_torchscript", "one_thread")

TEXT = "the teacher bought some bread"
Run = Callable[..., dict[str, np.ndarray]]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    found: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return found


def cut(model: Any, batch: Mapping[str, Any], folder: Path) -> tuple[Any, Run]:
    """The cut model as it is loaded again, and what runs its ONNX file."""
    pruned = optin_deploy.prune(model, [dict(batch)], flops=0.6, align=8, allocation="uniform")
    pruned.save(folder / "smaller")
    write(pruned.network, folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")

    def run(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        fed = {each.name: np.asarray(inputs[each.name]) for each in session.get_inputs()}
        return dict(zip([each.name for each in session.get_outputs()], session.run(None, fed), strict=True))

    loaded = optin_deploy.load(folder / "smaller")
    assert type(loaded) is type(model)
    assert sum(map(torch.numel, loaded.parameters())) < sum(map(torch.numel, model.parameters()))
    return loaded, run


def cut_text(kind: Any, folder: Path, names: tuple[str, ...] = (), **options: Any) -> tuple[Any, Run, Any]:
    """A tiny model of texts likewise, and its tokenizer."""
    labels = (
        {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}} if names else {}
    )
    source = tiny._save_text(kind, f"pipeline-{folder.name}", seed=21, **labels, **options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    types = kind is not transformers.GPT2LMHeadModel
    batch = tokenizer(list(tiny.texts()[:24]), padding=True, return_token_type_ids=types, return_tensors="pt")
    return *cut(kind.from_pretrained(source).eval(), batch, folder), tokenizer


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_text_classification(problem: str, tmp_path: Path) -> None:
    kind = transformers.BertForSequenceClassification
    model, run, tokenizer = cut_text(kind, tmp_path, tuple("abcd"), problem_type=problem)
    (found,) = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None)([TEXT])
    (logits,) = run(tokenizer(TEXT, return_tensors="np"))["logits"]
    expected = softmax(logits) if problem.startswith("single") else 1 / (1 + np.exp(-logits))
    assert {each["label"]: each["score"] for each in found} == pytest.approx(
        dict(zip("abcd", expected, strict=True)), abs=1e-5
    )


def test_zero_shot_classification(tmp_path: Path) -> None:
    names = ("contradiction", "neutral", "entailment")
    model, run, tokenizer = cut_text(transformers.BertForSequenceClassification, tmp_path, names)
    labels, template = ["bread", "school", "games"], "this is about {}"
    pipe = transformers.pipeline("zero-shot-classification", model=model, tokenizer=tokenizer)
    pairs = [(TEXT, template.format(label)) for label in labels]
    logits = np.concatenate([run(tokenizer(*pair, return_tensors="np"))["logits"] for pair in pairs])
    for several, expected in ((False, softmax(logits[:, 2])), (True, softmax(logits[:, [0, 2]])[:, 1])):
        found = pipe(TEXT, candidate_labels=labels, hypothesis_template=template, multi_label=several)
        assert dict(zip(found["labels"], found["scores"], strict=True)) == pytest.approx(
            dict(zip(labels, expected, strict=True)), abs=1e-5
        )


def test_token_classification(tmp_path: Path) -> None:
    names = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    model, run, tokenizer = cut_text(transformers.BertForTokenClassification, tmp_path, names)
    pipe = transformers.pipeline(
        "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple"
    )
    encoding = tokenizer(TEXT, return_offsets_mapping=True)
    scores = softmax(run(tokenizer(TEXT, return_tensors="np"))["logits"][0])
    groups: list[tuple[str, list[int]]] = []
    for place in range(1, len(scores) - 1):  # without [CLS] and [SEP]
        begins, _, kind = names[scores[place].argmax()].rpartition("-")
        if groups and groups[-1][0] == kind and begins != "B":
            groups[-1][1].append(place)
        else:
            groups.append((kind, [place]))
    expected = [(kind, places) for kind, places in groups if kind != "O"]
    assert len(expected) > 1
    offsets, found = encoding["offset_mapping"], pipe(TEXT)
    assert [(each["entity_group"], each["start"], each["end"]) for each in found] == [
        (kind, offsets[places[0]][0], offsets[places[-1]][1]) for kind, places in expected
    ]
    means = [scores[places].max(1).mean() for _, places in expected]
    assert [each["score"] for each in found] == pytest.approx(means, abs=1e-5)


def test_question_answering(tmp_path: Path) -> None:
    model, run, tokenizer = cut_text(transformers.BertForQuestionAnswering, tmp_path)  # transformers 5 has no pipeline
    encoding = tokenizer("who bought bread", TEXT, return_tensors="pt")
    with torch.inference_mode():
        found = model(**encoding)
    expected = run(encoding)
    for name in ("start_logits", "end_logits"):
        np.testing.assert_allclose(found[name].numpy(), expected[name], atol=1e-4)


def test_fill_mask(tmp_path: Path) -> None:
    model, run, tokenizer = cut_text(transformers.BertForMaskedLM, tmp_path)
    text = TEXT.replace("bought", "[MASK]")
    found = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5)(text)
    encoding = tokenizer(text, return_tensors="np")
    scores = softmax(run(encoding)["logits"][0, encoding["input_ids"][0].tolist().index(tokenizer.mask_token_id)])
    best = np.argsort(-scores)[:5]
    assert [each["token"] for each in found] == best.tolist()
    assert [each["score"] for each in found] == pytest.approx(scores[best], abs=1e-5)


def test_text_generation(tmp_path: Path) -> None:
    options = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "n_inner": tiny.FFN}
    model, run, tokenizer = cut_text(transformers.GPT2LMHeadModel, tmp_path, **options)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = pipe(TEXT, max_new_tokens=5, do_sample=False, return_tensors=True)
    ids = tokenizer(TEXT)["input_ids"]
    for _ in range(5):
        row = np.array([ids])
        ids.append(int(run({"input_ids": row, "attention_mask": np.ones_like(row)})["logits"][0, -1].argmax()))
    assert found["generated_token_ids"] == ids


def test_feature_extraction(tmp_path: Path) -> None:
    model, run, tokenizer = cut_text(transformers.BertModel, tmp_path)
    found = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer)(TEXT)
    np.testing.assert_allclose(found, run(tokenizer(TEXT, return_tensors="np"))["last_hidden_state"], atol=1e-4)


def image() -> Image.Image:
    """A photograph of coarse noise."""
    coarse = np.random.default_rng(5).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse.repeat(12, 0).repeat(12, 1))


def pixels(size: int) -> dict[str, torch.Tensor]:
    """Calibration images."""
    return {"pixel_values": torch.randn(24, 3, size, size, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
def test_images(task: str, tmp_path: Path) -> None:
    kind = transformers.ViTForImageClassification if task == "image-classification" else transformers.ViTModel
    model, run = cut(kind.from_pretrained(tiny.vit()).eval(), pixels(32), tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tiny.vit())
    found = transformers.pipeline(task, model=model, image_processor=processor)(image())
    outputs = run(processor(images=[image()], return_tensors="np"))
    if task == "image-classification":
        expected = dict(zip(tiny.CLASSES, softmax(outputs["logits"][0]), strict=True))
        assert {each["label"]: each["score"] for each in found} == pytest.approx(expected, abs=1e-5)
    else:
        np.testing.assert_allclose(found, outputs["last_hidden_state"], atol=1e-4)


def test_image_segmentation(tmp_path: Path) -> None:
    names = {"id2label": dict(enumerate("abcd")), "label2id": {name: i for i, name in enumerate("abcd")}}
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=32, initializer_range=0.3,
        **names,
    )  # fmt: skip
    dense = tiny._spread(transformers.SegformerForSemanticSegmentation, config, seed=4)
    model, run = cut(dense, pixels(32), tmp_path)
    processor = transformers.SegformerImageProcessor(size={"height": 32, "width": 32})
    found = transformers.pipeline("image-segmentation", model=model, image_processor=processor)(image())
    logits = run(processor(images=[image()], return_tensors="np"))["logits"]
    classes = torch.nn.functional.interpolate(torch.from_numpy(logits), (48, 48), mode="bilinear")[0].argmax(0).numpy()
    assert {each["label"] for each in found} == {"abcd"[number] for number in np.unique(classes)}
    for each in found:
        assert (np.asarray(each["mask"]) > 0).tolist() == (classes == "abcd".index(each["label"])).tolist()
