"""Prepared inputs by name: checked before a value is read, against the network, and never run as code."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from safetensors.torch import save_file

from optin_deploy.data import arrays
from optin_deploy.data.arrays import open_arrays
from optin_deploy.errors import BadInput
from optin_deploy.feeds.array_feeds import array_files
from optin_deploy.feeds.feeds import Drawing, Halves, Preparation, read_feeds, read_judging
from optin_deploy.feeds.rows import Feeds, rows_of
from optin_deploy.network.graph import Network
from support import tiny_checkpoint as tiny
from support import tiny_ports
from support.tiny_graphs import FLOAT, INT64, value

RNG = np.random.default_rng(0)
ROWS = 40
IDS = RNG.integers(1, 160, (ROWS, 6))
MASK = np.ones((ROWS, 6), np.int64)
MASK[::2, 4:] = 0
X = RNG.standard_normal((ROWS, 5)).astype(np.float32)
ALL = Drawing(held_out=0)
Array = NDArray[Any]


def both() -> Network:
    return tiny_ports.text("input_ids", "attention_mask")


def one(*shape: int | str, dtype: int = FLOAT) -> Network:
    return tiny_ports.network(value("x", *(shape or ("batch", 5)), dtype=dtype))


def stored(path: Path, **named: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **named)
    else:
        save_file({name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in named.items()}, path)
    return path


def fed(network: Network, path: Path, drawing: Drawing = ALL, **options: Any) -> Halves:
    return read_feeds(network, path, Preparation(**options), drawing)


def together(feeds: Feeds, name: str) -> Array:
    found: Array = torch.cat([batch[name] for batch in feeds.batches]).numpy()
    return found


def in_order(feeds: Feeds, name: str, wanted: Array) -> list[int]:
    """Places of the rows in the array that they came from."""
    return [int((wanted == row).reshape(len(wanted), -1).all(1).nonzero()[0][0]) for row in together(feeds, name)]


@pytest.mark.parametrize("name", ["labels", "label", "label_ids"])
def test_labels_have_the_names_that_they_have_beside_modules(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = fed(one(), stored(tmp_path / "data.npz", **{"x": X, name: np.arange(ROWS)})).calibration
    assert set(found.labels) == set(range(ROWS))
    assert caplog.text == ""


def test_of_two_arrays_of_labels_the_second_is_told_as_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = stored(tmp_path / "data.npz", x=X, label=np.arange(ROWS) + 100, labels=np.arange(ROWS))
    assert max(fed(one(), path).calibration.labels) == ROWS - 1  # type: ignore[type-var]
    assert "not used, as they are no inputs of the network: 'label'" in caplog.text


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_rows_are_read_by_name_with_their_labels(tmp_path: Path, ending: str) -> None:
    path = stored(tmp_path / f"data{ending}", attention_mask=MASK, input_ids=IDS, labels=np.arange(ROWS))
    found = fed(both(), path).calibration
    order = in_order(found, "input_ids", IDS)
    assert sorted(order) == list(range(ROWS))
    assert order == list(found.labels)
    assert np.array_equal(together(found, "attention_mask"), MASK[order])
    assert list(found.batches[0]) == ["input_ids", "attention_mask"]
    assert [rows_of(batch) for batch in found.batches] == [32, 8]


def test_halves_share_no_row_and_follow_the_seed(tmp_path: Path) -> None:
    path = stored(tmp_path / "data.npz", x=np.concatenate([X, X[:7]]))
    found, again = fed(one(), path, Drawing(samples=20)), fed(one(), path, Drawing(samples=20))
    assert found.held_out is not None
    assert (len(found.calibration), len(found.held_out)) == (20, 16)
    assert not set(found.calibration.keys) & set(found.held_out.keys)
    assert again.calibration.fingerprint == found.calibration.fingerprint
    assert fed(one(), path, Drawing(samples=20, seed=1)).calibration.fingerprint != found.calibration.fingerprint
    alone = fed(one(), path, Drawing(samples=20, others_judge=True))
    assert (alone.calibration.fingerprint, alone.held_out) == (found.calibration.fingerprint, None)
    with pytest.raises(BadInput, match="8 rows, but the network takes exactly 16"):
        fed(one(16, 5), path, Drawing())
    assert len(fed(one(16, 5), path, Drawing(others_judge=True)).calibration) == 32
    judging = read_judging(one(), path, found.calibration)
    assert len(judging) == ROWS - 20


def test_a_folder_of_batches_is_read_in_order_and_may_differ_in_length(tmp_path: Path) -> None:
    for i, length in enumerate((3, 6, 4)):
        stored(
            tmp_path / f"{i}.npz", input_ids=IDS[10 * i : 10 * i + 10, :length], attention_mask=MASK[:10, :length] | 1
        )
    found = fed(both(), tmp_path).calibration
    assert len(found) == 30
    assert sorted(batch["input_ids"].shape for batch in found.batches) == [(10, 3), (10, 4), (10, 6)]


def test_values_take_the_type_of_the_input_where_they_keep_their_meaning(tmp_path: Path) -> None:
    cases: list[tuple[Array, int, torch.dtype]] = [
        (X.astype(np.float64), FLOAT, torch.float32),
        (X, TensorProto.FLOAT16, torch.float16),
        (X.astype(">f4"), FLOAT, torch.float32),
        (np.asfortranarray(X), FLOAT, torch.float32),
        (RNG.integers(0, 256, (ROWS, 5), np.uint8), TensorProto.INT32, torch.int32),
        (RNG.integers(0, 9, (ROWS, 5)).astype(np.uint32), INT64, torch.int64),
        (RNG.integers(0, 100, (ROWS, 5)), TensorProto.UINT8, torch.uint8),
        (RNG.random((ROWS, 5)) < 0.5, INT64, torch.int64),
        (RNG.integers(0, 256, (ROWS, 5), np.uint8), FLOAT, torch.float32),
    ]
    for number, (given, dtype, wanted) in enumerate(cases):
        found = fed(one("batch", 5, dtype=dtype), stored(tmp_path / f"{number}.npz", x=given)).calibration
        assert found.batches[0]["x"].dtype == wanted
        assert {tuple(row) for row in together(found, "x").tolist()} == {
            tuple(row) for row in given.astype(np.float16 if wanted == torch.float16 else given.dtype).tolist()
        }


def test_half_precision_of_safetensors_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.from_numpy(X).to(torch.bfloat16)}, path)
    assert fed(one(), path).calibration.batches[0]["x"].dtype == torch.float32


def test_an_input_that_all_samples_share_stands_last(tmp_path: Path) -> None:
    network = tiny_ports.network(value("rate", dtype=INT64), value("size", 2, dtype=INT64), value("x", "batch", 5))
    path = stored(tmp_path / "data.npz", x=X, rate=np.array(16000), size=np.array([3, 4]))
    found = fed(network, path, Drawing(samples=20))
    for feeds in (found.calibration, found.held_out):
        assert feeds is not None
        assert [list(batch) for batch in feeds.batches] == [["x", "rate", "size"]] * len(feeds.batches)
        assert int(feeds.batches[0]["rate"]) == 16000
        assert feeds.batches[0]["size"].tolist() == [3, 4]
        assert sum(map(rows_of, feeds.batches)) == len(feeds)


def test_a_network_of_one_row_gets_one(tmp_path: Path) -> None:
    found = fed(one(1, 5), stored(tmp_path / "data.npz", x=X)).calibration
    assert {batch["x"].shape for batch in found.batches} == {(1, 5)}
    assert len(found.batches) == ROWS


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        (np.arange(ROWS, dtype=np.uint8), int),
        (np.arange(ROWS)[:, None], int),
        (np.linspace(0, 1, ROWS), float),
        (np.array(["a", "b"] * 20), str),
        (np.array([b"a", b"b"] * 20), str),
        (np.tile(np.arange(6), (ROWS, 1)), torch.Tensor),
        (np.tile(np.array([1.0, 0, 1]), (ROWS, 1)), torch.Tensor),
    ],
)
def test_labels_are_classes_numbers_names_or_classes_of_positions(tmp_path: Path, labels: Array, wanted: type) -> None:
    found = fed(one(), stored(tmp_path / "data.npz", x=X, labels=labels)).calibration
    order = in_order(found, "x", X)
    for place, label in zip(order, found.labels, strict=True):
        assert isinstance(label, wanted)
        given = labels[place].decode() if isinstance(labels[place], bytes) else labels[place]
        assert np.array_equal(np.asarray(label), np.asarray(given).reshape(np.asarray(label).shape))


def test_what_is_no_input_is_told_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fed(one(), stored(tmp_path / "data.npz", x=X, notes=np.array(["a"] * ROWS)))
    assert "not used, as they are no inputs of the network: 'notes'" in caplog.text


def test_labels_of_other_kinds_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = fed(one(), stored(tmp_path / "data.npz", x=X, labels=np.full((ROWS, 2), 0.5))).calibration
    assert set(found.labels) == {None}
    assert "(2,) numbers a sample are no labels that are used" in caplog.text
    places = fed(one(), stored(tmp_path / "data.npz", x=X, labels=np.zeros((ROWS, 2, 3), int))).calibration
    assert all(isinstance(label, torch.Tensor) and label.shape == (6,) for label in places.labels)


def changed(**more: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "attention_mask": MASK} | more


WRONG: list[tuple[Callable[[], Network], Mapping[str, Any], str]] = [
    (both, {"input_ids": IDS}, r"holds no attention_mask\. .* takes input_ids int64 \(batch, length\).*numpy.savez\("),
    (both, {"ids": IDS, "attention_mask": MASK}, "holds no input_ids. .* Not used: 'ids'"),
    (both, changed(input_ids=IDS.astype(np.float32)), "input_ids holds float32 values; .* whole numbers"),
    (both, changed(input_ids=IDS + 150), r"input_ids holds \d+; .* takes -160 to 159, .* a table of 160 rows"),
    (both, changed(input_ids=IDS[:, :4]), "input_ids has 4 and attention_mask 6 along the axis 'length'"),
    (both, changed(input_ids=IDS[:30]), "unequal numbers of samples: input_ids 30, attention_mask 40"),
    (both, changed(input_ids=IDS[0]), r"input_ids has the shape \(6,\); .* The first axis holds the samples"),
    (both, changed(input_ids=IDS[:0], attention_mask=MASK[:0]), "it has no samples"),
    (both, changed(input_ids=IDS[:, :0], attention_mask=MASK[:, :0]), "there is nothing in it"),
    (both, changed(attention_mask=2 * MASK), "other values than 1"),
    (both, changed(attention_mask=MASK * (np.arange(ROWS) != 3)[:, None]), "sample 3 has no token"),
    (both, changed(labels=np.arange(5)), r"labels has the shape \(5,\) for 40 samples"),
    (both, changed(labels=np.full(ROWS, np.nan)), "are no labels"),
    (both, changed(labels=np.array([["a"]] * ROWS)), "names of classes have one axis"),
    (one, {"x": X[:, :4]}, r"x has the shape \(40, 4\); the network takes x float \(batch, 5\), numbers are fixed"),
    (one, {"x": np.where(X[7, 2] == X, np.nan, X)}, "x holds NaN or infinity, first in sample 7"),
    (one, {"x": X.astype(np.complex64)}, "x holds complex64 values"),
    (one, {"x": np.array(["a"] * ROWS)}, "x holds texts"),
    (one, {"x": X[:5]}, "5 calibration samples in all from .*data.npz, but 8 are the least"),
    (one, {"x": X[:4].repeat(5, 0)}, "4 different samples among 20 from"),
    (lambda: one("batch", 5, dtype=TensorProto.FLOAT16), {"x": X * 1e6}, "infinity in float16, the type that"),
    (lambda: one("batch", 5, dtype=TensorProto.INT8), {"x": np.full((ROWS, 5), 300)}, "x holds 300; .* takes -128"),
    (lambda: one("batch", 5, dtype=TensorProto.BOOL), {"x": np.full((ROWS, 5), 2)}, "x holds 2; .* takes 0 to 1"),
    (lambda: one("batch", 5, dtype=TensorProto.UINT8), {"x": np.full((ROWS, 5), -1)}, "x holds -1; .* takes 0 to 255"),
    (lambda: one(64, 5), {"x": X}, "takes exactly 64 at once"),
]  # fmt: skip


@pytest.mark.parametrize(("network", "named", "told"), WRONG, ids=range(len(WRONG)))
def test_what_does_not_fit_the_network_is_told(
    tmp_path: Path, network: Callable[[], Network], named: Mapping[str, Any], told: str
) -> None:
    with pytest.raises(BadInput, match=told):
        fed(network(), stored(tmp_path / "data.npz", **named))


def npy(array: Array, header: bytes | None = None) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array)
    if header is None:
        return buffer.getvalue()
    padded = header.ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + array.tobytes()


def zipped(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch /tmp/optin-test-ran",)


def huge(shape: str) -> bytes:
    return npy(X, f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode())


def pickled() -> bytes:
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    return npy(np.frombuffer(pickle.dumps(Evil()), np.uint8), header)


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pickle": (lambda p: zipped(p, ("x.npy", pickled())), "holds Python objects, which are not read"),
    "a larger shape": (lambda p: zipped(p, ("x.npy", huge("(1000000, 1000000)"))), "damaged"),
    "a negative shape": (lambda p: zipped(p, ("x.npy", huge("(-40, -5)"))), "damaged"),
    "an endless shape": (lambda p: zipped(p, ("x.npy", huge("(" + "1," * 40 + ")"))), "damaged"),
    "a shape of numbers beyond 64 bits": (lambda p: zipped(p, ("x.npy", huge("(2**70,)"))), "damaged"),
    "code as a header": (lambda p: zipped(p, ("x.npy", npy(X, b"__import__('os').abort()"))), "damaged"),
    "fields": (lambda p: zipped(p, ("x.npy", npy(np.zeros(9, [("a", "f4")])))), "possible are numbers"),
    "dates": (lambda p: zipped(p, ("x.npy", npy(np.zeros(9, "M8[s]")))), "possible are numbers"),
    "a name twice": (lambda p: zipped(p, ("x.npy", npy(X)), ("x.npy", npy(X))), "stands twice"),
    "a path that leaves": (lambda p: zipped(p, ("../../x.npy", npy(X))), "holds no x"),
    "another file": (lambda p: zipped(p, ("x.txt", b"1")), "is no array"),
    "many members": (lambda p: zipped(p, *((f"{i}.npy", b"") for i in range(1100))), "arrays in it; at most"),
    "a very long list": (lambda p: zipped(p, *((f"{i:0200d}.npy", b"") for i in range(5000))), "too many arrays"),
    "nothing": (lambda p: zipped(p), "0 arrays in it"),
    "cut short": (lambda p: _written(p, zipped(p, ("x.npy", npy(X))).read_bytes()[:-30]), "damaged"),
    "no zip": (lambda p: _written(p, b"hello"), "damaged or not a .npz file"),
    "empty": (lambda p: _written(p, b""), "damaged or not a .npz file"),
    "an .npy": (lambda p: _written(p, npy(X)), "damaged or not a .npz file"),
    "a pointer": (lambda p: _written(p, b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS"),
    "a pipe": (lambda p: _pipe(p), "cannot read a pipe"),
    "no file": (lambda p: p, "no such file"),
}  # fmt: skip


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, kind: str) -> None:
    make, told = HOSTILE[kind]
    with pytest.raises(BadInput, match=told):
        fed(one(), make(tmp_path / "data.npz"))
    assert not Path("/tmp/optin-test-ran").exists()


def test_a_zip_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.zeros((100_000, 5), np.float32))
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(arrays, "MAX_FILE_BYTES", 10**6)
    monkeypatch.setattr(np.lib.format, "read_array", None)
    with pytest.raises(BadInput, match="GiB unpacked, but at most 2 GiB"):
        fed(one(), path)
    folder = tmp_path / "many"
    for number in range(3):
        stored(folder / f"{number}.npz", x=np.zeros((20_000, 5), np.float32))
    with pytest.raises(BadInput, match=r"and others: .* at most 2 GiB"):
        fed(one(), folder)


def test_any_damage_is_bad_input(tmp_path: Path) -> None:
    rng = random.Random(0)
    for ending in (".npz", ".safetensors"):
        whole = stored(tmp_path / f"whole{ending}", x=X, labels=np.arange(ROWS)).read_bytes()
        path = tmp_path / f"data{ending}"
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            if rng.random() < 0.3:
                del content[rng.randrange(len(content)) :]
            path.write_bytes(content)
            with suppress(BadInput):  # and nothing else
                fed(one(), path)


def test_a_folder_holds_arrays_or_images(tmp_path: Path) -> None:
    stored(tmp_path / "data.npz", x=X)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / "._a.png").write_bytes(b"")
    assert array_files(tmp_path) == [tmp_path / "data.npz"]
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"data.npz beside a.png: are they arrays, or the rows"):
        fed(one(), tmp_path)
    assert array_files(tiny.photos()) is None
    assert array_files(tiny.lines()) is None


def test_headers_are_read_without_values(tmp_path: Path) -> None:
    found = open_arrays(stored(tmp_path / "data.npz", x=X, labels=np.arange(ROWS)))
    assert {name: header.shape for name, header in found.headers.items()} == {"x": (40, 5), "labels": (40,)}
    assert found.bytes == X.nbytes + 8 * ROWS
