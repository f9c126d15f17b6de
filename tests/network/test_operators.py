"""Every operator's row computes what ONNX Runtime and onnx's reference compute: a line a case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from optin_deploy.network.graph import Network
from optin_deploy.network.operators import rows
from optin_deploy.network.operators.row import Row, Unsupported
from optin_deploy.network.shapes import shapes_of
from support.one_node import model_of, ours, reference, runtime

RNG = np.random.default_rng(0)
OTHER_FILES = ("test_operators_*.py",)
"""Files beside this one that test rows of their own families, by naming them."""
CONSTANT = ("NonMaxSuppression", "CastLike", "EyeLike", "Hardmax")
"""Operators whose output does not change with small changes of what they read."""
NOT_BY_NUMBERS = ("NonZero", "Compress", "NonMaxSuppression")
"""Operators whose output has a shape that only a run tells."""


@dataclass(frozen=True)
class Case:
    """One form of an operator."""

    op: str
    feeds: Sequence[np.ndarray | None]
    form: dict[str, Any]
    """opset, outputs and attributes."""
    judges: str
    """Who knows this form: "both", "runtime" or "reference"."""
    atol: float

    def __str__(self) -> str:
        sizes = ["-" if feed is None else "x".join(map(str, feed.shape)) for feed in self.feeds]
        return " ".join([self.op, ",".join(sizes), *(f"{key}={value}" for key, value in self.form.items())])[:100]


def case(op: str, *feeds: Any, judges: str = "both", atol: float = 1e-5, **form: Any) -> Case:
    """Write a case down; lists are numbers such as axes and sizes."""
    arrays = [np.array(feed, np.int64) if isinstance(feed, list) else feed for feed in feeds]
    return Case(op, arrays, form, judges, atol)


def f(*shape: int) -> np.ndarray:
    """Real numbers of both signs."""
    return RNG.standard_normal(shape).astype(np.float32)


def p(*shape: int) -> np.ndarray:
    """Real numbers between 0.1 and 0.9."""
    return RNG.uniform(0.1, 0.9, shape).astype(np.float32)


def i(*shape: int, low: int = -9, high: int = 10, dtype: Any = np.int64) -> np.ndarray:
    """Whole numbers."""
    return RNG.integers(low, high, shape).astype(dtype)


def b(*shape: int) -> np.ndarray:
    """Truth values."""
    return RNG.random(shape) > 0.5


def s(value: float, dtype: Any = np.float32) -> np.ndarray:
    """One number without axes."""
    return np.array(value, dtype)


def r(*values: float) -> np.ndarray:
    """A list of real numbers."""
    return np.array(values, np.float32)


def stored(values: Any) -> TensorProto:
    """An attribute that is a tensor."""
    array = np.array(values)
    return helper.make_tensor("value", helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array.reshape(-1))


SMALL = f(2, 3, 4)
EDGES = r(-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 3.0)
BROKEN = r(np.nan, np.inf, -np.inf, 1.0)
PICTURE = f(2, 4, 7, 6)
SEVENS, THREES = i(2, 3, low=-7, high=8), np.where((n := i(2, 3, low=-4, high=5)) == 0, 3, n)
SIDES = ("LEFT", "RIGHT")
RUNTIME = {"judges": "runtime"}
REFERENCE = {"judges": "reference"}

ELEMENTWISE = (
    *(case(op, SMALL) for op in ("Relu", "Erf", "Tanh", "Sigmoid", "Neg", "Exp", "Abs", "Sin", "Cos", "Tan", "Sign")),
    *(case(op, EDGES) for op in ("Floor", "Ceil", "Round", "Sinh", "Cosh", "Asinh", "Atan", "Identity", "Sign")),
    *(case(op, p(2, 3)) for op in ("Sqrt", "Log", "Reciprocal", "Asin", "Acos", "Atanh")),
    case("Acosh", 1 + p(2, 3)),
    case("Abs", i(2, 3)),
    case("Neg", i(2, 3)),
    case("Sign", i(2, 3)),
    case("IsNaN", BROKEN),
    case("IsInf", BROKEN),
    case("IsInf", BROKEN, detect_negative=0),
    case("IsInf", BROKEN, detect_positive=0),
    case("Not", b(2, 3)),
    case("BitwiseNot", i(2, 3)),
    case("Softplus", 30 * SMALL),
    case("Softsign", SMALL),
    case("Mish", SMALL),
    case("HardSwish", 4 * SMALL),
    case("HardSwish", 4 * SMALL, version=14),
    case("Gelu", SMALL),
    case("Gelu", SMALL, approximate="tanh"),
    case("Swish", SMALL, version=24, **REFERENCE),
    case("Swish", SMALL, version=24, alpha=1.7, **REFERENCE),
    case("HardSigmoid", 4 * SMALL),
    case("HardSigmoid", 4 * SMALL, alpha=0.3, beta=0.4),
    case("LeakyRelu", SMALL),
    case("LeakyRelu", SMALL, alpha=0.3),
    case("Elu", SMALL),
    case("Elu", SMALL, alpha=1.7),
    case("Celu", SMALL),
    case("Celu", SMALL, alpha=1.7),
    case("Selu", SMALL),
    case("Selu", SMALL, alpha=1.2, gamma=0.9),
    case("ThresholdedRelu", SMALL, alpha=0.4),
    case("ThresholdedRelu", 2 * SMALL),
    case("Shrink", SMALL),
    case("Shrink", SMALL, lambd=0.3, bias=0.1),
    case("Clip", SMALL),
    case("Clip", SMALL, s(-0.5), s(0.5)),
    case("Clip", SMALL, None, s(0.5)),
    case("Clip", SMALL, s(0.5), s(-0.5), version=13),
    case("Clip", i(2, 3), s(-2, np.int64), s(3, np.int64)),
    case("Clip", SMALL, version=6, min=-0.3, max=0.4, **RUNTIME),
    case("Clip", SMALL, version=6, max=0.4, **RUNTIME),
    case("Cast", SMALL, to=TensorProto.INT64),
    case("Cast", EDGES, to=TensorProto.BOOL),
    case("Cast", EDGES, to=TensorProto.FLOAT16),
    case("Cast", EDGES, to=TensorProto.INT32),
    case("Cast", i(2, 3), to=TensorProto.FLOAT),
    case("Cast", b(2, 3), to=TensorProto.FLOAT),
    case("Cast", i(2, 3), to=TensorProto.UINT8),
    case("CastLike", i(2, 3), f(1)),
    case("Dropout", SMALL),
    case("Dropout", SMALL, s(0.3)),
    case("Dropout", SMALL, s(0.3), s(False, bool), outputs=2),
    case("Dropout", SMALL, version=11, ratio=0.4, **RUNTIME),
    case("PRelu", SMALL, f(4)),
    case("PRelu", SMALL, f(3, 1)),
    case("PRelu", PICTURE, f(4, 1, 1)),
    case("Where", b(3, 1), SMALL, f(4)),
    case("Where", b(2, 1, 1), f(4), SMALL),
    case("Where", b(2, 3), i(2, 3), i(3)),
    case("Mod", SEVENS, THREES),
    case("Mod", SEVENS, THREES, fmod=1),
    case("Mod", f(2, 3), f(3), fmod=1),
    case("Add", SMALL, f(4)),
    case("Add", f(3, 1), f(2, 1, 4)),
    case("Add", i(2, 3), i(3)),
    case("Sub", SMALL, f(3, 1)),
    case("Mul", SMALL, f(1)),
    case("Mul", i(2, 3, dtype=np.int32), i(3, dtype=np.int32)),
    case("Div", SMALL, p(4)),
    case("Div", SEVENS, THREES),
    case("Pow", p(2, 3), f(3)),
    case("Pow", SMALL, s(2)),
    case("Pow", SMALL, s(3, np.int64)),
    case("Pow", i(2, 3, low=0), s(2, np.int64)),
    case("Pow", i(2, 3, low=1, dtype=np.int32), s(1.5)),
    case("Equal", i(4, high=-7), i(4, high=-7)),
    case("Equal", b(4), b(4)),
    case("Equal", f(4), f(4)),
    *(case(op, i(9), i(9)) for op in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")),
    *(case(op, SMALL, f(4)) for op in ("Less", "LessOrEqual", "Greater", "GreaterOrEqual")),
    *(case(op, b(2, 4), b(4)) for op in ("And", "Or", "Xor")),
    *(case(op, i(2, 4), i(4)) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")),
    *(case("BitShift", i(3, low=1, dtype=np.uint8), i(3, low=0, high=4, dtype=np.uint8), direction=to) for to in SIDES),
    *(case(op, SMALL, f(3, 1), f(4)) for op in ("Max", "Min", "Sum", "Mean")),
    *(case(op, SMALL) for op in ("Max", "Min", "Sum", "Mean")),
    *(case(op, i(2, 3), i(3)) for op in ("Max", "Min")),
)

PRODUCTS = (
    case("MatMul", f(2, 3), f(3, 4)),
    case("MatMul", f(2, 5, 3), f(3, 4)),
    case("MatMul", f(2, 1, 5, 3), f(4, 3, 2)),
    case("MatMul", f(3), f(3, 4)),
    case("MatMul", f(2, 4, 3), f(3)),
    case("MatMul", f(3), f(3)),
    case("MatMul", f(3), f(2, 3, 4)),
    case("MatMul", i(2, 3, dtype=np.int32), i(3, 2, dtype=np.int32)),
    case("Gemm", f(2, 3), f(3, 4)),
    case("Gemm", f(2, 3), f(3, 4), f(4)),
    case("Gemm", f(3, 2), f(4, 3), f(2, 1), transA=1, transB=1, alpha=0.5, beta=2.0),
    case("Gemm", f(2, 3), f(4, 3), s(1.5), transB=1, beta=0.5),
    case("Gemm", f(2, 3), f(3, 4), f(2, 4), beta=0.0),
    case("Gemm", f(2, 3), f(3, 4), alpha=0.3),
    case("Einsum", f(2, 3, 4), f(4, 5), equation="bij,jk->bik"),
    case("Einsum", f(2, 3, 4, 5), f(2, 6, 4, 5), equation="bqhd,bkhd->bhqk"),
    case("Einsum", f(2, 3), f(3, 2), equation="ij,ji"),
    case("Einsum", f(3, 3), equation="ii->i"),
    case("Einsum", f(2, 3, 4), equation="... i j -> ... j i"),
    case("Einsum", f(2, 3), f(2), f(3), equation="ij,i,j->ij"),
    case("Einsum", f(2, 3, 4), equation="abc->b"),
)

SHAPES = (
    case("Reshape", SMALL, [6, 4]),
    case("Reshape", SMALL, [0, -1]),
    case("Reshape", SMALL, [-1]),
    case("Reshape", SMALL, [0, 0, 2, -1]),
    case("Reshape", f(0, 3), [3, 0], allowzero=1),
    case("Reshape", f(1), []),
    case("Flatten", SMALL),
    case("Flatten", SMALL, axis=0),
    case("Flatten", SMALL, axis=-1),
    case("Flatten", SMALL, axis=3),
    case("Flatten", f(0, 3, 2), **RUNTIME),
    case("Flatten", f(2, 3, 0), axis=2),
    case("Squeeze", f(1, 3, 1), [0]),
    case("Squeeze", f(1, 3, 1), [-1, 0]),
    case("Squeeze", f(1, 3, 1)),
    case("Squeeze", f(1, 3, 1), version=11, axes=[2], **RUNTIME),
    case("Squeeze", f(1, 3, 1), version=11, axes=[-1], **RUNTIME),
    case("Unsqueeze", f(3, 2), [0, 3]),
    case("Unsqueeze", f(3, 2), [-1, 0]),
    case("Unsqueeze", f(3, 2), [2, 0, 1]),
    case("Unsqueeze", s(2), [0]),
    case("Unsqueeze", f(3, 2), version=11, axes=[1, -1], **RUNTIME),
    case("Transpose", SMALL),
    case("Transpose", SMALL, perm=[1, 0, 2]),
    case("Transpose", s(2)),
    case("Expand", f(3, 1), [2, 3, 4]),
    case("Expand", f(2, 3), [1, 3]),
    case("Expand", f(2, 3, 1), [4]),
    case("Expand", s(2), [2, 2]),
    case("Tile", f(2, 3), [2, 1]),
    case("Tile", i(2, 3), [1, 3]),
    case("Shape", SMALL),
    case("Shape", SMALL, start=1),
    case("Shape", SMALL, start=-2, end=-1),
    case("Shape", SMALL, start=-9, end=9),
    case("Shape", SMALL, start=2, end=1),
    case("Size", SMALL),
    case("ConstantOfShape", [2, 3]),
    case("ConstantOfShape", []),
    case("ConstantOfShape", [2, 3], value=stored([7])),
    case("ConstantOfShape", [2], value=stored([True])),
    case("Range", s(1, np.int64), s(7, np.int64), s(2, np.int64)),
    case("Range", s(5, np.int32), s(0, np.int32), s(-2, np.int32)),
    case("Range", s(0), s(1.0), s(0.25)),
    case("Range", s(3, np.int64), s(1, np.int64), s(1, np.int64)),
    case("EyeLike", f(3, 4)),
    case("EyeLike", f(4, 2), k=-1, dtype=TensorProto.INT64),
    case("EyeLike", i(2, 4), k=1, dtype=TensorProto.FLOAT),
)

SELECTIONS = (
    case("Concat", f(2, 3), f(2, 1), f(2, 2), axis=1),
    case("Concat", f(2, 3), f(1, 3), axis=-2),
    case("Concat", i(2), i(0), axis=0),
    case("Split", f(7, 3), outputs=3, version=18, num_outputs=3),
    case("Split", f(2, 6), version=18, outputs=2, num_outputs=2, axis=-1),
    case("Split", f(6, 2), outputs=3, version=13),
    case("Split", f(2, 7), [1, 4, 2], outputs=3, axis=1),
    case("Split", f(2, 7), [1, 4, 2], outputs=3, axis=1, version=13),
    case("Split", f(2, 7), version=11, split=[3, 4], outputs=2, axis=-1, **RUNTIME),
    case("Split", f(2, 6), version=11, outputs=3, axis=1, **RUNTIME),
    case("Slice", f(5, 6), [1], [4]),
    case("Slice", f(5, 6), [1, 0], [4, -1]),
    case("Slice", f(5, 6), [-3], [2**62], [1]),
    case("Slice", f(5, 6), [0, 5], [5, -7], [0, -1], [2, -2]),
    case("Slice", f(5, 6), [-1], [-99], [0], [-1]),
    case("Slice", f(5, 6), [4], [1], [0], [1]),
    case("Slice", f(5, 6), [9], [-(2**63)], [1], [-1]),
    case("Slice", i(5, 6), i(1, low=2, high=3, dtype=np.int32), i(1, low=5, high=6, dtype=np.int32)),
    case("Gather", f(5, 3), i(2, 2, low=-5, high=5)),
    case("Gather", f(5, 3), s(-1, np.int64), axis=1),
    case("Gather", f(2, 4, 3), i(2, low=0, high=4, dtype=np.int32), axis=-2),
    case("Gather", i(5), s(2, np.int64)),
    case("GatherElements", f(4, 3), i(2, 3, low=-4, high=4)),
    case("GatherElements", f(4, 3), i(4, 2, low=-3, high=3), axis=1),
    case("GatherElements", f(4, 3), i(4, 5, low=0, high=3, dtype=np.int32), axis=-1, **RUNTIME),
    case("GatherND", f(4, 3, 2), i(5, 2, low=-3, high=3)),
    case("GatherND", f(4, 3, 2), i(2, 3, 1, low=0, high=4)),
    case("GatherND", f(4, 3), i(2, low=0, high=3)),
    case("GatherND", f(2, 4, 3), i(2, 5, 1, low=-4, high=4), batch_dims=1),
    case("GatherND", f(2, 4, 3), i(2, 1, low=0, high=4), batch_dims=1),
    case("GatherND", f(2, 4, 3), i(2, 4, 1, low=0, high=3), batch_dims=2),
    case("ScatterElements", f(4, 3), np.array([[1, 0, 2], [-1, 2, 1]]), f(2, 3)),
    case("ScatterElements", f(4, 3), np.array([[0, -1]] * 4), f(4, 2), axis=1),
    case("ScatterElements", f(4, 3), np.array([[1, 1, 1], [1, 2, 1]], np.int32), f(2, 3), reduction="add"),
    *(
        case("ScatterElements", f(4, 3), i(2, 3, low=0, high=4), f(2, 3), reduction=how, version=18)
        for how in ("add", "mul", "max", "min")
    ),
    case("ScatterND", f(4, 3), np.array([[1], [3]]), f(2, 3)),
    case("ScatterND", f(4, 3), np.array([[1, -1], [-4, 0]]), f(2)),
    case("ScatterND", f(4, 3), np.array([[[1], [0]], [[2], [3]]]), f(2, 2, 3)),
    *(
        case("ScatterND", f(4, 3), np.array([[1], [3], [1]]), f(3, 3), reduction=how, version=18)
        for how in ("add", "mul", "max", "min")
    ),
    case("ScatterND", f(4, 3), np.array([[1, 2], [-3, -1]]), f(2), reduction="mul", version=18),
    case("TopK", f(3, 7), [3], outputs=2),
    case("TopK", f(3, 7), [2], outputs=2, axis=0, largest=0),
    case("TopK", i(9, high=99), [4], outputs=2),
    case("TopK", f(3, 7), [2], outputs=2, axis=-1, version=11, largest=0),
    case("OneHot", i(2, 3, low=-5, high=5), s(5, np.int64), r(0, 1)),
    case("OneHot", i(2, 3, low=-7, high=7), s(5), np.array([2.0, 9.0], np.float32), axis=1),
    case("OneHot", i(4, low=0, high=3), s(3, np.int64), r(0.5, 2), axis=0),
    case("Trilu", f(2, 4, 5)),
    case("Trilu", f(4, 5), s(1, np.int64), upper=0),
    case("Trilu", i(4, 5), s(-2, np.int64)),
    case("Trilu", b(4, 4), upper=0),
    case("NonZero", np.array([[1, 0, 2], [0, 0, 3]])),
    case("NonZero", b(2, 3, 2)),
    case("NonZero", r(0, 1, 0, 2)),
    case("Compress", f(3, 4), np.array([True, False, True]), axis=0),
    case("Compress", f(3, 4), np.array([False, True, True]), axis=-1),
    case("Compress", f(3, 4), b(12)),
    case("ReverseSequence", f(5, 3, 2), [1, 5, 3]),
    case("ReverseSequence", f(3, 5, 2), [2, 5, 1], batch_axis=0, time_axis=1),
)

SOME_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")
MORE_REDUCTIONS = ("ReduceSumSquare", "ReduceLogSumExp")
REDUCTIONS = (
    *(case(op, SMALL, [-1], version=18) for op in (*SOME_REDUCTIONS, *MORE_REDUCTIONS)),
    *(case(op, SMALL, [0, 2], version=18, keepdims=0) for op in (*SOME_REDUCTIONS, *MORE_REDUCTIONS)),
    *(case(op, SMALL, version=18) for op in (*SOME_REDUCTIONS, *MORE_REDUCTIONS)),
    *(case(op, SMALL, [], version=18, noop_with_empty_axes=1, **RUNTIME) for op in SOME_REDUCTIONS[:5]),
    *(case(op, SMALL, [], version=18) for op in SOME_REDUCTIONS),
    *(case(op, SMALL, version=11, axes=[-2], **RUNTIME) for op in (*SOME_REDUCTIONS, *MORE_REDUCTIONS)),
    *(case(op, SMALL, version=13, axes=[0, 1], keepdims=0) for op in ("ReduceMean", "ReduceMax", "ReduceL2")),
    case("ReduceSum", SMALL, [1], version=13),
    case("ReduceSum", SMALL, version=13, noop_with_empty_axes=1),
    case("ReduceSum", i(2, 3), [1]),
    case("ReduceSum", i(2, 3, dtype=np.int32), [1]),
    case("ReduceProd", i(2, 3), [1]),
    case("ReduceProd", i(2, 3, dtype=np.int32), [0], keepdims=0),
    case("ReduceMax", i(2, 3), [0]),
    case("ReduceMin", i(2, 3, dtype=np.int32), keepdims=0),
    case("ReduceMax", b(2, 3), [0]),
    case("ReduceL1", i(2, 3, dtype=np.int32), [1]),
    case("ReduceSumSquare", i(2, 3, dtype=np.int32), [1], **RUNTIME),
    case("ReduceLogSum", p(2, 3), [1]),
    case("ReduceLogSum", p(2, 3), keepdims=0),
    case("CumSum", SMALL, s(1, np.int64)),
    case("CumSum", SMALL, s(-1, np.int32), exclusive=1),
    case("CumSum", SMALL, s(0, np.int64), reverse=1),
    case("CumSum", SMALL, s(2, np.int64), reverse=1, exclusive=1),
    case("CumSum", i(2, 4), s(1, np.int64)),
    case("CumSum", i(2, 4, dtype=np.int32), s(1, np.int64), exclusive=1),
    case("DFT", f(2, 6, 5, 1), None, s(1, np.int64)),
    case("DFT", f(2, 6, 5, 2), s(4, np.int64), s(-2, np.int64)),
    case("DFT", f(2, 6, 5, 2), s(8, np.int64), inverse=1),
    case("DFT", f(2, 6, 5, 1), None, s(1, np.int64), onesided=1),
    case("DFT", f(2, 6, 5, 1), version=17, axis=2),
    case("STFT", f(2, 20, 1), s(4, np.int64), f(8)),
    case("STFT", f(2, 20, 1), s(3, np.int64), None, s(8, np.int64)),
    case("STFT", f(2, 20, 1), s(4, np.int64), f(8), s(8, np.int64), onesided=0),
    case("Det", f(2, 3, 3)),
    *(case(op, SMALL) for op in ("ArgMax", "ArgMin")),
    *(case(op, SMALL, axis=-1, keepdims=0) for op in ("ArgMax", "ArgMin")),
    *(case(op, i(3, 9, high=-7), axis=1) for op in ("ArgMax", "ArgMin")),
    *(case(op, i(3, 9, high=-7), axis=1, select_last_index=1, keepdims=0) for op in ("ArgMax", "ArgMin")),
)

NORMALIZATIONS = (
    case("LayerNormalization", SMALL, f(4), f(4)),
    case("LayerNormalization", SMALL, f(4), epsilon=0.1),
    case("LayerNormalization", SMALL, f(3, 4), f(3, 4), axis=1, outputs=3),
    case("LayerNormalization", SMALL, f(4), f(4), axis=-2, **REFERENCE),
    case("LayerNormalization", SMALL, f(1), f(1), **REFERENCE),
    case("LayerNormalization", SMALL, f(4), f(4), outputs=3, axis=-1, version=17),
    case("RMSNormalization", SMALL, f(4), version=23),
    case("RMSNormalization", SMALL, f(3, 4), version=23, axis=1, epsilon=0.1),
    case("BatchNormalization", PICTURE, f(4), f(4), f(4), p(4)),
    case("BatchNormalization", f(3, 5), f(5), f(5), f(5), p(5), epsilon=0.1),
    case("BatchNormalization", f(2, 4, 5), f(4), f(4), f(4), p(4), version=14, momentum=0.5),
    case("BatchNormalization", f(2, 3, 2, 2, 2), f(3), f(3), f(3), p(3), version=11, **RUNTIME),
    case("InstanceNormalization", PICTURE, f(4), f(4)),
    case("InstanceNormalization", f(2, 4, 5), f(4), f(4), epsilon=0.1),
    case("GroupNormalization", f(2, 6, 3, 2), f(6), f(6), version=21, num_groups=3),
    case("GroupNormalization", f(2, 6, 3, 2), f(3), f(3), version=18, num_groups=3),
    case("GroupNormalization", f(2, 6, 3), f(6), f(6), version=21, num_groups=2, epsilon=0.1),
    *(case(op, SMALL) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    *(case(op, SMALL, axis=1) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    *(case(op, SMALL, version=11, **RUNTIME) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    *(case(op, SMALL, version=11, axis=-1, **RUNTIME) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    *(case(op, SMALL, version=11, axis=0, **RUNTIME) for op in ("Softmax", "LogSoftmax", "Hardmax")),
    case("LpNormalization", SMALL),
    case("LpNormalization", SMALL, axis=1, p=1, **RUNTIME),
    case("LpNormalization", np.zeros((2, 3), np.float32), **RUNTIME),
    case("LRN", f(6, 6, 3, 3), size=3),  # the reference evaluator counts samples for channels
    case("LRN", f(6, 6, 3, 3), size=5, alpha=0.2, beta=0.5, bias=2.0),
    case("LRN", f(6, 6, 3, 3), size=4, alpha=0.2, **REFERENCE),
    case("MeanVarianceNormalization", f(2, 3, 4, 4), atol=1e-4),
    case("MeanVarianceNormalization", f(2, 3, 4, 4), axes=[2, 3], atol=1e-4),
)

SAMES = ("SAME_UPPER", "SAME_LOWER")
CONVOLUTIONS = (
    case("Conv", f(2, 4, 9), f(6, 4, 3)),
    case("Conv", f(2, 4, 9), f(6, 2, 3), f(6), group=2, pads=[1, 2], strides=[2]),
    case("Conv", PICTURE, f(5, 4, 3, 2), f(5), dilations=[2, 1], pads=[1, 0, 2, 1]),
    case("Conv", PICTURE, f(8, 1, 3, 3), group=4, kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    case("Conv", PICTURE, f(6, 2, 1, 1), f(6), group=2),
    case("Conv", f(1, 2, 4, 5, 3), f(4, 1, 2, 2, 2), f(4), group=2, pads=[0, 1, 0, 1, 0, 1]),
    *(case("Conv", PICTURE, f(3, 4, 3, 3), auto_pad=mode, strides=[2, 2], **RUNTIME) for mode in SAMES),
    *(case("Conv", PICTURE, f(3, 4, 2, 2), auto_pad=mode, **RUNTIME) for mode in SAMES),
    case("Conv", PICTURE, f(3, 4, 3, 3), auto_pad="VALID", strides=[2, 1]),
    case("ConvTranspose", f(2, 4, 5), f(4, 3, 3), f(3)),
    case("ConvTranspose", f(2, 4, 5), f(4, 3, 3), f(6), group=2, strides=[2], pads=[1, 0], **RUNTIME),
    case("ConvTranspose", PICTURE, f(4, 2, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1]),
    case("ConvTranspose", PICTURE, f(4, 2, 2, 2), f(2), strides=[2, 3], output_padding=[1, 2]),
    case("ConvTranspose", PICTURE, f(4, 1, 3, 3), group=4, dilations=[2, 1], pads=[0, 1, 1, 2], **RUNTIME),
    case("ConvTranspose", f(1, 2, 3, 4, 2), f(2, 3, 2, 2, 2), f(3), strides=[2, 1, 2], pads=[1, 0, 0, 1, 0, 1]),
    *(case("ConvTranspose", PICTURE, f(4, 2, 3, 3), auto_pad=mode, strides=[2, 2], **RUNTIME) for mode in SAMES),
    *(case("ConvTranspose", PICTURE, f(4, 2, 4, 3), auto_pad=mode, **RUNTIME) for mode in SAMES),
    case("ConvTranspose", PICTURE, f(4, 2, 3, 3), strides=[2, 2], output_shape=[15, 14], **RUNTIME),
    case("ConvTranspose", PICTURE, f(4, 2, 3, 3), strides=[2, 2], output_shape=[14, 12], **RUNTIME),
    *(
        case("ConvTranspose", PICTURE, f(4, 2, 3, 3), auto_pad=mode, strides=[2, 2], output_shape=[14, 13], **RUNTIME)
        for mode in SAMES
    ),
)

POOLS = (
    case("MaxPool", f(2, 3, 9), kernel_shape=[3]),
    case("MaxPool", PICTURE, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1]),
    case("MaxPool", PICTURE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    case("MaxPool", PICTURE, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1),
    case("MaxPool", f(1, 2, 6, 6), kernel_shape=[1, 1], strides=[2, 2], ceil_mode=1),
    case("MaxPool", PICTURE, kernel_shape=[2, 2], dilations=[2, 3]),
    case("MaxPool", f(1, 2, 4, 5, 4), kernel_shape=[2, 3, 2], strides=[2, 1, 2]),
    *(case("MaxPool", PICTURE, kernel_shape=[3, 2], strides=[2, 2], auto_pad=mode, **RUNTIME) for mode in SAMES),
    case("MaxPool", PICTURE, kernel_shape=[3, 2], strides=[2, 2], auto_pad="VALID"),
    case("MaxPool", i(1, 2, 5, 5, low=-9, high=9, dtype=np.int8), kernel_shape=[2, 2], pads=[1, 1, 0, 0], **RUNTIME),
    case("AveragePool", f(2, 3, 9), kernel_shape=[3]),
    case("AveragePool", PICTURE, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1]),
    case("AveragePool", PICTURE, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1], count_include_pad=1),
    case("AveragePool", PICTURE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, version=19),
    case("AveragePool", f(1, 2, 6, 6), kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1, pads=[1, 1, 1, 1], version=19),
    case(
        "AveragePool",
        f(1, 2, 6, 6),
        kernel_shape=[3, 3],
        strides=[2, 2],
        ceil_mode=1,
        pads=[1, 1, 1, 1],
        count_include_pad=1,
        version=19,
    ),
    *(case("AveragePool", PICTURE, kernel_shape=[3, 2], strides=[2, 2], auto_pad=mode) for mode in SAMES),
    case("AveragePool", f(1, 2, 4, 5, 4), kernel_shape=[2, 3, 2], strides=[2, 1, 2]),
    case("AveragePool", PICTURE, kernel_shape=[2, 2], dilations=[2, 2], version=19),
    case("LpPool", PICTURE, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1], version=18),
    case("LpPool", f(2, 3, 9), kernel_shape=[2], p=1, version=11, **RUNTIME),
    case("LpPool", PICTURE, kernel_shape=[3, 3], p=3, **RUNTIME),
    *(case("GlobalAveragePool", f(2, 3, *places)) for places in ((5,), (4, 5), (2, 3, 4))),
    case("GlobalMaxPool", f(2, 3, 4, 5)),
    *(case("GlobalMaxPool", f(2, 3, *places), **RUNTIME) for places in ((5,), (2, 3, 4))),
    case("GlobalLpPool", PICTURE, **RUNTIME),
    case("GlobalLpPool", PICTURE, p=1, **RUNTIME),
)

RESIZE_ALL = ("half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel", "half_pixel_symmetric")
FLOORED = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
PADS = (
    case("Pad", f(2, 3), [0, 1, 2, 0]),
    case("Pad", f(2, 3), [0, 1, 2, 0], s(1.5)),
    case("Pad", i(2, 3), [0, 1, 2, 0], s(7, np.int64)),
    case("Pad", f(2, 3, 4), [1, 2], s(0.5), [-1], version=18),
    case("Pad", f(2, 3, 4), [1, 0, 2, 1], None, [2, 0], version=18),
    case("Pad", f(4, 5), [-1, 1, 0, -2], **RUNTIME),
    case("Pad", b(2, 3), [0, 1, 0, 1], s(True, bool)),
    *(case("Pad", f(4, 5), [1, 2, 3, 0], mode=mode) for mode in ("edge", "reflect")),
    case("Pad", f(4, 5), [1, 2, 3, 0], mode="wrap", version=19),
    case("Pad", f(2, 3), [0, 4, 0, 5], mode="wrap", version=19),
    case("Pad", f(1, 2, 4, 5), [0, 0, 1, 2, 0, 0, 2, 1], mode="reflect", version=13),
)

RESIZES = (
    *(
        case("Resize", PICTURE, None, None, [2, 4, 9, 11], mode="nearest", nearest_mode=how, **{MODE: "asymmetric"})
        for MODE in ("coordinate_transformation_mode",)
        for how in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    ),
    *(
        case(
            "Resize",
            PICTURE,
            None,
            r(1, 1, 2, 1.5),
            mode=mode,
            coordinate_transformation_mode=how,
            atol=1e-4,
            version=19,
        )
        for mode in ("nearest", "linear", "cubic")
        for how in RESIZE_ALL
    ),
    *(
        case("Resize", PICTURE, None, None, [2, 4, 3, 4], mode=mode, coordinate_transformation_mode=how, atol=1e-4)
        for mode in ("linear", "cubic")
        for how in RESIZE_ALL[:4]
    ),
    case("Resize", PICTURE, None, r(1, 1, 0.6, 0.6), mode="linear", atol=1e-4, version=13),
    case("Resize", PICTURE, None, r(1, 1, 2.3, 2.3), mode="cubic", cubic_coeff_a=-0.5, atol=1e-4),
    case("Resize", PICTURE, None, r(1, 1, 2, 2), mode="cubic", exclude_outside=1, atol=1e-4),
    case("Resize", PICTURE, r(), r(1, 1, 2, 2), mode="nearest", version=11, **FLOORED, **RUNTIME),
    case("Resize", PICTURE, None, r(2, 3), mode="linear", axes=[2, 3], version=18, **REFERENCE),
    case("Resize", PICTURE, None, r(2, 3), mode="nearest", axes=[2, 3], version=18),
    case("Resize", PICTURE, None, None, [5, 9], mode="nearest", axes=[-2, -1], version=19, **RUNTIME),
    case(
        "Resize",
        PICTURE,
        r(),
        r(),
        [2, 4, 14, 18],
        version=11,
        **RUNTIME,
        mode="linear",
        **{"coordinate_transformation_mode": "pytorch_half_pixel"},
    ),
    *(
        case(
            "Resize",
            PICTURE,
            None,
            None,
            [14, 18],
            axes=[2, 3],
            keep_aspect_ratio_policy=how,
            mode="nearest",
            version=18,
        )
        for how in ("not_larger", "not_smaller")
    ),
    *(
        case("Resize", PICTURE, None, r(1, 1, 0.5, 0.4), mode=mode, antialias=1, version=18, atol=1e-4)
        for mode in ("linear", "cubic")
    ),
    case("Upsample", PICTURE, r(1, 1, 2, 2), version=9, mode="nearest", **RUNTIME),
    case("Upsample", PICTURE, r(1, 1, 2, 3), version=9, mode="linear", **RUNTIME),
)

HIDDEN = {"hidden_size": 4}
LAYERS = tuple(
    case(
        op,
        f(5, 2, 3),
        f(ways, gates * 4, 3),
        f(ways, gates * 4, 4),
        *more,
        outputs=outputs,
        **HIDDEN,
        **form,
        **RUNTIME,
    )
    for op, gates, outputs in (("LSTM", 4, 3), ("GRU", 3, 2), ("RNN", 1, 2))
    for ways, more, form in (
        (1, (), {}),
        (1, (f(1, gates * 8),), {"direction": "reverse"}),
        (2, (f(2, gates * 8), np.array([3, 5], np.int32)), {"direction": "bidirectional"}),
        (1, (None, None, *(f(1, 2, 4) for _ in range(outputs - 1))), {}),
    )
)
RECURRENT = (
    *LAYERS,
    case("GRU", f(5, 2, 3), f(1, 12, 3), f(1, 12, 4), f(1, 24), outputs=2, linear_before_reset=1, **HIDDEN, **RUNTIME),
    case("RNN", f(5, 2, 3), f(1, 4, 3), f(1, 4, 4), outputs=2, activations=["Relu"], **HIDDEN, **RUNTIME),
    case("LSTM", f(2, 5, 3), f(1, 16, 3), f(1, 16, 4), outputs=3, layout=1, **HIDDEN, **REFERENCE),
)

BOXES = RNG.uniform(0, 1, (2, 9, 4)).astype(np.float32)
DETECTION = (
    case("NonMaxSuppression", BOXES, p(2, 3, 9), [3], r(0.2), r(0.3)),
    case("NonMaxSuppression", BOXES, p(2, 3, 9), [9], r(0.5)),
    case("NonMaxSuppression", BOXES, p(2, 1, 9), s(4, np.int64), s(0.4), s(0.5), center_point_box=1, **RUNTIME),
    case("NonMaxSuppression", BOXES, p(2, 1, 9), **RUNTIME),
)

GRID = RNG.uniform(-1.3, 1.3, (2, 3, 5, 2)).astype(np.float32)
SAMPLES = (
    *(
        case("GridSample", PICTURE, GRID, mode=mode, padding_mode=outside, align_corners=corners, atol=1e-4, **RUNTIME)
        for mode in ("linear", "nearest", "cubic")
        for outside in ("zeros", "border", "reflection")
        for corners in (0, 1)
    ),
    case("GridSample", PICTURE, GRID, mode="bilinear", version=16, **RUNTIME),
    case("GridSample", PICTURE, GRID, mode="bicubic", version=16, atol=1e-4, **RUNTIME),
    case("GridSample", f(1, 2, 3, 4, 3), RNG.uniform(-1, 1, (1, 2, 3, 2, 3)).astype(np.float32), mode="linear"),
    case("AffineGrid", f(2, 2, 3), [2, 3, 4, 5]),
    case("AffineGrid", f(2, 2, 3), [2, 3, 4, 5], align_corners=1),
    case("AffineGrid", f(2, 3, 4), [2, 3, 2, 4, 5]),
    case("Col2Im", f(2, 12, 8), [4, 5], [2, 2], strides=[2, 1]),
    case("Col2Im", f(2, 6, 9), [5, 5], [1, 3], dilations=[1, 2], pads=[0, 1, 0, 1], strides=[2, 1]),
    *(case("DepthToSpace", f(2, 12, 2, 3), blocksize=2, mode=mode) for mode in ("DCR", "CRD")),
    case("SpaceToDepth", f(2, 3, 4, 6), blocksize=2),
)

CASES = (
    *ELEMENTWISE,
    *PRODUCTS,
    *SHAPES,
    *SELECTIONS,
    *REDUCTIONS,
    *NORMALIZATIONS,
    *CONVOLUTIONS,
    *POOLS,
    *PADS,
    *RESIZES,
    *SAMPLES,
    *RECURRENT,
    *DETECTION,
)


def tensors(case: Case, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """Inputs of a row; real numbers of another type if asked for, numbers such as scales aside."""
    numbers = rows()["", case.op].numbers
    found: list[Tensor | None] = []
    for place, feed in enumerate(case.feeds):
        tensor = None if feed is None else torch.from_numpy(np.array(feed))
        real = tensor is not None and dtype is not None and tensor.is_floating_point() and place not in numbers
        found.append(tensor.to(dtype) if real and tensor is not None else tensor)
    return found


def checked(case: Case) -> Any:
    return model_of(case.op, case.feeds, **case.form)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_computes_what_others_compute(case: Case) -> None:
    model, given = checked(case), tensors(case)
    before = [None if tensor is None else tensor.clone() for tensor in given]
    got = ours(model, given)
    for judge in (runtime, reference):
        if case.judges not in (judge.__name__, "both"):
            continue
        for value, right in zip(got, judge(model, case.feeds), strict=True):
            assert value is not None
            assert value.numpy().dtype == right.dtype, judge.__name__
            assert tuple(value.shape) == right.shape, judge.__name__
            np.testing.assert_allclose(value.numpy(), right, rtol=1e-4, atol=case.atol, err_msg=judge.__name__)
    for tensor, old in zip(given, before, strict=True):
        assert tensor is old is None or torch.equal(tensor.nan_to_num(), old.nan_to_num())  # type: ignore[union-attr]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_knows_shapes_without_computing(case: Case) -> None:
    model, given = checked(case), tensors(case)
    feeds = {f"in{place}": tensor for place, tensor in enumerate(given) if tensor is not None}
    for place in rows()["", case.op].numbers:
        name = f"in{place}"
        if name in feeds:
            model.graph.initializer.append(numpy_helper.from_array(feeds.pop(name).numpy(), name))
            model.graph.input.remove(next(value for value in model.graph.input if value.name == name))
    network = Network(ir.from_proto(model), "a test")
    found = shapes_of(network, feeds)
    if case.op in NOT_BY_NUMBERS and found.problems:
        return
    assert not found.problems
    for name, value in zip(network.nodes[0].outputs, ours(model, given), strict=True):
        assert value is not None
        assert (found.tensors[name].shape, found.tensors[name].dtype) == (value.shape, value.dtype)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if any(feed is not None and feed.dtype == np.float32 for feed in case.feeds)],
    ids=str,
)
def test_a_row_computes_in_double_precision_and_is_differentiable(case: Case) -> None:
    model = checked(case)
    given = tensors(case, torch.float64)
    watched = [x.requires_grad_() for x in given[:3] if x is not None and x.dtype is torch.float64]
    got = ours(model, given)
    for value, single in zip(got, ours(model, tensors(case)), strict=True):
        assert value is not None
        assert single is not None
        if value.is_floating_point() and case.op not in ("Cast", "Range"):
            assert value.dtype is torch.float64
        np.testing.assert_allclose(value.detach().numpy(), single.numpy(), rtol=1e-3, atol=1e-4)
    real = [value for value in got if value is not None and value.is_floating_point()]
    if real and watched and case.op not in CONSTANT:
        gradients = torch.autograd.grad(real[0].sum(), watched, allow_unused=True)
        assert gradients[0] is not None


def refuses(row: Row) -> bool:
    """Whether a row only says why it cannot be followed."""
    try:
        row.compute()
    except Unsupported:
        return True
    except TypeError:
        return False
    return False


def test_every_row_has_a_case() -> None:
    words = "".join(path.read_text() for pattern in OTHER_FILES for path in sorted(Path(__file__).parent.glob(pattern)))
    tested = {case.op for case in CASES}
    missing = [
        f"{domain or 'onnx'}.{name}"
        for (domain, name), row in rows().items()
        if not refuses(row) and f'"{name}"' not in words and (domain or name not in tested)
    ]
    assert not missing, f"no case for {missing}: add a line above, or a test in a file of their family"
