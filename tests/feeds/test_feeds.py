"""Texts become what a network takes of a tokenizer's outputs, in its types and lengths; none both learns and judges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from onnx import TensorProto

from optin_deploy.data.samples import Sample, read_samples
from optin_deploy.data.targets import Grade, Role
from optin_deploy.errors import BadInput
from optin_deploy.feeds.beside_graph import class_names, load_tokenizer
from optin_deploy.feeds.feeds import Drawing, Halves, Preparation, check_runs, read_feeds, read_judging
from optin_deploy.feeds.rows import Batching, Feeds, grouped, row_keys, rows_of
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from support import tiny_checkpoint as tiny
from support import tiny_ports
from support.tiny_graphs import INT64, value
from support.tiny_ports import LENGTH, text


def fed(network: Network, source: Any = None, drawing: Drawing = Drawing(), **options: Any) -> Halves:  # noqa: B008
    preparation = Preparation(tokenizer=str(tiny.bert()), seq_len=options.pop("seq_len", 16), **options)
    return read_feeds(network, tiny.lines() if source is None else source, preparation, drawing)


def rows_by_ids(feeds: Feeds) -> set[tuple[int, ...]]:
    return {tuple(row["input_ids"][0].tolist()) for row in feeds.rows()}


def test_texts_are_tokenised_as_transformers_does() -> None:
    found = fed(text(), drawing=Drawing(held_out=0))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.bert())
    samples = read_samples(tiny.lines())
    wanted = {
        tuple(tokenizer(sample.text, truncation=True, max_length=16, padding="max_length")["input_ids"])
        for sample in samples
    }
    rows = {(*row, *[0] * (16 - len(row))) for row in rows_by_ids(found.calibration)}
    assert found.held_out is None
    assert len(found.calibration) == len(samples)
    assert rows == wanted
    for batch in found.calibration.batches:
        assert list(batch) == list(tiny_ports.TEXT)
        assert torch.equal(batch["attention_mask"], (batch["input_ids"] != 0).long())


def test_only_what_the_network_takes_is_made_in_its_type() -> None:
    found = fed(text("input_ids", "position_ids", "attention_mask", dtype=TensorProto.INT32)).calibration
    batch = found.batches[0]
    assert list(batch) == ["input_ids", "position_ids", "attention_mask"]
    assert {each.dtype for each in batch.values()} == {torch.int32}
    assert torch.equal(
        batch["position_ids"], torch.arange(batch["input_ids"].shape[1]).int().expand_as(batch["input_ids"])
    )


@pytest.mark.parametrize("dtype", [TensorProto.BOOL, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8])
def test_masks_of_any_type_are_ones_and_zeros(dtype: int) -> None:
    network = tiny_ports.network(
        value("input_ids", "b", "n", dtype=INT64), value("attention_mask", "b", "n", dtype=dtype)
    )
    batch = fed(network).calibration.batches[0]
    assert torch.equal(batch["attention_mask"].long(), (batch["input_ids"] != 0).long())


def test_padding_on_the_left_moves_mask_and_positions(tmp_path: Path) -> None:
    shutil.copy(tiny.bert() / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"padding_side": "left", "pad_token": "[PAD]"}))
    names = ("input_ids", "attention_mask", "position_ids")
    found = read_feeds(
        text(*names), tiny.lines(), Preparation(str(tmp_path), seq_len=16), Drawing(held_out=0)
    ).calibration
    right = fed(text(*names), drawing=Drawing(held_out=0)).calibration
    assert any(batch["attention_mask"][:, 0].min() == 0 for batch in found.batches)
    for one, other in zip(found.batches, right.batches, strict=True):
        mask = one["attention_mask"]
        assert torch.equal(mask, other["attention_mask"].flip(1))
        assert torch.equal(one["position_ids"], (mask.cumsum(1) - 1).clamp(min=0))
    plain = [{name: each for name, each in batch.items() if name != "position_ids"} for batch in found.batches]
    again = [{name: each for name, each in batch.items() if name != "position_ids"} for batch in right.batches]
    assert [key for batch in plain for key in row_keys(batch)] == [key for batch in again for key in row_keys(batch)]


@pytest.mark.parametrize("ending", [".pt", ".pkl", ".npy", ".parquet", ""])
def test_other_files_are_refused_with_what_is_possible(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"data{ending}"
    path.write_bytes(b"x")
    with pytest.raises(
        BadInput, match=r"Possible: texts \(.txt, .jsonl, .csv\), a folder of images or recordings, or .*\.npz"
    ):
        fed(text(), path)


def test_a_fixed_length_is_filled_and_texts_are_cut_to_it() -> None:
    found = fed(text(shape=("batch", 12)), seq_len=None).calibration
    assert {batch["input_ids"].shape[1] for batch in found.batches} == {12}
    assert max(int(batch["attention_mask"].sum(1).max()) for batch in found.batches) == 12
    shorter = fed(text(shape=("batch", 12)), seq_len=8).calibration
    assert {batch["input_ids"].shape[1] for batch in shorter.batches} == {12}
    assert max(int(batch["attention_mask"].sum(1).max()) for batch in shorter.batches) == 8
    with pytest.raises(BadInput, match=r"--seq-len 20: .* takes exactly 12 tokens"):
        fed(text(shape=("batch", 12)), seq_len=20)


def test_a_fixed_batch_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    found = fed(text(shape=(1, LENGTH)))
    assert {rows_of(batch) for batch in found.calibration.batches} == {1}
    seven = fed(text(shape=(7, 12)), seq_len=None)
    assert {rows_of(batch) for batch in seven.calibration.batches} == {7}
    assert "do not fill a batch of exactly 7" in caplog.text
    with pytest.raises(BadInput, match="takes exactly 64 at once"):
        fed(text(shape=(64, 12)), seq_len=None)


def test_without_a_mask_nothing_is_padded(caplog: pytest.LogCaptureFixture) -> None:
    found = fed(text("input_ids")).calibration
    assert all(not (batch["input_ids"] == 0).any() for batch in found.batches)
    assert len({batch["input_ids"].shape[1] for batch in found.batches}) > 1
    assert caplog.text.count("no attention mask") == 1
    caplog.clear()
    fixed = fed(text("input_ids", shape=("batch", 30)), seq_len=None).calibration
    assert "it takes that for text" in caplog.text
    assert any((batch["input_ids"] == 0).any() for batch in fixed.batches)


def test_other_names_of_the_same_inputs_are_known() -> None:
    batch = fed(text("input_ids:0", "input_mask:0", "segment_ids:0")).calibration.batches[0]
    assert list(batch) == ["input_ids:0", "input_mask:0", "segment_ids:0", "attention_mask"]
    assert torch.equal(batch["attention_mask"], batch["input_mask:0"])
    assert list(fed(text("letters")).calibration.batches[0]) == ["letters"]


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (text("input_ids", "decoder_input_ids"), r"does not fill decoder_input_ids int64 \(batch, length\)\..*savez"),
        (text("input_ids", *(f"past_key_values.{i}" for i in range(60))), r"past_key_values.7 .* and 52 others\."),
        (text("attention_mask"), "no input of .* takes ids"),
        (text("input_ids", shape=("batch", 3, LENGTH)), r"\(rows, tokens\); it takes input_ids int64"),
        (tiny_ports.image("batch", 3, 8, 8), "does not fill image float"),
        (tiny_ports.network(value("input_ids", "b", 9, dtype=INT64), value("attention_mask", "b", 8, dtype=INT64)),
         "different fixed lengths"),
    ],
)  # fmt: skip
def test_what_a_text_cannot_fill_is_named(network: Network, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        fed(network)


def test_no_row_is_in_both_halves() -> None:
    found = fed(text(), drawing=Drawing(samples=30))
    assert found.held_out is not None
    assert len(found.calibration) == 30
    assert len(found.held_out) == 16
    assert not set(found.calibration.keys) & set(found.held_out.keys)
    again, other = fed(text(), drawing=Drawing(samples=30)), fed(text(), drawing=Drawing(samples=30, seed=1))
    assert again.calibration.fingerprint == found.calibration.fingerprint != other.calibration.fingerprint


def test_texts_that_differ_behind_the_last_token_do_not_judge(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "lines.txt"
    ends = ["of gold.", "of oil.", "by train.", "in winter."]
    path.write_text("".join(f"{text} {end}\n" for text in tiny.texts()[:10] for end in ends))
    with path.open("a") as file:
        file.writelines(f"{text}\n" for text in tiny.texts()[10:])
    found = fed(text(), path, seq_len=6)
    assert found.held_out is not None
    assert not set(found.calibration.keys) & set(found.held_out.keys)
    assert "equal a calibration row" in caplog.text
    path.write_text("".join(f"the market and {word} late\n" for word in tiny.WORDS.split()[:30]))
    with pytest.raises(BadInput, match=r"all \d+ rows that should judge .* --seq-len"):
        fed(text(), path, seq_len=4)


def test_rows_to_judge_leave_out_calibration_rows(tmp_path: Path) -> None:
    network = text()
    seen = fed(network, drawing=Drawing(held_out=0)).calibration
    preparation = Preparation(tokenizer=str(tiny.bert()), seq_len=16)
    with pytest.raises(BadInput, match="rows that should judge"):
        read_judging(network, tiny.lines(), seen, preparation)
    path = tmp_path / "eval.csv"
    path.write_text("text,label\nA new text.,1\nAnother one.,0\n" + tiny.texts()[0].replace(",", " ") + ",1\n")
    found = read_judging(network, path, seen, preparation)
    assert sorted(found.labels) == [0, 1]  # type: ignore[type-var]
    assert found.origin == str(path)


def test_texts_that_are_searched_stay_though_they_calibrate(caplog: pytest.LogCaptureFixture) -> None:
    """Of what calibrates, queries go; what they look for does not, nor the second text of a fresh scored pair."""
    network, words = text(), tiny.WORDS.split()
    texts = [f"{one} {other}" for one, other in zip(words[:12], words[12:24], strict=True)]
    roles = [
        *(Role(0, (1,)), Role(1, candidate=True), Role(2, (3,)), Role(3, (1,), candidate=True)),
        *(Role(4, scores=((5, 1.0),)), Role(5), Role(6, scores=((7, 2.0),)), Role(7)),
    ]
    samples = [Sample(text, label=role) for text, role in zip(texts, roles, strict=False)]
    preparation = Preparation(tokenizer=str(tiny.bert()), seq_len=16)
    learned = [Sample(texts[place]) for place in (1, 2, 3, 5, 6, 8, 9, 10)]
    seen = read_feeds(network, learned, preparation, Drawing(held_out=0)).calibration
    found = read_judging(network, samples, seen, preparation)
    kept = {label.number: label for label in found.labels if isinstance(label, Role)}
    assert kept == {0: roles[0], 1: roles[1], 3: Role(3, candidate=True), 4: roles[4], 5: Role(5), 7: Role(7)}
    assert "3 rows that should judge equal a calibration row" in caplog.text
    keys = {label.number: key for label, key in zip(found.labels, found.keys, strict=True) if isinstance(label, Role)}
    assert {number for number, key in keys.items() if key in seen.keys} == {1, 3, 5}
    with pytest.raises(BadInput, match="all 4 rows that should judge"):
        read_judging(network, [samples[place] for place in (1, 2, 3, 5)], seen, preparation)


def test_queries_that_are_held_out_find_their_texts_though_others_want_them_too(tmp_path: Path) -> None:
    words, path = tiny.WORDS.split(), tmp_path / "a.jsonl"
    rows = [{"query": f"{words[i % 30]} {words[i // 30]}", "positive": f"the {words[i % 15]}"} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = fed(text(), path)
    assert found.held_out is not None
    held_out = [label for label in found.held_out.labels if isinstance(label, Role)]
    candidates = {label.number for label in held_out if label.candidate}
    queries = [label for label in held_out if label.positives]
    assert len(queries) == 16
    assert all(set(label.positives) <= candidates for label in queries)
    keys = zip(held_out, found.held_out.keys, strict=True)
    assert {label.candidate for label, key in keys if key in found.calibration.keys} == {True}


def test_a_ranking_of_which_a_pair_calibrates_goes_as_a_whole() -> None:
    words = tiny.WORDS.split()
    pairs = [Sample("the match", text_pair=word, label=Grade(0, place == 0)) for place, word in enumerate(words[:5])]
    pairs += [Sample("a river", text_pair=word, label=Grade(1, place == 0)) for place, word in enumerate(words[:5])]
    learned = [*pairs[3:4], *(Sample(word) for word in words[:10])]
    preparation = Preparation(tokenizer=str(tiny.bert()), seq_len=16)
    seen = read_feeds(text(), learned, preparation, Drawing(held_out=0)).calibration
    assert {label.query for label in read_judging(text(), pairs, seen, preparation).labels} == {1}  # type: ignore[union-attr]


def test_labels_stay_with_their_rows() -> None:
    found = fed(text(), tiny.labelled(), drawing=Drawing(held_out=0)).calibration
    tokenizer = load_tokenizer(str(tiny.bert()), "")
    wanted = {}
    for line in tiny.labelled().read_text().splitlines():
        row = json.loads(line)
        wanted[tuple(tokenizer(row["text"], truncation=True, max_length=16)["input_ids"])] = row["label"]
    ids = [tuple(row["input_ids"][0][row["attention_mask"][0].bool()].tolist()) for row in found.rows()]
    assert [wanted[each] for each in ids] == list(found.labels)


def test_the_tokenizer_is_found_beside_the_network(tmp_path: Path) -> None:
    inputs = [value(name, "batch", LENGTH, dtype=INT64) for name in tiny_ports.TEXT]
    network = tiny_ports.saved(tmp_path / "onnx", *inputs)
    with pytest.raises(BadInput, match=r"none lies beside the network\. --tokenizer takes"):
        read_feeds(network, tiny.lines())
    shutil.copy(tiny.bert() / "tokenizer.json", tmp_path)
    alone = read_feeds(network, tiny.lines(), Preparation(seq_len=16)).calibration
    named = fed(network).calibration
    assert alone.fingerprint == named.fingerprint
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b"}}))
    assert class_names(network.source) == ("a", "b")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "a", "2": "b"}}))
    with pytest.raises(BadInput, match="id2label"):
        class_names(network.source)


def test_a_vocabulary_alone_is_word_pieces(tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.bert())
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words))
    found = load_tokenizer(str(tmp_path), "")
    assert [found(text)["input_ids"] for text in tiny.texts()] == [
        tokenizer(text)["input_ids"] for text in tiny.texts()
    ]


def hostile(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("tokenizer.json", "{", "is not a tokenizer"),
        ("tokenizer.json", '{"model": {"type": "Evil"}}', "is not a tokenizer"),
        ("vocab.txt", "", "no usable tokenizer|missing"),
        ("tokenizer.model", "x", "only tokenizer.model, of SentencePiece"),
        ("readme.md", "x", "holds no vocabulary"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    ],
)
def test_damaged_tokenizers_are_refused(tmp_path: Path, name: str, content: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        load_tokenizer(hostile(tmp_path, name, content), "")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("model", "unk_token"), "nothing"),
        (("post_processor", "special_tokens"), {}),
        (("post_processor", "single"), [{"SpecialToken": {"id": "nothing", "type_id": 0}}]),
    ],
)
def test_tokenizers_that_fail_on_texts_are_refused(tmp_path: Path, place: tuple[str, str], value: object) -> None:
    tokenizer = json.loads((tiny.bert() / "tokenizer.json").read_text())
    tokenizer[place[0]][place[1]] = value
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        load_tokenizer(hostile(tmp_path, "tokenizer.json", json.dumps(tokenizer)), "")


@pytest.mark.parametrize("longest", ["x", [], {}, None, -1, 1e30, True])
def test_an_odd_longest_text_is_no_limit(tmp_path: Path, longest: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": longest}))
    (tmp_path / "vocab.txt").write_text(
        "\n".join(json.loads((tiny.bert() / "tokenizer.json").read_text())["model"]["vocab"])
    )
    assert load_tokenizer(str(tmp_path), "").model_max_length > 10**6
    shutil.copy(tiny.bert() / "tokenizer.json", tmp_path)
    assert load_tokenizer(str(tmp_path), "").model_max_length > 10**6


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "", "a/b/c"])
def test_a_tokenizer_that_is_nowhere_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="no such file or folder"):
        load_tokenizer(name, "")


def test_code_of_a_tokenizer_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "vocab.txt").write_text("a\nb\nc\nd\ne\nf\n[UNK]\n[PAD]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(BadInput):
        load_tokenizer(str(tmp_path), "")
    assert not marker.exists()
    shutil.copy(tiny.bert() / "tokenizer.json", tmp_path)
    load_tokenizer(str(tmp_path), "")
    assert not marker.exists()


def test_ids_beyond_the_table_of_the_network_are_refused(tmp_path: Path) -> None:
    tokenizer = json.loads((tiny.bert() / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: i + 50 if i > 20 else i for word, i in vocabulary.items()}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer))
    told = r"lines.txt:\d+: input_ids holds \d+; .* takes -160 to 159, .* tokenizer, of another network"
    with pytest.raises(BadInput, match=told):
        read_feeds(text(), tiny.lines(), Preparation(tokenizer=str(path)))


def test_a_batch_that_the_network_cannot_take_is_told_before_the_work() -> None:
    model = transformers.BertModel.from_pretrained(tiny.bert())
    from optin_deploy.network.read import read

    network = read(model)
    found = fed(network, seq_len=16)
    check_runs(Program(network), found.calibration)
    long = fed(network, [Sample(text=text * 5) for text in tiny.texts()], seq_len=60)
    with pytest.raises(BadInput, match=r"does not run with input_ids \(.*60\).*--seq-len"):
        check_runs(Program(network), long.calibration)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seq_len": 2}, "2 special tokens. Use --seq-len 3"),
        ({"seq_len": 0}, "--seq-len 0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"drawing": Drawing(samples=0)}, "samples_limit=0"),
        ({"drawing": Drawing(held_out=0.9)}, "held_out=0.9"),
        ({"source": "/nowhere.txt"}, "no such file"),
        ({"source": [Sample(text="one")] * 9}, "1 different ones among 9"),
    ],
)
def test_wrong_options_say_what_is_possible(options: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        fed(text(), **options)


def test_keys_do_not_depend_on_padding_or_place() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 0], [0, 0, 5, 6]])
    one, two, three = row_keys({"input_ids": ids, "attention_mask": (ids != 0).long()})
    assert one == three != two
    short = {"input_ids": ids[:1, :2], "attention_mask": torch.ones(1, 2, dtype=torch.int64)}
    assert next(row_keys(short)) == one


def test_rows_of_equal_shape_share_a_batch_with_their_labels() -> None:
    rows = [{"x": torch.full((1, size), float(i))} for i, size in enumerate((2, 3, 2, 3, 2))]
    found = grouped(rows, list("abcde"), "here", Batching(2))
    assert [batch["x"][:, 0].tolist() for batch in found.batches] == [[0, 2], [4], [1, 3]]
    assert found.labels == ("a", "c", "e", "b", "d")
