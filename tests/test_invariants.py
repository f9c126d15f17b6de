"""What must hold for every architecture: cutting equals masking, counted MACs are real, the input is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import (
    ALL,
    BASES,
    SEQ_LEN,
    error,
    largest_error,
    main_name,
    outputs,
    probes,
    random_plan,
    tiny_batch,
    tiny_batches,
    tiny_model,
    zeroed,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from optin_deploy.arch.resolve import resolve
from optin_deploy.compensate import apply_weights, compensate
from optin_deploy.cost.macs import mac_cost
from optin_deploy.errors import ParityFailure
from optin_deploy.layout import ModelLayout
from optin_deploy.masking import recorded
from optin_deploy.plan import Masks, PruningPlan
from optin_deploy.pruning import cut, prune
from optin_deploy.rewrite.torch import rewrite_torch
from optin_deploy.rewrite.verify import masked_vs_rewritten
from optin_deploy.scoring import ScoreSettings
from optin_deploy.search import make_plan

TOLERANCE = 1e-5
"""float32; a cut that is off by 1% of a single unit is far above it."""
CLEAR = 2e-2
"""Least relative change of the output by a cut, else a comparison with the masked model would prove nothing."""

EMPTIED: dict[str, dict[str, tuple[int, ...]]] = {
    "all its heads": {"no_heads": (1,)},
    "all its neurons": {"no_neurons": (1,)},
    "both": {"no_heads": (1,), "no_neurons": (1,)},
    "both, first and last layer": {"no_heads": (0, 2), "no_neurons": (0, 2)},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ALL)
def test_identity_plan_changes_nothing(name: str) -> None:
    model = tiny_model(name)
    layout = resolve(model)
    plan = make_plan(Masks.all_kept(layout), layout, mac_cost(model, layout, seq_len=SEQ_LEN))
    same = rewrite_torch(model, layout, plan)
    assert same is not model
    assert plan.macs_pruned == plan.macs_dense
    for batch in probes(model):
        expected, found = outputs(model, batch), outputs(same, batch)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ALL)
def test_rewritten_equals_masked_and_differs_from_dense(name: str, seed: int) -> None:
    model = tiny_model(name)
    layout = resolve(model)
    plan = random_plan(model, layout, seed=seed)
    reference, smaller = zeroed(model, layout, plan), rewrite_torch(model, layout, plan)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    for batch in probes(model):
        dense, expected = outputs(model, batch), outputs(reference, batch)
        assert largest_error(expected, outputs(smaller, batch)) < TOLERANCE
        assert error(dense[main_name(dense)], expected[main_name(dense)]) > CLEAR


@pytest.mark.parametrize("name", ALL)
def test_input_projections_of_a_branch_read_the_same_tensor(name: str) -> None:
    """Compensation folds one map into all of them."""
    model = tiny_model(name)
    branches = [branch for layer in resolve(model).layers for branch in layer.branches]
    with recorded(model, inputs=[path for branch in branches for path in branch.inputs]) as seen:
        model(**tiny_batches(model)[0])
    for branch in branches:
        first, *others = (seen.inputs[path] for path in branch.inputs)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ALL)
def test_rewritten_equals_masked_with_compensated_weights(name: str) -> None:
    model = tiny_model(name)
    layout = resolve(model)
    plan = random_plan(model, layout, seed=2, no_heads=(1,))
    weights = compensate(model, layout, plan, tiny_batches(model))
    compensated = copy.deepcopy(model)
    assert not compensated.load_state_dict(weights, strict=False).unexpected_keys
    reference = zeroed(compensated, layout, plan)
    plain = rewrite_torch(model, layout, plan)
    smaller = rewrite_torch(apply_weights(model, weights), layout, plan)
    for batch in probes(model):
        dense, expected = outputs(model, batch), outputs(reference, batch)
        key = main_name(dense)
        assert largest_error(expected, outputs(smaller, batch)) < TOLERANCE
        assert error(dense[key], expected[key]) > CLEAR
        assert error(expected[key], outputs(plain, batch)[key]) > CLEAR  # the weights did change


@pytest.mark.parametrize("lost", EMPTIED)
@pytest.mark.parametrize("name", ALL)
def test_layer_that_loses_everything_keeps_its_bias(name: str, lost: str) -> None:
    model = tiny_model(name)
    layout = resolve(model)
    plan = random_plan(model, layout, seed=3, **EMPTIED[lost])
    reference, smaller = zeroed(model, layout, plan), rewrite_torch(model, layout, plan)
    without_bias = copy.deepcopy(reference)
    for i, layer in enumerate(layout.layers):
        for branch, kept in ((layer.attention, plan.heads[i]), (layer.ffn, plan.neurons[i])):
            if not kept:
                nn.init.zeros_(without_bias.get_submodule(branch.output).bias)
    for batch in probes(model):
        expected = outputs(reference, batch)
        assert largest_error(expected, outputs(smaller, batch)) < TOLERANCE
        key = main_name(expected)
        assert error(expected[key], outputs(without_bias, batch)[key]) > CLEAR  # a lost bias would show


@pytest.mark.parametrize("name", [name for name in BASES if name != "gpt2"])  # a Conv1D always has one
def test_emptied_branch_without_a_bias_becomes_zero(name: str) -> None:
    model = tiny_model(name)
    layout = resolve(model)
    for branch in (layout.layers[1].attention, layout.layers[1].ffn):
        model.get_submodule(branch.output).bias = None
    plan = random_plan(model, layout, no_heads=(1,), no_neurons=(1,))
    reference, smaller = zeroed(model, layout, plan), rewrite_torch(model, layout, plan)
    for batch in probes(model):
        assert largest_error(outputs(reference, batch), outputs(smaller, batch)) < TOLERANCE


@pytest.mark.parametrize("name", BASES)
def test_rewritten_equals_masked_under_eager_attention(name: str) -> None:
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    layout = resolve(model)
    plan = random_plan(model, layout, seed=4, no_heads=(2,), no_neurons=(0,))
    reference, smaller = zeroed(model, layout, plan), rewrite_torch(model, layout, plan)
    for batch in probes(model):
        assert largest_error(outputs(reference, batch), outputs(smaller, batch)) < TOLERANCE


@pytest.mark.parametrize("name", ALL)
def test_counted_macs_are_half_of_what_the_flop_counter_sees(name: str) -> None:
    model = tiny_model(name)
    layout = resolve(model)
    for seq_len in (SEQ_LEN, 11):
        cost = mac_cost(model, layout, seq_len=seq_len)
        assert cost.dense == eager_flops(model, seq_len) / 2
        for lost in ({}, *EMPTIED.values()):
            masks = random_plan(model, layout, seed=5, **lost).masks(layout)
            plan = make_plan(masks, layout, cost)
            smaller = rewrite_torch(model, layout, plan)
            assert plan.macs_pruned == eager_flops(smaller, seq_len) / 2
            assert plan.macs_pruned < plan.macs_dense == cost.dense


def eager_flops(model: Any, seq_len: int) -> int:
    """FLOPs of one sample by torch's counter; sdpa would hide the products of attention on the CPU."""
    counted = copy.deepcopy(model)
    counted.set_attn_implementation("eager")
    counted.requires_grad_(False)  # the counter's module tracker wants a graph otherwise
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        counted(**tiny_batch(counted, batch=1, seq_len=seq_len))
    return int(counter.get_total_flops())


def test_random_plans_are_as_uneven_as_these_tests_need() -> None:
    model = tiny_model("bert")
    layout = resolve(model)
    for seed in range(5):
        plan = random_plan(model, layout, seed=seed)
        assert len({len(kept) for kept in plan.heads}) == len({len(kept) for kept in plan.neurons}) == 3
        assert all(kept[-1] - kept[0] >= len(kept) for kept in (*plan.heads, *plan.neurons) if len(kept) > 1)


def test_masked_vs_rewritten_refuses_a_wrong_cut() -> None:
    model = tiny_model("bert")
    layout = resolve(model)
    plan = random_plan(model, layout)
    smaller = rewrite_torch(model, layout, plan)
    batch = probes(model)[0]
    assert masked_vs_rewritten(model, smaller, layout, plan, batch) < 1e-9
    with torch.no_grad():
        smaller.get_submodule(layout.layers[2].ffn.output).weight[0, 0] *= 1.01
    with pytest.raises(ParityFailure, match="differ by"):
        masked_vs_rewritten(model, smaller, layout, plan, batch)


# The input model is untouched.


def fingerprint(model: Any) -> dict[str, Any]:
    """All that a careless function could leave changed, besides the weights themselves."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "modules": {path: type(module) for path, module in model.named_modules()},
        "training": {path: module.training for path, module in model.named_modules()},
        "requires_grad": {path: p.requires_grad for path, p in model.named_parameters()},
        "gradients": {path for path, p in model.named_parameters() if p.grad is not None},
        "identity": {path: id(p) for path, p in model.named_parameters()},
        "hooks": {path: [len(getattr(m, each)) for each in hooks] for path, m in model.named_modules()},
        "attributes": {path: sorted(vars(m)) for path, m in model.named_modules()},
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
    }


def unusual(name: str) -> Any:
    """A model in a mixed state: training, but for one block, and one frozen parameter."""
    model = tiny_model(name)
    outputs(model, probes(model)[0], states=False)  # what transformers sets up in the first forward is not our doing
    model.train()
    layer = resolve(model).layers[0]
    model.get_submodule(layer.path).eval()
    model.get_submodule(layer.attention.output).weight.requires_grad_(False)
    return model


def states_of(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ALL)
def test_pruning_leaves_the_input_model_untouched(name: str) -> None:
    model = unusual(name)
    before, weights = fingerprint(model), states_of(model)
    pruned = prune(model, tiny_batches(model), flops=0.5, seq_len=SEQ_LEN, align=8)
    assert pruned.plan.kept <= 0.5
    assert fingerprint(model) == before
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ALL)
def test_changing_the_rewritten_model_does_not_reach_the_input_model(name: str) -> None:
    model = tiny_model(name)
    layout = resolve(model)
    weights = states_of(model)
    smaller = rewrite_torch(model, layout, random_plan(model, layout, no_heads=(1,), no_neurons=(2,)))
    with torch.no_grad():
        for parameter in smaller.parameters():
            parameter.fill_(7)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def run_prune(model: Any, layout: ModelLayout, plan: PruningPlan) -> None:
    prune(model, tiny_batches(model), flops=0.5, seq_len=SEQ_LEN, align=8)


def run_exact(model: Any, layout: ModelLayout, plan: PruningPlan) -> None:
    exact = ScoreSettings("exact")
    prune(model, [tiny_batch(model, batch=4)], flops=0.5, seq_len=SEQ_LEN, align=8, settings=exact)


def run_mac_cost(model: Any, layout: ModelLayout, plan: PruningPlan) -> None:
    mac_cost(model, layout, seq_len=SEQ_LEN)


def run_compensate(model: Any, layout: ModelLayout, plan: PruningPlan) -> None:
    compensate(model, layout, plan, tiny_batches(model))


def run_cut(model: Any, layout: ModelLayout, plan: PruningPlan) -> None:
    cut(model, layout, plan, tiny_batches(model), compensation=False)


FAILURES: list[tuple[Callable[[Any, ModelLayout, PruningPlan], None], tuple[int, ...]]] = [
    (run_prune, (1, 2, 4, 11, 25, 60)),  # 3 forwards count MACs, the next score, the last compensate
    (run_exact, (5, 25)),
    (run_mac_cost, (1, 2)),
    (run_compensate, (1, 2, 10, 30)),
    (run_cut, (1, 5)),
]
"""What is run, and the number of the block's forward that raises."""


@pytest.mark.parametrize(("run", "failing"), [(run, n) for run, numbers in FAILURES for n in numbers])
def test_error_inside_a_forward_leaves_the_input_model_untouched(
    run: Callable[[Any, ModelLayout, PruningPlan], None], failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unusual("bert")
    layout = resolve(model)
    plan = random_plan(model, layout, no_heads=(1,))
    before, weights = fingerprint(model), states_of(model)
    block = type(model.get_submodule(layout.layers[0].path))
    forward, calls = block.forward, 0

    def raising(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise KeyboardInterrupt("inside")
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", raising)
        with pytest.raises(KeyboardInterrupt, match="inside"):
            run(model, layout, plan)
    assert fingerprint(model) == before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
