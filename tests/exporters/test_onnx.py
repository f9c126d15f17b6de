"""ONNX files of cut networks compute what torch does, hold no empty tensors, and are written whole or not at all."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from optin_deploy.errors import BadInput
from optin_deploy.exporters.base import Artifact, ExportSpec, Form
from optin_deploy.exporters.passes.pooled import head_of
from optin_deploy.exporters.to_onnx import OnnxExporter
from optin_deploy.feeds.embedding_head import EmbeddingHead
from optin_deploy.files.storage import sha256_file
from optin_deploy.jobs.prepared import prepare
from optin_deploy.jobs.stages import dense_stage
from optin_deploy.jobs.workspace import Workspace
from optin_deploy.network import sealed
from optin_deploy.network.examples import example_of
from optin_deploy.network.read_torch import read_module
from optin_deploy.pruning.source import Source
from support import tiny_checkpoint
from support.tiny_forms import Tiny, form_of, tiny
from support.tiny_models import error, main_name, outputs, tiny_batch, tiny_model

TOLERANCE = 1e-4

CASES = (
    *("bert", "roberta+head", "electra+head", "distilbert", "vit", "deit+head", "dinov2", "dinov2-swiglu+head"),
    *("gpt2", "gpt2+head", "dynamo bert", "dynamo dinov2-registers"),
)
"""Every way of making positions, and both exporters of torch."""

pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def case(name: str) -> Tiny:
    """One layer lost all heads, one all neurons, one (in classifiers) both; the first is cut unevenly."""
    return tiny(name, no_neurons=(1,) if name.endswith("+head") else (2,))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> artifact of a case, exported once."""
    folder = tmp_path_factory.mktemp("onnx")

    @cache
    def export(name: str) -> Artifact:
        form = form_of(case(name).network, folder / f"{name}.onnx")
        return OnnxExporter().export(form, ExportSpec(), form.graph)

    return export


def run(path: Path, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with OnnxExporter().open(path, threads=1) as runtime:
        found = runtime.run({name: value.numpy() for name, value in batch.items()})
    return {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_onnx_equals_torch_at_other_sizes_with_padding(name: str, exported: Any) -> None:
    model, artifact, dense = case(name).reference, exported(name), case(name).model
    # The traced example has batch 2 and 13 tokens.
    for sizes in ({"batch": 5, "seq_len": 23}, {"batch": 1, "seq_len": 7}, {"batch": 3, "seq_len": 1}):
        batch = tiny_batch(model, **sizes) if sizes["seq_len"] > 2 else single_token(model, sizes["batch"])
        expected, found = outputs(model, batch, states=False), run(artifact.path, batch)
        assert set(found) == names_of_outputs(name)
        assert error(expected[main_name(expected)], found[main_name(expected)]) < TOLERANCE
        assert error(outputs(dense, batch)[main_name(expected)], found[main_name(expected)]) > 1000 * TOLERANCE


def names_of_outputs(name: str) -> set[str]:
    """DINOv2 pools without a pooler: its pooled output is the first token's state, and costs nothing."""
    if name.endswith("+head"):
        return {"logits"}
    return {"last_hidden_state"} | ({"pooler_output"} if "dinov2" in name else set())


def single_token(model: Any, batch: int) -> dict[str, Tensor]:
    """The shortest text there is; images keep their size."""
    longer = tiny_batch(model, batch=batch, seq_len=4)
    return longer if "pixel_values" in longer else {name: value[:, :1] for name, value in longer.items()}


@pytest.mark.parametrize("name", CASES)
def test_names_of_inputs_and_outputs_follow_the_contract(name: str, exported: Any) -> None:
    artifact, family = exported(name), name.removeprefix("dynamo ")
    text = ["input_ids", "attention_mask"]
    types = ["token_type_ids"] if family.partition("+")[0] in ("bert", "electra") else []
    image = family.startswith(("vit", "deit", "dinov2"))
    graph = onnx.load(artifact.path).graph
    assert [each.name for each in graph.input] == (["pixel_values"] if image else text + types)
    assert graph.output[0].name == main_name(names_of_outputs(name))
    assert {each.name for each in graph.output} == names_of_outputs(name)
    assert artifact.inputs == tuple(each.name for each in graph.input)
    assert artifact.outputs == tuple(each.name for each in graph.output)
    assert (artifact.engine, artifact.precision) == ("onnx", "fp32")
    assert (artifact.sha256, artifact.size_bytes) == (sha256_file(artifact.path), artifact.path.stat().st_size)


@pytest.mark.parametrize("name", CASES)
def test_graph_holds_no_zero_size_tensor(name: str, exported: Any) -> None:
    proto = onnx.load(exported(name).path)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    shapes = dict(shapes_of(inferred.graph))
    scalars = {node.input[0] for node in proto.graph.node if node.op_type == "ConstantOfShape"}  # of no sizes
    scalars |= {node.input[1] for node in proto.graph.node if node.op_type in ("Reshape", "Expand")}
    assert len(shapes) > len(proto.graph.initializer) > 10
    assert not {tensor: shape for tensor, shape in shapes.items() if 0 in shape and tensor not in scalars}


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
    dense = sum(p.numel() for p in case(name).model.parameters())
    assert stored <= case(name).kept_parameters * 1.05 < 0.8 * dense  # small constants of the graph aside


def test_reading_leaves_out_dropout_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny_model("distilbert")
    outputs(model, tiny_batch(model, batch=1), states=False)
    model.train()
    model.transformer.layer[0].eval()
    before, example = state_of(model), example_of(model)
    form = form_of(read_module(model, example.inputs, axes=example.axes, dynamo=False), tmp_path / "model.onnx")
    assert state_of(model) == before
    batch = tiny_batch(model, batch=3, seq_len=11)
    expected = outputs(model.eval(), batch)["last_hidden_state"]
    assert error(expected, run(form.graph, batch)["last_hidden_state"]) < TOLERANCE


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


def test_an_export_leaves_the_file_of_the_stage_before_as_it_is(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copy(exported("distilbert").path, tmp_path / "model.onnx"))
    before = (out.stat().st_mtime_ns, out.stat().st_ino, sha256_file(out))
    monkeypatch.setattr(sealed, "write", no_export)
    again = OnnxExporter().export(Form(out, case("distilbert").network), ExportSpec(), out)
    assert again == replace(exported("distilbert"), path=out)
    assert (out.stat().st_mtime_ns, out.stat().st_ino, sha256_file(out)) == before


# ---- the dense network of a job


def job(model: Path, folder: Path) -> Workspace:
    """A workspace with the dense network of a model."""
    source = Source(str(model), calibration=str(tiny_checkpoint.lines()), seq_len=16, samples=8)
    workspace = Workspace.claim(folder, source, force=True)
    dense_stage(workspace, prepare(source, folder))
    return workspace


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return job(tiny_checkpoint.classifier(), tmp_path_factory.mktemp("dense"))


def changed_classifier(folder: Path, **settings: Any) -> Path:
    """The same with other settings or, without any, with one other weight."""
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(tiny_checkpoint.classifier(), folder))
    if settings:
        (path / "config.json").write_text(json.dumps({**json.loads((path / "config.json").read_text()), **settings}))
        return path
    weights = load_file(path / "model.safetensors")
    weights["classifier.bias"][1] += 1
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def test_a_second_job_on_the_same_weights_reuses_the_file(
    whole: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(whole.root, tmp_path / "job"))
    before = ((folder / "dense.onnx").stat().st_mtime_ns, sha256_file(folder / "dense.onnx"))
    monkeypatch.setattr(torch.onnx, "export", no_export)
    job(tiny_checkpoint.classifier(), folder)
    assert ((folder / "dense.onnx").stat().st_mtime_ns, sha256_file(folder / "dense.onnx")) == before


@pytest.mark.parametrize("settings", [{}, {"hidden_act": "relu"}])
def test_other_weights_and_another_activation_are_exported_anew(
    settings: dict[str, Any], whole: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(whole.root, tmp_path / "job"))
    monkeypatch.setattr(torch.onnx, "export", no_export)
    with pytest.raises(Exporting):
        job(changed_classifier(tmp_path / "changed", **settings), folder)


@pytest.mark.parametrize("content", [b"", b"not a protobuf", None])
def test_a_damaged_file_is_not_reused(
    content: bytes | None, whole: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(whole.root, tmp_path / "job"))
    bytes_of = (folder / "dense.onnx").read_bytes()
    (folder / "dense.onnx").write_bytes(bytes_of[: len(bytes_of) // 2] if content is None else content)
    monkeypatch.setattr(torch.onnx, "export", no_export)
    with pytest.raises(Exporting):
        job(tiny_checkpoint.classifier(), folder)


# ---- pooling


def test_mean_pooling_averages_the_real_tokens(tmp_path: Path) -> None:
    model = case("bert").reference
    form = form_of(case("bert").network, tmp_path / "model.onnx", head=EmbeddingHead("mean"))
    artifact = OnnxExporter().export(form, ExportSpec(head=EmbeddingHead("mean")), form.graph)
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
    model = case("vit").reference
    form = form_of(case("vit").network, tmp_path / "model.onnx", head=EmbeddingHead("mean"))
    batch = tiny_batch(model, batch=3)
    expected = outputs(model, batch)["last_hidden_state"].mean(1)
    assert error(expected, run(form.graph, batch)["sentence_embedding"]) < TOLERANCE


def test_pooling_of_a_classifier_and_unknown_pooling_are_refused() -> None:
    with pytest.raises(BadInput, match=r"--pool mean.*logits"):
        head_of(case("roberta+head").network, "mean", None)
    with pytest.raises(BadInput, match=r"'median'.*possible: mean"):
        head_of(case("bert").network, "median", None)


# ---- whole or not at all


@pytest.mark.parametrize("failing", ["typed", "check_model", "write"])
@pytest.mark.parametrize("old", [None, b"an older file"])
def test_a_failed_export_leaves_nothing_behind(
    failing: str, old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, out = form_of(case("distilbert").network, tmp_path / "model.onnx"), tmp_path / "model.fp16.onnx"
    if old is not None:
        out.write_bytes(old)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def raising(*args: object, **kwargs: object) -> None:
        if failing == "write":
            Path(args[1]).write_bytes(b"half")  # type: ignore[arg-type]
        raise KeyboardInterrupt(failing)

    owner = {"typed": "optin_deploy.exporters.to_onnx.typed", "check_model": "onnx.checker.check_model"}
    monkeypatch.setattr(owner.get(failing, "optin_deploy.network.sealed.write"), raising)
    with pytest.raises(KeyboardInterrupt, match=failing):
        OnnxExporter().export(form, ExportSpec("fp16"), out)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
