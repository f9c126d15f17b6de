"""A layout that does not fit its model is refused before the work, with the row and the layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from conftest import ALL, TEXT, tiny_batch, tiny_batches, tiny_model
from torch import nn

import optin_deploy
from optin_deploy import pruning
from optin_deploy.arch.resolve import resolve
from optin_deploy.arch.spec import ArchSpec
from optin_deploy.arch.table import BERT
from optin_deploy.errors import BadInput, InfeasibleBudget, OptinError
from optin_deploy.proof import prove


def neox() -> tuple[nn.Module, ArchSpec]:
    """Its queries, keys and values are fused head by head, not one after another."""
    config = transformers.GPTNeoXConfig(
        **{**TEXT, "hidden_act": "gelu", "use_parallel_residual": False, "use_cache": False}
    )
    row = ArchSpec(
        name="my-neox",
        model_types=frozenset({"gpt_neox"}),
        tested_with="",
        blocks="layers",
        qkv=("attention.query_key_value",),
        attn_out="attention.dense",
        core="attention",
        ffn_in=("mlp.dense_h_to_4h",),
        ffn_out="mlp.dense_4h_to_h",
        residual=("", "post_attention_layernorm"),
    )
    torch.manual_seed(0)
    return transformers.GPTNeoXModel(config).eval(), row


def albert() -> tuple[nn.Module, ArchSpec]:
    """One block that runs three times."""
    row = ArchSpec(
        name="my-albert",
        model_types=frozenset({"albert"}),
        tested_with="",
        blocks="encoder.albert_layer_groups.0.albert_layers",
        qkv=("attention.query", "attention.key", "attention.value"),
        attn_out="attention.dense",
        core="attention",
        ffn_in=("ffn",),
        ffn_out="ffn_output",
        residual=("", "ffn"),
    )
    torch.manual_seed(0)
    return transformers.AlbertModel(transformers.AlbertConfig(**{**TEXT, "embedding_size": 24})).eval(), row


def swapped() -> tuple[nn.Module, ArchSpec]:
    """Queries and keys come from the FFN's input: another tensor than the values read."""
    model = tiny_model("bert")
    for layer in model.encoder.layer:
        attention = layer.attention.self
        attention.key.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return model, replace(BERT, name="my-bert")


def unused() -> tuple[nn.Module, ArchSpec]:
    """A layer that the forward leaves out."""
    model = tiny_model("bert")
    model.encoder.layer[1].forward = lambda hidden_states, *args, **kwargs: hidden_states
    return model, replace(BERT, name="my-bert")


WRONG: list[tuple[Callable[[], tuple[nn.Module, ArchSpec]], str]] = [
    (neox, r"row 'my-neox': layers\.0 cannot be cut: "),
    (albert, r"row 'my-albert': encoder\.albert_layer_groups\.0\.albert_layers\.0 runs 3 times in a forward"),
    (swapped, r"row 'my-bert': encoder\.layer\.0\.attention\.self\.key reads another tensor than"),
    (unused, r"row 'my-bert': encoder\.layer\.1\.attention\.self runs 0 times"),
]


@pytest.mark.parametrize(("make", "says"), WRONG, ids=[make.__name__ for make, _ in WRONG])
def test_a_row_that_does_not_fit_is_refused_before_scoring(
    make: Callable[[], tuple[nn.Module, ArchSpec]], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, row = make()
    monkeypatch.setattr(pruning, "score", None)
    data = [{name: value for name, value in tiny_batch(tiny_model("bert"), batch=4).items() if "type" not in name}]
    with pytest.raises(BadInput, match=says):
        optin_deploy.prune(model, data, spec=row, seq_len=16, align=8)


@pytest.mark.parametrize("name", ALL)
def test_every_row_of_the_table_passes(name: str) -> None:
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    prove(model, resolve(model), tiny_batches(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]


# --- degenerate models ----------------------------------------------------------------------------------------


def zero(model: Any, *, what: str = "") -> Any:
    for name, parameter in model.named_parameters():
        if what in name:
            parameter.data.zero_()
    return model


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("bert", ""),  # all weights
        ("vit", ""),
        ("gpt2", ""),
        ("bert+head", "classifier"),  # constant outputs
        ("vit+head", "classifier"),
        ("bert", "layer.2.output.LayerNorm"),
    ],
)
def test_a_model_whose_outputs_hear_no_unit_is_refused_before_scoring(
    name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zero(tiny_model(name), what=what)
    monkeypatch.setattr(pruning, "score", None)
    with pytest.raises(BadInput, match="stay the same when all its heads and neurons are removed"):
        optin_deploy.prune(model, tiny_batches(model), flops=0.5, seq_len=16, align=8)


PARTLY = ["layer.1.", "attention.self", "intermediate", "layer.0.output.dense", "LayerNorm.bias", "bias", "position"]


@pytest.mark.parametrize("what", PARTLY)
def test_a_model_with_dead_parts_is_pruned(what: str) -> None:
    model = zero(tiny_model("bert"), what=what)
    pruned = optin_deploy.prune(model, tiny_batches(model), flops=0.5, seq_len=16, align=8)
    assert 0 < pruned.plan.kept <= 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    model = tiny_model("bert")
    model.encoder.layer[1].intermediate.dense.weight.data[3, 4] = value
    with pytest.raises(OptinError, match=r"NaN or infinity|cannot be cut"):
        optin_deploy.prune(model, tiny_batches(model), flops=0.5, seq_len=16, align=8)


def test_equal_samples_and_samples_of_one_token_are_pruned() -> None:
    model = tiny_model("bert")
    for ids in (torch.full((6, 5), 7), torch.full((6, 1), 7)):
        assert optin_deploy.prune(model, {"input_ids": ids}, flops=0.5, seq_len=16, align=8).plan.kept <= 0.5


SMALLEST = {"hidden_size": 2, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 1}


LEAST = 28 / (28 + 308)
"""A neuron takes 2 n d MACs, a head 4 n d h + 2 n^2 h, with 7 tokens of width 2."""


@pytest.mark.parametrize("allocation", ["curves", "uniform", "paper"])
@pytest.mark.parametrize("flops", [1.0, 0.5, 0.1, 1e-9])
def test_the_smallest_model_is_pruned_or_the_least_budget_is_named(allocation: str, flops: float) -> None:
    torch.manual_seed(1)
    model = transformers.BertModel(transformers.BertConfig(**{**TEXT, **SMALLEST}), add_pooling_layer=False).eval()
    data = {"input_ids": torch.randint(5, 90, (6, 7))}
    if flops < LEAST:
        with pytest.raises(InfeasibleBudget, match="Allow"):
            optin_deploy.prune(model, data, flops=flops, seq_len=7, allocation=allocation)
    else:
        pruned = optin_deploy.prune(model, data, flops=flops, seq_len=7, allocation=allocation)
        assert 0 < pruned.plan.macs_pruned <= flops * pruned.plan.macs_dense


def test_a_budget_below_one_unit_names_the_least_and_that_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    model.pooler = None  # nothing but the layers counts MACs
    data = tiny_batches(model)
    for allocation in ("curves", "uniform", "paper"):
        with monkeypatch.context() as patch, pytest.raises(BadInput, match=r"Allow 0\.\d+ or more") as caught:
            patch.setattr(pruning, "score", None)
            optin_deploy.prune(model, data, flops=1e-9, seq_len=16, align=8, allocation=allocation)
        least = float(str(caught.value).split("Allow ")[1].split()[0])
        pruned = optin_deploy.prune(model, data, flops=least, seq_len=16, align=8, allocation=allocation)
        assert pruned.plan.macs_pruned > 0
