"""Folders of cut transformers models: every family comes back the same in a fresh process; hostile ones are refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import optin_deploy
import optin_deploy.checkpoint.smaller
from benchmarks.zoo.families import FAMILIES
from benchmarks.zoo.family import Family, scatter
from optin_deploy.checkpoint.reloading import differs, load
from optin_deploy.checkpoint.smaller import MANIFEST, config_hash, read_saved, remedy, save
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.torch import CutModule, cut_and_tell
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.files.storage import sha256_file
from optin_deploy.network.graph import Network
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.read_torch import read_module
from optin_deploy.planning.plan import NetworkPlan, plan_of
from optin_deploy.structure.find import find
from support import tiny_checkpoint as tiny
from support.project import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("heads", "groups", "neurons", "channels")
NAMES = (
    *("bert", "roberta", "distilbert", "gpt2", "llama", "phi-3", "bart"),
    *("vit", "deit", "swin", "resnet", "mobilenet-v2"),
)
LOADS_AND_RUNS = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import optin_deploy

torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = optin_deploy.load(folder)
    assert not any(part.training for part in model.modules())
    with torch.no_grad():
        output = model(**load_file(folder / "probe.safetensors"))
    found = {name: value.contiguous() for name, value in output.items() if isinstance(value, torch.Tensor)}
    save_file(found, folder / "found.safetensors", {"class": type(model).__name__})
"""


@dataclass(frozen=True, eq=False)
class Case:
    """A cut model, and all that is known of it."""

    dense: nn.Module
    cut: CutModule
    network: Network
    plan: NetworkPlan
    probes: tuple[dict[str, Tensor], ...]

    def save(self, folder: Path, **more: Any) -> Path:
        return save(self.cut.module, self.cut.attributes, self.plan, folder, **more)


def cut_of(model: nn.Module, family: Family, seed: int = 0) -> Case:
    """Between half and all units of every group stay, other ones in each."""
    network = read_module(model, family.feeds(), axes={one.name: one.free for one in family.inputs}, dynamo=False)
    probes = (family.feeds(1, batch=7, length=17, target=19), family.feeds(2, batch=5, length=11, target=23))
    layout, rng = find(network, probes), np.random.default_rng(seed)
    keep = {
        group.name: sorted(rng.choice(group.units, rng.integers(group.units // 2, group.units), replace=False).tolist())
        for group in layout.groups
        if group.kind in KINDS and group.units > 1
    }
    found = cut_and_tell(model, layout, keep, probes)
    return Case(model, found, cut(layout, keep), plan_of(layout, keep), probes)


def dense(name: str) -> Any:
    """A model whose weights all matter, as its class is by default."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[name].build()
        scatter(model)
    return model.eval()


@cache
def case(name: str, seed: int = 0) -> Case:
    found = cut_of(dense(name), FAMILIES[name], seed)
    assert not found.cut.why_graph
    return found


def outputs(model: Any, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: value for name, value in model(**feeds).items() if isinstance(value, Tensor)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return case("bert").save(tmp_path / "smaller")


def edit(path: Path, **change: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def sealed(folder: Path) -> None:
    """As a hostile folder would be: every hash fits."""
    weights, config = sha256_file(folder / "model.safetensors"), config_hash(folder / "config.json", "")
    edit(folder / MANIFEST, weights_sha256=weights, config_sha256=config)


# A fresh process


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reload")
    for i, name in enumerate(NAMES):
        case(name).save(folder / name / "model" if i % 2 else folder / name)  # as optin-export writes it: DIR/model
        save_file(case(name).probes[1], folder / name / "probe.safetensors")
    command = [sys.executable, "-W", "error::UserWarning", "-c", LOADS_AND_RUNS, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_reload_in_a_fresh_process_gives_the_same_outputs(name: str, reloaded: Path) -> None:
    one, found = case(name), load_file(reloaded / name / "found.safetensors")
    expected = outputs(one.cut.module, one.probes[1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    dense = outputs(one.dense, one.probes[1])
    assert max(float((dense[key] - found[key]).abs().max()) for key in found) > 1e-2
    folder = reloaded / name if (reloaded / name / MANIFEST).is_file() else reloaded / name / "model"
    assert differs(folder, one.network, one.probes) == ""
    params = read_saved(folder)[0].params
    counts = [sum(p.numel() for p in model.parameters()) for model in (one.dense, one.cut.module)]
    assert [params.dense, params.pruned] == counts


def test_the_folder_says_what_it_holds(tmp_path: Path) -> None:
    one = case("phi-3")
    folder = one.save(tmp_path / "out" / "model", about={"key": "abc"}, files={"1_Pooling/config.json": b"{}\n"})
    found, plan = read_saved(folder)
    assert (found.model_class, found.network, plan) == ("Phi3ForCausalLM", one.plan.network, one.plan)
    assert found.sizes == one.cut.attributes
    assert any("." in name for _, name in found.sizes)  # also one of a config that a layer has for itself
    assert dict(found.about) == {"key": "abc"}
    assert (folder / "1_Pooling" / "config.json").read_bytes() == b"{}\n"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Phi3ForCausalLM"]
    assert type(optin_deploy.load(folder.parent)) is hf.Phi3ForCausalLM


def test_tied_weights_are_one_again_and_a_cut_decoder_generates(tmp_path: Path) -> None:
    for name in ("gpt2", "llama"):
        one = case(name)
        loaded = load(one.save(tmp_path / name))
        tied = one.dense.config.tie_word_embeddings
        assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
        assert len(list(loaded.parameters())) == len(list(one.dense.parameters()))
        how = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        ids = one.probes[0]["input_ids"][:2]
        assert torch.equal(loaded.generate(ids, **how), one.cut.module.generate(ids, **how))


def test_buffers_that_a_state_dict_leaves_out_come_back(tmp_path: Path) -> None:
    model = dense("bert")
    model.bert.embeddings.position_ids = model.bert.embeddings.position_ids.flip(-1)
    one = cut_of(model, FAMILIES["bert"])
    loaded = load(one.save(tmp_path / "smaller"))
    assert torch.equal(loaded.bert.embeddings.position_ids, model.bert.embeddings.position_ids)
    assert differs(tmp_path / "smaller", one.network, one.probes) == ""


@pytest.mark.parametrize("pooled", [True, False])
def test_a_pooler_is_loaded_only_if_it_was_saved(pooled: bool, tmp_path: Path) -> None:
    model = dense("bert").bert
    if not pooled:
        model.pooler = None
    one = cut_of(model, FAMILIES["bert"])
    loaded = load(one.save(tmp_path / "smaller"))
    assert (loaded.pooler is not None) == pooled
    assert outputs(loaded, one.probes[0]).keys() == outputs(one.cut.module, one.probes[0]).keys()
    assert read_saved(tmp_path / "smaller")[0].params.dense == sum(p.numel() for p in model.parameters())


def test_a_pooler_without_weights_stays(tmp_path: Path) -> None:
    one = cut_of(dense("resnet").resnet, FAMILIES["resnet"])
    found = outputs(load(one.save(tmp_path / "smaller")), one.probes[0])
    assert torch.equal(found["pooler_output"], outputs(one.cut.module, one.probes[0])["pooler_output"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_stay_half(dtype: torch.dtype, tmp_path: Path) -> None:
    one = cut_of(dense("bert").to(dtype), FAMILIES["bert"])
    loaded = load(one.save(tmp_path / "smaller"))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(outputs(loaded, one.probes[0])["logits"], outputs(one.cut.module, one.probes[0])["logits"])
    assert differs(tmp_path / "smaller", one.network, one.probes) == ""


def test_a_loaded_classifier_works_in_a_pipeline(tmp_path: Path) -> None:
    model = hf.BertForSequenceClassification.from_pretrained(tiny.classifier()).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny.classifier())
    case_of = cut_of(model, FAMILIES["bert"])
    folder = case_of.save(tmp_path / "smaller", preprocessor=tokenizer)
    again = hf.AutoTokenizer.from_pretrained(folder)
    pipe = hf.pipeline("text-classification", model=optin_deploy.load(folder), tokenizer=again)
    texts = list(tiny.texts()[:4])
    for text, found in zip(texts, pipe(texts, top_k=None, batch_size=2), strict=True):
        logits = outputs(case_of.cut.module, tokenizer(text, return_tensors="pt"))["logits"]
        expected = dict(zip(tiny.CLASSES, logits[0].softmax(0).tolist(), strict=True))
        assert {each["label"]: each["score"] for each in found} == pytest.approx(expected, abs=1e-5)


# What does not equal its graph


def test_what_is_not_its_graph_is_told(saved: Path) -> None:
    other = case("bert", seed=1)
    assert "differs from its graph by" in differs(saved, other.network, other.probes)
    assert "outputs" in differs(saved, cut_of(case("bert").dense.bert, FAMILIES["bert"]).network, other.probes)
    assert "does not run" in differs(saved, case("vit").network, case("vit").probes)
    again = case("gpt2").save(saved.parent / "gpt2")
    edit(again / MANIFEST, attributes={})
    assert "does not run" in differs(again, case("gpt2").network, case("gpt2").probes)
    (saved / MANIFEST).unlink()
    assert "is not a pruned model" in differs(saved, other.network, other.probes)


def test_a_class_that_is_not_of_transformers_is_not_saved(tmp_path: Path) -> None:
    class Mine(hf.BertModel):
        pass

    one = case("bert")
    for model in (Mine(one.dense.config), NetworkModule(one.network)):
        with pytest.raises(BadInput, match="no class of transformers"):
            save(model, {}, one.plan, tmp_path / "smaller")
    assert not list(tmp_path.iterdir())


# What does not belong together


def test_weights_that_are_damaged_or_foreign_are_refused(saved: Path) -> None:
    path = saved / "model.safetensors"
    whole, other = path.read_bytes(), case("bert", seed=1).save(saved.parent / "other")
    damages: list[tuple[Callable[[], Any], str]] = [
        (lambda: path.write_bytes(whole[:-100]), "truncated"),
        (lambda: path.write_bytes(b"PK\x03\x04 a zip, as torch writes it" * 99), "not a safetensors file"),
        (lambda: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "not a safetensors file"),
        (lambda: path.unlink(), "does not exist"),
        (lambda: save_file(dict(case("bert").dense.state_dict()), path), "not the file that was saved here"),
        (lambda: shutil.copy(other / path.name, path), "not the file that was saved here"),
    ]
    for damage, says in damages:
        damage()
        with pytest.raises(BadInput, match=rf"model\.safetensors.*{says}.*optin-export MODEL --out {saved}` again"):
            load(saved)


def change_tensor(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sealed(folder)


WEIGHT = "bert.encoder.layer.0.intermediate.dense.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(WEIGHT), "has no '" + WEIGHT),
        (lambda t: t.update(strange=torch.ones(2)), "a strange 'strange'"),
        (lambda t: t.update({WEIGHT: torch.ones(81, 48)}), r"\(81, 48\)"),
        (lambda t: t.update({WEIGHT: torch.ones(48)}), r"\(48,\)"),
        (lambda t: t.update({WEIGHT: torch.ones(7, 48, 1)}), r"\(7, 48, 1\)"),
        (lambda t: t.update({WEIGHT: torch.ones(7, 48, dtype=torch.int64)}), "int64"),
    ],
)
def test_tensors_that_the_class_cannot_hold_are_named(change: Any, says: str, saved: Path) -> None:
    change_tensor(saved, change)
    with pytest.raises(PlanMismatch, match=rf"model\.safetensors does not fit Bert.*{says}.*optin-export"):
        load(saved)


PLACE = "bert.encoder.layer.0.attention.self"


@pytest.mark.parametrize(
    ("module", "attribute", "value"),
    [
        *((PLACE, name, 1) for name in ("forward", "__class__", "training", "_modules", "config", "nowhere", "query")),
        *((PLACE, name, 1) for name in ("config.__dict__", "config.nowhere", "config.id2label", "query.out_features")),
        *((path, "num_attention_heads", 1) for path in ("nowhere", "bert.encoder.layer.9", "bert.__class__")),
        *((PLACE, "num_attention_heads", value) for value in (-1, 7, 2**40, 2**70, [2], [], [[1]], {"a": 1}, {})),
        *((PLACE, "num_attention_heads", value) for value in ("2", 2.0, True, None)),
        (PLACE, "config.vocab_size", 10**6),
    ],
)
def test_sizes_that_a_module_does_not_have_are_refused(module: str, attribute: str, value: Any, saved: Path) -> None:
    edit(saved / MANIFEST, attributes={module: {attribute: value}})
    with pytest.raises(BadInput, match=rf"{MANIFEST}.*optin-export"):
        load(saved)


def test_rows_of_sizes_are_as_long_as_they_were(tmp_path: Path) -> None:
    one = case("swin")
    folder = one.save(tmp_path / "smaller")
    kept = dict(read_saved(folder)[0].attributes)
    for bad in (5, [4], [4, 5], [4, -1], [4, 4, 4]):
        edit(folder / MANIFEST, attributes={**kept, "swin.encoder.layers.0.blocks.0.attention": {"window_size": bad}})
        with pytest.raises(BadInput, match=MANIFEST):
            load(folder)


FREE: dict[str, tuple[Any, ...]] = {
    "about": (..., {}, {"": {"": 1}}, {"x": None}),
    "network": (None, "", "x", "../.."),
    "attributes": ({},),  # what a module then does is another question
}


def test_any_value_in_any_field_of_the_manifest_is_loaded_or_refused(saved: Path) -> None:
    whole = json.loads((saved / MANIFEST).read_text())
    values: tuple[Any, ...] = (..., None, 0, -1, 2**70, 0.5, "", "x", "../..", [], [[]], {}, {"": {"": 1}}, {"x": None})
    for field in whole:
        for value in values:
            bent = {name: entry for name, entry in whole.items() if name != field}
            (saved / MANIFEST).write_text(json.dumps(bent if value is ... else {**bent, field: value}))
            if field in FREE and value in FREE[field]:
                load(saved)
            else:
                with pytest.raises(BadInput, match="optin-export"):
                    load(saved)
    (saved / MANIFEST).write_text(json.dumps(whole))
    load(saved)


@pytest.mark.parametrize("name", ["NotThere", "AutoModel", "pipeline", "os.system", "__builtins__", "", "BertConfig"])
def test_a_class_that_transformers_lacks_is_refused(name: str, saved: Path) -> None:
    edit(saved / MANIFEST, model_class=name)
    with pytest.raises(BadInput, match=rf"names class '{name}'.*transformers {hf.__version__}.*optin-export"):
        load(saved)


def test_a_class_of_another_family_is_refused(saved: Path) -> None:
    for name in ("ElectraForSequenceClassification", "ViTModel", "BertModel", "LlamaForCausalLM", "PreTrainedModel"):
        edit(saved / MANIFEST, model_class=name)
        with pytest.raises(BadInput, match="optin-export"):
            load(saved)


@pytest.mark.parametrize(
    "change",
    [
        *({"num_hidden_layers": value} for value in (1, 3, 0, -1, 10**7, "x", None)),
        *({"hidden_size": value} for value in (49, 96, 2**30, 47.5)),
        *({"vocab_size": 2**31}, {"max_position_embeddings": 10**12}, {"num_attention_heads": 0}),
        *({"auto_map": {"AutoModel": "x.Mine"}}, {"model_type": "vit"}, {"model_type": []}, {"hidden_act": "evil"}),
        *({"quantization_config": {"quant_method": "gptq"}}, {"__class__": "x"}, {"num_labels": 10**12}),
    ],
)
def test_a_config_of_another_model_is_refused(change: dict[str, Any], saved: Path) -> None:
    edit(saved / "config.json", **change)
    with pytest.raises(PlanMismatch, match=r"config\.json is not the config that was saved here.*optin-export"):
        load(saved)
    sealed(saved)
    if why := differs(saved, case("bert").network, case("bert").probes):
        assert "optin-export" in why or "does not run" in why


def test_labels_may_be_called_otherwise(saved: Path) -> None:
    names = {str(i): f"class {i}" for i in range(5)}
    edit(saved / "config.json", id2label=names, label2id={name: int(i) for i, name in names.items()})
    assert load(saved).config.id2label[3] == "class 3"


def test_the_plan_of_another_model_is_refused(saved: Path) -> None:
    for other in (case("vit").plan, case("bert", seed=1).plan):
        other.write(saved / "plan.json")
        with pytest.raises(PlanMismatch, match=r"plan\.json is not the plan that made these weights.*optin-export"):
            load(saved)


@pytest.mark.parametrize("file", ["plan.json", "optin.json", "config.json"])
def test_a_file_that_is_missing_or_no_object_is_named(file: str, saved: Path) -> None:
    for content in (None, b"", b"{", b"[]", b"\xff", b"[" * 10**5):
        (saved / file).unlink(missing_ok=True)
        if content is not None:
            (saved / file).write_bytes(content)
        with pytest.raises(BadInput, match=rf"{file}.*optin-export"):
            load(saved)


def test_a_folder_of_the_first_edition_is_refused_with_its_command(saved: Path, tmp_path: Path) -> None:
    home = tmp_path / "out dir" / "model"
    shutil.copytree(saved, home)
    (home / "layout.json").write_text("{}")
    (home.parent / "source.json").write_text(json.dumps({"model": "me/my model", "schema_version": 1}))
    command = f"Run `optin-export 'me/my model' --out {home.parent}` again."
    for folder in (home, home.parent):
        with pytest.raises(BadInput, match="was written by the first edition") as refused:
            optin_deploy.load(folder)
        assert str(refused.value).endswith(command)
    (home / "layout.json").unlink()
    edit(home / MANIFEST, schema_version=1)
    with pytest.raises(BadInput, match="was written by the first edition"):
        read_saved(home)
    edit(home / MANIFEST, schema_version=3)
    with pytest.raises(BadInput, match="schema_version 3"):
        read_saved(home)
    for named in (5, None, "a\nb"):
        (home.parent / "source.json").write_text(json.dumps({"model": named}))
        assert remedy(home) == f"Run `optin-export MODEL --out {home.parent}` again."


def test_dense_folders_and_none_at_all_are_not_taken_for_smaller_models(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"is not a pruned model.*optin-export"):
        optin_deploy.load(tmp_path / "nowhere")
    dense = Path(tiny.bert())
    asked = f"optin-export {dense} --flops 0.6 --out {dense.name}-0.6"
    with pytest.raises(BadInput, match=rf"is not a pruned model.*`{asked}`, then load {dense.name}-0.6\.$"):
        optin_deploy.load(dense)


# Saving


class Failing:
    """Writes half of its files, then fails."""

    def __init__(self, err: BaseException) -> None:
        self.err = err

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("half")
        raise self.err


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("exception", [OSError("no space left"), KeyboardInterrupt("Ctrl-C")])
def test_a_failed_save_leaves_the_old_folder_in_place(exception: BaseException, saved: Path) -> None:
    before = contents(saved.parent)
    with pytest.raises(type(exception), match=str(exception)):
        case("bert", seed=1).save(saved, preprocessor=Failing(exception))
    assert contents(saved.parent) == before


def test_a_failed_first_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(optin_deploy.checkpoint.smaller, "sha256_file", raising)
    with pytest.raises(OSError, match="no space left"):
        case("bert").save(tmp_path / "smaller")
    assert not list(tmp_path.iterdir())


def test_saving_does_not_change_the_model_and_gives_the_same_files(tmp_path: Path) -> None:
    one = case("llama")
    before, config = outputs(one.cut.module, one.probes[0]), one.cut.module.config.to_dict()
    assert contents(one.save(tmp_path / "one")) == contents(one.save(tmp_path / "two"))
    assert one.cut.module.config.to_dict() == config
    after = outputs(one.cut.module, one.probes[0])
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_files_of_others_are_not_replaced(saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    before = contents(saved)
    with pytest.raises(BadInput, match=r"notes\.txt: optin-deploy did not make this"):
        case("bert", seed=1).save(saved)
    assert contents(saved) == before


def test_scatter_leaves_no_unit_without_effect() -> None:
    """What the cases are made of: two cuts of one model differ."""
    model = dense("bert")
    one, other = (cut_of(model, FAMILIES["bert"], seed) for seed in (0, 1))
    feeds = one.probes[0]
    found = [outputs(each.cut.module, feeds)["logits"] for each in (one, other)]
    assert float((found[0] - found[1]).abs().max()) > 1e-2
