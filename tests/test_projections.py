"""Conv1D and fused QKV are a matter of storage: a twin of the model with separate Linears is pruned to the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SEQ_LEN, error, outputs, probes, random_plan, tiny_batches, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from optin_deploy.arch.resolve import resolve
from optin_deploy.arch.table import GPT2
from optin_deploy.compensate import apply_weights, compensate
from optin_deploy.cost.params import count_params, param_cost
from optin_deploy.curves import error_curves
from optin_deploy.errors import BadInput
from optin_deploy.masking import inference
from optin_deploy.pruning import prune
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.scoring import score
from optin_deploy.token_weights import measure_token_weights

pytestmark = pytest.mark.usefixtures("one_thread")

TWIN = replace(GPT2, qkv=("attn.c_attn.query", "attn.c_attn.key", "attn.c_attn.value"))


class Separate(nn.Module):
    """Three Linears whose outputs stand side by side, as a fused projection's do."""

    def __init__(self, fused: Conv1D) -> None:
        super().__init__()
        for name, part in zip(("query", "key", "value"), range(3), strict=True):
            width = fused.nf // 3
            rows = slice(part * width, (part + 1) * width)
            self.add_module(name, linear(fused.weight[:, rows], fused.bias[rows]))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([part(hidden) for part in self.children()], dim=-1)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(*weight.shape)
    made.load_state_dict({"weight": weight.detach().T, "bias": bias.detach()})
    return made


def twin(name: str) -> Any:
    """The tiny GPT-2 without a Conv1D."""
    model = tiny_model(name)
    for path, module in [*model.named_modules()]:
        if isinstance(module, Conv1D):
            fused = path.endswith("c_attn")
            model.set_submodule(path, Separate(module) if fused else linear(module.weight, module.bias))
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    return model.eval()


@pytest.mark.parametrize("name", ["gpt2", "gpt2+head"])
def test_the_twin_computes_the_same(name: str) -> None:
    for batch in probes(tiny_model(name)):
        expected, found = outputs(tiny_model(name), batch), outputs(twin(name), batch)
        assert all(error(expected[key], found[key]) < 1e-5 for key in expected)


@pytest.mark.parametrize("name", ["gpt2", "gpt2+head"])
def test_scores_and_error_curves_are_those_of_the_twin(name: str) -> None:
    model, other = tiny_model(name), twin(name)
    layout, twin_layout = resolve(model), resolve(other, TWIN)
    batches = tiny_batches(model)
    scores, wanted = score(model, layout, batches), score(other, twin_layout, batches)
    for mine, its in zip((*scores.heads, *scores.neurons), (*wanted.heads, *wanted.neurons), strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-2, atol=0)  # the passes may multiply in bfloat16
    same_order = replace(scores, layout_hash=twin_layout.hash)
    found, expected = (
        error_curves(model, layout, scores, batches),
        error_curves(other, twin_layout, same_order, batches),
    )
    for curve, its_curve in zip((*found.heads, *found.neurons), (*expected.heads, *expected.neurons), strict=True):
        assert curve.errors == pytest.approx(its_curve.errors, rel=1e-3)
        assert curve.errors[0] > 0


@pytest.mark.parametrize("name", ["gpt2", "gpt2+head"])
def test_compensated_and_cut_it_is_the_twin(name: str) -> None:
    cut = []
    for model, row in ((tiny_model(name), GPT2), (twin(name), TWIN)):
        layout, batches = resolve(model, row), tiny_batches(model)
        plan = random_plan(model, layout, no_heads=(1,), no_neurons=(2,))
        weights = compensate(model, layout, plan, batches, token_weights=measure_token_weights(model, layout, batches))
        cut.append((rewrite_torch(apply_weights(model, weights), layout, plan), rewrite_torch(model, layout, plan)))
    (mine, plain), (other, _) = cut
    assert count_params(mine) == count_params(other) < count_params(tiny_model(name))
    for batch in probes(mine):
        expected, found, without = (outputs(model, batch) for model in (other, mine, plain))
        assert all(error(expected[key], found[key]) < 1e-3 for key in expected)
        assert max(error(expected[key], without[key]) for key in expected) > 1e-2  # the compensation shows


def test_the_cut_attention_is_still_fused_and_says_how_wide_its_parts_are() -> None:
    model = tiny_model("gpt2")
    layout = resolve(model)
    plan = random_plan(model, layout, no_heads=(2,))
    smaller = rewrite_torch(model, layout, plan)
    for index, heads in enumerate(plan.heads[:2]):
        attention = smaller.h[index].attn
        assert isinstance(attention.c_attn, Conv1D)
        assert attention.c_attn.nf == attention.c_attn.weight.shape[1] == 3 * 8 * len(heads)
        assert attention.split_size == 8 * len(heads)
        columns = [8 * head + place for head in heads for place in range(8)]
        full = model.h[index].attn
        rows = [part * 48 + column for part in range(3) for column in columns]
        assert torch.equal(attention.c_attn.weight, full.c_attn.weight[:, rows])
        assert torch.equal(attention.c_attn.bias, full.c_attn.bias[rows])
        assert torch.equal(attention.c_proj.weight, full.c_proj.weight[columns])
    assert model.h[0].attn.split_size == 48


def test_parameters_of_a_head_count_all_three_parts() -> None:
    model = tiny_model("gpt2")
    cost = param_cost(model, resolve(model))
    assert cost.head == (3 * 8 * (48 + 1) + 8 * 48,) * 3
    assert cost.neuron == (48 + 1 + 48,) * 3


def test_a_row_that_names_another_split_is_refused() -> None:
    with pytest.raises(BadInput, match=r"h\.0\.attn has no 'part_width' of 48"):
        resolve(tiny_model("gpt2"), spec=replace(GPT2, split="part_width"))


def test_a_fused_projection_of_two_parts_is_refused() -> None:
    model = tiny_model("gpt2")
    model.h[1].attn.c_attn = Conv1D(96, 48)
    with pytest.raises(BadInput, match=r"h\.1\.attn\.c_attn has 96 outputs, not the 144"):
        resolve(model)


def test_no_keys_and_values_are_kept_while_a_model_is_looked_at() -> None:
    model = tiny_model("gpt2+head")
    model.config.use_cache = True
    batch = tiny_batches(model)[0]
    with inference(model):
        assert model(**batch).past_key_values is None
    assert model(**batch).past_key_values is not None
    pruned = prune(model, tiny_batches(model), flops=0.6, seq_len=SEQ_LEN, align=8)
    assert model.config.use_cache
    assert pruned.model.config.use_cache
