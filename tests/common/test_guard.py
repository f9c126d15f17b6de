"""Models in any state, threads side by side: pruning is right and leaves everything as it was, or refuses at once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import optin_deploy
from optin_deploy.common.guard import alone, inference
from optin_deploy.errors import BadInput
from optin_deploy.network.read_torch import read_module
from optin_deploy.pruning import modules
from optin_deploy.scoring.settings import ScoreSettings
from support.tiny_scoring import VOCABULARY, bert, one_thread, state_of, text_batch

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

DATA = [text_batch((3, 7, 5, 6, 8)), text_batch((4, 2, 6), seed=1)]
HOW: dict[str, Any] = {"flops": 0.6, "align": 2, "settings": ScoreSettings(probes=2, head_samples=2)}


@pytest.fixture(autouse=True)
def _quickly_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the exporter that takes a tenth of the time."""
    monkeypatch.setattr(modules, "read_module", partial(read_module, dynamo=False))


def pruned_weights(model: nn.Module, data: Any = DATA, **how: Any) -> dict[str, Tensor]:
    return dict(optin_deploy.prune(model, data, **(HOW | how)).model.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@cache
def wanted() -> dict[str, Tensor]:
    """What the plain model becomes: smaller than it was."""
    found = pruned_weights(bert())
    assert sum(value.numel() for value in found.values()) < sum(value.numel() for value in bert().state_dict().values())
    return found


# --- states of a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switch", "value"),
    [("return_dict", False), ("output_hidden_states", True), ("_output_attentions", True), ("use_cache", True)],
)
def test_switches_of_a_config_change_nothing_and_stay(switch: str, value: bool) -> None:
    model = bert()
    setattr(model.config, switch, value)
    found = optin_deploy.prune(model, DATA, **HOW)
    assert same(dict(found.model.state_dict()), wanted())
    assert getattr(model.config, switch) is value
    assert getattr(found.model.config, switch) is value


def _inference_mode() -> Any:
    return torch.inference_mode()


def _autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _other_device() -> Any:
    return torch.device("meta")


@pytest.mark.parametrize("around", [_inference_mode, _autocast, _other_device])
def test_what_is_around_the_call_does_not_matter(around: Callable[[], Any]) -> None:
    model = bert()
    with around():
        found = optin_deploy.prune(model, DATA, **HOW).model
    assert same(dict(found.state_dict()), wanted())
    found(**DATA[0]).logits.sum().backward()


def test_a_model_in_training_with_frozen_parts_is_left_as_it_was() -> None:
    model = bert().float().train()
    model.bert.embeddings.requires_grad_(False)
    before = state_of(model)
    optin_deploy.prune(model, DATA, **HOW)
    assert state_of(model) == before


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
    with pytest.raises(BadInput, match=says):
        optin_deploy.prune(make(), DATA)


@pytest.mark.parametrize("name", ["module", "_orig_mod"])
def test_a_model_in_a_wrapper_says_to_take_it_out(name: str) -> None:
    """As DataParallel and torch.compile have it, which cannot be made everywhere."""
    wrapper = nn.Module()
    setattr(wrapper, name, bert())
    with pytest.raises(BadInput, match=rf"the model is a Module around another one: give that one, its \.{name}"):
        optin_deploy.prune(wrapper, DATA)


def test_a_weight_that_is_computed_stays_computed_and_the_result_is_told_as_a_graph(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = bert()
    parametrizations.weight_norm(model.bert.encoder.layer[1].output.dense)
    found = optin_deploy.prune(model, DATA, **HOW, compensation=False)
    assert found.proof.masked < 1e-9
    with torch.no_grad():
        assert torch.isfinite(found.model(**DATA[0])["logits"]).all()


# --- arguments and data ---------------------------------------------------------------------------------------

ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"flops": True}, "flops True: give a number"),
    ({"flops": "0.6"}, "flops '0.6': give a number"),
    ({"flops": float("nan")}, "flops nan"),
    ({"flops": np.float64("inf")}, "flops inf"),
    ({"flops": [0.5]}, "flops"),
    ({"params": np.bool_(True)}, "params"),
    ({"size": "1MiB"}, "size '1MiB': give a number"),
    ({"size": -1}, "size -1"),
    ({"align": 0}, "align 0"),
    ({"align": True}, "align True"),
    ({"align": 2.0}, "align 2.0"),
    ({"allocation": "best"}, "allocation 'best'"),
    ({"allocation": 3}, "allocation is a int"),
    ({"seed": "0"}, "seed '0': give a whole number"),
    ({"seed": 0.5}, "seed 0.5"),
    ({"settings": {"probes": 2}}, "settings is a dict; give a ScoreSettings"),
]


@pytest.mark.parametrize(("argument", "says"), ARGUMENTS, ids=[says for _, says in ARGUMENTS])
def test_arguments_that_cannot_be_are_named_before_any_work(
    argument: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "read_module", None)
    with pytest.raises(BadInput) as caught:
        optin_deploy.prune(bert(), DATA, **(HOW | argument))
    assert says in str(caught.value)


def test_numbers_of_numpy_are_numbers() -> None:
    assert same(pruned_weights(bert(), flops=np.float64(0.6), align=np.int8(2)), wanted())


def test_a_narrow_ffn_needs_no_align() -> None:
    cost = optin_deploy.prune(bert(), DATA, **{**HOW, "align": None}).plan.cost
    assert cost is not None
    assert cost.macs_pruned <= 0.6 * cost.macs_dense


def masked_by(value: Any) -> list[dict[str, Any]]:
    return [DATA[0], DATA[1] | {"attention_mask": value}]


WRONG: list[tuple[Any, str]] = [
    ([DATA[0], {**DATA[1], "input_ids": torch.full((3, 6), VOCABULARY)}], f"hold {VOCABULARY}"),
    (masked_by(torch.full((3, 6), 2)), "other values than 1"),
    (masked_by(torch.tensor([[1] * 6, [0] * 6, [1] * 6])), "has no token"),
]


@pytest.mark.parametrize(("data", "says"), WRONG, ids=[says for _, says in WRONG])
def test_values_that_the_model_cannot_take_are_named_with_their_batch(data: Any, says: str) -> None:
    with pytest.raises(BadInput, match="batch 1: ") as caught:
        optin_deploy.prune(bert(), data, **HOW)
    assert says.replace("hold ", "holds ") in str(caught.value)


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


def one_model() -> Iterator[nn.Module]:
    model = bert()
    yield from (model, model)


def one_config() -> Iterator[nn.Module]:
    """While a model is read, attention is switched in the config."""
    one = bert()
    other = copy.deepcopy(one)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = one.config
    yield from (one, other)


def two_models() -> Iterator[nn.Module]:
    """Exporters keep things in places that all threads share."""
    yield from (bert(), bert())


@pytest.mark.parametrize("models", [one_model, one_config, two_models])
def test_two_threads_are_both_right(models: Callable[[], Iterator[nn.Module]]) -> None:
    one, other = models()
    expected, before = wanted(), state_of(one)
    found = both(lambda: pruned_weights(one), lambda: pruned_weights(other))
    assert all(isinstance(each, dict) and same(each, expected) for each in found), found
    assert state_of(one) == before


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
