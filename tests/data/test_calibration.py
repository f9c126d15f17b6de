"""Calibration data: what is read, what is refused and how, and what the batches hold."""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from optin_deploy.data.bundled import bundled_samples
from optin_deploy.data.halves import split
from optin_deploy.data.repeats import distinct
from optin_deploy.data.samples import Sample, read_samples
from optin_deploy.errors import BadInput
from optin_deploy.feeds.preprocessor import check_tokenizer
from optin_deploy.feeds.rows import Feeds
from optin_deploy.feeds.text_feeds import encoded
from optin_deploy.files import opening as data_files
from optin_deploy.jobs import prepared
from optin_deploy.pruning.source import Source
from support.tiny_files import processor, save_image, write
from support.tiny_ports import TEXT as BERT_INPUTS
from support.tiny_ports import image_rows, text_rows

MASKED = ("input_ids", "attention_mask")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_tokenizer(words: int = 200, **options: str) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate([*SPECIAL, *(f"w{i}" for i in range(words))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)  # type: ignore[no-untyped-call]  # transformers


def texts(*lengths: int) -> list[Sample]:
    return [
        Sample(text=" ".join(f"w{j}" for j in range(length)), label=i, source=f"t:{i}")
        for i, length in enumerate(lengths)
    ]


def many(rows: int) -> list[Sample]:
    return [Sample(text=f"w{i}", label=i, source=f"t:{i}") for i in range(rows)]


# Reading


def test_a_text_file_gives_one_sample_a_line_and_skips_blank_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\n  \ntwo words\n")
    assert read_samples(path) == (
        Sample(text="one", source=f"{path}:1"),
        Sample(text="two words", source=f"{path}:4"),
    )


def test_json_lines_and_csv_with_the_same_rows_give_the_same_samples(tmp_path: Path) -> None:
    rows = [
        {"text": "a, b", "text_pair": "c", "label": 1},
        {"text": 'say "x"', "text_pair": None, "label": "spam"},
        {"text": "d", "text_pair": "", "label": None},
        {"text": "e", "text_pair": "f", "label": 3.5},
        {"text": "g", "text_pair": "h", "label": 2.0},
    ]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    table = 'text,text_pair,label\n"a, b",c,1\n"say ""x""",,spam\nd,,\ne,f,3.5\ng,h,2\n'
    path = write(tmp_path / "a.CSV", table)
    from_json = [replace(sample, source="") for sample in read_samples(jsonl)]
    assert from_json == [replace(sample, source="") for sample in read_samples(str(path))]
    assert [sample.label for sample in from_json] == [1, "spam", None, "3.5", 2]
    assert [sample.text_pair for sample in from_json] == ["c", None, None, "f", "h"]


def test_other_column_names_are_read_when_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "review,stars\ngood,5\n")
    (sample,) = read_samples(path, text_column="review", label_column="stars")
    assert (sample.text, sample.label, sample.source) == ("good", 5, f"{path}:2")


def test_a_csv_record_over_several_lines_is_named_by_its_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text\n"one\ntwo"\nthree\n')
    assert [sample.source for sample in read_samples(path)] == [f"{path}:2", f"{path}:4"]


def test_rows_with_a_blank_text_are_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"  ",1\nx,2\n')
    assert [sample.label for sample in read_samples(path)] == [2]
    assert "1 rows with a blank text" in caplog.text


def test_an_image_folder_is_read_sorted_with_subfolders_as_labels(tmp_path: Path) -> None:
    for name in ("dog/b.png", "dog/a.JPG", "1/c.webp", ".hidden/x.png", "z.bmp"):
        save_image(tmp_path / name)
    write(tmp_path / "dog" / "notes.txt", "no image")
    (tmp_path / "dog" / "link.png").symlink_to(tmp_path / "z.bmp")
    found = [(str(s.image.relative_to(tmp_path)), s.label) for s in read_samples(tmp_path) if isinstance(s.image, Path)]
    assert found == [
        ("1/c.webp", 1),
        ("dog/a.JPG", "dog"),
        ("dog/b.png", "dog"),
        ("dog/link.png", "dog"),
        ("z.bmp", None),
    ]


# Files that are none


@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_what_would_wait_for_ever_is_not_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    def make(path: Path) -> Path:
        if kind == "fifo":
            os.mkfifo(path)
        else:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(os.path.relpath(path))  # an absolute name may be too long
        return path

    with pytest.raises(BadInput, match=r"texts\.txt: cannot read a (pipe|socket)\..*\.jsonl"):
        read_samples(make(tmp_path / "texts.txt"))
    folder = tmp_path / "photos"
    image = save_image(folder / "a.png")
    make(folder / "photo.png")
    assert [sample.image for sample in read_samples(folder)] == [image]
    assert re.search(r"1 files are not used \(1 x a (pipe|socket)\)", caplog.text)


def test_a_name_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/photos\xff"))
    try:
        save_image(folder / "a.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for path in (folder, tmp_path, folder / "none.txt"):
        with pytest.raises(BadInput, match=r"photos\\udcff.*not valid UTF-8.*Rename") as caught:
            read_samples(path)
        str(caught.value).encode()


# Refusals: (file name, content, what the message must hold beside the file)

REFUSED_FILES: dict[str, tuple[str, str | bytes, list[str]]] = {
    "empty": ("a.txt", "", ["file is empty", "at least 8"]),
    "only_blank_lines": ("a.jsonl", "\n\n", ["file is empty", "at least 8"]),
    "not_json": ("a.jsonl", '{"text": "x"}\n{oops\n', [":2:", "not a JSON object", "{oops", "correct or delete"]),
    "json_but_no_object": ("a.jsonl", "[1, 2]\n", [":1:", "not a JSON object", "[1, 2]", "correct or delete"]),
    "nested_too_deep": ("a.jsonl", "[" * 100_000, [":1:", "not a JSON object", "..."]),
    "no_text_column": ("a.jsonl", '{"body": "x", "id": 1}\n', [":1:", "'text'", "body, id", "--text-column"]),
    "no_text_column_csv": ("a.csv", "body,id\nx,1\n", [":2:", "'text'", "body, id", "--text-column"]),
    "text_is_a_number": ("a.jsonl", '{"text": 12}\n', [":1:", "12, not a string", "quotes"]),
    "text_is_a_lone_surrogate": ("a.jsonl", '{"text": "\\ud800"}\n', [":1:", "not valid Unicode", "delete that row"]),
    "label_is_a_list": ("a.jsonl", '{"text": "x", "label": [[1]]}\n', [":1:", "label [[1]]", "one class a row"]),
    "too_many_fields": ("a.csv", "text,label\na,b,1\n", [":2:", "3 fields", "text, label", "double quotes"]),
    "open_quote": ("a.csv", 'text\nx\n"never closed\n', [":3:", "not CSV", "double each quote"]),
    "latin_1": ("a.txt", "gut\nschön\n".encode("latin-1"), [":2:", "not UTF-8", "0xf6", "position 4", "iconv"]),
    "utf_16_without_mark": ("a.txt", "text".encode("utf-16-le"), [":1:", "not UTF-8", "UTF-16", "iconv -f UTF-16LE"]),
    "utf_16_cut_off": ("a.txt", "text".encode("utf-16")[:-1], ["UTF-16", "truncated", "again"]),
    "zip": ("a.csv", b"PK\x03\x04\x14\0", ["zip archive", "save the sheet as CSV"]),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\0", ["gzip", "unpack"]),
    "git_lfs": ("a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ["`git lfs pull`"]),
    "zero_byte": ("a.csv", b"text\nx\0y\n", [":2:", "zero byte at position 2"]),
    "header_twice": ("a.csv", "text,label,label\nx,1,2\n", [":1:", "'label' stands twice", "Rename"]),
    "header_twice_after_blank_lines": ("a.csv", "\n\ntext;text\nx;y\n", [":3:", "'text' stands twice"]),
    "key_twice": ("a.jsonl", '{"text": "x", "text": "y"}\n', [":1:", "the key 'text' stands twice"]),
    "header_only": ("a.csv", "text,label\n", ["holds no row", "at least 8"]),
    "label_is_infinite": ("a.jsonl", '{"text": "x", "label": Infinity}\n', [":1:", "label inf", "one class a row"]),
    "number_without_end": ("a.jsonl", '{"text": "x", "label": ' + "9" * 5000 + "}\n", [":1:", "not a JSON object"]),
    "semicolon_in_a_text": ("a.csv", "text;label\na;b;1\n", [":2:", "3 fields", "contains semicolons"]),
    "unknown_extension": ("a.parquet", "x", [".parquet", ".txt, .jsonl or .csv", "Convert"]),
    "no_extension": ("data", "x", ["without extension", ".txt, .jsonl or .csv"]),
    "json": ("a.json", "[]", [".json", "one JSON object a line"]),
    "single_image": ("a.png", "x", [".png", "Give the folder"]),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_a_refused_file_is_named_with_line_and_next_step(tmp_path: Path, case: str) -> None:
    name, content, expected = REFUSED_FILES[case]
    path = write(tmp_path / name, content)
    with pytest.raises(BadInput) as caught:
        read_samples(path)
    for part in [str(path), *expected]:
        assert part in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) * 2 + 450


def test_a_missing_file_is_named_with_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.txt: no such file or folder.*\.jsonl.*check the path"):
        read_samples(tmp_path / "none.txt")


def test_a_path_that_is_no_regular_file_is_refused() -> None:
    with pytest.raises(BadInput, match="cannot read"):
        read_samples("/dev/null")


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "label": "\ud800"},
        {"text": "a", "label": ["b", "\ud800"]},
        {"tokens": ["a", "b"], "ner_tags": ["O", "\ud800"]},
        {"tokens": ["a", "\ud800"], "ner_tags": ["O", "O"]},
        {"question": "a", "context": "b c", "answers": {"text": ["\ud800"]}},
        {"query": "a", "positive": "\ud800"},
        {"sentence1": "\ud800", "sentence2": "a", "score": 1},
        {"query": "a", "positive": ["b"], "negative": ["\ud800"]},
    ],
)
def test_no_text_of_a_row_holds_a_lone_surrogate(row: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(row))
    with pytest.raises(BadInput, match=r"a\.jsonl:1: '.*' is not valid Unicode. Correct or delete that row"):
        read_samples(path)


def test_a_missing_label_column_is_refused_only_when_it_was_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n')
    assert read_samples(path)[0].label is None
    with pytest.raises(BadInput, match=r"a\.jsonl:1: no column 'stars'.*are 'text'.*--label-column"):
        read_samples(path, label_column="stars")


def test_a_file_above_two_gib_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    with path.open("wb") as stream:
        stream.truncate(2 * 1024**3 + 1)  # sparse: takes no space
    with pytest.raises(BadInput, match=r"big\.txt: 2\.0 GiB.*at most 2 GiB.*smaller file"):
        read_samples(path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x")
    with pytest.raises(BadInput, match=r"folder holds no images.*at least 8"):
        read_samples(tmp_path)


def test_two_levels_of_subfolders_are_refused(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "cat" / "a.png")
    with pytest.raises(BadInput, match=r"cat: a folder two levels below .*; give .*train if"):
        read_samples(tmp_path)


@pytest.mark.parametrize("target", ["outside.png", "nowhere.png", "outside_folder"])
def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path, target: str) -> None:
    save_image(tmp_path / "outside.png")
    save_image(tmp_path / "outside_folder" / "a.png")
    save_image(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / target)
    with pytest.raises(BadInput, match=r"link\.png: a link that leaves .*copy the file there"):
        read_samples(tmp_path / "images")


# Bundled


def test_bundled_texts_are_160_different_lines_of_8_to_60_words() -> None:
    found = bundled_samples("text")
    words = [len((sample.text or "").split()) for sample in found]
    assert len({sample.text for sample in found}) == 160
    assert min(words) >= 8
    assert max(words) <= 60


def test_bundled_images_are_64_different_ones_and_the_same_on_every_call() -> None:
    first, second = ([np.asarray(sample.image).tobytes() for sample in bundled_samples("image")] for _ in range(2))
    assert first == second
    assert len(set(first)) == 64


def test_an_unknown_kind_of_bundled_samples_is_refused() -> None:
    with pytest.raises(BadInput, match=r"kind 'audio'. Use 'text' or 'image'"):
        bundled_samples("audio")  # type: ignore[arg-type]


# Splitting


@pytest.mark.parametrize(
    ("rows", "limit", "calibration", "held_out"),
    [
        (8, 512, 6, 2),  # a fifth
        (160, 512, 128, 32),
        (512, 512, 410, 102),
        (513, 512, 411 - 1, 103),  # one row over is too few: cut as if below the limit
        (528, 512, 512, 16),
        (600, 512, 512, 88),
        (5000, 512, 512, 128),  # a quarter of the limit at most
        (5000, 20, 20, 16),  # at least 16
    ],
)
def test_split_is_disjoint_and_sized_as_promised(rows: int, limit: int, calibration: int, held_out: int) -> None:
    samples = many(rows)
    first, second = split(samples, samples_limit=limit, seed=0)
    assert (len(first), len(second)) == (calibration, held_out)
    assert len({sample.source for sample in first + second}) == calibration + held_out


def test_split_depends_on_the_seed_alone() -> None:
    samples = many(40)
    assert split(samples, samples_limit=10, seed=3) == split(samples, samples_limit=10, seed=3)
    assert split(samples, samples_limit=10, seed=3) != split(samples, samples_limit=10, seed=4)


def test_what_is_equal_is_never_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    rows = [*many(20), *(replace(sample, text=f" {sample.text}  ", source="again") for sample in many(20))]
    rows += [Sample(text="w0", text_pair="w1"), Sample(text="w0", text_pair="w2"), Sample(text="w0", text_pair="w1")]
    first, second = split(rows, samples_limit=512, seed=0)
    assert sorted((s.text, s.text_pair or "") for s in first + second) == sorted(
        [*((s.text, "") for s in many(20)), ("w0", "w1"), ("w0", "w2")]
    )
    assert (len(first), len(second)) == (18, 4)
    assert "21 of 43 calibration samples repeat others" in caplog.text


def test_equal_rows_are_too_few() -> None:
    with pytest.raises(BadInput, match=r"1 different ones among 60 calibration samples \(from t:0\), but 8"):
        split([Sample(text="the same", source=f"t:{i}") for i in range(60)], samples_limit=512, seed=0)


def test_a_copy_of_an_image_counts_once(tmp_path: Path) -> None:
    for index in range(10):
        pixels = np.full((4, 4, 3), index, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.bmp")  # all of one size
    write(tmp_path / "copy.bmp", (tmp_path / "3.bmp").read_bytes())
    first, second = split(read_samples(tmp_path), samples_limit=512, seed=0)
    assert sorted(Path(sample.source).name for sample in first + second) == [f"{index}.bmp" for index in range(10)]
    again = [Sample(image=Image.open(sample.source)) for sample in first + second]
    assert len(distinct([*again, *again[:3]])) == 10


def test_no_rows_are_held_out_when_the_share_is_zero() -> None:
    assert [len(part) for part in split(many(40), samples_limit=10, held_out=0, seed=0)] == [10, 0]
    assert [len(part) for part in split(many(40), samples_limit=50, held_out=0, seed=0)] == [40, 0]


def test_fewer_than_eight_samples_are_refused_with_the_reason() -> None:
    with pytest.raises(BadInput, match=r"7 calibration samples in all \(from t:0\), but 8 are the least: some.*Add"):
        split(many(7), samples_limit=512, seed=0)


@pytest.mark.parametrize("options", [{"samples_limit": 0}, {"samples_limit": 9, "held_out": 0.9}])
def test_a_split_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(BadInput, match=r"between 0 and 0\.5"):
        split(many(9), seed=0, **options)  # type: ignore[arg-type]


# Text batches


def test_rows_are_sorted_by_length_cut_and_padded_per_batch_with_their_labels() -> None:
    got = text_rows(texts(50, 3, 1, 3), make_tokenizer(), *MASKED, seq_len=8, batch_size=2)
    assert got.labels == (2, 1, 3, 0)
    assert [tuple(batch["input_ids"].shape) for batch in got.batches] == [(2, 5), (2, 8)]
    assert got.batches[0]["input_ids"].tolist() == [[2, 4, 3, 0, 0], [2, 4, 5, 6, 3]]
    assert got.batches[0]["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert (len(got), list(got.batches[0])) == (4, ["input_ids", "attention_mask"])


def test_padding_is_what_the_tokenizer_itself_would_do() -> None:
    pairs = [Sample(text="w1 w2", text_pair="w3"), Sample(text="w1"), Sample(text="w4 w5 w6", text_pair="w7 w8 w9")]
    tokenizer = make_tokenizer(padding_side="left")
    (got,) = text_rows(pairs, tokenizer, *BERT_INPUTS, seq_len=8).batches
    for row, sample in zip(range(3), (pairs[1], pairs[0], pairs[2]), strict=True):
        options = {"padding": "max_length", "return_tensors": "pt", "return_token_type_ids": True}
        cut = {"truncation": True, "max_length": 8} if row == 2 else {"max_length": 12}
        wanted = tokenizer(sample.text, sample.text_pair, **options, **cut)
        for name in BERT_INPUTS:
            width = wanted[name].shape[1]
            assert torch.equal(got[name][row], wanted[name][0, width - 8 :])
            assert got[name].dtype == torch.int64


def test_the_tokenizer_is_left_as_it_was() -> None:
    tokenizer = make_tokenizer()
    before = tokenizer.backend_tokenizer.to_str()
    text_rows(texts(3, 30), tokenizer, *MASKED, seq_len=8)
    assert tokenizer.backend_tokenizer.to_str() == before


def test_without_a_padding_token_the_end_token_pads_under_the_mask() -> None:
    tokenizer = make_tokenizer(eos_token="[SEP]")
    tokenizer.pad_token = None
    (batch,) = text_rows(texts(1, 2), tokenizer, *MASKED, seq_len=8).batches
    assert batch["input_ids"].tolist() == [[2, 4, 3, 3], [2, 4, 5, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 2}, r"2 tokens a text leave no room.*2 special tokens.*--seq-len 3"),
        ({"seq_len": 8, "batch_size": 0}, r"batch_size=0: it must be 1 or more"),
    ],
)
def test_a_wrong_option_of_texts_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        text_rows(texts(3), make_tokenizer(), *MASKED, **options)


def test_an_input_that_the_tokenizer_does_not_make_is_named() -> None:
    made = make_tokenizer()

    def without_types(*args: Any, return_token_type_ids: bool, **options: Any) -> Any:
        return made(*args, **options)

    with pytest.raises(BadInput, match=r"does not make .*\(it makes input_ids.*saved with this"):
        encoded(texts(3), without_types, ["attention_mask", "token_type_ids"], 8)


def test_a_sample_of_the_wrong_kind_is_named() -> None:
    with pytest.raises(BadInput, match=r"bundled image 0: no text in this sample"):
        text_rows(bundled_samples("image")[:1], make_tokenizer(), *MASKED, seq_len=8)
    with pytest.raises(BadInput, match=r"t:0: no image in this sample.*folder of images"):
        image_rows(texts(3), ViTImageProcessorPil())


# Image batches


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
def test_images_of_every_mode_and_size_become_pixel_values(tmp_path: Path, mode: str) -> None:
    save_image(tmp_path / "cat" / "a.png", (40, 30), mode)
    save_image(tmp_path / "dog" / "b.png", (20, 70), mode)
    save_image(tmp_path / "dog" / "c.png", (9, 9), mode)
    got = image_rows(read_samples(tmp_path), processor(), batch_size=2)
    assert [tuple(batch["image"].shape) for batch in got.batches] == [(2, 3, 16, 16), (1, 3, 16, 16)]
    assert (got.labels, got.batches[0]["image"].dtype) == (("cat", "dog", "dog"), torch.float32)


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (batch,) = image_rows(read_samples(tmp_path), processor()).batches
    assert batch["image"][0, :, :8].max() < 0 < batch["image"][0, :, 8:].min()


def test_bundled_images_pass_through_the_processor() -> None:
    assert len(image_rows(bundled_samples("image")[:5], processor(), batch_size=2)) == 5


def broken_images() -> dict[str, bytes]:
    png = b"\x89PNG\r\n\x1a\n"
    ico = BytesIO()  # opens well, but is not on the list (nor is .eps, which would start Ghostscript)
    Image.new("L", (9, 9)).save(ico, "ICO")
    eps = BytesIO()
    Image.new("L", (9, 9)).save(eps, "EPS")
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    renamed = {"renamed_ico": ico.getvalue(), "renamed_eps": eps.getvalue(), "renamed_heic": heic}
    return {"empty": b"", "text": b"hello", "cut_off_png": png + b"\0\0\0\rIHDR", **renamed}


@pytest.mark.parametrize("case", broken_images())
def test_an_image_that_does_not_open_is_named(tmp_path: Path, case: str) -> None:
    write(tmp_path / "bad.png", broken_images()[case])
    with pytest.raises(BadInput, match=r"bad\.png: this image does not open.*png, jpg.*delete it"):
        image_rows(read_samples(tmp_path), processor())


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    write(path, path.read_bytes()[:-400])
    with pytest.raises(BadInput, match=r"cut\.jpg: this image does not open.*truncated"):
        image_rows(read_samples(tmp_path), processor())


@pytest.mark.parametrize("limit", [50, 80])  # PIL raises above twice the limit, and only warns above it
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    save_image(tmp_path / "bomb.png", (11, 11))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadInput, match=r"bomb\.png: too many pixels.*Shrink it"):
        image_rows(read_samples(tmp_path), processor())


def test_an_image_file_above_the_size_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_image(tmp_path / "a.png")
    monkeypatch.setattr(data_files, "MAX_FILE_BYTES", 10)
    with pytest.raises(BadInput, match=r"a\.png: .*at most 2 GiB"):
        image_rows(read_samples(tmp_path), processor())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_processor_that_leaves_unequal_sizes_is_refused(tmp_path: Path, batch_size: int) -> None:
    save_image(tmp_path / "a.png", (10, 10))
    save_image(tmp_path / "b.png", (20, 10))
    with pytest.raises(BadInput, match=r"b\.png: the image processor does not fit.*do_resize"):
        image_rows(read_samples(tmp_path), processor(do_resize=False), batch_size=batch_size)


# Fingerprints


def test_reading_again_gives_the_same_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "w1 w2\nw3\nw4 w5 w6\n")
    first, second = (text_rows(read_samples(path), make_tokenizer(), *MASKED, seq_len=8) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert len(first.fingerprint) == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_one_flipped_bit_changes_the_fingerprint(dtype: torch.dtype) -> None:
    tensor = torch.zeros(2, 3, dtype=dtype)
    flipped = tensor.clone()
    flipped.view(torch.uint8)[1, 2] ^= 1
    one, other = (Feeds(({"x": value},), (None, None), "here") for value in (tensor, flipped))
    assert one.fingerprint != other.fingerprint


def test_name_shape_dtype_and_batching_are_in_the_fingerprint_and_labels_are_not() -> None:
    zeros = torch.zeros(2, 6)
    variants = [
        ({"x": zeros},),
        ({"y": zeros},),
        ({"x": zeros.view(2, 2, 3)},),
        ({"x": zeros.to(torch.int32)},),
        ({"x": zeros[:1]}, {"x": zeros[1:]}),
    ]
    assert len({Feeds(batches, (0, 1), "here").fingerprint for batches in variants}) == len(variants)
    assert Feeds(variants[0], (0, 1), "here").fingerprint == Feeds(variants[0], ("a", None), "there").fingerprint


def test_labels_that_do_not_match_the_rows_are_refused() -> None:
    with pytest.raises(BadInput, match="1 labels for 2 rows"):
        Feeds(({"x": torch.zeros(2, 3)},), (None,), "here")


# Tokenizer


@pytest.mark.parametrize(("words", "vocab_size"), [(200, 204), (200, 30522), (8, 16), (5, None)])
def test_a_fitting_tokenizer_passes(words: int, vocab_size: int | None) -> None:
    check_tokenizer(make_tokenizer(words), SimpleNamespace(vocab_size=vocab_size))


@pytest.mark.parametrize(("words", "vocab_size"), [(0, 30522), (0, 4), (0, None), (20, 30522)])
def test_a_tokenizer_without_its_vocabulary_files_is_refused(words: int, vocab_size: int | None) -> None:
    message = rf"knows {words + 4} tokens, {words} of them.* model {vocab_size}: .*missing. Put tokenizer.json"
    with pytest.raises(BadInput, match=message):
        check_tokenizer(make_tokenizer(words), SimpleNamespace(vocab_size=vocab_size))


def test_a_tokenizer_larger_than_the_embedding_is_refused_with_both_numbers() -> None:
    with pytest.raises(BadInput, match=r"needs 204 embeddings, but config\.vocab_size is 203.*saved"):
        check_tokenizer(make_tokenizer(200), SimpleNamespace(vocab_size=203))


@pytest.mark.parametrize(
    ("field", "rows", "says"),
    [
        ("calibration", None, "no such file or folder. Possible: .*npz"),
        ("calibration", "id,body\n1,a\n", "no column 'text'. The columns are 'id, body'"),
        ("evaluation", "text,topic\na,b\n", "no column 'team'"),
    ],
)
def test_files_are_looked_at_before_the_model_is_loaded(
    field: str, rows: str | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(prepared, "dense_of", never)
    path = tmp_path / "rows.csv"
    if rows is not None:
        path.write_text(rows)
    columns = {"label_column": "team"} if field == "evaluation" else {}
    with pytest.raises(BadInput, match=says):
        prepared.prepare(Source("nowhere", **{field: str(path)}, **columns))
