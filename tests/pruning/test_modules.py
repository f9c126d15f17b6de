"""`optin_deploy.prune` of any module: smaller, proven, nearer to dense than by norms, saved and loaded as it was."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import optin_deploy
from benchmarks.zoo.families import FAMILIES
from benchmarks.zoo.family import scatter
from optin_deploy.cutting.graph import cut
from optin_deploy.errors import BadInput, PlanMismatch
from optin_deploy.feeds.feeds import feeds_of
from optin_deploy.network.module import NetworkModule
from optin_deploy.network.read_torch import read_module
from optin_deploy.network.run import Program
from optin_deploy.planning.magnitude import magnitudes
from optin_deploy.planning.widths import best
from optin_deploy.pruning import modules
from optin_deploy.pruning.modules import PrunedModel
from optin_deploy.pruning.networks import find_in
from optin_deploy.scoring.settings import ScoreSettings
from support.tiny_networks import VOCABULARY, Image, Text, made

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def quickly_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the exporter that takes a tenth of the time."""
    monkeypatch.setattr(modules, "read_module", partial(read_module, dynamo=False))


def pictures(count: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def texts(count: int = 48, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, 7), generator=torch.Generator().manual_seed(seed))


def distance(one: nn.Module, other: nn.Module, rows: Tensor) -> float:
    with torch.no_grad():
        wanted, found = other(rows), one(rows)
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.usefixtures("quickly_read")
def test_a_network_of_convolutions_is_cut_by_a_dataloader() -> None:
    module = made(Image)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loader = DataLoader(TensorDataset(pictures(), torch.zeros(48)), batch_size=8)
    pruned = optin_deploy.prune(module, loader, flops=0.6, align=2, allocation="uniform")
    assert isinstance(pruned, PrunedModel)
    assert isinstance(pruned.model, Image)
    assert pruned.plan.cost is not None
    assert pruned.plan.cost.macs_pruned <= 0.6 * pruned.plan.cost.macs_dense
    assert sum(p.numel() for p in pruned.model.parameters()) < sum(p.numel() for p in module.parameters())
    assert distance(pruned.model, module, pictures(seed=1)) < 0.1
    torch.testing.assert_close(dict(module.state_dict()), before, rtol=0, atol=0)  # the given one is untouched


@pytest.mark.usefixtures("quickly_read")
def test_the_graph_beside_a_module_computes_the_same() -> None:
    pruned = optin_deploy.prune(made(Text), [texts()], flops=0.6, align=4, allocation="uniform")
    rows = texts(9, seed=2)
    with torch.no_grad():
        found = Program(pruned.network)({pruned.network.inputs[0].name: rows}).outputs
        torch.testing.assert_close(pruned.model(rows), next(iter(found.values())), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("quickly_read")
def test_what_is_saved_is_loaded_as_the_graph(tmp_path: Path) -> None:
    pruned = optin_deploy.prune(made(Text), [texts()], flops=0.6, align=4, allocation="uniform")
    assert isinstance(pruned, PrunedModel)
    folder = pruned.save(tmp_path / "smaller")
    rows = texts(9, seed=2)
    with torch.no_grad():
        (found,) = optin_deploy.load(folder)(rows).values()
        torch.testing.assert_close(found, pruned.model(rows), rtol=1e-4, atol=1e-5)
    plan = json.loads((folder / "plan.json").read_text())
    name = next(iter(plan["keep"]))
    plan["keep"][name] = plan["keep"][name][1:]
    (folder / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(PlanMismatch, match="was cut by plan"):
        optin_deploy.load(folder)


def test_a_network_with_batch_statistics_learns_on_after_it_is_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(512, 4))
    module = nn.Sequential(*parts)
    module(pictures())  # in training mode: there are statistics
    pruned = optin_deploy.prune(module.eval(), [pictures()], flops=0.6, align=2, allocation="uniform")
    loaded = optin_deploy.load(pruned.save(tmp_path / "smaller"))
    (found,) = loaded(pictures(4, seed=1)).values()
    torch.testing.assert_close(found, pruned.model(pictures(4, seed=1)), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    counts = {name: len(dict(each.named_parameters())) for name, each in (("own", module), ("loaded", loaded))}
    assert counts["loaded"] == counts["own"]
    assert all(each.grad is not None for each in loaded.parameters())
    assert len(repr(pruned)) < 2000


class Deciding(nn.Module):
    """Its steps follow from what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(torch.relu(hidden) if x.mean() > 0 else torch.relu(-hidden))


@pytest.mark.parametrize("signs", [(1, -1), (1, 1)])
def test_a_forward_that_decides_by_values_is_refused(signs: tuple[int, int], capfd: pytest.CaptureFixture[str]) -> None:
    batches = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) + sign for i, sign in enumerate(signs)]
    with pytest.raises(BadInput, match=r"Deciding.*A forward that decides by values"):
        optin_deploy.prune(made(Deciding), batches, flops=0.6, allocation="uniform")
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("quickly_read")
def test_scores_and_compensation_are_nearer_to_dense_than_norms() -> None:
    module, unseen = made(Image), pictures(64, seed=1)
    pruned = optin_deploy.prune(module, [pictures(128)], flops=0.6, align=2, allocation="uniform")
    norms = magnitudes(optin_deploy.inspect(module, {"pixels": pictures(2)}))
    keep = {name: best(norms[name], len(units)) for name, units in pruned.plan.keep.items()}
    by_norms = optin_deploy.cut(module, keep, {"pixels": pictures(2)})
    assert distance(pruned.model, module, unseen) < 0.5 * distance(by_norms, module, unseen)


def test_a_generator_is_read_once() -> None:
    def batches() -> Iterator[dict[str, Tensor]]:
        for seed in range(6):
            yield {"ids": texts(8, seed)}

    pruned = optin_deploy.prune(made(Text), batches(), flops=0.7, align=4, allocation="paper", compensation=False)
    assert isinstance(pruned.model, Text)


def test_what_does_not_fit_the_forward_is_refused() -> None:
    with pytest.raises(BadInput, match="ids"):
        optin_deploy.prune(made(Text), [{"words": texts()}], flops=0.6)
    with pytest.raises(BadInput, match=r"^flops 0\.01"):
        optin_deploy.prune(made(Image), [pictures()], flops=0.01)


class Padded(nn.Module):
    """Attention that hides what is padded, as torch's own does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 5)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2)).masked_fill(pad[:, None, None, :], float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2).mean(1))


def test_a_mask_that_is_true_where_nothing_is_to_be_seen() -> None:
    pad = torch.arange(7).expand(24, 7) >= 5
    pruned = optin_deploy.prune(made(Padded), [{"x": torch.randn(24, 7, 32), "pad": pad}], flops=0.7, align=1)
    assert 0 < len(pruned.plan.keep["qkv: heads"]) < 4


class Summed(nn.Module):
    """Sums by letters of a single tensor."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.up, self.down, self.equation = nn.Linear(16, 64), nn.Linear(64, 16), equation

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, self.down(self.up(x).relu()))


@pytest.mark.parametrize("equation", ["bnd->bdn", "bnd->bd"])
def test_letters_of_a_single_tensor(equation: str) -> None:
    module = Summed(equation).eval()
    pruned = optin_deploy.prune(module, [torch.randn(24, 7, 16)], flops=0.7, allocation="uniform")
    assert isinstance(pruned.model, Summed)
    assert pruned.model.up.out_features < 64


class Compared(nn.Module):
    """Global response normalisation (ConvNeXt V2): each channel's size beside the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 4, 1)
        self.scale = nn.Parameter(torch.randn(1, 32, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        sizes = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True)
        return self.down(x + self.scale * x * sizes / (sizes.mean(1, keepdim=True) + 1e-6))


def test_channels_beside_the_mean_of_all_are_cut_and_the_mean_stays_that_of_all(tmp_path: Path) -> None:
    module, x = made(Compared), torch.randn(24, 3, 12, 12)
    pruned = optin_deploy.prune(module, [x], flops=0.5, allocation="uniform", compensation=False)
    (units,) = pruned.plan.keep.values()
    masked = copy.deepcopy(module)
    gone = [unit for unit in range(32) if unit not in units]
    with torch.no_grad():
        for tensor in (masked.up.weight, masked.up.bias):
            tensor[gone] = 0
        expected = masked(x)
    assert 0 < len(units) < 32
    torch.testing.assert_close(optin_deploy.load(pruned.save(tmp_path / "smaller"))(x=x)["output"], expected)


class Shifted(nn.Module):
    """Some channels come from the moment before, some from the one behind (TSM, Lin et al., ICCV 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).relu()
        out = torch.zeros_like(x)
        out[:, :-1, :8] = x[:, 1:, :8]
        out[:, 1:, 8:16] = x[:, :-1, 8:16]
        out[:, :, 16:] = x[:, :, 16:]
        return self.down(out)


def test_channels_that_are_written_into_slices_are_cut_in_each_slice() -> None:
    module, x = made(Shifted), torch.randn(5, 7, 12)
    layout = optin_deploy.inspect(module, x)
    assert [group.units for group in layout.groups] == [8, 8, 16]
    keep = {group.name: range(0, group.units, 2) for group in layout.groups}
    masked = copy.deepcopy(module)
    with torch.no_grad():
        for tensor in (masked.up.weight, masked.up.bias):
            tensor[1::2] = 0
        torch.testing.assert_close(optin_deploy.cut(module, keep, x)(x=x)["output"], masked(x))


class Recurrent(nn.Module):
    """Features for a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.steps, self.out = nn.Linear(12, 48), nn.GRU(48, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.steps(self.before(x).relu())[0][:, -1])


class Neighbours(nn.Module):
    """A mean over the neighbours in a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(12, 48), nn.Linear(48, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.out(((edges / edges.sum(-1, keepdim=True)) @ self.inner(x)).relu())


@pytest.mark.parametrize(
    ("kind", "more", "name"),
    [(Recurrent, {}, "before: neurons"), (Neighbours, {"edges": torch.ones(8, 7, 7)}, "inner: neurons")],
)
def test_what_is_no_attention_has_neurons(kind: Any, more: dict[str, Tensor], name: str) -> None:
    layout = optin_deploy.inspect(made(kind), {"x": torch.randn(8, 7, 12), **more})
    assert {group.name: group.units for group in layout.groups} == {name: 48}


# Models of transformers

QUICK = ScoreSettings(probes=2, head_samples=2)


def transformer(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[name].build()
        scatter(model)
    return model.eval()


def rows_for(name: str, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches of one length."""
    return [FAMILIES[name].feeds(seed + n, batch=12) for n in range(2)]


def pruned_by(name: str, model: Any, **more: Any) -> PrunedModel:
    return optin_deploy.prune(model, rows_for(name), **{"flops": 0.6, "align": 8, "settings": QUICK, **more})


def logits(model: Any, feeds: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**feeds)["logits"]


def test_experts_lose_neurons_together() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.MixtralConfig(vocab_size=60, num_key_value_heads=2, num_local_experts=3, **sizes)
    model = hf.MixtralForCausalLM(config).eval()
    ids = {"input_ids": torch.randint(3, 60, (8, 9))}
    pruned = optin_deploy.prune(model, [ids], flops=0.8, units=("neurons",), compensation=False, settings=QUICK)
    ((name, units),) = pruned.plan.keep.items()
    masked = copy.deepcopy(model)
    gone = [unit for unit in range(24) if unit not in units]
    with torch.no_grad():
        masked.get_parameter("model.layers.0.mlp.experts.down_proj")[:, :, gone] = 0
    assert name == "model.layers.0.mlp: neurons"
    assert type(pruned.model) is type(model)
    assert pruned.model.get_parameter("model.layers.0.mlp.experts.down_proj").shape == (3, 16, len(units))
    torch.testing.assert_close(logits(pruned.model, ids), logits(masked, ids))


SIZES = {"vocab_size": 60, "initializer_range": 0.3}
FALCON = {**SIZES, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
"""Falcons; initial weights are larger than usual, so that heads differ."""
BY_DISTANCE = [
    pytest.param(hf.BloomConfig(hidden_size=24, n_layer=2, n_head=6, **SIZES), "h.{}.self_attention.dense", id="Bloom"),
    pytest.param(hf.MptConfig(d_model=24, n_layers=2, n_heads=4, **SIZES), "blocks.{}.attn.out_proj", id="MPT"),
    pytest.param(
        hf.FalconConfig(multi_query=False, alibi=True, **FALCON), "h.{}.self_attention.dense", id="Falcon by distance"
    ),
    pytest.param(hf.FalconConfig(**FALCON), "h.{}.self_attention.dense", id="Falcon of one key"),
]


@pytest.mark.parametrize(("config", "behind"), BY_DISTANCE)
def test_heads_go_with_their_slopes_and_leave_shared_keys(config: Any, behind: str) -> None:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    feeds = {"input_ids": torch.randint(3, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    feeds["attention_mask"][1, 6:] = 0
    layout = find_in(model).layout
    heads = [group for group in layout.groups if group.kind == "heads"]
    assert [group.units for group in heads] == 2 * [config.num_attention_heads]
    keep = {group.name: [n, config.num_attention_heads - 1] for n, group in enumerate(heads)}
    with torch.no_grad():
        dense = model(**feeds).logits
        smaller = Program(cut(layout, keep))(feeds).outputs["logits"]
        for n, kept in enumerate(keep.values()):
            alive = torch.zeros(config.num_attention_heads, 1)
            alive[kept] = 1
            weight = model.get_parameter(f"transformer.{behind.format(n)}.weight")
            weight.mul_(alive.expand(-1, weight.shape[1] // len(alive)).reshape(-1))
        masked = model(**feeds).logits
    seen = feeds["attention_mask"].bool()
    assert float((dense - masked)[seen].abs().max()) > 0.1
    torch.testing.assert_close(smaller[seen], masked[seen])


@pytest.mark.usefixtures("quickly_read")
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "vit", "deit", "gpt2", "llama"])
def test_a_model_of_transformers_comes_back_as_its_class(name: str, tmp_path: Path) -> None:
    model = transformer(name)
    pruned = pruned_by(name, model)
    assert type(pruned.model) is type(model)
    assert pruned.report["macs"]["kept"] <= 0.6
    assert pruned.report["params"]["pruned"] == sum(p.numel() for p in pruned.model.parameters())
    assert pruned.report["params"]["dense"] == sum(p.numel() for p in model.parameters())
    assert pruned.report["why_graph"] == ""
    folder = pruned.save(tmp_path / "out" / "model")
    other = FAMILIES[name].feeds(9, batch=3, length=21)  # another length than that of the rows
    for place in (folder, folder.parent):
        loaded = optin_deploy.load(place)
        assert type(loaded) is type(model)
        assert torch.equal(logits(loaded, other), logits(pruned.model, other))
    assert not (folder / "model.onnx").exists()


def test_prune_save_load_in_three_lines(tmp_path: Path) -> None:
    model = transformer("distilbert")
    pruned = optin_deploy.prune(model, rows_for("distilbert"))
    pruned.save(tmp_path / "smaller")
    loaded = optin_deploy.load(tmp_path / "smaller")
    feeds = FAMILIES["distilbert"].feeds(9, batch=1, length=5)
    assert torch.equal(logits(loaded, feeds), logits(pruned.model, feeds))
    named = {port.name: feeds[port.name] for port in pruned.network.inputs}
    torch.testing.assert_close(logits(NetworkModule(pruned.network), named), logits(loaded, feeds), rtol=0, atol=1e-4)


def test_an_input_that_the_class_does_not_ask_for_is_as_long_as_the_one_that_it_is_like() -> None:
    """Token types of GPT-2, in rows of one length: fixed to that, no other length could be run to find units."""
    batch = rows_for("gpt2")[0]
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    model = transformer("gpt2")
    example = modules.example_for(model, feeds_of(model, [batch]).calibration)
    assert example.axes["token_type_ids"] == example.axes["input_ids"] == {0: "batch", 1: "length"}


@pytest.mark.usefixtures("quickly_read")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_stays_half(dtype: torch.dtype, tmp_path: Path) -> None:
    pruned = pruned_by("bert", transformer("bert").to(dtype))
    loaded = optin_deploy.load(pruned.save(tmp_path / "smaller"))
    assert isinstance(loaded, hf.BertForSequenceClassification)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    feeds = rows_for("bert", seed=5)[0]
    assert torch.equal(logits(loaded, feeds), logits(pruned.model, feeds))


@pytest.mark.usefixtures("quickly_read")
def test_what_a_class_cannot_hold_is_saved_as_its_graph(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The heads of all layers share a table of biases."""
    with caplog.at_level(logging.WARNING):
        pruned = pruned_by("mpnet", transformer("mpnet"), allocation="paper")
    assert isinstance(pruned.model, NetworkModule)
    assert "MPNetForSequenceClassification is given as a graph" in pruned.report["why_graph"]
    assert pruned.report["why_graph"] in caplog.text
    loaded = optin_deploy.load(pruned.save(tmp_path / "smaller"))
    feeds = FAMILIES["mpnet"].feeds(9, batch=3, length=21)
    torch.testing.assert_close(logits(loaded, feeds), logits(pruned.model, feeds))


@pytest.mark.usefixtures("quickly_read")
def test_what_does_not_come_back_equal_is_saved_as_its_graph(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = transformer("bert")
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()  # its config says GELU
    pruned = pruned_by("bert", model)
    assert type(pruned.model) is type(model)
    with caplog.at_level(logging.WARNING):
        folder = pruned.save(tmp_path / "smaller")
    assert "BertForSequenceClassification is stored as a graph: what was saved differs from its graph by" in caplog.text
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {"model.onnx", "plan.json"}
    feeds = rows_for("bert", seed=5)[0]
    torch.testing.assert_close(logits(optin_deploy.load(folder), feeds), logits(pruned.model, feeds), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("quickly_read")
def test_a_folder_of_others_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pruned = pruned_by("bert", transformer("bert"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="optin-deploy did not make this"):
        pruned.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert "stored as a graph" not in caplog.text
    for path in ("", "\0", 3, None, b"folder", "/", "x" * 300, tmp_path / "notes.txt", tmp_path / "notes.txt" / "x"):
        for use in (pruned.save, optin_deploy.load):
            with pytest.raises(BadInput):
                use(path)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"flops": True}, "flops True"),
        ({"flops": 0.6, "size": 0}, "size"),
        ({"align": 0}, "align 0"),
        ({"align": 2.5}, "align 2.5"),
        ({"allocation": "best"}, "allocation 'best'"),
        ({"allocation": 3}, "allocation is a int"),
        ({"settings": {}}, "settings is a dict"),
        ({"compensation": 1}, "compensation is a int"),
        ({"seed": 1.0}, "seed 1.0"),
    ],
)
def test_arguments_that_cannot_be_are_refused_at_once(more: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        optin_deploy.prune(made(Text), [texts()], **more)


def test_what_is_no_module_with_weights_is_refused() -> None:
    for model in ("a path", nn.ReLU(), nn.Linear(3, 3, device="meta")):
        with pytest.raises(BadInput):
            optin_deploy.prune(model, [texts()])  # type: ignore[arg-type]


@pytest.mark.usefixtures("quickly_read")
def test_inference_mode_and_a_default_device_do_not_matter() -> None:
    model, found = made(Text), []
    for around in (torch.no_grad, torch.inference_mode, partial(torch.device, "meta")):
        given = [texts()]
        with around():
            found.append(optin_deploy.prune(model, given, flops=0.6, align=4, settings=QUICK).model)
    for other in found[1:]:
        torch.testing.assert_close(dict(other.state_dict()), dict(found[0].state_dict()), rtol=0, atol=0)
    found[1](texts(3)).sum().backward()
