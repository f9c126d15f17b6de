"""A cut holds two copies of the weights; a job tells the peak of each stage, and which went over the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_scoring import one_thread
from torch import Tensor, nn

from optin_deploy import stage_memory
from optin_deploy.arch.resolve import resolve
from optin_deploy.compensate import apply_weights, compensate
from optin_deploy.cost.macs import mac_cost
from optin_deploy.errors import ParityFailure
from optin_deploy.layout import ModelLayout
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.pruning import cut
from optin_deploy.rewrite.exact import in_float64
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.rewrite.verify import masked_vs_rewritten
from optin_deploy.scoring.memory import PeakBytes
from optin_deploy.search import make_plan
from optin_deploy.stage_memory import StageMemory, over_budget

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

MIB, LAYERS = 2**20, 16


def deep() -> tuple[Any, ModelLayout, PruningPlan, list[dict[str, Tensor]]]:
    """Many narrow layers: the weights outweigh what a layer computes with; three quarters of the units stay."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=8, initializer_range=0.1)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    layout = resolve(model)
    keep = tuple(
        tuple((unit + index) % 4 != 0 for unit in range(units))
        for index, units in enumerate([4] * LAYERS + [64] * LAYERS)
    )
    plan = make_plan(Masks(keep[:LAYERS], keep[LAYERS:], layout.hash), layout, mac_cost(model, layout, seq_len=4))
    ids = torch.randint(5, 50, (5, 3), generator=torch.Generator().manual_seed(1))
    return model, layout, plan, [{"input_ids": ids}]


def size_of(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("compensation", [False, True])
def test_a_cut_holds_the_dense_and_the_smaller_model_and_little_else(compensation: bool) -> None:
    model, layout, plan, data = deep()
    with PeakBytes() as peak:
        smaller = cut(model, layout, plan, data, compensation=compensation).model
    dense, left = size_of(model), size_of(smaller)
    assert 0.7 * dense < left < 0.8 * dense
    # Beside the smaller model: one layer in float64 (2/16), and the sums of one regression.
    assert left <= peak.most < left + 0.45 * dense


def test_the_compensated_cut_is_that_of_the_compensated_weights() -> None:
    model, layout, plan, data = deep()
    wanted = rewrite_torch(apply_weights(model, compensate(model, layout, plan, data)), layout, plan).state_dict()
    found = cut(model, layout, plan, data).model.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())


@pytest.mark.parametrize("refitted", [False, True])
def test_the_proof_sees_an_error_of_a_part_in_ten_million_in_any_layer(refitted: bool) -> None:
    model, layout, plan, data = deep()
    for path in ("encoder.layer.3.output.dense", "encoder.layer.15.attention.self.value", "embeddings.LayerNorm"):
        smaller = rewrite_torch(model, layout, plan)
        assert masked_vs_rewritten(model, smaller, layout, plan, data[0], refitted=refitted) < 1e-12
        weight = smaller.get_submodule(path).weight
        if refitted and "embeddings" not in path:  # new weights are no error, but in a wrong place they are
            weight.data = weight.data.roll(1, dims=0)
            dense = model.get_submodule(path).weight.data
            dense[...] = dense.roll(1, dims=0)
            smaller.encoder.layer[5].output.LayerNorm.bias.data += 1e-6
        else:
            weight.data *= 1 + 1e-6
        with pytest.raises(ParityFailure):
            masked_vs_rewritten(model, smaller, layout, plan, data[0], refitted=refitted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_in_float64_is_that_of_a_model_in_float64_and_leaves_no_trace(dtype: torch.dtype) -> None:
    model, layout, _, data = deep()
    model = model.to(dtype)
    before = [(parameter.dtype, parameter.data_ptr()) for parameter in model.parameters()]
    with torch.no_grad():
        with in_float64(model, layout), PeakBytes() as peak:
            found = model(**data[0]).last_hidden_state
        assert [(parameter.dtype, parameter.data_ptr()) for parameter in model.parameters()] == before
        assert peak.most < 0.7 * size_of(model)
        assert torch.equal(found, model.double()(**data[0]).last_hidden_state)


def test_an_error_inside_a_forward_in_float64_leaves_the_weights() -> None:
    model, layout, _, data = deep()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def failing(*ignored: object) -> None:
        raise KeyboardInterrupt

    hook = model.encoder.layer[7].output.dense.register_forward_hook(failing)
    with pytest.raises(KeyboardInterrupt), in_float64(model, layout):
        model(**data[0])
    hook.remove()
    assert all(value.dtype == before[name].dtype for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# --- stages ---------------------------------------------------------------------------------------------------


def hold(mib: int) -> None:
    """Touch so much memory, and let it go."""
    torch.ones(mib * MIB, dtype=torch.uint8).sum()


@pytest.mark.parametrize("resettable", [True, False])
def test_each_stage_has_its_own_peak_and_an_outer_one_that_of_its_inner(
    resettable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not resettable:
        monkeypatch.setattr(stage_memory, "CLEAR", tmp_path / "absent" / "clear_refs")
    elif not stage_memory.CLEAR.exists():
        pytest.skip("no /proc/self/clear_refs here")
    memory = StageMemory()
    with memory("before"):
        pass
    with memory("outer"):
        with memory("large"):
            block = torch.ones(300 * MIB, dtype=torch.uint8)
            assert block[::4096].sum() > 0
            stage_memory.threading.Event().wait(3 * stage_memory.SAMPLED_EVERY)
            del block
        with memory("small"):
            hold(1)
    peaks = memory.peaks
    assert list(peaks) == ["before", "large", "small", "outer"]
    assert peaks["large"] - peaks["before"] > 250 * MIB
    assert peaks["outer"] >= peaks["large"]
    assert peaks["large"] - peaks["small"] > 250 * MIB


def test_a_stage_that_fails_is_told_too() -> None:
    memory = StageMemory()
    with pytest.raises(KeyError), memory("broken"):
        raise KeyError
    assert memory.peaks["broken"] > 0
    with memory("next"):
        pass
    assert list(memory.peaks) == ["broken", "next"]


def test_stages_over_the_budget_are_those_beyond_what_was_held_before() -> None:
    peaks = {"score": 150, "rewrite": 171, "export": 230}
    assert over_budget(peaks, 100, 70) == {"rewrite": 71, "export": 130}
    assert over_budget(peaks, 100, 130) == {}
    assert over_budget(peaks, 100, None) == {}


def test_a_job_says_once_which_stages_went_over_the_memory_budget(caplog: pytest.LogCaptureFixture) -> None:
    from exporters.job import _over_budget

    peaks = {"score": 150 * MIB, "rewrite": 171 * MIB, "export": 230 * MIB}
    assert _over_budget(peaks, 100 * MIB, 130 * MIB) == _over_budget(peaks, 100 * MIB, None) == []
    assert not caplog.messages
    (sentence,) = _over_budget(peaks, 100 * MIB, 70 * MIB)
    assert "--memory-budget 70MiB" in sentence
    assert sentence.endswith("rewrite 71 MiB, export 130 MiB.")
    assert caplog.messages == [sentence]
