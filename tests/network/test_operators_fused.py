"""Nodes that ONNX Runtime fuses compute what ONNX Runtime computes; its layouts for one machine are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional

from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.operators import rows
from optin_deploy.network.operators.row import Unsupported
from optin_deploy.network.run import Program
from support.one_node import model_of, ours, same

MICROSOFT = {"domain": "com.microsoft"}
Form = dict[str, Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def real(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def test_activations_with_a_bias(rng: np.random.Generator) -> None:
    x, bias = real(rng, 2, 5, 8), real(rng, 8)
    same("Gelu", [x], **MICROSOFT)
    same("QuickGelu", [x], **MICROSOFT)
    same("QuickGelu", [x], alpha=1.0, **MICROSOFT)
    same("FastGelu", [x], **MICROSOFT)
    same("FastGelu", [x, bias], **MICROSOFT)
    same("BiasGelu", [x, bias], **MICROSOFT)


@pytest.mark.parametrize(
    "form",
    [
        {"activation": "Relu"},
        {"activation": "Tanh"},
        {"activation": "Sigmoid"},
        {"activation": "HardSwish"},
        {"activation": "LeakyRelu", "activation_params": [0.1]},
        {"activation": "Clip", "activation_params": [-0.5, 0.7]},
        {"activation": "HardSigmoid", "activation_params": [0.3, 0.4]},
    ],
)
def test_convolutions_with_an_activation(rng: np.random.Generator, form: Form) -> None:
    window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    x, weight, bias = real(rng, 2, 4, 6, 6), real(rng, 6, 4, 3, 3), real(rng, 6)
    same("FusedConv", [x, weight, bias], **form, **window, **MICROSOFT)
    same("FusedConv", [x, weight, bias, real(rng, 2, 6, 6, 6)], **form, **window, **MICROSOFT)
    same("FusedConv", [x, real(rng, 4, 1, 3, 3)], group=4, strides=[2, 2], **form, **window, **MICROSOFT)


@pytest.mark.parametrize(
    "form",
    [
        {"activation": "Relu"},
        {"activation": "Tanh"},
        {"activation": "Sigmoid"},
        {"activation": "Softplus"},
        {"activation": "Softsign"},
        {"activation": "Elu", "activation_alpha": 0.7},
        {"activation": "LeakyRelu", "activation_alpha": 0.1},
        {"activation": "ThresholdedRelu", "activation_alpha": 0.3},
        {"activation": "HardSigmoid", "activation_alpha": 0.3, "activation_beta": 0.4},
    ],
)
def test_gemm_with_an_activation(rng: np.random.Generator, form: Form) -> None:
    feeds = [real(rng, 4, 5), real(rng, 6, 5), real(rng, 6)]
    same("FusedGemm", feeds, transB=1, alpha=0.5, beta=2.0, **form, **MICROSOFT)
    same("FusedGemm", [real(rng, 5, 4), real(rng, 5, 6)], transA=1, **form, **MICROSOFT)


@pytest.mark.parametrize(
    ("a", "b", "form"),
    [
        ((2, 3, 4, 5), (2, 3, 6, 5), {"transB": 1, "alpha": 0.3}),
        ((2, 3, 5, 4), (2, 3, 5, 6), {"transA": 1}),
        ((4, 2, 3, 5), (6, 2, 3, 5), {"transBatchA": 1, "transBatchB": 1, "transB": 1}),
        ((5, 2, 3, 4), (2, 3, 5, 6), {"transBatchA": 1, "transA": 1}),
        ((2, 4, 5), (5,), {}),
    ],
)
def test_products_of_transposed_tensors(rng: np.random.Generator, a: Any, b: Any, form: Form) -> None:
    same("FusedMatMul", [real(rng, *a), real(rng, *b)], **form, **MICROSOFT)
    if "transBatchA" not in form:
        same("TransposeMatMul", [real(rng, *a), real(rng, *b)], **form, **MICROSOFT)


def test_normalisations_of_a_sum(rng: np.random.Generator) -> None:
    x, scale, shift, bias = real(rng, 2, 5, 8), real(rng, 8), real(rng, 8), real(rng, 8)
    same("SimplifiedLayerNormalization", [x, scale], epsilon=1e-6, axis=-1, stash_type=1)
    shown: Form = {"outputs": 4, "unread": (1, 2), **MICROSOFT}
    same("SkipLayerNormalization", [x, real(rng, 2, 5, 8), scale, shift, bias], **shown)
    same("SkipLayerNormalization", [x, real(rng, 5, 8), scale], epsilon=1e-5, **MICROSOFT)
    same("SkipLayerNormalization", [x, real(rng, 1, 5, 8), scale, shift], **MICROSOFT)
    same("SkipSimplifiedLayerNormalization", [x, real(rng, 2, 5, 8), scale, bias], **shown)
    same("SkipSimplifiedLayerNormalization", [real(rng, 5, 8), real(rng, 5, 8), scale], epsilon=1e-5, **MICROSOFT)


def test_a_variance_of_nothing_counts_as_the_file_says(rng: np.random.Generator) -> None:
    """Without an epsilon in the file, ONNX Runtime adds 1e-12, not ONNX's 1e-5: small numbers tell."""
    small = real(rng, 2, 5, 8) * np.float32(1e-4)
    scale = real(rng, 8)
    same("SkipLayerNormalization", [small, small, scale], atol=1e-4, **MICROSOFT)
    same("SkipSimplifiedLayerNormalization", [small, small, scale], atol=1e-4, **MICROSOFT)


@pytest.mark.parametrize("outputs", [2, 3])
def test_embeddings_with_their_normalisation(rng: np.random.Generator, outputs: int) -> None:
    def ids(*shape: int) -> np.ndarray:
        return rng.integers(0, 5, shape).astype(np.int32)

    tables, scales = [real(rng, 5, 8), real(rng, 6, 8)], [real(rng, 8), real(rng, 8)]
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], np.int32)
    form: Form = {"outputs": outputs, **MICROSOFT}
    counted = [ids(2, 4), ids(2, 4) % 2, *tables, real(rng, 2, 8), *scales, mask]
    same("EmbedLayerNormalization", counted, mask_index_type=1, **form)
    same("EmbedLayerNormalization", [ids(2, 4), None, *tables, None, *scales], **form)
    same("EmbedLayerNormalization", [ids(2, 4), None, *tables, None, *scales, None, ids(2, 4)], **form)


def test_inverse(rng: np.random.Generator) -> None:
    same("Inverse", [real(rng, 2, 4, 4)], atol=1e-4, **MICROSOFT)


def test_what_only_gpus_run_is_what_its_parts_are(rng: np.random.Generator) -> None:
    """ONNX Runtime has no kernel for these on a CPU, so they are compared with the operators that they stand for."""
    x, bias, skip = (torch.from_numpy(real(rng, *shape)) for shape in ((2, 5, 8), (8,), (2, 5, 8)))
    weight = torch.from_numpy(real(rng, 8, 4))

    def run(op: str, *feeds: torch.Tensor, **form: Any) -> torch.Tensor:
        (value,) = ours(model_of(op, [feed.numpy() for feed in feeds], **form, **MICROSOFT), feeds)
        assert value is not None
        return value

    gated = (x + bias)[..., :4] * functional.gelu((x + bias)[..., 4:])
    torch.testing.assert_close(run("BiasAdd", x, bias, skip), x + bias + skip)
    torch.testing.assert_close(run("BiasSplitGelu", x, bias), gated)
    product = functional.gelu(x @ weight + bias[:4], approximate="tanh")
    torch.testing.assert_close(run("GemmFastGelu", x, weight, bias[:4]), product)
    torch.testing.assert_close(run("BiasSoftmax", x, bias, axis=2), torch.softmax(x + bias, 2))
    flat = torch.softmax((x + bias).reshape(2, 40), 1).reshape(2, 5, 8)
    torch.testing.assert_close(run("BiasSoftmax", x, bias, axis=1), flat)
    torch.testing.assert_close(run("FusedMatMulActivation", x, weight, activation="Relu"), torch.relu(x @ weight))


@pytest.mark.parametrize(
    ("op", "domain", "words"),
    [
        ("ReorderInput", "com.microsoft.nchwc", "give the file from before"),
        ("Conv", "com.microsoft.nchwc", "level 'extended' or below"),
        ("NhwcConv", "com.microsoft", "keeps channels last"),
        ("QLinearGlobalAveragePool", "com.microsoft", "keeps channels last"),
    ],
)
def test_layouts_for_one_machine_are_refused_with_what_to_do(op: str, domain: str, words: str) -> None:
    feeds = [np.zeros((1, 8, 4, 4), np.float32), *[np.array(1, np.float32)] * 4]
    model = model_of(op, feeds, domain=domain, channels_last=1)
    with pytest.raises(BadInput, match=words):
        Program(Network(ir.from_proto(model), "a test"))(
            {f"in{place}": torch.from_numpy(feed) for place, feed in enumerate(feeds)}
        )


def test_what_cannot_be_followed_says_why() -> None:
    pools = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")
    blocked = [("com.microsoft.nchwc", op) for op in ("ReorderInput", "ReorderOutput", "Conv", "Upsample", *pools)]
    for key in (*blocked, *(("com.microsoft", op) for op in ("NhwcConv", "NhwcFusedConv", "NhwcMaxPool"))):
        with pytest.raises(Unsupported, match="give the file from before"):
            rows()[key].flow(None)  # type: ignore[arg-type]


def test_an_activation_that_is_not_known_is_named(rng: np.random.Generator) -> None:
    feeds = [real(rng, 4, 5), real(rng, 5, 6)]
    with pytest.raises(Unsupported, match="activation Erf; known are Relu"):
        ours(model_of("FusedGemm", feeds, activation="Erf", **MICROSOFT), [torch.from_numpy(feed) for feed in feeds])
