"""A model folder is compared with its config before anything is built; what does not belong together is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import optin_deploy
from optin_deploy.checkpoint import fit
from optin_deploy.checkpoint.loading import load_model
from optin_deploy.cutting.masks import masks
from optin_deploy.data.bundled import bundled_samples
from optin_deploy.errors import BadInput
from optin_deploy.files.wall import wall
from optin_deploy.network.run import Program
from optin_deploy.pruning.networks import find_in
from support import tiny_checkpoint as tiny
from support.tiny_models import IMAGE, error, outputs, probes, tiny_batches
from support.tiny_ports import image_rows

pytestmark = pytest.mark.usefixtures("one_thread")

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 17\n"
ENDLESS = 10**7
Model = Callable[[], Path]
Weights = dict[str, Tensor]


def changed(
    model: Model, folder: Path, change: dict[str, Any], weights: Callable[[Weights], object] | None = None
) -> Path:
    """A copy with other entries in its config (None removes one) and other weights."""
    copy = tiny.copy_of(model(), folder / "model")
    data = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    if weights is not None:
        tensors = {name: tensor.clone() for name, tensor in load_file(copy / "model.safetensors").items()}
        weights(tensors)
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def refused(folder: Path, *says: object, task: str | None = None) -> None:
    with pytest.raises(BadInput) as stopped:
        load_model(str(folder), task)
    assert [part for part in map(str, says) if part not in str(stopped.value)] == [], stopped.value


def same(one: nn.Module, other: nn.Module) -> bool:
    """Are all weights equal, bit by bit?"""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def ours(caplog: Any) -> list[logging.LogRecord]:
    """What we say, not what torch notes after an export."""
    return [record for record in caplog.records if record.name.startswith("optin_deploy")]


@pytest.fixture(autouse=True)
def _told_anew() -> None:
    fit._tell.cache_clear()


# what loads, loads as before


@pytest.mark.parametrize(
    ("model", "auto"),
    [
        (tiny.bert, "AutoModel"),
        (tiny.classifier, "AutoModelForSequenceClassification"),
        (tiny.gpt2, "AutoModelForSequenceClassification"),
        (tiny.vit, "AutoModelForImageClassification"),
    ],
)
def test_weights_are_those_that_transformers_loads(model: Model, auto: str) -> None:
    expected = getattr(transformers, auto).from_pretrained(model())
    found, task = load_model(str(model()))
    if task.embeds:
        expected.pooler = None
    assert type(found) is type(expected)
    assert same(found, expected)
    assert not found.training
    settings = {key: value for key, value in expected.config.to_dict().items() if not key.startswith("_")}
    assert {key: value for key, value in found.config.to_dict().items() if not key.startswith("_")} == settings


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    def halve(weights: Weights) -> None:
        weights.update({name: tensor.half() for name, tensor in weights.items()})

    folder = changed(tiny.bert, tmp_path, {"dtype": "float16"}, halve)
    model, _ = load_model(str(folder))
    stored = load_file(folder / "model.safetensors")["encoder.layer.0.output.dense.weight"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.encoder.layer[0].output.dense.weight, stored.float())


def sharded(folder: Path) -> Path:
    transformers.BertModel.from_pretrained(tiny.bert()).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def test_shards_are_the_same_model(tmp_path: Path) -> None:
    assert same(load_model(str(sharded(tmp_path)))[0], load_model(str(tiny.bert()))[0])


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        (None, "None"),
        ([], "[]"),
        ({"a": 1}, "lies in 1"),
        ({"a": "../model.safetensors"}, "'../model.safetensors'"),
        ({"a": "/etc/model.safetensors"}, "'/etc/model.safetensors'"),
        ({"a": "model-00009-of-00009.safetensors"}, "missing"),
        ({"nowhere": "model-00001-of-00009.safetensors"}, "nowhere is not in"),
    ],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path: Path, weight_map: Any, says: str) -> None:
    index = sharded(tmp_path) / "model.safetensors.index.json"
    first = min(path.name for path in tmp_path.glob("model-*.safetensors"))
    text = json.dumps({"weight_map": weight_map}).replace("model-00001-of-00009.safetensors", first)
    index.write_text(text)
    refused(tmp_path, index, says)
    index.write_text("[1, 2]")
    refused(tmp_path, index, "list")


def test_a_hub_id_passes_the_same_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[list[str]] = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("somebody/bert", None)
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    folder = changed(tiny.bert, tmp_path, {"num_hidden_layers": ENDLESS})
    refused(Path("somebody/bert"), "num_hidden_layers", ENDLESS)
    assert asked == [["*.json", "*.txt", "*.model"], ["model.safetensors", "model-*.safetensors"]]
    asked.clear()
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "x.Y"}}')
    refused(Path("somebody/bert"), "auto_map")
    assert len(asked) == 1  # refused before the weights are downloaded


# config.json of the wrong shape


@pytest.mark.parametrize("content", ["null", "[]", "3", '"bert"', "{", "", "\xff", "[" * 100_000])
def test_a_config_that_is_no_object(tmp_path: Path, content: str) -> None:
    folder = changed(tiny.bert, tmp_path, {})
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    refused(folder, folder / "config.json")


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (tiny.bert, {"model_type": ["bert"]}),
        (tiny.bert, {"model_type": "unheard-of"}),
        (tiny.bert, {"architectures": "BertModel"}),
        (tiny.bert, {"architectures": [None]}),
        (tiny.bert, {"hidden_size": 48.5}),
        (tiny.bert, {"hidden_size": -48}),
        (tiny.bert, {"hidden_size": True}),
        (tiny.bert, {"num_attention_heads": 0}),
        (tiny.bert, {"num_attention_heads": -6}),
        (tiny.bert, {"hidden_act": "unheard-of"}),
        (tiny.bert, {"hidden_act": {"a": 1}}),
        (tiny.bert, {"hidden_dropout_prob": 7}),
        (tiny.bert, {"layer_norm_eps": float("nan")}),
        (tiny.bert, {"pad_token_id": 999}),
        (tiny.bert, {"vocab_size": "many"}),
        (tiny.classifier, {"id2label": ["a", "b", "c"]}),
        (tiny.classifier, {"id2label": {"1": "a", "2": "b", "3": "c"}}),
        (tiny.classifier, {"problem_type": "guessing"}),
        (tiny.vit, {"patch_size": 0}),
        (tiny.vit, {"patch_size": [8]}),
        (tiny.vit, {"image_size": "large"}),
        (tiny.vit, {"id2label": {}}),
        (tiny.gpt2, {"n_head": 0}),
        (tiny.gpt2, {"layer_types": 3}),
    ],
)
def test_an_entry_that_cannot_be_is_named_with_its_value(tmp_path: Path, model: Model, change: dict[str, Any]) -> None:
    folder = changed(model, tmp_path, change)
    ((name, value),) = change.items()
    said = "keys [" if name == "id2label" and isinstance(value, dict) else str(value)
    refused(folder, folder / "config.json", name, said)


@pytest.mark.parametrize(
    ("model", "change"),
    [
        (tiny.bert, {"num_hidden_layers": ENDLESS}),
        (tiny.bert, {"num_hidden_layers": 2**31}),
        (tiny.bert, {"num_hidden_layers": 0}),
        (tiny.bert, {"num_hidden_layers": -1}),
        (tiny.bert, {"hidden_size": 6 * ENDLESS}),
        (tiny.bert, {"vocab_size": 2**31 - 1}),
        (tiny.bert, {"vocab_size": 10**30}),
        (tiny.bert, {"intermediate_size": ENDLESS}),
        (tiny.bert, {"intermediate_size": 64}),
        (tiny.bert, {"max_position_embeddings": ENDLESS}),
        (tiny.bert, {"type_vocab_size": ENDLESS}),
        (tiny.classifier, {"num_labels": 2**30, "id2label": None}),
        (tiny.gpt2, {"n_layer": ENDLESS}),
        (tiny.gpt2, {"n_positions": ENDLESS}),
        (tiny.vit, {"num_hidden_layers": ENDLESS}),
        (tiny.vit, {"num_channels": ENDLESS}),
        (tiny.vit, {"patch_size": 16}),
        (tiny.vit, {"num_channels": 4}),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_unbuilt(
    tmp_path: Path, model: Model, change: dict[str, Any]
) -> None:
    name, value = next(iter(change.items()))
    refused(changed(model, tmp_path, change), "config.json", name, value)


def test_lists_of_depths_are_counted_too(tmp_path: Path) -> None:
    entries = {"model_type": "swin", "depths": [1, ENDLESS], "num_heads": [3, 3], "embed_dim": 12}
    stored = [fit.HeaderTensor(tmp_path / "model.safetensors", (12, 12), "F32")] * 30
    with pytest.raises(BadInput, match=rf"depths = \[1, {ENDLESS}\].* 30 tensors"):
        fit.sketch(tmp_path / "config.json", entries, stored, transformers.AutoModel.from_config, ratio=2)


def test_counts_of_nested_configs_are_counted_too(tmp_path: Path) -> None:
    entries = {"model_type": "clip", "vision_config": {"num_hidden_layers": ENDLESS}}
    stored = [fit.HeaderTensor(tmp_path / "model.safetensors", (12, 12), "F32")] * 30
    with pytest.raises(BadInput, match=rf"num_hidden_layers = {ENDLESS}.* 30 tensors"):
        fit.sketch(tmp_path / "config.json", entries, stored, transformers.AutoModel.from_config, ratio=2)


def test_a_class_that_builds_without_end_is_stopped(tmp_path: Path) -> None:
    def endless(config: Any) -> nn.Module:
        return nn.ModuleList(nn.Identity() for _ in iter(int, 1))

    stored = [fit.HeaderTensor(tmp_path / "model.safetensors", (12, 12), "F32")] * 30
    with pytest.raises(BadInput, match="parts"):
        fit.sketch(tmp_path / "config.json", {"model_type": "bert"}, stored, endless, ratio=2)


def test_shapes_that_differ_name_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    folder = changed(tiny.bert, tmp_path, {"intermediate_size": 64})
    refused(folder, "intermediate.dense.bias", "(96,)", "(64,)", "intermediate_size = 64", "5 more")
    with pytest.raises(BadInput) as stopped:
        load_model(str(folder))
    assert "above report" not in str(stopped.value)


# what would be dropped


def test_more_layers_than_the_config_says(tmp_path: Path) -> None:
    refused(changed(tiny.bert, tmp_path, {"num_hidden_layers": 1}), "encoder.layer.1", "num_hidden_layers = 1")
    shutil.rmtree(tmp_path / "model")
    refused(changed(tiny.bert, tmp_path, {"num_hidden_layers": 3}), "no weights for encoder.layer.2", "= 3")


def test_biases_that_the_config_denies(tmp_path: Path) -> None:
    refused(changed(tiny.vit, tmp_path, {"qkv_bias": False}), "_proj.bias", "qkv_bias = false")


@pytest.mark.parametrize("name", ["attention.self.distance_embedding.weight", "crossattention.self.key.weight"])
def test_weights_of_a_block_that_the_class_does_not_know(tmp_path: Path, name: str) -> None:
    key = f"encoder.layer.0.{name}"
    folder = changed(tiny.bert, tmp_path, {}, lambda weights: weights.update({key: torch.zeros(79, 8)}))
    refused(folder, key, "BertModel", "does not have")


def test_old_buffers_and_unused_pretraining_weights_are_no_loss(tmp_path: Path, caplog: Any) -> None:
    buffers = {"embeddings.position_ids": torch.arange(40)[None], "embeddings.token_type_ids": torch.zeros(1, 40)}
    folder = changed(tiny.bert, tmp_path, {}, lambda weights: weights.update(buffers))
    load_model(str(folder))
    config = transformers.ViTConfig(**{**IMAGE, "encoder_stride": 8, "num_labels": 2})
    transformers.ViTModel(config, use_mask_token=True).save_pretrained(tmp_path / "vit")
    load_model(str(tmp_path / "vit"))
    masks = {f"transformer.h.{i}.attn.{name}": torch.ones(1) for i in range(2) for name in ("bias", "masked_bias")}
    load_model(str(changed(tiny.gpt2, tmp_path / "gpt2", {}, lambda weights: weights.update(masks))))
    assert caplog.records == []


def test_weights_of_a_head_that_the_class_does_not_know(tmp_path: Path) -> None:
    key = "classifier.norm.weight"
    folder = changed(tiny.classifier, tmp_path, {}, lambda weights: weights.update({key: torch.zeros(48)}))
    refused(folder, key, "BertForSequenceClassification", "does not have")


@pytest.mark.parametrize("framework", ["TF", "Flax"])
def test_a_model_of_another_framework_is_the_same_model(tmp_path: Path, framework: str, caplog: Any) -> None:
    load_model(
        str(changed(tiny.classifier, tmp_path, {"architectures": [f"{framework}BertForSequenceClassification"]}))
    )
    assert caplog.records == []


@pytest.mark.parametrize(
    ("model", "architecture"),
    [
        (tiny.gpt2, "GPT2DoubleHeadsModel"),
        (tiny.bert, "BertForPreTraining"),
        (tiny.bert, "BertForMultipleChoice"),
        (tiny.bert, "SomethingElse"),
    ],
)
def test_a_head_that_no_task_has_is_never_dropped_without_a_word(
    tmp_path: Path, caplog: Any, model: Model, architecture: str
) -> None:
    folder = changed(model, tmp_path, {"architectures": [architecture]})
    refused(folder, architecture, "--task feature-extraction", "without its head")
    with caplog.at_level(logging.WARNING):
        load_model(str(folder), "feature-extraction")
        load_model(str(folder), "feature-extraction")
    (record,) = ours(caplog)  # a job loads its model more than once
    assert all(part in record.getMessage() for part in (architecture, "left out", str(folder)))


def test_heads_of_other_tasks_are_one_line(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        load_model(str(tiny.classifier()), "feature-extraction")
    (record,) = ours(caplog)
    assert "BertForSequenceClassification" in record.getMessage()
    assert "left out: 'classifier'" in record.getMessage()


@pytest.mark.parametrize("entry", ["add_cross_attention", "is_encoder_decoder"])
def test_a_second_input_is_refused(tmp_path: Path, entry: str) -> None:
    refused(changed(tiny.bert, tmp_path, {entry: True, "is_decoder": True}), f"{entry} = true")


def test_a_task_that_a_model_cannot_have() -> None:
    refused(tiny.bert(), "bert", "image-classification", task="image-classification")


# code, quantised weights, switches


def test_a_model_that_needs_its_own_code(tmp_path: Path) -> None:
    change = {"auto_map": {"AutoModel": "modeling.Mine"}, "architectures": ["SomethingElse"]}
    refused(changed(tiny.bert, tmp_path, change), "config.json", "auto_map", "modeling.Mine", "code")
    refused(tmp_path / "model", "auto_map", task="feature-extraction")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "compressed-tensors", "torchao", "mine"])
def test_quantised_weights(tmp_path: Path, method: str) -> None:
    change = {"quantization_config": {"quant_method": method, "load_in_8bit": True}}
    refused(changed(tiny.bert, tmp_path, change), "config.json", "quantization_config", method, "float checkpoint")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_without_a_word_in_the_config(tmp_path: Path, dtype: torch.dtype) -> None:
    key = "encoder.layer.0.output.dense.weight"
    folder = changed(tiny.bert, tmp_path, {}, lambda weights: weights.update({key: weights[key].to(dtype)}))
    refused(folder, "model.safetensors", key, "quantised")


@pytest.mark.parametrize(
    "switches",
    [
        {"output_attentions": True, "output_hidden_states": True},
        {"return_dict": False},
        {"torchscript": True},
        {"attn_implementation": "flash_attention_2"},
        {"attn_implementation": "somebody/kernels"},
        {"attn_implementation": 3},
        {"_attn_implementation": "flash_attention_3", "_attn_implementation_internal": "eager"},
        {"gradient_checkpointing": True, "chunk_size_feed_forward": 7},
        {"dtype": "evil"},
        {"torch_dtype": ["float16"]},
        {"transformers_weights": "../elsewhere.safetensors", "fusion_config": {"patch_embeddings": True}},
        {"to_dict": 1, "attribute_map": {"hidden_size": "x"}, "sub_configs": 3, "base_model_tp_plan": 5},
    ],
)
def test_how_a_model_runs_is_not_for_its_config_to_say(tmp_path: Path, switches: dict[str, Any]) -> None:
    found, _ = load_model(str(changed(tiny.bert, tmp_path, switches)))
    expected, _ = load_model(str(tiny.bert()))
    ids = {"input_ids": torch.randint(5, 100, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    with torch.no_grad():
        one, other = found(**ids), expected(**ids)
    assert one.keys() == other.keys()
    assert torch.equal(one["last_hidden_state"], other["last_hidden_state"])


# files


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs(tmp_path: Path, name: str) -> None:
    folder = changed(tiny.bert, tmp_path, {})
    (folder / name).write_bytes(POINTER)
    refused(folder, folder / name, "git lfs pull")


def test_a_pointer_in_place_of_a_shard_or_the_index(tmp_path: Path) -> None:
    for path in (max(sharded(tmp_path).glob("model-*.safetensors")), tmp_path / "model.safetensors.index.json"):
        path.write_bytes(POINTER)
        refused(tmp_path, path, "git lfs pull")


def test_the_folder_of_an_adapter(tmp_path: Path) -> None:
    folder = changed(tiny.bert, tmp_path, {})
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "adapter", "merge")


def test_an_old_sentence_transformers_folder_says_where_the_model_lies(tmp_path: Path) -> None:
    shutil.copytree(tiny.bert(), tmp_path / "0_Transformer")
    (tmp_path / "modules.json").write_text("[]")
    refused(tmp_path, tmp_path / "0_Transformer", "give that folder")


def test_a_config_from_before_model_types(tmp_path: Path) -> None:
    model, _ = load_model(str(changed(tiny.bert, tmp_path, {"model_type": None})))
    assert type(model) is transformers.BertModel
    refused(changed(tiny.bert, tmp_path / "two", {"model_type": None, "architectures": None}), "model_type is missing")


# families


@pytest.mark.usefixtures("by_torchscript")
def test_a_distilled_deit_is_an_image_classifier_and_can_be_cut(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.DeiTConfig(**IMAGE)
    transformers.DeiTForImageClassificationWithTeacher(config).eval().save_pretrained(tmp_path / "deit")
    model, task = load_model(str(tmp_path / "deit"))
    assert (type(model).__name__, task.name) == ("DeiTForImageClassificationWithTeacher", "image-classification")
    pruned = optin_deploy.prune(model, tiny_batches(model), flops=0.6, align=8, compensation=False)
    layout = find_in(model).layout
    assert set(pruned.plan.keep) <= set(layout.by_name)
    masked, places = Program(layout.structure.network), masks(layout, pruned.plan.keep)
    for batch in probes(model):
        found = outputs(pruned.model, batch, states=False)["logits"]
        assert error(masked(batch, masks=places).outputs["logits"], found) < 1e-5
        assert error(outputs(model, batch, states=False)["logits"], found) > 1e-3
    assert same(optin_deploy.load(pruned.save(tmp_path / "smaller")), pruned.model)


def test_a_one_channel_model_gets_grey_images(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**{**IMAGE, "num_channels": 1})
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    sizes = {"size": {"height": 32, "width": 32}, "image_mean": [0.5], "image_std": [0.5]}
    samples = bundled_samples("image")[:4]
    (batch,) = image_rows(samples, ViTImageProcessorPil(**sizes), channels=1).batches
    assert batch["image"].shape == (4, 1, 32, 32)
    grey = samples[0].image.convert("L").resize((32, 32), resample=2)  # type: ignore[union-attr]
    expected = (torch.tensor(np.asarray(grey)) / 255 - 0.5) / 0.5  # (32, 32)
    assert (batch["image"][0, 0] - expected).abs().max() < 0.02
    with torch.no_grad():
        assert model(pixel_values=batch["image"]).logits.shape == (4, 4)
    with pytest.raises(BadInput, match="1 or 3 of them stand at axis 1 or last"):
        image_rows(samples, ViTImageProcessorPil(**sizes), channels=4)


# the wall


def test_whatever_transformers_raises_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange(Exception):
        pass

    def fails(*_: object, **__: object) -> None:
        raise Strange("of its own kind\nand a report")

    monkeypatch.setattr(transformers.BertModel, "from_pretrained", fails)
    refused(tiny.bert(), tiny.bert(), "of its own kind")


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "/dev/null", "\ud800/x/y"])
def test_names_that_no_folder_has(name: str) -> None:
    with pytest.raises(BadInput):
        load_model(name)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError, SystemExit])
def test_what_is_not_about_the_files_passes_the_wall(kind: type[BaseException]) -> None:
    before = transformers.utils.logging.get_verbosity()
    with pytest.raises(kind), wall("a file", "Do this."):
        raise kind
    assert transformers.utils.logging.get_verbosity() == before


@pytest.mark.parametrize("part", ["", "model"])
def test_a_model_that_is_pruned_already_is_told_so(part: str) -> None:
    with pytest.raises(BadInput, match=r"pruned already\. Give the dense model"):
        load_model(str(tiny.finished_job() / part))
