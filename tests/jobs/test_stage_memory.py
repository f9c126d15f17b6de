"""A cut holds little beside two copies of the weights; a job tells the peak of each stage, and which went over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest
import torch
import transformers
from torch import Tensor

from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.proof import NotProven, prove
from optin_deploy.jobs import stage_memory
from optin_deploy.jobs.stage_memory import StageMemory, over_budget
from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from optin_deploy.network.tensors import torch_tensor
from optin_deploy.scoring.memory import PeakBytes
from optin_deploy.scoring.subject import Subject
from support.tiny_scoring import one_thread, subject_of

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)

MIB, LAYERS = 2**20, 16


@pytest.fixture(scope="module", name="model")
def _model() -> Any:
    """Many narrow layers: the weights outweigh what a layer computes with."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes, vocab_size=50, max_position_embeddings=32, initializer_range=0.1)
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module", name="subject")
def _subject(model: Any) -> Subject:
    return subject_of(model)


def keep_of(subject: Subject) -> dict[str, list[int]]:
    """Three quarters of the heads and neurons stay, other ones in each layer."""
    groups = [group for group in subject.layout.groups if group.kind in ("heads", "neurons")]
    return {
        group.name: [unit for unit in range(group.units) if (unit + place) % 4] for place, group in enumerate(groups)
    }


def feeds() -> list[dict[str, Tensor]]:
    ids = torch.randint(5, 50, (5, 3), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def size_of(network: Network) -> int:
    return sum(weight.nbytes for weight in network.weights.values())


def test_a_cut_and_its_proof_hold_little_beside_the_two_networks(subject: Subject) -> None:
    with PeakBytes() as peak:
        smaller = cut(subject.layout, keep_of(subject))
        prove(subject.layout, keep_of(subject), smaller, feeds())
    dense, left = size_of(subject.structure.network), size_of(smaller)
    assert 0.7 * dense < left < 0.8 * dense
    # Masks, the tables of embeddings and one product at a time in float64.
    assert peak.most < 0.1 * dense


def bent(network: Network, name: str) -> Network:
    """A network with one matrix a millionth larger."""
    model = network.model.clone()
    value = model.graph.initializers[name]
    value.const_value = ir.tensor_adapters.TorchTensor(torch_tensor(network.weights[name]) * (1 + 1e-6), name)
    return Network(model, network.source)


def test_the_proof_sees_an_error_of_a_part_in_a_million_in_any_layer(subject: Subject) -> None:
    keep = keep_of(subject)
    smaller = cut(subject.layout, keep)
    assert prove(subject.layout, keep, smaller, feeds()).masked < 1e-12
    for path in ("encoder.layer.3.output.dense", "encoder.layer.15.attention.self.value", "embeddings.LayerNorm"):
        (name,) = [name for name in smaller.weights if name.startswith(f"{path}.weight")]
        with pytest.raises(NotProven, match="differs from the masked one"):
            prove(subject.layout, keep, bent(smaller, name), feeds())


def test_a_run_in_float64_is_that_of_a_model_in_float64_and_holds_no_copy(model: Any, subject: Subject) -> None:
    network = subject.structure.network
    with torch.no_grad():
        with PeakBytes() as peak:
            (found,) = Program(network, dtype=torch.float64)(feeds()[0]).outputs.values()
        expected = type(model)(model.config, add_pooling_layer=False).double().eval()
        expected.load_state_dict(model.state_dict())
        expected.set_attn_implementation("eager")
        # Constants of the graph, such as the square root of 2 in GELU, are stored in float32.
        torch.testing.assert_close(found, expected(**feeds()[0]).last_hidden_state, rtol=1e-5, atol=1e-6)
    assert peak.most < 0.2 * size_of(network)


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
    from optin_deploy.jobs.export import _over_budget

    peaks = {"score": 150 * MIB, "rewrite": 171 * MIB, "export": 230 * MIB}
    clock: Any = SimpleNamespace(memory=SimpleNamespace(peaks=peaks))
    assert _over_budget(clock, 100 * MIB, 130 * MIB) == _over_budget(clock, 100 * MIB, None) == []
    assert not caplog.messages
    (sentence,) = _over_budget(clock, 100 * MIB, 70 * MIB)
    assert "--memory-budget 70MiB" in sentence
    assert sentence.endswith("rewrite 71 MiB, export 130 MiB.")
    assert caplog.messages == [sentence]
