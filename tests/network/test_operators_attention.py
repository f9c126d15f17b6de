"""Attention operators compute what ONNX Runtime and onnx's reference compute, form by form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from optin_deploy.network.graph import Network
from optin_deploy.network.operators import rows
from optin_deploy.network.operators.row import Unsupported
from support.one_node import model_of, ours, runtime, same

BATCH, LENGTH, INNER, HEADS, WIDTH = 2, 5, 6, 3, 4
MICROSOFT = {"domain": "com.microsoft"}
Form = dict[str, Any]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def real(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def zeros_and_ones(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.random(shape) > 0.4).astype(np.int32)


def lengths(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def projected(rng: np.random.Generator) -> list[np.ndarray | None]:
    merged = 3 * HEADS * WIDTH
    return [real(rng, BATCH, LENGTH, INNER), real(rng, INNER, merged), real(rng, merged)]


@pytest.mark.parametrize(
    ("mask", "form"),
    [
        (None, {}),
        (lengths(3, 5), {}),
        (lengths(5, 4, 1, 0), {}),
        ((BATCH, LENGTH), {"unidirectional": 1}),
        ((BATCH, LENGTH, LENGTH), {}),
        ((BATCH, LENGTH, LENGTH), {"unidirectional": 1, "mask_filter_value": -50.0, "scale": 0.3}),
    ],
)
@pytest.mark.parametrize("added", [None, (BATCH, HEADS), (1, HEADS), (1, 1)])
def test_attention_with_its_projections(rng: np.random.Generator, mask: Any, form: Form, added: Any) -> None:
    feeds = projected(rng)
    feeds.append(zeros_and_ones(rng, *mask) if isinstance(mask, tuple) else mask)
    feeds += [None, None if added is None else real(rng, *added, LENGTH, LENGTH)]
    same("Attention", feeds, num_heads=HEADS, **form, **MICROSOFT)


def test_attention_with_narrower_values(rng: np.random.Generator) -> None:
    wide, narrow = HEADS * WIDTH, HEADS * 2
    feeds = [real(rng, BATCH, LENGTH, INNER), real(rng, INNER, 2 * wide + narrow), real(rng, 2 * wide + narrow)]
    same("Attention", feeds, num_heads=HEADS, qkv_hidden_sizes=[wide, wide, narrow], **MICROSOFT)


@pytest.mark.parametrize("form", [{}, {"unidirectional": 1}])
def test_attention_with_a_past(rng: np.random.Generator, form: Form) -> None:
    mask, past = zeros_and_ones(rng, BATCH, LENGTH + 3), real(rng, 2, BATCH, HEADS, 3, WIDTH)
    same("Attention", [*projected(rng), mask, past], num_heads=HEADS, outputs=2, **form, **MICROSOFT)
    same("Attention", projected(rng), num_heads=HEADS, outputs=2, **form, **MICROSOFT)


def test_a_mask_over_the_longest_length_is_that_of_the_rows_at_hand(rng: np.random.Generator) -> None:
    """ONNX Runtime computes this form on GPUs only, so the mask of the right size is the judge."""
    feeds, longest = projected(rng), zeros_and_ones(rng, BATCH, 1, 9, 9)
    wide = model_of("Attention", [*feeds, longest], num_heads=HEADS, **MICROSOFT)
    cut = np.ascontiguousarray(longest[:, 0, :LENGTH, :LENGTH])
    right = runtime(model_of("Attention", [*feeds, cut], num_heads=HEADS, **MICROSOFT), [*feeds, cut])
    got = ours(wide, [torch.from_numpy(feed) for feed in (*feeds, longest) if feed is not None])
    np.testing.assert_allclose(got[0], right[0], atol=1e-5)


def merged(rng: np.random.Generator, length: int, width: int = WIDTH) -> np.ndarray:
    return real(rng, BATCH, length, HEADS * width)


@pytest.mark.parametrize("form", [{}, {"unidirectional": 1}, {"scale": 0.2}])
def test_multi_head_attention(rng: np.random.Generator, form: Form) -> None:
    same("MultiHeadAttention", [merged(rng, LENGTH) for _ in range(3)], num_heads=HEADS, outputs=3, **form, **MICROSOFT)


@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention_across(rng: np.random.Generator, bias: bool) -> None:
    feeds: list[np.ndarray | None] = [merged(rng, LENGTH), merged(rng, 7), merged(rng, 7, 2)]
    same("MultiHeadAttention", [*feeds, real(rng, HEADS * 10) if bias else None], num_heads=HEADS, **MICROSOFT)
    whole = [merged(rng, LENGTH), real(rng, BATCH, HEADS, 7, WIDTH), real(rng, BATCH, HEADS, 7, WIDTH)]
    same("MultiHeadAttention", whole, num_heads=HEADS, **MICROSOFT)


@pytest.mark.parametrize("mask", [lengths(3, 7), (BATCH, 7), (BATCH, LENGTH, 7)])
def test_multi_head_attention_with_masks(rng: np.random.Generator, mask: Any) -> None:
    given = zeros_and_ones(rng, *mask) if isinstance(mask, tuple) else mask
    feeds = [merged(rng, LENGTH), merged(rng, 7), merged(rng, 7), None, given, real(rng, 1, HEADS, LENGTH, 7)]
    same("MultiHeadAttention", feeds, num_heads=HEADS, **MICROSOFT)


def test_multi_head_attention_with_a_past(rng: np.random.Generator) -> None:
    past = [real(rng, BATCH, HEADS, 2, WIDTH) for _ in range(2)]
    feeds = [*(merged(rng, LENGTH) for _ in range(3)), real(rng, 3 * HEADS * WIDTH), None, None, *past]
    same("MultiHeadAttention", feeds, num_heads=HEADS, outputs=3, unidirectional=1, **MICROSOFT)


def test_packed_queries_keys_and_values_are_the_same_side_by_side(rng: np.random.Generator) -> None:
    """ONNX Runtime computes packed forms on GPUs only, so the separate form is the judge."""
    parts = [real(rng, BATCH, LENGTH, HEADS, WIDTH) for _ in range(3)]
    flat = [part.reshape(BATCH, LENGTH, -1) for part in parts]
    right = runtime(model_of("MultiHeadAttention", flat, num_heads=HEADS, **MICROSOFT), flat)[0]
    for feeds in ([np.stack(parts, 3)], [flat[0], np.stack(parts[1:], 3)]):
        model = model_of("MultiHeadAttention", feeds, num_heads=HEADS, **MICROSOFT)
        np.testing.assert_allclose(ours(model, [torch.from_numpy(feed) for feed in feeds])[0], right, atol=1e-5)


def grouped(rng: np.random.Generator, length: int, past: int | None, total: int, last: tuple[int, ...]) -> list[Any]:
    heads, groups, width = 4, 2, 16
    feeds = [real(rng, BATCH, length, heads * width), *(real(rng, BATCH, length, groups * width) for _ in range(2))]
    before = [None, None] if past is None else [real(rng, BATCH, groups, past, width) for _ in range(2)]
    return [*feeds, *before, lengths(*last), lengths(total)]


GROUPED: Form = {"num_heads": 4, "kv_num_heads": 2, "outputs": 3, **MICROSOFT}


@pytest.mark.parametrize(
    "form",
    [{}, {"local_window_size": 2}, {"softcap": 2.0, "scale": 0.5}, {"smooth_softmax": 1}, {"causal": 0}],
)
def test_group_query_attention_of_a_prompt(rng: np.random.Generator, form: Form) -> None:
    same("GroupQueryAttention", grouped(rng, 5, None, 5, (4, 4)), **GROUPED, **form)
    same("GroupQueryAttention", grouped(rng, 5, 0, 5, (4, 2)), **GROUPED, **form)
    feeds = grouped(rng, 5, None, 5, (4, 4))
    packed = [np.concatenate(feeds[:3], 2), None, None, *feeds[3:]]
    same("GroupQueryAttention", packed, **GROUPED, **form)


@pytest.mark.parametrize("form", [{}, {"local_window_size": 3}])
def test_group_query_attention_of_one_more_token(rng: np.random.Generator, form: Form) -> None:
    same("GroupQueryAttention", grouped(rng, 1, 6, 7, (6, 6)), **GROUPED, **form)
    # What lies behind the real tokens of a cache is nobody's.
    same("GroupQueryAttention", grouped(rng, 1, 6, 7, (6, 4)), compare=1, **GROUPED, **form)
    same("GroupQueryAttention", grouped(rng, 1, 9, 7, (6, 6)), compare=1, **GROUPED, **form)


def test_group_query_attention_rotates(rng: np.random.Generator) -> None:
    angles = [real(rng, 16, 8), real(rng, 16, 8)]
    same("GroupQueryAttention", [*grouped(rng, 5, None, 5, (4, 4)), *angles], do_rotary=1, **GROUPED)
    one = [*grouped(rng, 1, 6, 7, (6, 4)), *angles]
    same("GroupQueryAttention", one, compare=1, do_rotary=1, rotary_interleaved=1, **GROUPED)
    placed = [*grouped(rng, 1, 6, 7, (6, 6)), *angles, np.array([[3], [2]])]
    same("GroupQueryAttention", placed, do_rotary=1, **GROUPED)


def test_group_query_attention_with_a_bias_and_a_sink(rng: np.random.Generator) -> None:
    feeds = [*grouped(rng, 5, None, 5, (4, 4)), None, None, None]
    same("GroupQueryAttention", [*feeds, real(rng, 1, 4, 5, 5)], **GROUPED)
    same("GroupQueryAttention", [*feeds, None, real(rng, 4)], **GROUPED)
    for shown in (1, 2):
        same("GroupQueryAttention", feeds[:7], **{**GROUPED, "outputs": 4, "causal": 0, "qk_output": shown})


def query_key_value(rng: np.random.Generator, *, heads: int = HEADS, groups: int = HEADS, keys: int = 7) -> list[Any]:
    shapes = ((heads, LENGTH, WIDTH), (groups, keys, WIDTH), (groups, keys, WIDTH))
    return [real(rng, BATCH, *shape) for shape in shapes]


BOTH: Form = {"version": 23, "judges": "both"}


def test_attention_of_onnx(rng: np.random.Generator) -> None:
    same("Attention", query_key_value(rng), **BOTH)
    same("Attention", query_key_value(rng, heads=4, groups=2), scale=0.4, **BOTH)
    same("Attention", query_key_value(rng, keys=LENGTH), is_causal=1, **BOTH)
    flat = [real(rng, BATCH, LENGTH, 4 * WIDTH), real(rng, BATCH, 7, 2 * WIDTH), real(rng, BATCH, 7, 2 * 3)]
    same("Attention", flat, q_num_heads=4, kv_num_heads=2, **BOTH)


@pytest.mark.parametrize(
    ("shape", "judges"), [((LENGTH, 7), "both"), ((BATCH, 1, LENGTH, 7), "both"), ((1, HEADS, 1, 7), "reference")]
)
def test_attention_of_onnx_with_added_masks(rng: np.random.Generator, shape: tuple[int, ...], judges: str) -> None:
    same("Attention", [*query_key_value(rng), real(rng, *shape)], softcap=1.5, version=23, judges=judges)


def test_a_query_of_onnx_that_may_see_nothing_gives_zeros(rng: np.random.Generator) -> None:
    mask = rng.random((LENGTH, LENGTH)) > 0.4
    mask[2] = False
    out = same("Attention", [*query_key_value(rng, keys=LENGTH), mask], is_causal=1, **BOTH)[0]
    assert not out[:, :, 2].any()


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_attention_of_onnx_shows_its_scores(rng: np.random.Generator, mode: int) -> None:
    feeds = [*query_key_value(rng), real(rng, LENGTH, 7)]
    same("Attention", feeds, softcap=1.5, qk_matmul_output_mode=mode, outputs=4, version=23)


def test_attention_of_onnx_with_a_past(rng: np.random.Generator) -> None:
    past = [real(rng, BATCH, HEADS, 4, WIDTH) for _ in range(2)]
    feeds = [*query_key_value(rng, keys=LENGTH), None, *past]
    same("Attention", feeds, is_causal=1, outputs=3, **BOTH)


@pytest.mark.parametrize("form", [{}, {"is_causal": 1}])
def test_attention_of_onnx_with_lengths(rng: np.random.Generator, form: Form) -> None:
    same("Attention", [*query_key_value(rng), None, None, None, np.array([7, 6])], **{**BOTH, "version": 24}, **form)
    short = [*query_key_value(rng), real(rng, LENGTH, 5), None, None, np.array([4, 5])]
    same("Attention", short, version=24, judges="reference", **form)


@pytest.mark.parametrize(
    "form", [{"is_causal": 1, "left_window_size": 2}, {"left_window_size": 2, "right_window_size": 1}]
)
def test_attention_of_onnx_in_windows(rng: np.random.Generator, form: Form) -> None:
    same("Attention", query_key_value(rng, keys=LENGTH), version=26, judges="reference", **form)


def test_attention_of_half_precision_weighs_in_single_precision(rng: np.random.Generator) -> None:
    feeds = [feed.astype(np.float16) for feed in query_key_value(rng)]
    same("Attention", feeds, softmax_precision=1, atol=2e-3, **BOTH)


def test_rotations(rng: np.random.Generator) -> None:
    places, angles = rng.integers(0, 9, (BATCH, LENGTH)), [real(rng, 9, 4), real(rng, 9, 4)]
    split, flat = real(rng, BATCH, HEADS, LENGTH, 8), real(rng, BATCH, LENGTH, HEADS * 8)
    direct, few = [real(rng, BATCH, LENGTH, 4) for _ in range(2)], [real(rng, 9, 2) for _ in range(2)]
    same("RotaryEmbedding", [split, *angles, places], **BOTH)
    same("RotaryEmbedding", [flat, *angles, places], num_heads=HEADS, interleaved=1, **BOTH)
    same("RotaryEmbedding", [flat, *direct], num_heads=HEADS, **BOTH)
    same("RotaryEmbedding", [split, *few, places], rotary_embedding_dim=4, **BOTH)
    same("RotaryEmbedding", [flat, places, *angles], **MICROSOFT)
    same("RotaryEmbedding", [flat, np.array([2]), *angles], interleaved=1, **MICROSOFT)
    same("RotaryEmbedding", [split, places, *angles], **MICROSOFT)
    same("RotaryEmbedding", [flat, places, *few], num_heads=HEADS, rotary_embedding_dim=4, **MICROSOFT)


def test_gradients_reach_what_attention_reads_even_where_nothing_may_be_seen(rng: np.random.Generator) -> None:
    mask = np.zeros((LENGTH, 7), bool)
    mask[1:, :3] = True
    feeds = [*query_key_value(rng), mask]
    tensors = [torch.from_numpy(feed).requires_grad_(feed.dtype.kind == "f") for feed in feeds]
    out = ours(model_of("Attention", feeds, version=23), tensors)[0]
    assert out is not None
    out.sum().backward()
    for tensor in tensors[:3]:
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
    assert tensors[2].grad is not None
    assert tensors[2].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("op", "form"),
    [
        ("Attention", {"do_rotary": 1}),
        ("GroupQueryAttention", {"sliding_window_cache": 1}),
        ("RotaryEmbedding", {"scale": 2.0}),
    ],
)
def test_forms_that_are_not_known_are_refused_by_name(op: str, form: Form, rng: np.random.Generator) -> None:
    feeds = {
        "Attention": projected(rng),
        "GroupQueryAttention": grouped(rng, 5, None, 5, (4, 4)),
        "RotaryEmbedding": [real(rng, BATCH, LENGTH, 8), np.array([0]), real(rng, 9, 4), real(rng, 9, 4)],
    }[op]
    sizes = {"num_heads": 4, "kv_num_heads": 2} if op.startswith("Group") else {"num_heads": HEADS}
    (node,) = Network(ir.from_proto(model_of(op, feeds, **sizes, **form, **MICROSOFT)), "a test").nodes
    tensors = [None if feed is None else torch.from_numpy(feed) for feed in feeds]
    with pytest.raises(Unsupported, match=f"{op} with {next(iter(form))}"):
        rows()[node.domain, node.op].compute(node, *tensors)
