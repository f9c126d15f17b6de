"""A saved pruned model comes back the same in a fresh process; what does not belong together is refused with advice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import (
    ALL,
    SEQ_LEN,
    error,
    main_name,
    outputs,
    probes,
    random_plan,
    tiny_batches,
    tiny_model,
    zeroed,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import optin_deploy
import optin_deploy.pruned
from optin_deploy.arch.resolve import resolve
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.pruned import PrunedModel, load_pruned
from optin_deploy.rewrite.torch import rewrite_torch

ROOT = Path(__file__).resolve().parent.parent

LOADS_AND_RUNS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import optin_deploy

torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = optin_deploy.load(folder)
    assert not model.training
    inputs = load_file(folder / "probe.safetensors")
    with torch.no_grad():
        output = model(**inputs)
    found = {name: value.contiguous() for name, value in output.items()}
    save_file(found, folder / "found.safetensors", {"class": type(model).__name__})
"""

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned_model(name: str, *, seed: int = 0) -> PrunedModel:
    """A layer without heads, one without neurons, one cut unevenly."""
    model = tiny_model(name)
    layout = resolve(model)
    plan = random_plan(model, layout, seed=seed, no_heads=(1,), no_neurons=(2,))
    return PrunedModel(rewrite_torch(model, layout, plan), plan, layout, {"kept": plan.kept})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return pruned_model("bert").save(tmp_path / "smaller")


# A fresh process


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """What one fresh process gets out of the saved models of all architectures."""
    folder = tmp_path_factory.mktemp("reload")
    for i, name in enumerate(ALL):
        # every second one as optin-export writes it: DIR/model
        place = folder / name / "model" if i % 2 else folder / name
        pruned = pruned_model(name)
        pruned.save(place)
        save_file(probes(pruned.model)[0], folder / name / "probe.safetensors")
    command = [sys.executable, "-W", "error::UserWarning", "-c", LOADS_AND_RUNS, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return lambda name: load_file(folder / name / "found.safetensors")


@pytest.mark.parametrize("name", ALL)
def test_reload_in_a_fresh_process_gives_the_same_outputs(
    name: str, reloaded: Callable[[str], dict[str, Tensor]]
) -> None:
    pruned = pruned_model(name)
    expected = outputs(pruned.model, probes(pruned.model)[0], states=False)
    found = reloaded(name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    dense = outputs(tiny_model(name), probes(pruned.model)[0], states=False)
    assert error(dense[main_name(dense)], found[main_name(dense)]) > 1e-2


@pytest.mark.parametrize("name", ["bert", "vit+head"])
def test_loaded_model_has_the_original_class_and_fewer_parameters(name: str, tmp_path: Path) -> None:
    pruned = pruned_model(name)
    pruned.save(tmp_path / "out" / "model")
    for folder in (tmp_path / "out", tmp_path / "out" / "model"):
        again = load_pruned(folder)
        assert type(again.model) is type(tiny_model(name))
        assert type(optin_deploy.load(folder)) is type(again.model)
        assert (again.plan, again.layout, dict(again.report)) == (pruned.plan, pruned.layout, pruned.report)
        count = [sum(p.numel() for p in m.parameters()) for m in (again.model, pruned.model, tiny_model(name))]
        assert count[0] == count[1] < count[2]


@pytest.mark.parametrize("pooled", [True, False])
def test_pooler_is_loaded_only_if_it_was_saved(pooled: bool, tmp_path: Path) -> None:
    pruned = pruned_model("bert")
    if not pooled:
        pruned.model.pooler = None
    loaded = optin_deploy.load(pruned.save(tmp_path / "smaller"))
    assert (loaded.pooler is not None) == pooled
    batch = probes(loaded)[0]
    expected, found = outputs(pruned.model, batch), outputs(loaded, batch)
    assert [k for k, v in found.items() if v is not None] == [k for k, v in expected.items() if v is not None]
    assert torch.equal(found["last_hidden_state"], expected["last_hidden_state"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_stay_half(dtype: torch.dtype, tmp_path: Path) -> None:
    pruned = pruned_model("bert+head")
    pruned.model.to(dtype)
    loaded = optin_deploy.load(pruned.save(tmp_path / "smaller"))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(**probes(loaded)[0]).logits, pruned.model(**probes(loaded)[0]).logits)


def test_prune_save_load_in_three_lines(tmp_path: Path) -> None:
    model = tiny_model("distilbert+head")
    pruned = optin_deploy.prune(model, tiny_batches(model), flops=0.6, seq_len=SEQ_LEN, align=8)
    pruned.save(tmp_path / "smaller")
    loaded = optin_deploy.load(tmp_path / "smaller")
    for batch in probes(model):
        assert torch.equal(outputs(loaded, batch)["logits"], outputs(pruned.model, batch)["logits"])
    assert pruned.report["params"]["pruned"] == sum(p.numel() for p in loaded.parameters())
    assert 0 < pruned.plan.kept <= 0.6


# transformers.pipeline

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat")
TEXTS = ["the cat sat on a mat", "a mat", "the dog"]


def tiny_tokenizer() -> Any:
    """Words are tokens; ids as in WORDS."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **special)


def saved_with_tokenizer(name: str, folder: Path) -> tuple[Any, Any]:
    """Saves; returns the loaded model and what it must equal: the dense one without its cut units."""
    pruned = replace(pruned_model(name), preprocessor=tiny_tokenizer())
    pruned.save(folder)
    return optin_deploy.load(folder), zeroed(tiny_model(name), pruned.layout, pruned.plan)


def test_loaded_model_works_in_a_feature_extraction_pipeline(tmp_path: Path) -> None:
    model, reference = saved_with_tokenizer("bert", tmp_path / "smaller")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "smaller")
    pipe = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    for text, found in zip(TEXTS, pipe(TEXTS), strict=True):
        expected = outputs(reference, tiny_tokenizer()(text, return_tensors="pt"))["last_hidden_state"]
        assert error(expected, torch.tensor(found)) < 1e-5


def test_loaded_model_works_in_a_text_classification_pipeline(tmp_path: Path) -> None:
    model, reference = saved_with_tokenizer("distilbert+head", tmp_path / "smaller")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "smaller")
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)
    for text, found in zip(TEXTS, pipe(TEXTS, top_k=None, batch_size=2), strict=True):
        logits = outputs(reference, tiny_tokenizer()(text, return_tensors="pt"))["logits"]
        expected = {reference.config.id2label[i]: float(p) for i, p in enumerate(logits[0].softmax(0))}
        assert {each["label"]: each["score"] for each in found} == pytest.approx(expected, abs=1e-5)


# What does not belong together


def test_truncated_weights_are_refused(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"model\.safetensors is truncated .*optin-export"):
        load_pruned(saved)


def test_file_that_is_not_safetensors_is_refused(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"PK\x03\x04 a zip, as torch writes it" * 100)
    with pytest.raises(BadInput, match=r"not a safetensors file .*optin-export"):
        load_pruned(saved)


@pytest.mark.parametrize("foreign", ["dense weights of the model", "another architecture", "another plan"])
def test_foreign_weights_are_refused(foreign: str, saved: Path) -> None:
    other = {
        "dense weights of the model": lambda: tiny_model("bert"),
        "another architecture": lambda: tiny_model("vit"),
        "another plan": lambda: pruned_model("bert", seed=1).model,
    }[foreign]()
    save_file(other.state_dict(), saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanMismatch, match=r"model\.safetensors does not fit .*optin-export"):
        load_pruned(saved)


def test_foreign_weights_of_the_same_shapes_are_refused(saved: Path) -> None:
    # Another fine-tune cut to the same widths: only the hash in the manifest can tell.
    tensors = load_file(saved / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"] += 1
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        load_pruned(saved)


def edit(path: Path, **change: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def test_edited_plan_is_refused(saved: Path) -> None:
    plan = load_pruned(saved).plan
    heads = [list(kept) for kept in plan.heads]
    heads[0][0] = next(unit for unit in range(6) if unit not in heads[0] and unit < heads[0][1])
    edit(saved / "plan.json", heads=heads)  # the same widths: the weights would load
    with pytest.raises(PlanMismatch, match=r"plan\.json is not the plan that made these weights.*optin-export"):
        load_pruned(saved)


def test_plan_of_another_model_is_refused(saved: Path) -> None:
    other = pruned_model("vit").plan
    (saved / "plan.json").write_text(json.dumps(other.to_json()))
    with pytest.raises(PlanMismatch, match=rf"made for layout {other.layout_hash[:12]}.*BertModel.*optin plan"):
        load_pruned(saved)


def test_plan_of_another_model_is_refused_before_cutting() -> None:
    model = tiny_model("bert")
    with pytest.raises(PlanMismatch, match="BertModel"):
        rewrite_torch(model, resolve(model), pruned_model("electra").plan)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"heads": [[0], [1]]}, "2 layers"),
        ({"heads": [[0], [1], [6]]}, "keeps heads 6"),
        ({"heads": [[1, 0], [1], [2]]}, "ascending"),
        ({"heads": [[-1], [1], [2]]}, "negative"),
        ({"heads": [["a"], [1], [2]]}, "not a plan.json"),
        ({"heads": None}, "not a plan.json"),
        ({"colour": "red"}, "colour"),
        ({"schema_version": 99}, "schema_version 99"),
    ],
)
def test_damaged_plan_is_refused_with_the_reason(change: dict[str, Any], says: str, saved: Path) -> None:
    if change.get("heads"):
        change = {**change, "neurons": [[0]] * len(change["heads"])}
    edit(saved / "plan.json", **change)
    with pytest.raises(BadInput, match=says):
        load_pruned(saved)


@pytest.mark.parametrize("name", ["NotInTransformers", "AutoModel", "pipeline", "os.system", "__builtins__", ""])
def test_class_that_transformers_lacks_is_refused(name: str, tmp_path: Path) -> None:
    pruned = pruned_model("bert")
    layout = replace(pruned.layout, model_class=name)
    plan = replace(pruned.plan, layout_hash=layout.hash)
    folder = replace(pruned, plan=plan, layout=layout).save(tmp_path / "smaller")
    with pytest.raises(BadInput, match=rf"layout\.json names class '{name}'.*transformers {transformers.__version__}"):
        load_pruned(folder)


def test_edited_layout_is_refused(saved: Path) -> None:
    edit(saved / "layout.json", model_class="ElectraModel")
    with pytest.raises(PlanMismatch, match="ElectraModel"):
        load_pruned(saved)


@pytest.mark.parametrize("file", ["model.safetensors", "plan.json", "layout.json", "optin.json", "config.json"])
def test_missing_file_is_named(file: str, saved: Path) -> None:
    (saved / file).unlink()
    with pytest.raises(BadInput, match=rf"{file}.*optin-export"):
        load_pruned(saved)


@pytest.mark.parametrize("file", ["plan.json", "layout.json", "optin.json", "config.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_file_that_is_not_a_json_object_is_named(file: str, content: str, saved: Path) -> None:
    (saved / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInput, match=rf"{file}.*optin-export"):
        load_pruned(saved)


def test_config_of_another_model_type_is_refused(saved: Path) -> None:
    tiny_model("vit").config.save_pretrained(saved)
    with pytest.raises(BadInput, match=r"config\.json.*optin-export"):
        load_pruned(saved)


def test_config_of_another_size_is_refused(saved: Path) -> None:
    edit(saved / "config.json", num_hidden_layers=2)
    with pytest.raises(BadInput, match="optin-export"):
        load_pruned(saved)


def test_folder_of_a_later_version_is_refused(saved: Path) -> None:
    edit(saved / "optin.json", schema_version=99)
    with pytest.raises(BadInput, match="schema_version 99"):
        load_pruned(saved)


def test_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere.*optin-export"):
        optin_deploy.load(tmp_path / "nowhere")


def test_dense_model_folder_is_not_taken_for_a_pruned_one(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "dense")
    with pytest.raises(BadInput, match=r"is not a pruned model.*optin-export"):
        optin_deploy.load(tmp_path / "dense")


# A failed save


class FailingPreprocessor:
    """Writes half of its files, then fails."""

    def __init__(self, err: BaseException) -> None:
        self.err = err

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("half")
        raise self.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("exception", [OSError("no space left"), KeyboardInterrupt("Ctrl-C")])
def test_failed_save_leaves_the_old_folder_in_place(exception: BaseException, saved: Path) -> None:
    before = contents(saved.parent)
    other = replace(pruned_model("bert", seed=1), preprocessor=FailingPreprocessor(exception))
    with pytest.raises(type(exception), match=str(exception)):
        other.save(saved)
    assert contents(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("failing_step", ["write_tensors", "sha256_file"])
def test_failed_first_save_leaves_nothing(failing_step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(optin_deploy.pruned, failing_step, raising)
    with pytest.raises(OSError, match="no space left"):
        pruned_model("bert").save(tmp_path / "smaller")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("exception", [OSError("device busy"), KeyboardInterrupt("Ctrl-C")])
def test_save_that_fails_while_the_folders_change_places_keeps_the_old_one(
    exception: BaseException, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved.parent)
    rename = Path.replace

    def raising(source: Path, target: Path) -> Path:
        if Path(target) == saved and source.suffix == ".tmp":
            raise exception
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", raising)
    with pytest.raises(type(exception), match=str(exception)):
        pruned_model("bert", seed=1).save(saved)
    assert contents(saved.parent) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_save_replaces_an_older_model_whole(saved: Path) -> None:
    other = pruned_model("bert", seed=1)
    other.save(saved)
    assert load_pruned(saved).plan == other.plan
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    pruned = pruned_model("electra")
    batch = probes(pruned.model)[0]
    before, config = outputs(pruned.model, batch), pruned.model.config.to_dict()
    config["architectures"] = ["ElectraModel"]  # filled in, as save_pretrained does
    first = pruned.save(tmp_path / "one")
    second = pruned.save(tmp_path / "two")
    after = outputs(pruned.model, batch)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert pruned.model.config.to_dict() == config
    assert contents(first) == contents(second)


def test_saved_folder_can_be_moved(saved: Path, tmp_path: Path) -> None:
    shutil.move(saved, tmp_path / "elsewhere")
    assert load_pruned(tmp_path / "elsewhere").plan == pruned_model("bert").plan


def test_save_never_replaces_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="optin-deploy did not make this"):
        pruned_model("bert").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_save_never_replaces_a_model_with_files_of_others_in_it(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(BadInput, match=r"notes\.txt: optin-deploy did not make this"):
        pruned_model("bert", seed=1).save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_save_keeps_a_model_that_somebody_changed(saved: Path) -> None:
    (saved / "config.json").write_text("{}")
    other = pruned_model("bert", seed=1)
    other.save(saved)
    assert load_pruned(saved).plan == other.plan
    assert (saved.with_name(f"{saved.name}.kept1") / "config.json").read_text() == "{}"


@pytest.mark.parametrize("path", ["", "\0", "a\0b", 3, None, b"folder", "/", "x" * 300, "file.txt", "file.txt/inside"])
def test_a_path_that_no_folder_has_is_refused(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("mine")
    for use in (pruned_model("bert").save, optin_deploy.load):
        with pytest.raises(BadInput):
            use(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("path", ["new/in/new", "with space", "ünï", "-x", "a'b\"c", "new/../other"])
def test_a_folder_of_any_name_is_written_and_read(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pruned_model("bert").save(path)
    assert type(optin_deploy.load(path)).__name__ == "BertModel"
