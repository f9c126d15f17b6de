"""Models in any state, threads side by side: pruning is right and leaves everything as it was, or refuses at once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import tiny_batches, tiny_model
from tiny_scoring import bert, one_thread, state_of, text_batch
from torch import nn
from torch.nn.utils import parametrizations, prune

import optin_deploy
from optin_deploy import pruning
from optin_deploy.arch.resolve import resolve
from optin_deploy.compensate import compensate
from optin_deploy.errors import BadInput
from optin_deploy.guard import alone
from optin_deploy.masking import inference
from optin_deploy.scoring import ScoreSettings, score
from optin_deploy.token_weights import measure_token_weights

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

DATA = [text_batch((3, 7, 5, 6)), text_batch((4, 2), seed=1)]
HOW: dict[str, Any] = {"flops": 0.6, "seq_len": 8, "align": 2, "settings": ScoreSettings(probes=2, head_samples=2)}


def pruned_weights(model: nn.Module, data: Any = DATA, **how: Any) -> dict[str, torch.Tensor]:
    return dict(optin_deploy.prune(model, data, **(HOW | how)).model.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


# --- states of a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switch", "value"),
    [("return_dict", False), ("output_hidden_states", True), ("_output_attentions", True), ("use_cache", True)],
)
def test_switches_of_a_config_change_nothing_and_stay(switch: str, value: bool) -> None:
    model = bert()
    wanted = pruned_weights(model)
    setattr(model.config, switch, value)
    found = optin_deploy.prune(model, DATA, **HOW)
    assert same(dict(found.model.state_dict()), wanted)
    assert getattr(model.config, switch) is value
    assert getattr(found.model.config, switch) is value


def test_under_inference_mode_or_no_grad_the_same_comes_out_and_can_be_trained() -> None:
    wanted = pruned_weights(bert())
    model = bert()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            data = [{name: value.clone() for name, value in batch.items()} for batch in DATA]
            found = optin_deploy.prune(model, data, **HOW).model
        assert same(dict(found.state_dict()), wanted)
        found(**DATA[0]).logits.sum().backward()


def test_another_default_device_does_not_matter() -> None:
    model = bert()
    wanted = pruned_weights(model)
    with torch.device("meta"):
        found = pruned_weights(model)
    assert same(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_model_of_any_type_is_pruned_and_left_as_it_was(dtype: torch.dtype) -> None:
    model = bert().to(dtype).train()
    model.bert.embeddings.requires_grad_(False)
    before = state_of(model.float())
    model.to(dtype)
    found = optin_deploy.prune(model, DATA, **HOW)
    assert next(found.model.parameters()).dtype == dtype
    assert state_of(model.float())[0] == before[0]


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return transformers.BertModel(bert().config)


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return transformers.BertModel(bert().config)


NO_MODELS: list[tuple[Callable[[], Any], str]] = [
    (lambda: "bert-base-uncased", "the model is a str"),
    (lambda: None, "the model is a NoneType"),
    (nn.Identity, "Identity has no parameters"),
    (on_meta, "embeddings.word_embeddings.weight lies on the meta device"),
    (made_in_inference_mode, "was made under torch.inference_mode"),
]


@pytest.mark.parametrize(("make", "says"), NO_MODELS, ids=[says for _, says in NO_MODELS])
def test_what_is_no_loaded_model_is_refused_at_once(make: Callable[[], Any], says: str) -> None:
    for use in (
        lambda: optin_deploy.prune(make(), DATA),
        lambda: optin_deploy.resolve(make()),
        lambda: score(make(), resolve(bert()), DATA),
    ):
        with pytest.raises(BadInput, match=says):
            use()


ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"flops": True}, "--flops True: give a number"),
    ({"flops": "0.6"}, "--flops '0.6': give a number"),
    ({"flops": float("nan")}, "--flops nan"),
    ({"flops": np.float64("inf")}, "--flops inf"),
    ({"flops": [0.5]}, "--flops"),
    ({"params": np.bool_(True)}, "--params"),
    ({"size": "1MiB"}, "--size '1MiB': give a number"),
    ({"size": -1}, "--size -1"),
    ({"align": 0}, "--align 0"),
    ({"align": True}, "--align True"),
    ({"align": 2.0}, "--align 2.0"),
    ({"align": 7}, "widest FFN of this model has 6 neurons"),
    ({"allocation": "best"}, "unknown --allocation 'best'"),
    ({"allocation": 3}, "unknown --allocation 3"),
    ({"seed": "0"}, "seed '0': give a whole number"),
    ({"seed": 0.5}, "seed 0.5"),
    ({"seq_len": True}, "seq_len True"),
    ({"seq_len": 25}, "--seq-len 25: possible are 1 to 24"),
    ({"settings": {"probes": 2}}, "settings is a dict; give a ScoreSettings"),
    ({"spec": "bert"}, "spec is a str; give a ArchSpec"),
]


@pytest.mark.parametrize(("argument", "says"), ARGUMENTS, ids=[says for _, says in ARGUMENTS])
def test_arguments_that_cannot_be_are_named_before_any_work(
    argument: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "score", None)
    with pytest.raises(BadInput) as caught:
        optin_deploy.prune(bert(), DATA, **(HOW | argument))
    assert says in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    plain = optin_deploy.prune(bert(), DATA, **HOW)
    found = optin_deploy.prune(
        bert(), DATA, **(HOW | {"flops": np.float32(0.6), "seq_len": np.int64(8), "align": np.int8(2)})
    )
    assert found.plan == plain.plan


def test_a_narrow_ffn_needs_no_align() -> None:
    assert optin_deploy.prune(bert(), DATA, **{**HOW, "align": None}).plan.kept <= 0.6


# --- threads --------------------------------------------------------------------------------------------------


def both(*work: Callable[[], Any]) -> list[Any]:
    """Run these at once, each in a thread of its own; returns what each gave, or raised."""
    found: list[Any] = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(index: int) -> None:
        start.wait()
        try:
            found[index] = work[index]()
        except Exception as err:  # noqa: BLE001  # told to the test
            found[index] = err

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
    return found


def test_two_threads_that_prune_one_model_are_both_right() -> None:
    model = bert()
    wanted, before = pruned_weights(model), state_of(model)
    found = both(lambda: pruned_weights(model), lambda: pruned_weights(model))
    assert all(isinstance(each, dict) and same(each, wanted) for each in found), found
    assert state_of(model) == before


def test_two_models_that_share_one_config_in_two_threads_are_both_right() -> None:
    """While MACs are counted, attention is switched in the config."""
    one = bert()
    other = copy.deepcopy(one)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = one.config
    wanted = pruned_weights(one)
    found = both(lambda: pruned_weights(one), lambda: pruned_weights(other))
    assert all(isinstance(each, dict) and same(each, wanted) for each in found), found


def test_another_thread_waits_for_a_model_and_for_its_base_model_but_not_for_another() -> None:
    model, other = bert(), bert()
    entered = {"base": threading.Event(), "other": threading.Event()}

    def enter(name: str, what: nn.Module) -> None:
        with inference(what):
            entered[name].set()

    with alone(model):
        threads = [threading.Thread(target=enter, args=pair) for pair in (("base", model.bert), ("other", other))]
        for thread in threads:
            thread.start()
        assert entered["other"].wait(60)
        assert not entered["base"].is_set()
        with inference(model):  # the thread that has it may go on
            pass
    assert entered["base"].wait(60)
    for thread in threads:
        thread.join(60)


# --- every stage takes batches --------------------------------------------------------------------------------


def test_every_stage_takes_any_form_of_batches_and_refuses_what_is_none() -> None:
    model = tiny_model("bert")
    data = tiny_batches(model)
    layout = resolve(model)
    plan = optin_deploy.prune(model, data, flops=0.5, seq_len=24, align=8, compensation=False).plan
    stages: list[Callable[[Any], Any]] = [
        lambda batches: compensate(model, layout, plan, batches),
        lambda batches: measure_token_weights(model, layout, batches),
        lambda batches: pruning.cut(model, layout, plan, batches),
    ]
    for stage in stages:
        stage({name: value.tolist() for name, value in batch.items()} for batch in data)
        with pytest.raises(BadInput, match="A batch is a dict"):
            stage([{"input_ids": [[0.5]]}])


def test_under_autocast_the_same_comes_out() -> None:
    wanted = pruned_weights(bert())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(pruned_weights(bert()), wanted)


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_a_model_in_a_wrapper_says_to_take_it_out(name: str) -> None:
    """As DataParallel and torch.compile have it, which cannot be made everywhere."""
    wrapper = nn.Module()
    setattr(wrapper, name, bert())
    with pytest.raises(BadInput, match=rf"the model is a Module around another one: give that one, its \.{name}"):
        optin_deploy.prune(wrapper, DATA)


def _normed(projection: nn.Module) -> None:
    parametrizations.weight_norm(projection)


def _masked(projection: nn.Module) -> None:
    prune.l1_unstructured(projection, "weight", 0.5)


@pytest.mark.parametrize("change", [_normed, _masked])
def test_a_weight_that_is_computed_is_refused_before_any_work(change: Callable[[nn.Module], None]) -> None:
    model = tiny_model("bert")
    change(model.encoder.layer[1].output.dense)
    with pytest.raises(BadInput, match=r"layer\.1\.output\.dense\.weight is computed anew.*permanent"):
        resolve(model)


def test_a_layout_a_plan_or_a_budget_of_memory_that_is_none_is_refused() -> None:
    model, other = tiny_model("bert"), tiny_model("vit")
    layout, batches = resolve(model), tiny_batches(model)
    with pytest.raises(BadInput, match="layout is of a BertModel"):
        score(other, layout, tiny_batches(other))
    with pytest.raises(BadInput, match="layout is a NoneType"):
        score(model, None, batches)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="memory_budget '1GiB'"):
        score(model, layout, batches, memory_budget="1GiB")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="plan is a dict"):
        pruning.cut(model, layout, {}, batches)  # type: ignore[arg-type]
