"""The exported graph computes what the torch model does, holds no empty tensors, and is written whole or not at all."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import error, main_name, outputs, random_plan, tiny_batch, tiny_model
from torch import Tensor

from exporters.base import Artifact, ExportSpec
from exporters.to_onnx import OnnxExporter
from optin_deploy.arch.resolve import resolve
from optin_deploy.arch.table import TABLE
from optin_deploy.errors import BadInput
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.storage import sha256_file

TOLERANCE = 1e-4

CASES = (
    *("bert", "roberta+head", "electra+head", "distilbert", "vit", "deit+head"),
    *("dinov2", "dinov2-swiglu+head", "dinov2-registers", "gpt2", "gpt2+head"),
)
"""An export takes seconds: every row and every way of making positions, one class each."""

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def pruned_model(name: str) -> Any:
    """One layer lost all heads, one all neurons, one (in classifiers) both; the first is cut unevenly."""
    model = tiny_model(name)
    layout = resolve(model)
    lost: dict[str, tuple[int, ...]] = {"no_heads": (1,), "no_neurons": (1,) if name.endswith("+head") else (2,)}
    return rewrite_torch(model, layout, random_plan(model, layout, **lost))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> artifact of `pruned_model(name)`, exported once."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def export(name: str) -> Artifact:
        return OnnxExporter().export(pruned_model(name), ExportSpec(), folder / f"{name}.onnx")

    return export


def run(path: Path, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with OnnxExporter().open(path, threads=1) as runtime:
        found = runtime.run({name: value.numpy() for name, value in batch.items()})
    return {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_onnx_equals_torch_at_other_sizes_with_padding(name: str, exported: Any) -> None:
    model, artifact = pruned_model(name), exported(name)
    # The traced example has batch 2 and 16 tokens.
    for sizes in ({"batch": 5, "seq_len": 23}, {"batch": 1, "seq_len": 7}, {"batch": 3, "seq_len": 1}):
        batch = tiny_batch(model, **sizes) if sizes["seq_len"] > 2 else single_token(model, sizes["batch"])
        expected, found = outputs(model, batch, states=False), run(artifact.path, batch)
        assert set(found) == {main_name(expected)}
        assert error(expected[main_name(expected)], found[main_name(expected)]) < TOLERANCE


def single_token(model: Any, batch: int) -> dict[str, Tensor]:
    """The shortest text there is; images keep their size."""
    longer = tiny_batch(model, batch=batch, seq_len=4)
    return longer if "pixel_values" in longer else {name: value[:, :1] for name, value in longer.items()}


@pytest.mark.parametrize("name", CASES)
def test_names_of_inputs_and_outputs_follow_the_contract(name: str, exported: Any) -> None:
    artifact = exported(name)
    text = ["input_ids", "attention_mask"]
    types = ["token_type_ids"] if name.partition("+")[0] in ("bert", "electra") else []
    image = name.startswith(("vit", "deit", "dinov2"))
    graph = onnx.load(artifact.path).graph
    assert [each.name for each in graph.input] == (["pixel_values"] if image else text + types)
    assert [each.name for each in graph.output] == ["logits" if name.endswith("+head") else "last_hidden_state"]
    assert artifact.inputs == tuple(each.name for each in graph.input)
    assert artifact.outputs == tuple(each.name for each in graph.output)
    assert (artifact.engine, artifact.precision) == ("onnx", "fp32")
    assert (artifact.sha256, artifact.size_bytes) == (sha256_file(artifact.path), artifact.path.stat().st_size)


@pytest.mark.parametrize("name", CASES)
def test_graph_holds_no_zero_size_tensor(name: str, exported: Any) -> None:
    proto = onnx.load(exported(name).path)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    shapes = dict(shapes_of(inferred.graph))
    assert len(shapes) > len(proto.graph.initializer) > 10
    assert not {tensor: shape for tensor, shape in shapes.items() if 0 in shape}


def shapes_of(graph: onnx.GraphProto) -> Iterator[tuple[str, list[int]]]:
    """Names and known sizes (-1: dynamic) of weights, constants and values, also in subgraphs."""
    yield from ((each.name, list(each.dims)) for each in graph.initializer)
    for each in itertools.chain(graph.value_info, graph.input, graph.output):
        dims = each.type.tensor_type.shape.dim
        yield each.name, [dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield f"{node.name}.{attribute.name}", list(attribute.t.dims)
            elif attribute.type == onnx.AttributeProto.GRAPH:
                yield from shapes_of(attribute.g)


def test_zero_size_tensors_would_be_found() -> None:
    empty = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [0, 4], [])
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 0])
    node = onnx.helper.make_node("Constant", [], ["y"], value=empty, name="c")
    graph = onnx.helper.make_graph([node], "g", [], [output], [empty])
    assert dict(shapes_of(graph)) == {"w": [0, 4], "y": [-1, 0], "c.value": [0, 4]}


@pytest.mark.parametrize("name", CASES)
def test_cut_weights_are_physically_smaller_in_the_file(name: str, exported: Any) -> None:
    graph = onnx.load(exported(name).path).graph
    stored = sum(int(np.prod(w.dims)) for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT)
    kept, dense = (sum(p.numel() for p in m.parameters()) for m in (pruned_model(name), tiny_model(name)))
    assert stored <= kept * 1.05 < 0.8 * dense  # small constants of the graph aside


def test_every_row_is_exported() -> None:
    assert {resolve(tiny_model(name)).arch for name in CASES} == {row.name for row in TABLE}


def test_export_leaves_out_dropout_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("distilbert")
    outputs(model, tiny_batch(model, batch=1), states=False)
    model.train()
    model.transformer.layer[0].eval()
    before = state_of(model)
    artifact = OnnxExporter().export(model, ExportSpec(), tmp_path / "model.onnx")
    assert state_of(model) == before
    batch = tiny_batch(model, batch=3, seq_len=11)
    expected = outputs(model.eval(), batch)["last_hidden_state"]
    assert error(expected, run(artifact.path, batch)["last_hidden_state"]) < TOLERANCE


def state_of(model: Any) -> dict[str, Any]:
    return {
        "training": {path: module.training for path, module in model.named_modules()},
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "hooks": {path: len(m._forward_hooks) + len(m._forward_pre_hooks) for path, m in model.named_modules()},
        "requires_grad": {path: p.requires_grad for path, p in model.named_parameters()},
        "weights": {name: value.sum().item() for name, value in model.state_dict().items()},
        "attention": model.config._attn_implementation,
    }


class Exporting(Exception):
    """Raised where the long work would begin."""


def no_export(*args: object, **kwargs: object) -> None:
    raise Exporting


def test_second_export_of_the_same_weights_reuses_the_file(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copy(exported("distilbert").path, tmp_path / "model.onnx"))
    before = (out.stat().st_mtime_ns, out.stat().st_ino, sha256_file(out))
    monkeypatch.setattr(torch.onnx, "export", no_export)
    again = OnnxExporter().export(pruned_model("distilbert"), ExportSpec(), out)
    assert again == replace(exported("distilbert"), path=out)
    assert (out.stat().st_mtime_ns, out.stat().st_ino, sha256_file(out)) == before


def test_other_weights_are_exported_anew(exported: Any, tmp_path: Path) -> None:
    out = Path(shutil.copy(exported("distilbert").path, tmp_path / "model.onnx"))
    changed = copy.deepcopy(pruned_model("distilbert"))
    with torch.no_grad():
        changed.transformer.layer[0].ffn.lin1.bias[3] += 1
    artifact = OnnxExporter().export(changed, ExportSpec(), out)
    assert artifact.sha256 == sha256_file(out) != exported("distilbert").sha256
    batch = tiny_batch(changed, batch=3, seq_len=11)
    assert error(outputs(changed, batch)["last_hidden_state"], run(out, batch)["last_hidden_state"]) < TOLERANCE


def test_same_weights_with_another_activation_are_exported_anew(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copy(exported("distilbert").path, tmp_path / "model.onnx"))
    changed = copy.deepcopy(pruned_model("distilbert"))
    changed.config.activation = "relu"
    for layer in changed.transformer.layer:
        layer.ffn.activation = torch.nn.ReLU()
    monkeypatch.setattr(torch.onnx, "export", no_export)
    with pytest.raises(Exporting):
        OnnxExporter().export(changed, ExportSpec(), out)


@pytest.mark.parametrize("content", [b"", b"not a protobuf", None])
def test_file_that_is_not_ours_is_not_reused(content: bytes | None, tmp_path: Path, exported: Any) -> None:
    out = tmp_path / "model.onnx"
    whole = exported("distilbert").path.read_bytes()
    out.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Exporting):
        patch.setattr(torch.onnx, "export", no_export)
        OnnxExporter().export(pruned_model("distilbert"), ExportSpec(), out)


def test_mean_pooling_averages_the_real_tokens(exported: Any, tmp_path: Path) -> None:
    model = pruned_model("bert")
    out = Path(shutil.copy(exported("bert").path, tmp_path / "model.onnx"))  # without pooling: not to be reused
    artifact = OnnxExporter().export(model, ExportSpec(pool="mean"), out)
    assert artifact.outputs == ("last_hidden_state", "sentence_embedding")
    batch = tiny_batch(model, batch=4, seq_len=13)
    states = outputs(model, batch)["last_hidden_state"]
    lengths = batch["attention_mask"].sum(1).tolist()
    assert min(lengths) < 13
    expected = torch.stack([row[:length].mean(0) for row, length in zip(states, lengths, strict=True)])
    found = run(artifact.path, batch)
    assert error(states, found["last_hidden_state"]) < TOLERANCE
    assert error(expected, found["sentence_embedding"]) < TOLERANCE
    assert error(states.mean(1), found["sentence_embedding"]) > 1e-2  # padding matters here


def test_mean_pooling_of_an_image_model_averages_all_tokens(tmp_path: Path) -> None:
    model = pruned_model("vit")
    artifact = OnnxExporter().export(model, ExportSpec(pool="mean"), tmp_path / "model.onnx")
    batch = tiny_batch(model, batch=3)
    expected = outputs(model, batch)["last_hidden_state"].mean(1)
    assert error(expected, run(artifact.path, batch)["sentence_embedding"]) < TOLERANCE


def test_pooling_of_a_classifier_and_unknown_pooling_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"feature-extraction.*BertForSequenceClassification"):
        OnnxExporter().export(tiny_model("bert+head"), ExportSpec(pool="mean"), tmp_path / "model.onnx")
    with pytest.raises(BadInput, match=r"'max'.*possible: mean"):
        OnnxExporter().export(tiny_model("bert"), ExportSpec(pool="max"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["export", "check_model", "save"])
@pytest.mark.parametrize("old", [None, b"an older file"])
def test_failed_export_leaves_nothing_behind(
    failing: str, old: bytes | None, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = copy.deepcopy(pruned_model("distilbert")), tmp_path / "model.onnx"
    proto = onnx.load(exported("distilbert").path)  # stands for the seconds of the real export
    del proto.metadata_props[:]  # of which the key is not yet a part
    if old is not None:
        out.write_bytes(old)
    before = state_of(model)

    def raising(*args: object, **kwargs: object) -> None:
        if failing == "save":
            Path(args[1]).write_bytes(b"half")  # type: ignore[arg-type]
        raise KeyboardInterrupt(failing)

    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: SimpleNamespace(model_proto=proto))
    owner = {"export": torch.onnx, "check_model": onnx.checker, "save": onnx}[failing]
    monkeypatch.setattr(owner, failing, raising)
    with pytest.raises(KeyboardInterrupt, match=failing):
        OnnxExporter().export(model, ExportSpec(), out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == ({"model.onnx": old} if old else {})
    assert state_of(model) == before
