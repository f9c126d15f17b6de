"""The tokenizer beside a model is the one that tokenizer.json says, and files that are not usable are named."""

from __future__ import annotations

import json
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds

from optin_deploy.checkpoint.loading import LoadedModel, load_dense
from optin_deploy.data.samples import Sample
from optin_deploy.errors import BadInput
from optin_deploy.feeds.preprocessor import load_preprocessor
from optin_deploy.feeds.raw_tokenizer import as_in_file, warn_of_unknown
from optin_deploy.files.wall import wall
from optin_deploy.jobs.building import _copy_support_files
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.serving.texts import tokenizer_files
from support import tiny_checkpoint as tiny
from support.tiny_folders import model_with, uncut
from support.tiny_ports import text_rows

MIXED = ("The river, the bridge and 27 CARS!", *tiny.texts()[:6], "Straße café 東京")


@cache
def other_tokenizer(kind: str) -> str:
    """tokenizer.json of another kind than BERT's, with few enough tokens for the tiny models."""
    models = {"unigram": kinds.Unigram(), "bpe": kinds.BPE(unk_token="<unk>"), "byte-bpe": kinds.BPE()}
    tokenizer = Tokenizer(models[kind])
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    options: dict[str, Any] = {"special_tokens": special, "show_progress": False, "vocab_size": 150}
    if kind == "unigram":
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer: Any = trainers.UnigramTrainer(unk_token="<unk>", **options)
    elif kind == "bpe":
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(**options)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        trainer = trainers.BpeTrainer(**options)
    tokenizer.train_from_iterator(tiny.texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return str(tokenizer.to_str(pretty=True))


def raw_ids(folder: Path, *texts: str) -> list[int]:
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw.no_truncation()
    raw.no_padding()
    return list(raw.encode(*texts).ids)


def same_ids(tokenizer: Any, folder: Path) -> bool:
    """Does a tokenizer give the ids of the folder's tokenizer.json, on single texts and on a pair?"""
    try:
        single = all(tokenizer(text, verbose=False)["input_ids"] == raw_ids(folder, text) for text in MIXED)
    except Exception:  # noqa: BLE001  # as tokenizers raises where a kind lacks its unknown token
        return False
    return single and tokenizer(*MIXED[:2], verbose=False)["input_ids"] == raw_ids(folder, *MIXED[:2])


CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "unigram-without-a-class": ("unigram", {}),
    "unigram-by-another-class": ("unigram", {"tokenizer_class": "DistilBertTokenizer"}),
    "unigram-without-special-tokens": ("unigram", dict.fromkeys(("pad_token", "unk_token", "cls_token"))),
    "bpe": ("bpe", {}),
    "byte-bpe": ("byte-bpe", {"tokenizer_class": "BertTokenizer"}),
    "wordpiece-by-roberta": (None, {"tokenizer_class": "RobertaTokenizer"}),
    "wordpiece-by-gpt2": (None, {"tokenizer_class": "GPT2Tokenizer"}),
    "wordpiece-cased-by-its-settings": (None, {"do_lower_case": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_tokenizer_json_however_the_class_is_named(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, settings = CASES[case]
    folder = model_with(tmp_path / "model", kind and other_tokenizer(kind), **settings)
    loaded = load_dense(str(folder))
    assert same_ids(loaded.preprocessor, folder)
    if not same_ids(transformers.AutoTokenizer.from_pretrained(folder), folder):  # what was used before
        assert "tokenizer.json is used" in caplog.text
    ids = {int(i) for batch in prepare_batches(loaded) for i in batch["input_ids"].flatten()}
    assert ids <= {i for text in MIXED for i in raw_ids(folder, text)} | {loaded.preprocessor.pad_token_id}
    assert loaded.preprocessor.pad_token in ("[PAD]", "<pad>")


def prepare_batches(loaded: LoadedModel) -> Any:
    rows = [Sample(text=text) for text in MIXED]
    return text_rows(rows, loaded.preprocessor).batches


@pytest.mark.parametrize("case", [None, "unigram-without-a-class", "byte-bpe", "wordpiece-by-roberta"])
def test_the_saved_and_the_shipped_tokenizer_is_the_file_itself(case: str | None, tmp_path: Path) -> None:
    kind, settings = CASES[case] if case else (None, {})
    folder = model_with(tmp_path / "model", kind and other_tokenizer(kind), **settings)
    work = Workspace(tmp_path / "work")
    uncut(folder).save(work.model_folder)
    _copy_support_files(work)
    content = (folder / "tokenizer.json").read_bytes()
    for saved in (work.model_folder, work.root):
        assert (saved / "tokenizer.json").read_bytes() == content
        assert same_ids(transformers.AutoTokenizer.from_pretrained(saved), folder)
    assert tokenizer_files(work.model_folder)["tokenizer.json"] == content


def test_texts_of_the_user_are_compared_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = model_with(tmp_path / "model")
    data = json.loads((folder / "tokenizer.json").read_text())
    known = {"id": 150, "content": "zyx", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data["added_tokens"].append({**known, "special": False})
    raw = json.dumps(data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    rows = [Sample(text="the river", source="a:1"), Sample(text="zyx", source="a:2")]
    assert as_in_file(tokenizer, raw.encode(), rows[:1], config, "file") is tokenizer
    assert not caplog.text
    found = as_in_file(tokenizer, raw.encode(), rows, config, "file")
    assert found("zyx")["input_ids"] == Tokenizer.from_str(raw).encode("zyx").ids
    assert "'zyx' (a:2)" in caplog.text


def test_a_tokenizer_that_not_even_its_file_gives_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model_with(tmp_path / "model", other_tokenizer("unigram"))
    built = transformers.AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(transformers, "PreTrainedTokenizerFast", lambda **_: built)
    with pytest.raises(BadInput, match=r"/tokenizer\.json and .*BertTokenizer.*other ids.*does not give them either"):
        load_dense(str(folder))


def test_many_unknown_tokens_are_told(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.bert())
    for texts, told in ((["東京 は 日本", "the river"], True), (["the river"] * 4, False)):
        caplog.clear()
        warn_of_unknown(tokenizer, tokenizer(texts)["input_ids"], "texts.txt")
        assert ("unknown to the tokenizer ([UNK])" in caplog.text) == told


def test_a_text_that_the_tokenizer_cannot_take_is_named() -> None:
    words = Tokenizer(kinds.WordLevel({"river": 0, "<pad>": 1}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    rows = [Sample(text="river", source="a.txt:1"), Sample(text="bridge", source="a.txt:2")]
    with pytest.raises(BadInput, match=r"a\.txt:2: the tokenizer cannot take this text"):
        text_rows(rows, tokenizer, "input_ids", "attention_mask", seq_len=4)


# files that are not what they should be

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 466247\n"


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"', "{", "", "[" * 100_000, "\ud800", POINTER])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_files_of_a_tokenizer_that_hold_something_else(name: str, content: str, tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model")
    (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(BadInput, match=name) as refused:
        load_dense(str(folder))
    assert "git lfs pull" in str(refused.value) or content is not POINTER


@pytest.mark.parametrize("content", ["[]", "null", "3", "{", "", POINTER])
def test_an_image_processor_that_is_something_else(content: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.vit(), tmp_path / "model"))
    (folder / "preprocessor_config.json").write_text(content)
    with pytest.raises(BadInput, match=r"preprocessor_config\.json"):
        load_dense(str(folder))


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0", "model": '])
def test_a_broken_tokenizer_json_is_the_file_that_is_named(content: str, tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(BadInput, match=r"/tokenizer\.json is not a tokenizer"):
        load_dense(str(folder))


def test_looking_for_the_field_says_nothing_of_its_trials(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = model_with(tmp_path / "model", tokenizer_class="CamembertTokenizer")
    file = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**file, "normalizer": None}))
    with pytest.raises(BadInput, match="The cause is 'tokenizer_class'"):
        load_dense(str(folder))
    assert not caplog.text


def test_the_field_that_breaks_a_tokenizer_is_named(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model", added_tokens_decoder={"zero": 1})
    with pytest.raises(BadInput, match=r"The cause is 'added_tokens_decoder' in tokenizer_config.json.*\{'zero': 1\}"):
        load_dense(str(folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", {"height": 10**9, "width": 10**9}), ("image_std", [0, 0, 0]), ("image_mean", "grey"), ("resample", 77)],
)
def test_the_field_that_breaks_an_image_processor_is_named(field: str, value: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.vit(), tmp_path / "model"))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(BadInput, match=rf"preprocessor_config\.json.*'{field}") as refused:
        load_dense(str(folder))
    assert str(10**9 if field == "size" else value) in str(refused.value)


@pytest.mark.parametrize("target", ["outside", "nowhere", "itself", "a pipe"])
def test_links_that_leave_the_folder_and_special_files_are_not_read(target: str, tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model")
    shutil.move(folder / "tokenizer.json", tmp_path / "outside.json")
    path = folder / "tokenizer.json"
    if target == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path if target == "itself" else tmp_path / f"{target}.json")
    with pytest.raises(BadInput, match=r"tokenizer\.json is (a link that leaves|not a regular file)"):
        load_preprocessor(folder, load_dense(str(tiny.bert())).model)


def test_links_within_the_folder_and_in_the_cache_of_the_hub_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    within = model_with(tmp_path / "model")
    (within / "tokenizer.json").rename(within / "own.json")
    (within / "tokenizer.json").symlink_to("own.json")
    assert load_dense(str(within)).files["tokenizer.json"] == (within / "own.json").read_bytes()

    cached = tmp_path / "hub/models--someone--bert"
    snapshot = cached / "snapshots/0123456789012345678901234567890123456789"
    (cached / "blobs").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(snapshot.name)
    shutil.copytree(tiny.bert(), snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(cached / f"blobs/{number}")
        path.symlink_to(f"../../blobs/{number}")
    for name, value in (("HF_HUB_OFFLINE", True), ("HF_HUB_CACHE", str(tmp_path / "hub"))):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    model = load_dense(str(tiny.bert())).model
    assert same_ids(load_preprocessor(snapshot, model), tiny.bert())


def test_a_tokenizer_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model")
    with (folder / "tokenizer.json").open("r+b") as file:
        file.truncate(2**30)  # a sparse file
    with pytest.raises(BadInput, match=r"tokenizer\.json is 1073741824 bytes; at most"):
        load_dense(str(folder))


def test_a_tokenizer_of_sentencepiece_says_how_to_convert_it(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model", tokenizer_class="XLMRobertaTokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "sentencepiece.bpe.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(BadInput, match=r"sentencepiece\.bpe\.model, of SentencePiece.*and save_pretrained"):
        load_dense(str(folder))


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    folder = model_with(tmp_path / "model")
    for path in (*folder.glob("tokenizer*"), *folder.glob("special_tokens*")):
        path.unlink()
    with pytest.raises(BadInput, match="model has no tokenizer: save it beside the weights"):
        load_dense(str(folder))


def test_a_panic_of_the_tokenizers_package_is_bad_input() -> None:
    class PanicException(BaseException):
        """As pyo3's own, which is no Exception."""

    with pytest.raises(BadInput, match="it broke: index out of bounds"), wall("it broke", "Stop."):
        raise PanicException("index out of bounds.")
    with pytest.raises(KeyboardInterrupt), wall("it broke", "Stop."):
        raise KeyboardInterrupt
