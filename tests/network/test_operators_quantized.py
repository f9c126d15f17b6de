"""Operators of whole numbers compute what ONNX Runtime and onnx's reference compute, bit by bit or one step apart."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from optin_deploy.network.graph import Network
from optin_deploy.network.run import Program
from support.one_node import model_of, ours, same

MICROSOFT = {"domain": "com.microsoft"}
BOTH: dict[str, Any] = {"version": 21, "judges": "both"}
WINDOW = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
Form = dict[str, Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def real(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def unsigned(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape).astype(np.uint8)


def signed(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype(np.int8)


def scales(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.asarray(rng.random(shape) * 0.05 + 0.01, np.float32)


def number(value: float, dtype: Any = np.float32) -> np.ndarray:
    return np.array(value, dtype)


@pytest.mark.parametrize(
    ("zero", "finer"),
    [
        (number(3, np.uint8), 1),
        (number(-3, np.int8), 1),
        (None, 1),
        (number(700, np.uint16), 100),
        (number(-70, np.int16), 100),
    ],
)
def test_quantizing_and_back_with_one_scale(rng: np.random.Generator, zero: Any, finer: float) -> None:
    scale = scales(rng) / np.float32(finer)
    whole = same("QuantizeLinear", [real(rng, 4, 6, 8), scale, zero], **BOTH)[0]
    same("DequantizeLinear", [whole, scale, zero], **BOTH)


def test_quantizing_and_back_along_an_axis(rng: np.random.Generator) -> None:
    x = real(rng, 4, 6, 8)
    for axis, size in ((1, 6), (-1, 8)):
        scale, zero = scales(rng, size), signed(rng, size)
        whole = same("QuantizeLinear", [x, scale, zero], axis=axis, **BOTH)[0]
        same("DequantizeLinear", [whole, scale, zero], axis=axis, **BOTH)
        same("DequantizeLinear", [whole, scale.astype(np.float16)], axis=axis, atol=2e-2, **BOTH)


@pytest.mark.parametrize(("shape", "axis", "size"), [((4, 3, 8), 1, 2), ((4, 6, 3), 2, 3)])
def test_quantizing_and_back_by_blocks(rng: np.random.Generator, shape: Any, axis: int, size: int) -> None:
    form, scale, zero = {"axis": axis, "block_size": size}, scales(rng, *shape), signed(rng, *shape)
    same("QuantizeLinear", [real(rng, 4, 6, 8), scale, zero], **form, **BOTH)
    same("DequantizeLinear", [signed(rng, 4, 6, 8), scale, zero], **form, **BOTH)


def test_quantizing_and_back_in_the_domain_of_onnx_runtime(rng: np.random.Generator) -> None:
    x, scale, zero = real(rng, 4, 6, 8), scales(rng, 6), signed(rng, 6)
    same("QuantizeLinear", [x, scales(rng), number(3, np.uint8)], **MICROSOFT)
    same("QuantizeLinear", [x, scale, zero], axis=1, **MICROSOFT)
    same("DequantizeLinear", [signed(rng, 4, 6, 8), scale, zero], axis=1, **MICROSOFT)


def test_half_precision_is_quantized_one_step_apart(rng: np.random.Generator) -> None:
    half = [value.astype(np.float16) for value in (real(rng, 4, 6), scales(rng))]
    same("QuantizeLinear", [*half, number(3, np.uint8)], steps=1, **BOTH)


def test_quantizing_by_the_range_of_all_entries(rng: np.random.Generator) -> None:
    x = real(rng, 4, 6, 8)
    for values in (x, x + 9, -x * x):
        same("DynamicQuantizeLinear", [values], outputs=3, steps=1, judges="both")
    same("DynamicQuantizeLinear", [x * 0], outputs=3)


def test_products_of_whole_numbers_are_exact(rng: np.random.Generator) -> None:
    a, b = unsigned(rng, 2, 4, 6), signed(rng, 6, 5)
    same("MatMulInteger", [a, b], judges="both")
    same("MatMulInteger", [a, b, number(7, np.uint8), number(-3, np.int8)], judges="both")
    same("MatMulInteger", [a, b, number([7], np.uint8), signed(rng, 5)])
    x, zero = unsigned(rng, 2, 4, 6, 6), number(7, np.uint8)
    same("ConvInteger", [x, unsigned(rng, 6, 4, 3, 3), zero], judges="both", **WINDOW)
    same("ConvInteger", [x, unsigned(rng, 4, 1, 3, 3), zero, number(9, np.uint8)], group=4, **WINDOW)


def test_long_sums_of_whole_numbers_differ_by_the_rounding_of_a_cast_alone() -> None:
    """Sums above 2^24 are rounded to single precision, as the Cast that always follows would."""
    a, b = np.full((1, 3001), 255, np.uint8), np.full((3001, 1), 255, np.uint8)
    a[0, 0] = 254
    exact = int((a.astype(np.int64) @ b.astype(np.int64))[0, 0])
    assert exact > 2**24
    (got,) = ours(model_of("MatMulInteger", [a, b]), [torch.from_numpy(a), torch.from_numpy(b)])
    assert got is not None
    assert got.item() == np.float32(exact)


def unit(rng: np.random.Generator, dtype: Any = np.uint8) -> list[np.ndarray]:
    return [scales(rng), number(5, dtype)]


COARSE = [number(0.7), number(100, np.uint8)]


def test_products_that_are_quantized_again(rng: np.random.Generator) -> None:
    a, b, first, second = unsigned(rng, 2, 4, 6), signed(rng, 6, 5), unit(rng), unit(rng, np.int8)
    same("QLinearMatMul", [a, *first, b, *second, *COARSE], steps=1, **BOTH)
    same("QLinearMatMul", [a[0], *first, b, scales(rng, 5), signed(rng, 5), *COARSE], steps=1, version=21)
    bias = rng.integers(-999, 999, 5).astype(np.int32)
    same("QGemm", [a[0], *first, signed(rng, 5, 6), *second, bias, *COARSE], transB=1, steps=1, **MICROSOFT)
    columns = [scales(rng, 5), signed(rng, 5)]
    same("QGemm", [unsigned(rng, 6, 4), *first, b, *columns], transA=1, alpha=0.5, **MICROSOFT)


def test_convolutions_that_are_quantized_again(rng: np.random.Generator) -> None:
    x, weight, first = unsigned(rng, 2, 4, 6, 6), signed(rng, 6, 4, 3, 3), unit(rng)
    bias = rng.integers(-999, 999, 6).astype(np.int32)
    same("QLinearConv", [x, *first, weight, *unit(rng, np.int8), *COARSE, bias], steps=1, **WINDOW)
    channels = [scales(rng, 6), np.zeros(6, np.int8)]
    same("QLinearConv", [x, *first, weight, *channels, *COARSE], steps=1, **WINDOW)
    same("QLinearConv", [x, *first, unsigned(rng, 4, 1, 3, 3), *unit(rng), *COARSE], group=4, steps=1, **WINDOW)


def test_products_that_become_real_numbers(rng: np.random.Generator) -> None:
    a, b = unsigned(rng, 2, 4, 6), signed(rng, 6, 5)
    feeds = [a, b, scales(rng, 1), scales(rng, 1), number([3], np.uint8), number([2], np.int8), real(rng, 5)]
    same("MatMulIntegerToFloat", feeds, **MICROSOFT)
    columns = [scales(rng), scales(rng, 5), number(3, np.uint8), signed(rng, 5)]
    same("MatMulIntegerToFloat", [a, b, *columns], **MICROSOFT)
    x = real(rng, 2, 4, 6)
    one = [scales(rng), number(2, np.int8), real(rng, 5)]
    same("DynamicQuantizeMatMul", [x, b, *one], atol=1e-4, **MICROSOFT)
    same("DynamicQuantizeMatMul", [x, b, scales(rng, 5), signed(rng, 5)], atol=1e-4, **MICROSOFT)


def test_attention_that_projects_from_whole_numbers(rng: np.random.Generator) -> None:
    feeds = [unsigned(rng, 2, 5, 6), signed(rng, 6, 36), real(rng, 36), scales(rng)]
    zeros = [number(5, np.uint8), number(-2, np.int8)]
    same("QAttention", [*feeds, scales(rng), None, *zeros], num_heads=3, atol=1e-4, **MICROSOFT)
    columns = [scales(rng, 36), number([3, 5], np.int32), zeros[0], np.zeros(36, np.int8)]
    same("QAttention", [*feeds, *columns], num_heads=3, unidirectional=1, atol=1e-4, **MICROSOFT)


def test_units_of_whole_numbers(rng: np.random.Generator) -> None:
    x, y, picture = unsigned(rng, 4, 6), unsigned(rng, 4, 6), unsigned(rng, 2, 3, 6, 6)
    fine = [number(1 / 256), number(0, np.uint8)]
    form: Form = {"steps": 1, **MICROSOFT}
    same("QLinearAdd", [x, *unit(rng), y, *unit(rng), *unit(rng)], **form)
    whole = [unit(rng, np.int8) for _ in range(3)]
    same("QLinearMul", [signed(rng, 4, 6), *whole[0], signed(rng, 6), *whole[1], *whole[2]], **form)
    same("QLinearSigmoid", [x, *unit(rng), *fine], **form)
    same("QLinearLeakyRelu", [signed(rng, 4, 6), *whole[0], *whole[1]], alpha=0.2, **form)
    for step in (1 / 256, 1 / 255, 0.0023):
        finest = [number(step), number(0, np.uint8)]
        same("QLinearSoftmax", [picture, *unit(rng), *finest], axis=-1, opset=13, **MICROSOFT)
    same(
        "QLinearSoftmax",
        [signed(rng, 4, 6), *unit(rng, np.int8), number(0.003), number(-128, np.int8)],
        axis=-1,
        opset=13,
        **MICROSOFT,
    )
    same("QLinearSoftmax", [picture, *unit(rng), *fine], axis=1, opset=12, **form)
    pool = [picture, *unit(rng), *unit(rng)]
    same("QLinearAveragePool", pool, kernel_shape=[2, 2], strides=[2, 2], **form)
    same("QLinearAveragePool", pool, **WINDOW, **form)
    same("QLinearGlobalAveragePool", pool, **form)
    same("QLinearConcat", [*unit(rng), x, *unit(rng), unsigned(rng, 4, 3), *unit(rng)], axis=1, **form)
    same("QLinearWhere", [rng.random((4, 6)) > 0.5, x, *unit(rng), y, *unit(rng), *unit(rng)], **form)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zeros", ["none", "packed", "real"])
def test_weights_of_a_few_bits(rng: np.random.Generator, bits: int, zeros: str) -> None:
    if bits == 8 and zeros == "real":
        return  # ONNX Runtime has no such form
    for width, size in ((64, 16), (96, 32), (100, 32)):
        rows, blocks = 7, -(-width // size)
        points = {
            "none": None,
            "packed": unsigned(rng, rows, -(-blocks * bits // 8)),
            "real": real(rng, rows, blocks) + 2 ** (bits - 1),
        }[zeros]
        feeds = [
            real(rng, 2, 3, width),
            unsigned(rng, rows, blocks, size * bits // 8),
            scales(rng, rows, blocks),
            points,
        ]
        form: Form = {"N": rows, "K": width, "bits": bits, "block_size": size, "atol": 1e-3, **MICROSOFT}
        same("MatMulNBits", feeds, **form)
        same("MatMulNBits", [*feeds, None, real(rng, rows)], **form)
        flat = [value if value is None else value.ravel() for value in feeds[2:]]
        same("MatMulNBits", [*feeds[:2], *flat], **form)


def test_tables_of_a_few_bits(rng: np.random.Generator) -> None:
    ids = rng.integers(-5, 9, (2, 3))
    form: Form = {"gather_axis": 0, "quantize_axis": 1, **MICROSOFT}
    packed = [unsigned(rng, 9, 32), ids, scales(rng, 9, 2)]
    same("GatherBlockQuantized", [*packed, unsigned(rng, 9, 1)], bits=4, block_size=32, **form)
    same("GatherBlockQuantized", packed, bits=8, block_size=16, **form)


def of_four_bits(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-8, 8, shape).astype(ml_dtypes.int4)


def test_stored_numbers_of_four_bits(rng: np.random.Generator) -> None:
    """They are stored two in a byte, and read as one a byte."""
    ids = rng.integers(-5, 9, (2, 3))
    stored = {
        "table": of_four_bits(rng, 4, 9, 32),
        "points": of_four_bits(rng, 4, 9, 2),
        "factors": scales(rng, 4, 9, 2),
        "weight": of_four_bits(rng, 8, 6),
        "by_block": scales(rng, 4, 6),
    }
    nodes = [
        helper.make_node(
            "GatherBlockQuantized", ["table", "ids", "factors", "points"], ["looked"], "a", domain="com.microsoft",
            block_size=16, gather_axis=1, quantize_axis=2,
        ),
        helper.make_node("DequantizeLinear", ["weight", "by_block"], ["real"], "b", axis=0, block_size=2),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "stored",
        [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [2, 3])],
        [helper.make_empty_tensor_value_info(name) for name in ("looked", "real")],
        [
            numpy_helper.from_array(value, name)
            if value.dtype != ml_dtypes.int4
            else helper.make_tensor(name, onnx.TensorProto.INT4, value.shape, value.astype(int).ravel())
            for name, value in stored.items()
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    got = Program(Network(ir.from_proto(model), "a test"))({"ids": torch.from_numpy(ids)}).outputs
    for value, right in zip(got.values(), runtime_of(model, {"ids": ids}), strict=True):
        np.testing.assert_allclose(value, right, atol=1e-6)


def runtime_of(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def test_gradients_pass_straight_through_the_rounding(rng: np.random.Generator) -> None:
    x = torch.from_numpy(real(rng, 3, 6)).requires_grad_()
    b, scale = torch.from_numpy(signed(rng, 6, 5)), torch.tensor(0.02)
    whole, step, zero = ours(model_of("DynamicQuantizeLinear", [x.detach().numpy()], outputs=3), [x])
    assert whole is not None
    assert step is not None
    product = model_of("MatMulInteger", [unsigned(rng, 3, 6), b.numpy(), number(0, np.uint8)])
    (sums,) = ours(product, [whole, b, zero])
    assert sums is not None
    (sums * step * scale).sum().backward()
    assert x.grad is not None
    real_gradient = (b.float() * scale).sum(1).expand(3, 6)
    inside = torch.ones_like(x, dtype=torch.bool)
    inside.view(-1)[[int(x.argmax()), int(x.argmin())]] = False  # these two also set the scale
    torch.testing.assert_close(x.grad[inside], real_gradient[inside], rtol=1e-3, atol=1e-3)
