"""Rows of the architecture table: each is tested, an own one works, and what cannot be cut is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from conftest import ALL, TEXT, class_names, largest_error, outputs, probes, random_plan, tiny_batch, tiny_model, zeroed
from torch import nn

import optin_deploy
from optin_deploy.arch.resolve import resolve, supported_model_types
from optin_deploy.arch.spec import ArchSpec
from optin_deploy.arch.table import BERT, DINOV2, DINOV2_SWIGLU, DISTILBERT, GPT2, TABLE, VIT
from optin_deploy.errors import BadInput, UnknownArchitecture
from optin_deploy.layout import ModelLayout
from optin_deploy.rewrite.torch import rewrite_torch

# row -> its base model, the output projections of layer 1 there, and the FFN width
EXPECTED = {
    "bert": ("bert", "encoder.layer.1.attention.output.dense", "encoder.layer.1.output.dense", 80),
    "distilbert": ("distilbert", "transformer.layer.1.attention.out_lin", "transformer.layer.1.ffn.lin2", 80),
    "vit": ("vit", "layers.1.attention.o_proj", "layers.1.mlp.fc2", 80),
    "dinov2": ("dinov2", "encoder.layer.1.attention.o_proj", "encoder.layer.1.mlp.fc2", 96),
    "dinov2-swiglu": ("dinov2-swiglu", "encoder.layer.1.attention.o_proj", "encoder.layer.1.mlp.down_proj", 64),
    "gpt2": ("gpt2", "h.1.attn.c_proj", "h.1.mlp.c_proj", 80),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_model_type_of_every_row_has_a_tiny_config() -> None:
    models = [tiny_model(name) for name in ALL]
    tested = {(resolve(model).arch, model.config.model_type) for model in models}
    served = {(row.name, model_type) for row in TABLE for model_type in row.model_types}
    assert served == tested, f"add to FAMILIES in tests/conftest.py: {sorted(served - tested)}"


def test_names_of_rows_are_unique_and_all_types_are_listed() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    assert set(supported_model_types()) == {model_type for row in TABLE for model_type in row.model_types}
    assert list(supported_model_types()) == sorted(supported_model_types())


@pytest.mark.parametrize("arch", [row.name for row in TABLE])
def test_layout_says_where_units_are_and_how_many(arch: str) -> None:
    name, attention, ffn, neurons = EXPECTED[arch]
    model = tiny_model(name)
    layout = resolve(model)
    assert (layout.arch, layout.model_class) == (arch, class_names(name)[0])
    assert [(x.hidden, x.heads, x.head_dim, x.neurons) for x in layout.layers] == [(48, 6, 8, neurons)] * 3
    assert (layout.layers[1].attention.output, layout.layers[1].ffn.output) == (attention, ffn)
    assert (layout.layers[1].attention.scale is not None) == arch.startswith("dinov2")
    assert len(layout.layers[1].ffn.inputs) == (2 if arch == "dinov2-swiglu" else 1)


@pytest.mark.parametrize("arch", [row.name for row in TABLE])
def test_layout_of_a_classifier_has_the_prefix_of_its_base_model(arch: str) -> None:
    name, attention, ffn, _ = EXPECTED[arch]
    model = tiny_model(f"{name}+head")
    layer = resolve(model).layers[1]
    assert layer.attention.output == f"{model.base_model_prefix}.{attention}"
    assert layer.ffn.output == f"{model.base_model_prefix}.{ffn}"


@pytest.mark.parametrize("name", ALL)
def test_residual_and_output_add_up_to_what_follows(name: str) -> None:
    # A wrong `residual` or `layer_scale` would silently spoil compensation: check them against a forward.
    model = tiny_model(name)
    for layer in resolve(model).layers:
        for branch in (layer.attention, layer.ffn):
            seen: dict[str, Any] = {}
            watched = [
                model.get_submodule(branch.residual).register_forward_pre_hook(
                    lambda _, args, kwargs, seen=seen: seen.update(
                        residual=args[0] if args else kwargs["hidden_states"]
                    ),
                    with_kwargs=True,
                ),
                model.get_submodule(branch.output).register_forward_hook(
                    lambda _, args, output, seen=seen: seen.update(branch=output)
                ),
            ]
            sums: list[torch.Tensor] = []
            watched += [
                module.register_forward_pre_hook(lambda _, args, sums=sums: sums.extend(args[:1]))
                for module in model.modules()
                if isinstance(module, nn.LayerNorm)
            ]
            block = model.get_submodule(layer.path)
            watched.append(block.register_forward_hook(lambda _, args, output, sums=sums: sums.append(first(output))))
            with torch.no_grad():
                model(**tiny_batch(model, batch=2))
            for hook in watched:
                hook.remove()
            scale = 1 if branch.scale is None else model.get_parameter(branch.scale)
            total = seen["residual"] + scale * seen["branch"]
            # The sum enters a LayerNorm or leaves the block.
            assert any(each.shape == total.shape and torch.allclose(each, total, atol=1e-5) for each in sums)


def first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


@pytest.mark.parametrize("family", ["dinov2", "dinov2-registers"])
def test_swiglu_picks_the_gated_row(family: str) -> None:
    gated, plain = (resolve(tiny_model(f"{family}{kind}")) for kind in ("-swiglu", ""))
    assert (gated.arch, plain.arch) == (DINOV2_SWIGLU.name, DINOV2.name)
    assert [path.rpartition(".")[2] for path in gated.layers[0].ffn.inputs] == ["gate_proj", "up_proj"]


def test_unknown_architecture_tells_how_to_give_an_own_row() -> None:
    config = transformers.GPTNeoConfig(hidden_size=48, num_layers=2, num_heads=6, attention_types=[[["global"], 2]])
    with pytest.raises(UnknownArchitecture) as raised:
        resolve(transformers.GPTNeoModel(config))
    text = str(raised.value)
    assert "'gpt_neo'" in text
    assert "GPTNeoModel" in text
    assert "ArchSpec" in text
    assert "resolve(model, spec=my_row)" in text
    assert all(model_type in text for model_type in supported_model_types())


def test_known_type_with_other_modules_is_an_unknown_architecture() -> None:
    model = tiny_model("bert")
    for layer in model.encoder.layer:
        layer.intermediate.up = layer.intermediate.dense
        del layer.intermediate.dense
    with pytest.raises(UnknownArchitecture, match="'bert'"):
        resolve(model)


def own_model_and_row() -> tuple[Any, ArchSpec]:
    """A family that the table lacks."""
    torch.manual_seed(0)
    model = transformers.ErnieModel(transformers.ErnieConfig(**TEXT)).eval()
    row = replace(BERT, name="my-ernie", model_types=frozenset({"ernie"}))
    return model, row


def test_own_row_makes_an_unknown_model_prunable() -> None:
    model, row = own_model_and_row()
    with pytest.raises(UnknownArchitecture):
        resolve(model)
    layout = resolve(model, spec=row)
    assert layout.arch == "my-ernie"
    plan = random_plan(model, layout, no_heads=(0,))
    reference, smaller = zeroed(model, layout, plan), rewrite_torch(model, layout, plan)
    assert all(largest_error(outputs(reference, b), outputs(smaller, b)) < 1e-5 for b in probes(model))


def test_own_row_goes_through_prune_save_and_load(tmp_path: Any) -> None:
    model, row = own_model_and_row()
    batches = [tiny_batch(model, batch=4)]
    pruned = optin_deploy.prune(model, batches, flops=0.5, seq_len=16, align=8, spec=row)
    pruned.save(tmp_path / "ernie")
    loaded = optin_deploy.load(tmp_path / "ernie")
    assert type(loaded) is transformers.ErnieModel
    assert largest_error(outputs(pruned.model, batches[0]), outputs(loaded, batches[0])) == 0


def test_own_row_is_used_although_the_table_has_one() -> None:
    assert resolve(tiny_model("bert"), spec=replace(BERT, name="mine")).arch == "mine"


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("bert", {"blocks": "encoder.blocks"}, "encoder.blocks"),
        (
            "bert",
            {"qkv": ("attention.self.query", "attention.self.keys", "attention.self.value")},
            "attention.self.keys",
        ),
        ("bert", {"attn_out": "attention.out"}, "attention.out"),
        ("bert", {"ffn_in": ("intermediate.up",)}, "intermediate.up"),
        ("bert", {"ffn_out": "output.down"}, "output.down"),
        ("bert", {"core": "attention.core"}, "attention.core"),
        ("bert", {"residual": ("", "feed_forward")}, "feed_forward"),
        ("dinov2", {"layer_scale": ("layer_scale1.gamma", "layer_scale2.gamma")}, "layer_scale1.gamma"),
    ],
)
def test_path_that_does_not_exist_is_named(family: str, change: dict[str, Any], named: str) -> None:
    row = {"bert": BERT, "dinov2": DINOV2}[family]
    with pytest.raises(BadInput, match=named):
        resolve(tiny_model(family), spec=replace(row, **change))


def test_two_paths_for_queries_keys_and_values_are_refused() -> None:
    with pytest.raises(BadInput, match="qkv has 2 paths; give three, or one that is fused"):
        resolve(tiny_model("bert"), spec=replace(BERT, qkv=BERT.qkv[:2]))


def test_path_of_something_else_than_a_linear_is_refused() -> None:
    with pytest.raises(BadInput, match=r"attention\.output\.LayerNorm is a LayerNorm.*Linear"):
        resolve(tiny_model("bert"), spec=replace(BERT, attn_out="attention.output.LayerNorm"))


def test_shared_weights_are_refused_with_both_names() -> None:
    model = tiny_model("bert")
    model.encoder.layer[2].intermediate.dense.weight = model.encoder.layer[0].intermediate.dense.weight
    with pytest.raises(BadInput, match=r"layer\.2\.intermediate\.dense shares .*layer\.0\.intermediate\.dense"):
        resolve(model)


def test_a_block_used_twice_is_refused() -> None:
    model = tiny_model("vit")
    model.layers[1] = model.layers[0]
    with pytest.raises(BadInput, match="shares its weight"):
        resolve(model)


Keep = Callable[[int, int], bool]
"""(layer, unit) -> kept?"""

CUTS: dict[str, tuple[Keep, Keep]] = {
    "half the heads": (lambda layer, unit: unit % 2 == 0, lambda layer, unit: True),
    "four of six heads": (lambda layer, unit: unit < 4, lambda layer, unit: True),
    "neurons": (lambda layer, unit: True, lambda layer, unit: unit % 3 == 0),
    "all heads of a layer": (lambda layer, unit: layer != 1, lambda layer, unit: True),
    "all neurons of a layer": (lambda layer, unit: True, lambda layer, unit: layer != 1),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("row", [BERT, DISTILBERT, VIT, DINOV2, DINOV2_SWIGLU, GPT2], ids=lambda row: row.name)
def test_already_pruned_model_is_refused(row: ArchSpec, cut: str) -> None:
    model = tiny_model(EXPECTED[row.name][0])
    layout = resolve(model)
    smaller = rewrite_torch(model, layout, plan_of(model, layout, *CUTS[cut]))
    with pytest.raises(BadInput, match="already pruned"):
        resolve(smaller, spec=row)


def plan_of(model: Any, layout: ModelLayout, heads: Keep, neurons: Keep) -> Any:
    kept = {
        "heads": tuple(tuple(u for u in range(x.heads) if heads(i, u)) for i, x in enumerate(layout.layers)),
        "neurons": tuple(tuple(u for u in range(x.neurons) if neurons(i, u)) for i, x in enumerate(layout.layers)),
    }
    return replace(random_plan(model, layout), **kept)


def test_a_model_with_another_number_of_blocks_than_its_config_says_is_refused() -> None:
    """It could be cut and saved, but not loaded again."""
    model = tiny_model("bert")
    model.encoder.layer = model.encoder.layer[:2]
    with pytest.raises(BadInput, match="has 2 blocks, but its config says num_hidden_layers = 3"):
        resolve(model)
    model.config.num_hidden_layers = 2
    assert len(resolve(model).layers) == 2
