"""Torch modules become networks whose weights are the module's own, by name and in memory; the module is as before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from optin_deploy.errors import BadInput
from optin_deploy.network.examples import example_of
from optin_deploy.network.graph import Network
from optin_deploy.network.read import read
from optin_deploy.network.read_torch import read_module
from support.tiny_graphs import outputs

TEXT: dict[str, Any] = {
    **{"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40},
    **{"max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
IMAGE: dict[str, Any] = {
    **{"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40},
    **{"image_size": 32, "patch_size": 8},
}
SPEECH: dict[str, Any] = {
    **{"vocab_size": 97, "d_model": 24, "encoder_layers": 1, "encoder_attention_heads": 3, "decoder_layers": 1},
    **{"decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_mel_bins": 20},
    **{"max_source_positions": 15, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 1},
}
T5: dict[str, Any] = {
    **{"vocab_size": 97, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 1, "num_heads": 3},
    **{"decoder_start_token_id": 0, "pad_token_id": 0},
}


def built(prefix: str, suffix: str, settings: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}{suffix}")(getattr(transformers, f"{prefix}Config")(**settings))


def resized(inputs: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]], sizes: Mapping[str, int]) -> Any:
    """The same rows and columns, repeated or cut to other sizes."""
    found = {}
    for name, values in inputs.items():
        for axis, size in axes[name].items():
            values = values.index_select(axis, torch.arange(sizes[size]) % values.shape[axis])
        found[name] = values
    return found


def check_weights(network: Network, module: nn.Module) -> None:
    """All parameters are there, by name, and none is a copy."""
    for name, parameter in module.named_parameters():
        assert network.weights[name].raw.data_ptr() == parameter.data_ptr(), name


@pytest.mark.parametrize(
    ("model", "dynamo"),
    [
        (("Bert", "ForSequenceClassification", TEXT), True),
        (("Bert", "ForSequenceClassification", TEXT), False),
        (("Llama", "ForCausalLM", {**TEXT, "num_key_value_heads": 1, "tie_word_embeddings": True}), False),
        (("T5", "ForConditionalGeneration", T5), False),
        (("ViT", "ForImageClassification", IMAGE), False),
    ],
)
def test_a_network_holds_the_weights_of_its_model_and_computes_the_same_at_other_sizes(
    model: Any, dynamo: bool
) -> None:
    module = built(*model).eval()
    example = example_of(module)
    network = read_module(module, example.inputs, axes=example.axes, dynamo=dynamo)
    check_weights(network, module)
    shared = [weight for weight in network.weights.values() if isinstance(getattr(weight, "raw", None), nn.Parameter)]
    assert len({weight.raw.data_ptr() for weight in shared}) == len(shared)  # tied weights are one
    inputs = resized(example.inputs, example.axes, {"batch": 3, "length": 7, "decoder_length": 5})
    with torch.no_grad():
        expected = module(**inputs)
    found = outputs(ir.to_proto(network.model), {name: values.numpy() for name, values in inputs.items()})
    assert next(port.name for port in network.outputs) == "logits"
    for port, values in zip(network.outputs, found, strict=True):
        assert np.allclose(expected[port.name].numpy(), values, atol=1e-5)


class Parts(nn.Module):
    """Gives nested outputs, one of them twice, and fails on demand."""

    def __init__(self, *, branch: bool = False, fails: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)
        self.drop = nn.Dropout(0.5)
        self.branch, self.fails = branch, fails

    def forward(self, x: Tensor, scale: Tensor) -> Any:
        if self.fails:
            raise ValueError("this module never works")
        hidden = self.drop(self.first(x))
        if self.branch and hidden.sum() > 1e9:
            hidden = -hidden
        return self.second(hidden) * scale, [hidden, (hidden, hidden + 1)]


INPUTS = {"x": torch.randn(3, 4), "scale": torch.tensor(2.0)}


def test_any_module_is_read_and_its_outputs_are_named_by_place() -> None:
    module = Parts()
    network = read(module, INPUTS)
    check_weights(network, module)
    assert [port.name for port in network.outputs] == ["output_0", "output_1_0", "output_1_1_1"]
    assert [(port.name, port.shape) for port in network.inputs] == [("x", ("batch", 4)), ("scale", ())]
    assert module.training
    with torch.no_grad():
        (first, _), found = (
            module.eval()(**INPUTS),
            outputs(ir.to_proto(network.model), {k: v.numpy() for k, v in INPUTS.items()}),
        )
    assert np.allclose(first.numpy(), found[0], atol=1e-6)  # without dropout


@dataclass
class Named:
    """An output that is no dict."""

    logits: Tensor
    states: dict[str, Any]


class Nested(Parts):
    """Gives what it computes in whatever `as_output` makes of it."""

    def __init__(self, as_output: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.as_output = as_output

    def forward(self, x: Tensor, scale: Tensor) -> Any:
        hidden = self.first(x)
        return self.as_output(self.second(hidden) * scale, hidden)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize(
    ("as_output", "names"),
    [
        (lambda a, b: {"logits": a, "features": [b, b + 1]}, ["logits", "features_0", "features_1"]),
        (lambda a, b: {"logits": a, "aux": [{"f": b}, {"f": b + 1}]}, ["logits", "aux_0_f", "aux_1_f"]),
        (lambda a, b: (a, {"f": b}), ["output_0", "output_1_f"]),
        (lambda a, b: Named(a, {"f": b, "name": "b"}), ["logits", "states_f"]),
        (lambda a, b: BaseModelOutput(last_hidden_state=a, hidden_states=(b, b + 1)), ["last_hidden_state"]),
    ],
    ids=["lists", "dicts in lists", "a dict in a tuple", "a dataclass", "of transformers"],
)
def test_tensors_anywhere_in_an_output_are_outputs(as_output: Any, names: list[str], dynamo: bool) -> None:
    network = read_module(Nested(as_output).eval(), INPUTS, dynamo=dynamo)
    assert [port.name for port in network.outputs] == names


def test_an_output_without_a_tensor_is_refused_by_its_type() -> None:
    with pytest.raises(BadInput, match="its forward returns no tensor but str"):
        read(Nested(lambda *_: "nothing"), INPUTS)


def test_encoders_of_torch_are_read_off_their_fast_path(capfd: pytest.CaptureFixture[str]) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
            self.inner = nn.TransformerEncoder(layer, 1)

        def forward(self, x: Tensor, pad: Tensor) -> Tensor:
            return self.inner(x, src_key_padding_mask=pad).mean(1)

    pad = torch.arange(5).expand(3, 5) >= torch.tensor([5, 3, 4])[:, None]
    inputs, module = {"x": torch.randn(3, 5, 8), "pad": pad}, Encoder().eval()
    before = torch.backends.mha.get_fastpath_enabled()
    network = read_module(module, inputs, axes={"x": {0: "batch", 1: "length"}, "pad": {0: "batch", 1: "length"}})
    assert torch.backends.mha.get_fastpath_enabled() == before
    with torch.no_grad():
        expected = module.train()(**inputs)  # not on the fast path
    (found,) = outputs(ir.to_proto(network.model), {name: values.numpy() for name, values in inputs.items()})
    assert np.allclose(expected.numpy(), found, atol=1e-5)
    assert capfd.readouterr().err == ""


class Assigned(nn.Module):
    """Writes into slices of a copy."""

    def __init__(self, *places: Any) -> None:
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for place in self.places:
            out[place] = x[place] + 1
        return out


WHOLE = slice(None)


@pytest.mark.parametrize(
    ("places", "scattered"),
    [
        (((WHOLE, slice(1, None)), (WHOLE, WHOLE, slice(2, 5))), False),
        (((WHOLE, slice(-3, -1), slice(None, 4)),), False),
        (((..., slice(5, 99)), (WHOLE, slice(7, 9))), False),
        (((WHOLE, WHOLE, slice(0, None, 2)),), True),
        (((slice(1, None), slice(1, 2)),), False),
    ],
)
def test_what_is_written_into_a_slice_is_joined_with_the_rest(places: Any, scattered: bool) -> None:
    module = Assigned(*places)
    network = read(module, {"x": torch.randn(3, 7, 6)})
    assert ("ScatterND" in {node.op for node in network.nodes}) == scattered
    for rows in (2, 5):
        x = torch.randn(rows, 7, 6)
        (found,) = outputs(ir.to_proto(network.model), {"x": x.numpy()})
        assert np.array_equal(found, module(x).numpy())


def test_where_the_new_exporter_fails_the_older_one_reads() -> None:
    module = Parts(branch=True)
    with pytest.raises(BadInput, match=r"torch\.export: "):
        read_module(module, INPUTS, dynamo=True)
    check_weights(read_module(module, INPUTS), module)


def test_where_the_new_exporter_writes_what_cannot_be_followed_the_older_one_reads() -> None:
    bag = nn.Sequential(nn.EmbeddingBag(30, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = bag

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids)

    inputs = {"ids": torch.randint(30, (4, 5))}
    new, old, chosen = (read_module(Bag(), inputs, dynamo=dynamo) for dynamo in (True, False, None))
    kinds = [[node.op for node in network.nodes] for network in (new, old, chosen)]
    assert "If" in kinds[0]
    assert kinds[2] == kinds[1] != kinds[0]


def test_a_module_that_cannot_be_traced_is_refused_with_both_reasons_and_is_as_before(
    capfd: pytest.CaptureFixture[str],
) -> None:
    module = Parts(fails=True)
    module.second.eval()
    with pytest.raises(BadInput, match=r"Parts cannot .*never works.*TorchScript: 'this module never works'"):
        read(module, INPUTS)
    assert [part.training for part in (module, module.first, module.second)] == [True, True, False]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fails", [torch.histc, lambda x: x @ torch.ones(x.shape[-1] + 1, 2)])
def test_what_fails_is_not_printed(
    fails: Callable[[Tensor], Tensor], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Parts):
        def forward(self, x: Tensor, scale: Tensor) -> Any:
            return fails(self.first(x)) * scale

    with pytest.raises(BadInput, match="Failing cannot be read as a graph"):
        read(Failing(), INPUTS)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_model_is_as_before() -> None:
    model = built("GPT2", "Model", {"vocab_size": 97, "n_embd": 24, "n_layer": 1, "n_head": 3, "n_positions": 32})
    model.set_attn_implementation("sdpa")
    model.config.output_hidden_states = True
    model.ln_f.eval()
    model.wpe.weight.requires_grad_(False)
    before = (
        dict(vars(model.config)),
        [part.training for part in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    example = example_of(model)
    network = read_module(model, example.inputs, axes=example.axes, dynamo=False)
    after = (
        dict(vars(model.config)),
        [part.training for part in model.modules()],
        [p.requires_grad for p in model.parameters()],
    )
    assert before == after
    assert [port.name for port in network.outputs] == ["last_hidden_state"]  # no caches, no states


WORDS = {"input_ids": (2, 13), "attention_mask": (2, 13)}
CHARACTERS = {**WORDS, "token_type_ids": (2, 13)}
PARTS = {"vision_config": {**IMAGE, "projection_dim": 8}, "text_config": {**TEXT, "projection_dim": 8}}


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (("Bert", "Model", TEXT), {**WORDS, "token_type_ids": (2, 13)}),
        (("Roberta", "Model", {**TEXT, "type_vocab_size": 1}), WORDS),
        (("T5", "EncoderModel", T5), WORDS),
        (("T5", "Model", T5), {**WORDS, "decoder_input_ids": (2, 11)}),
        (("Whisper", "Model", SPEECH), {"input_features": (2, 20, 30), "decoder_input_ids": (2, 11)}),
        (("ViT", "Model", {**IMAGE, "image_size": (32, 64)}), {"pixel_values": (2, 3, 32, 64)}),
        (("ViT", "Model", {**IMAGE, "num_channels": 1}), {"pixel_values": (2, 1, 32, 32)}),
        (("CLIP", "Model", PARTS), {**WORDS, "pixel_values": (2, 3, 32, 32)}),
        (("Canine", "Model", {name: value for name, value in TEXT.items() if name != "vocab_size"}), CHARACTERS),
        (("VideoMAE", "Model", {**IMAGE, "num_frames": 4}), {"pixel_values": (2, 4, 3, 32, 32)}),
        (
            ("ResNet", "Model", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}),
            {"pixel_values": (2, 3, 224, 224)},
        ),
    ],
)
def test_examples_are_what_the_kind_of_model_takes(model: Any, shapes: Any) -> None:
    inputs = example_of(built(*model)).inputs
    assert {name: tuple(values.shape) for name, values in inputs.items()} == shapes
    for name in inputs.keys() & {"input_ids", "decoder_input_ids"}:
        assert int(inputs[name].min()) > 1  # 0 and 1 mean something special in all of them


def test_what_no_example_is_known_for_asks_for_inputs() -> None:
    class Odd(nn.Module):
        main_input_name, input_modalities, config = "spikes", "neurons", transformers.BertConfig()

        def forward(self, spikes: Tensor) -> Tensor:
            return spikes

    with pytest.raises(BadInput, match="Odd takes spikes: give example inputs by name"):
        read(Odd())
    Odd.main_input_name, Odd.forward = "input_features", lambda self, input_features: input_features
    with pytest.raises(BadInput, match=r"no input_features for Odd .*'num_mel_bins'.*: give example inputs by name"):
        read(Odd())
    with pytest.raises(BadInput, match="Parts is no transformers model: give example inputs"):
        read(Parts())
