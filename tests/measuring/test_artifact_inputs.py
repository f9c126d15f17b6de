"""What artifacts take, read from graphs made here and from models beside them, and the random inputs for it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from optin_deploy.errors import BadInput
from optin_deploy.files.storage import sha256_file
from optin_deploy.measuring.artifact_inputs import Input, common_inputs, graph_inputs, inputs_of, make_feeds, settled
from optin_deploy.measuring.comparing import comparison_of
from optin_deploy.measuring.points import Point
from support.tiny_checkpoint import finished_job

Shape = Sequence[int | str | None]


def graph_file(
    path: Path,
    inputs: dict[str, tuple[int, Shape]],
    nodes: Sequence[Any] = (),
    tables: dict[str, np.ndarray] | None = None,
) -> Path:
    """An ONNX file with these inputs (type, shape), and an output for the last node or a copy of the first input."""
    first = next(iter(inputs), "")
    nodes = list(nodes) or [helper.make_node("Identity", [first], ["out"])]
    entries = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    out = helper.make_value_info(nodes[-1].output[0], helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    stored = [numpy_helper.from_array(array, name) for name, array in (tables or {}).items()]
    graph = helper.make_graph(nodes, "made", entries, [out], stored)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


INT, FLOAT, HALF, BOOL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL
TEXT: dict[str, tuple[int, Shape]] = {
    "input_ids": (INT, ["batch", "sequence"]),
    "attention_mask": (INT, ["batch", "sequence"]),
    "token_type_ids": (INT, ["batch", "sequence"]),
}


def test_text_is_full_rows_of_small_ids(tmp_path: Path) -> None:
    inputs = graph_inputs(graph_file(tmp_path / "text.onnx", TEXT))
    assert inputs == tuple(Input(name, "int64", (None, None)) for name in TEXT)
    feeds = make_feeds(inputs, Point(3, 700))
    assert {name: value.shape for name, value in feeds.items()} == dict.fromkeys(TEXT, (3, 700))
    assert {value.dtype for value in feeds.values()} == {np.dtype(np.int64)}
    assert (feeds["attention_mask"] == 1).all()
    assert (feeds["token_type_ids"] == 0).all()
    assert (feeds["input_ids"].min(), feeds["input_ids"].max()) == (5, 99)


def test_the_same_seed_gives_the_same_values(tmp_path: Path) -> None:
    inputs = graph_inputs(graph_file(tmp_path / "text.onnx", TEXT))
    first, again, other = (make_feeds(inputs, Point(2, 9), seed=seed)["input_ids"] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("batch", [1, "N", None])
def test_pictures_have_the_models_own_size(tmp_path: Path, batch: int | str | None) -> None:
    file = graph_file(tmp_path / "image.onnx", {"pixel_values": (FLOAT, [batch, 3, 8, 6])})
    inputs = graph_inputs(file)
    points = [settled(file, inputs, Point(1), 128)]
    points += [] if batch == 1 else [settled(file, inputs, Point(4), 128)]
    assert [point.seq for point in points] == [None] * len(points)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for point in points:
        pixels = make_feeds(inputs, point)["pixel_values"]
        assert (pixels.shape, pixels.dtype) == ((point.batch, 3, 8, 6), np.float32)
        assert abs(pixels.mean()) < 0.5 < pixels.std() < 1.5
        assert session.run(None, {"pixel_values": pixels})[0].shape == pixels.shape


def test_types_and_ranks_are_kept(tmp_path: Path) -> None:
    inputs = {
        "half": (HALF, ["n", 2, "t"]),
        "flag": (BOOL, ["n"]),
        "pixel_mask": (BOOL, ["n", "t"]),
        "small": (TensorProto.UINT8, ["n", 7]),
        "scale": (TensorProto.DOUBLE, []),
    }
    feeds = make_feeds(graph_inputs(graph_file(tmp_path / "kinds.onnx", inputs)), Point(2, 5))
    found = {name: (value.dtype.name, np.shape(value)) for name, value in feeds.items()}
    assert found == {
        "half": ("float16", (2, 2, 5)),
        "flag": ("bool", (2,)),
        "pixel_mask": ("bool", (2, 5)),
        "small": ("uint8", (2, 7)),
        "scale": ("float64", ()),
    }
    assert feeds["pixel_mask"].all()


@pytest.mark.parametrize(("rows", "between"), [(1, []), (3, []), (7, ["Cast"]), (30, ["Identity", "Cast"]), (500, [])])
def test_ids_stay_inside_the_table_that_they_look_up(tmp_path: Path, rows: int, between: list[str]) -> None:
    nodes, name = [], "input_ids"
    for i, kind in enumerate(between):
        nodes.append(
            helper.make_node(kind, [name], [f"same{i}"], **({"to": TensorProto.INT32} if kind == "Cast" else {}))
        )
        name = f"same{i}"
    nodes.append(helper.make_node("Gather", ["table", name], ["out"]))
    table = np.ones((rows, 2), np.float32)
    file = graph_file(tmp_path / "ids.onnx", {"input_ids": TEXT["input_ids"]}, nodes, {"table": table})
    inputs = graph_inputs(file)
    feeds = make_feeds(inputs, Point(2, 400))
    low, high = min(5, rows - 1), min(rows, 100)
    assert (feeds["input_ids"].min(), feeds["input_ids"].max()) == (low, high - 1)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert session.run(None, feeds)[0].shape == (2, 400, 2)


def test_a_quantised_table_bounds_ids_too(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["table", "scale"], ["floats"]),
        helper.make_node("Gather", ["floats", "input_ids"], ["out"]),
    ]
    tables = {"table": np.ones((9, 2), np.int8), "scale": np.float32(0.5)}
    file = graph_file(tmp_path / "ids.onnx", {"input_ids": TEXT["input_ids"]}, nodes, tables)
    assert [each.end_id for each in graph_inputs(file)] == [9]


def test_a_gather_along_another_axis_says_nothing_of_ids(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["table", "input_ids"], ["out"], axis=1)
    file = graph_file(
        tmp_path / "ids.onnx", {"input_ids": TEXT["input_ids"]}, [node], {"table": np.ones((2, 200), np.float32)}
    )
    assert [each.end_id for each in graph_inputs(file)] == [100]


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_are_no_sizes_are_open(tmp_path: Path, size: int) -> None:
    assert graph_inputs(graph_file(tmp_path / "a.onnx", {"x": (FLOAT, [size, size, 3])}))[0].shape == (None, None, 3)


def test_fixed_shapes_refuse_other_points(tmp_path: Path) -> None:
    file = graph_file(tmp_path / "fixed.onnx", {name: (INT, [1, 32]) for name in TEXT})
    inputs = graph_inputs(file)
    for good in (Point(1), Point(1, 32)):
        assert settled(file, inputs, good, 128) == Point(1, None)
    with pytest.raises(BadInput, match=r"batch=2.*fixed batch of 1"):
        settled(file, inputs, Point(2), 128)
    with pytest.raises(BadInput, match=r"seq=64.*\[32\]"):
        settled(file, inputs, Point(1, 64), 128)


def test_a_fixed_batch_beside_an_open_length(tmp_path: Path) -> None:
    file = graph_file(tmp_path / "one.onnx", {name: (INT, [1, "sequence"]) for name in TEXT})
    inputs = graph_inputs(file)
    point = settled(file, inputs, Point(1), 128)
    assert point == Point(1, 128)
    assert {value.shape for value in make_feeds(inputs, point).values()} == {(1, 128)}


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.BFLOAT16, TensorProto.COMPLEX64, 99])
def test_types_without_random_values_are_refused(tmp_path: Path, kind: int) -> None:
    file = graph_file(tmp_path / "odd.onnx", {"x": (FLOAT, ["n"])})
    proto = onnx.load(file)
    proto.graph.input[0].type.tensor_type.elem_type = kind
    onnx.save(proto, file)
    with pytest.raises(BadInput, match="type"):
        graph_inputs(file)


def test_graphs_without_inputs_or_shapes_are_refused(tmp_path: Path) -> None:
    nothing = graph_file(
        tmp_path / "none.onnx", {}, [helper.make_node("Identity", ["w"], ["out"])], {"w": np.ones(2, np.float32)}
    )
    with pytest.raises(BadInput, match="no inputs"):
        graph_inputs(nothing)
    file = graph_file(tmp_path / "shapeless.onnx", {"x": (FLOAT, None)})  # type: ignore[dict-item]  # no shape at all
    with pytest.raises(BadInput, match="shape"):
        graph_inputs(file)
    (tmp_path / "text.onnx").write_text("not a graph")
    with pytest.raises(BadInput, match="not an ONNX"):
        graph_inputs(tmp_path / "text.onnx")


def test_stored_weights_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    # Old exporters list weights there too.
    node = helper.make_node("Add", ["x", "w"], ["out"])
    inputs = {"x": (FLOAT, ["n", 2]), "w": (FLOAT, [2])}
    file = graph_file(tmp_path / "old.onnx", inputs, [node], {"w": np.ones(2, np.float32)})
    assert [each.name for each in graph_inputs(file)] == ["x"]


def test_a_size_beyond_reason_is_refused(tmp_path: Path) -> None:
    inputs = graph_inputs(graph_file(tmp_path / "image.onnx", {"x": (FLOAT, ["n", 3, 10**6, 10**6])}))
    with pytest.raises(BadInput, match="4 GiB"):
        make_feeds(inputs, Point(1))


# other artifacts


def test_other_artifacts_are_described_by_the_model_beside_them() -> None:
    graph = inputs_of(finished_job() / "model.onnx")
    beside = inputs_of(finished_job() / "model.pt2")  # its own content is not looked at
    assert [each.end_id for each in graph] == [100, 100, 2]
    assert beside == graph


def test_other_artifacts_need_their_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="output folder"):
        inputs_of(tmp_path / "model.engine")


# two artifacts


def test_two_artifacts_take_the_same_inputs_in_any_order(tmp_path: Path) -> None:
    one = graph_file(tmp_path / "one.onnx", TEXT)
    other = graph_file(tmp_path / "other.onnx", dict(reversed(TEXT.items())))
    contest = comparison_of(one, other)
    assert [each.name for each in contest.inputs] == list(TEXT)
    ids = [(Path("a"), (Input("ids", "int64", (None,), end),)) for end in (50, 20)]
    assert common_inputs(*ids)[0].end_id == 20


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({name: TEXT[name] for name in ("input_ids", "attention_mask")}, "token_type_ids"),
        ({**TEXT, "input_ids": (TensorProto.INT32, ["batch", "sequence"])}, "int32"),
        ({"pixel_values": (FLOAT, ["n", 3, 8, 8])}, "pixel_values"),
    ],
)
def test_other_inputs_are_refused_with_both_names(
    tmp_path: Path, inputs: dict[str, tuple[int, Shape]], says: str
) -> None:
    one, other = graph_file(tmp_path / "one.onnx", TEXT), graph_file(tmp_path / "other.onnx", inputs)
    with pytest.raises(BadInput, match=says) as refused:
        comparison_of(one, other)
    assert str(one) in str(refused.value)
    assert str(other) in str(refused.value)


def test_pictures_go_through_the_whole_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from optin_deploy.measuring import artifacts as measuring
    from optin_deploy.measuring.gate import LatencyLimit
    from support.made_timings import HOLDS, FakeMeasuring

    fake = FakeMeasuring([HOLDS])
    monkeypatch.setattr(measuring, "measure_pair", fake)
    file = graph_file(tmp_path / "image.onnx", {"pixel_values": (FLOAT, ["n", 3, 8, 6])})
    copy = Path(shutil.copy(file, tmp_path / "copy.onnx"))
    found = comparison_of(file, copy, points=[Point(2)]).run(LatencyLimit("max_ratio", 1.05))
    assert found.to_json()["points"][0]["seq_len"] is None
    assert found.sentence.startswith("2 holds")
    assert [feeds["pixel_values"].shape for feeds in fake.feeds] == [(2, 3, 8, 6)]


def test_a_pin_covers_weights_in_other_files(tmp_path: Path) -> None:
    node = helper.make_node("Add", ["x", "w"], ["out"])
    file = graph_file(tmp_path / "a.onnx", {"x": (FLOAT, ["n", 2])}, [node], {"w": np.ones(2, np.float32)})
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="w.bin", size_threshold=0)
    pin, data = tmp_path / "baseline.json", tmp_path / "w.bin"
    assert comparison_of(file).pin(pin).data == {"w.bin": sha256_file(data)}
    assert comparison_of(pin).baseline == file
    content = data.read_bytes()
    data.write_bytes(content[:-1] + b"\x41")
    with pytest.raises(BadInput, match=r"w\.bin, which holds weights of a\.onnx, is not the pinned file"):
        comparison_of(pin)
    data.unlink()
    with pytest.raises(BadInput, match=r"a\.onnx: weights of 'w' cannot be read: its data file 'w\.bin' is missing"):
        comparison_of(pin)
    data.write_bytes(content)
    assert comparison_of(pin).baseline == file
