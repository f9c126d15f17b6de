"""What must be found in each family, written by hand from its config and modeling code, not from what finders say.

A group is an axis that lies on a weight, that a product contracts with a weight or with another activation, and that
nothing keeps whole: no LayerNorm, softmax, reduction, input or output. So the residual stream of every transformer is
whole, and with it what projects into it: patch embeddings, projections of features, factorised embeddings. Residual
streams of convolutional networks under BatchNorm are groups, one a stage.

A table of biases by distance that all layers read does not tie their heads, and rotations do not tie their widths:
each layer takes its own part. What follows from weights alone, such as the network that makes Swin v2's biases, costs
nothing once it is folded and is no group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """Groups of one kind and size."""

    kind: str
    """`heads`, `groups` (of keys and values that several queries share), `queries` (in each such group), `neurons`,
    `channels`, `qk-width` (of a head in queries and keys, or of any two activations that are compared), `v-width`."""
    units: int
    groups: int


def attention(blocks: int, heads: int = 6, width: int = 8) -> tuple[Expected, ...]:
    """Plain attention: heads, and how wide each is."""
    return (Expected("heads", heads, blocks), *widths(blocks, width, width))


def grouped(blocks: int, groups: int, queries: int, width: int = 8) -> tuple[Expected, ...]:
    """Attention with keys and values that several queries share, rotated: q and k lose entries i and i + width / 2."""
    shared = Expected("groups", groups, blocks), Expected("queries", queries, blocks)
    return (*shared, *widths(blocks, width // 2, width))


def widths(blocks: int, qk: int, v: int) -> tuple[Expected, ...]:
    """Widths of heads."""
    return Expected("qk-width", qk, blocks), Expected("v-width", v, blocks)


def neurons(layers: Mapping[int, int]) -> tuple[Expected, ...]:
    """How many hidden layers there are of each width."""
    return tuple(Expected("neurons", units, groups) for units, groups in layers.items())


def channels(layers: Mapping[int, int]) -> tuple[Expected, ...]:
    """How many groups of channels there are of each number."""
    return tuple(Expected("channels", units, groups) for units, groups in layers.items())


ENCODER = (*attention(2), *neurons({80: 2}))
CLASSIFIER = (*ENCODER, *neurons({48: 1}))
"""Groups of a network with a pooler or a dense layer before the classifier, after which no LayerNorm comes."""

EXPECTED: Mapping[str, tuple[Expected, ...]] = {
    "bert": CLASSIFIER,
    "roberta": CLASSIFIER,
    "distilbert": CLASSIFIER,
    "electra": CLASSIFIER,
    # One block's weights serve both layers; the pooler is there once as well.
    "albert": (*attention(1), *neurons({80: 1, 48: 1})),
    "mpnet": CLASSIFIER,
    # Positions go through the same query and key projections, so they share heads and width with the content.
    "deberta-v2": CLASSIFIER,
    # One axis of the fused weight runs over q, k and v, (3, heads, width), so they lose the same entries of a head,
    # and rotation ties entries i and i + 4. The prediction head ends in a LayerNorm.
    "modernbert": (Expected("heads", 6, 3), Expected("qk-width", 4, 3), *neurons({80: 3})),
    "gpt2": ENCODER,
    # Fused by head, (heads, q + k + v); 8 of the 16 entries of q and k are rotated (4 pairs), 8 are not.
    "gpt-neox": (
        Expected("heads", 6, 2),
        Expected("qk-width", 4, 2),
        Expected("qk-width", 8, 2),
        Expected("v-width", 16, 2),
        *neurons({80: 2}),
    ),
    "llama": (*grouped(2, groups=3, queries=2), *neurons({80: 2})),
    "qwen2": (*grouped(2, groups=2, queries=3), *neurons({80: 2})),
    "phi-3": (*grouped(2, groups=3, queries=2), *neurons({80: 2})),
    # Slopes by distance go with their heads. Fused by head, (heads, 3, width): q, k and v lose the same entries.
    "bloom": (Expected("heads", 6, 2), Expected("qk-width", 8, 2), *neurons({192: 2})),
    "mpt": (*attention(2), *neurons({192: 2})),
    # One key and one value for all heads, fused with the queries, (heads + 2, width); rotated.
    "falcon": (Expected("heads", 6, 2), Expected("qk-width", 4, 2), *neurons({192: 2})),
    "t5-encoder": ENCODER,
    # Attention to the tokens and to the encoder in each layer; the latter's biases are zeros that all layers share.
    "t5-decoder": (*attention(4), *neurons({80: 2})),
    "bart": (*attention(6), *neurons({80: 2, 88: 2})),
    # The second convolution's channels are the residual stream, the first one's are free.
    "whisper-encoder": (*ENCODER, *channels({48: 1})),
    "whisper-decoder": (*attention(4), *neurons({80: 2})),
    "vit": ENCODER,
    "deit": ENCODER,
    "dinov2": (*attention(2), *neurons({96: 2})),
    # Two thirds of 96.
    "dinov2-swiglu": (*attention(2), *neurons({64: 2})),
    "beit": ENCODER,
    "clip-text": ENCODER,
    "clip-vision": ENCODER,
    # Pooling by attention: q is apart, one axis of the fused weight runs over k and v, (2, heads x width).
    "siglip": (Expected("heads", 6, 3), Expected("qk-width", 8, 3), Expected("v-width", 8, 2), *neurons({80: 3})),
    "swin": (*attention(2, heads=3), *attention(2, heads=6), *neurons({96: 2, 192: 2})),
    # Queries and keys are divided by their lengths: their width is whole.
    "swin2": (Expected("heads", 3, 2), Expected("heads", 6, 2), Expected("v-width", 8, 4), *neurons({96: 2, 192: 2})),
    # The first stage has one head. FFNs with a depthwise convolution inside; in the decoder each stage is projected to
    # 40 channels, which one convolution fuses, and that one's 40 are classified.
    "segformer": (
        *(Expected("heads", heads, 1) for heads in (2, 3, 4)),
        *widths(4, 16, 16),
        *neurons({64: 1, 128: 1, 192: 1, 256: 1}),
        *channels({40: 5}),
    ),
    # Stem 8; expansions by 4 of 8, 16, 24 (twice, with a residual over 24), 24, 32 and 40; between them 16 and 24. In
    # each of the three MobileViT layers its input, the local convolution, the projection back and the fusion; at the
    # end 64. The transformers have 2, 4 and 3 layers with 4 heads.
    "mobilevit": (
        *channels({8: 1, 32: 5, 16: 1, 64: 2, 96: 3, 24: 1, 128: 1, 40: 4, 160: 1, 48: 4}),
        *attention(2, heads=4, width=6),
        *attention(4, heads=4, width=8),
        *attention(3, heads=4, width=10),
        *neurons({48: 2, 64: 4, 80: 3}),
    ),
    # Swin with 3, 6, 12 and 24 heads. Two layers of deformable attention: heads (of values, offsets and weights alike)
    # and width of values. A 3 x 3 convolution under GroupNorm keeps or loses whole norm groups, 32 of 2 channels. Two
    # decoder layers, each with attention to pixels and among queries; the former's mask is one a layer. Queries and
    # pixels are compared over 56 features, which the two hidden layers of the mask embedding lead to.
    "mask2former": (
        *(Expected("heads", heads, blocks) for heads, blocks in ((3, 2), (6, 1), (12, 1), (24, 1))),
        *widths(5, 8, 8),
        *neurons({96: 2, 192: 1, 384: 1, 768: 1}),
        Expected("heads", 8, 2),
        Expected("v-width", 8, 2),
        *neurons({80: 2}),
        *channels({32: 1}),
        *attention(4, heads=8),
        *neurons({72: 2}),
        Expected("qk-width", 56, 1),
        *neurons({64: 2}),
    ),
    # A ResNet of two bottlenecks, six blocks of attention, and two hidden layers that lead to boxes.
    "detr": (
        *channels({16: 1, 8: 2, 32: 1, 10: 2, 40: 1}),
        *attention(6),
        *neurons({80: 2, 88: 2, 48: 2}),
    ),
    # Backbone: stem 8, 8, 16, then inside and at the end of each stage. Hybrid encoder: 48 channels of the two lower
    # projections, of two lateral convolutions and two downsamplings, of the four fusions, and of the memory, to which
    # three projections lead; 24 in each fusion: its first convolution, two blocks, and the last block with the bypass.
    # Decoder: heads and width of values in deformable attention; boxes of the encoder and of two layers, two hidden
    # layers each; one network for the positions of queries.
    "rt-detr": (
        *channels({8: 2, 16: 3, 20: 2, 28: 2, 36: 2, 48: 11, 24: 16}),
        *attention(3),
        Expected("heads", 6, 2),
        Expected("v-width", 8, 2),
        *neurons({80: 1, 88: 2, 48: 6, 96: 1}),
    ),
    # Stem; two inside each of four bottlenecks; one stream a stage.
    "resnet": channels({16: 1, 8: 4, 32: 1, 10: 4, 40: 1}),
    # Widths are quartered, at least 8: stem 8 and 8, then streams of 8 and 8 (strides part them), 16, 24, 40 and 80;
    # each of 16 blocks expands by 6; the last convolution has 1280.
    "mobilenet-v2": channels({8: 4, 16: 1, 24: 1, 40: 1, 80: 1, 1280: 1, 48: 6, 96: 4, 144: 3, 240: 3}),
    # Stem 16, streams of 16, 24 and 40, expansions by 4 (the first block has none), the last 640; inside each block the
    # bottleneck of squeeze-and-excite, a quarter of the block's input. Its outer channels are those that it scales.
    "efficientnet": channels({16: 2, 24: 1, 40: 1, 64: 1, 96: 2, 160: 1, 640: 1, 4: 2, 6: 2, 10: 1}),
    # Streams are under LayerNorm, also in the downsamplings.
    "convnext": neurons({64: 1, 96: 1, 128: 2, 160: 1}),
}


UNTIED: Mapping[tuple[str, str], tuple[Expected, ...]] = {
    # The exporter transposes a weight at each of its uses, and the file holds as many copies, which may be cut apart.
    ("albert", "dynamo"): (*attention(1), *neurons({80: 1})),
    ("mask2former", "dynamo"): neurons({64: 4}),
    # What the first decoder layer's queries and keys see are learned positions alone, of which each layer takes its own
    # part: their 48 entries are free there.
    ("detr", "dynamo"): neurons({48: 1}),
    ("detr", "torchscript"): neurons({48: 1}),
    ("mask2former", "torchscript"): neurons({64: 1}),
}
"""Groups that a file of one exporter has besides."""


WHOLE_BLOCKS: Mapping[str, tuple[Expected, ...]] = {
    # Blocks of 16 along the axis that is contracted share a scale: two heads of 8 each, 16 neurons. The width of values
    # lies inside a block; that of queries and keys is never contracted with a weight of few bits. The pooler is no
    # product that is stored so.
    "bert": (Expected("heads", 3, 2), Expected("qk-width", 8, 2), *neurons({5: 2, 48: 1})),
    "vit": (Expected("heads", 3, 2), Expected("qk-width", 8, 2), *neurons({5: 2})),
    # Both queries of one group of keys and values are one block: they stay or go with it, as heads do.
    "llama": (Expected("heads", 3, 2), Expected("qk-width", 4, 2), *neurons({5: 2})),
    # 24 is one block and a half.
    "swin": (Expected("heads", 3, 2), Expected("qk-width", 8, 4), *neurons({6: 2, 12: 2})),
}
"""Groups of weights in 4 bits, by family."""
WHOLE_BYTES: Mapping[str, tuple[Expected, ...]] = {
    # Zero points of two blocks share a byte: three and five blocks are no whole bytes, six and twelve are.
    "bert": (Expected("qk-width", 8, 2), *neurons({48: 1})),
    "vit": (Expected("qk-width", 8, 2),),
    "llama": (Expected("qk-width", 4, 2),),
    "swin": (Expected("qk-width", 8, 4), *neurons({3: 2, 6: 2})),
}
"""The same with zero points."""
ROTATED = (Expected("groups", 3, 2), Expected("queries", 2, 2), Expected("v-width", 8, 2), *neurons({80: 2}))
FORMS: Mapping[tuple[str, str], tuple[Expected, ...]] = {
    **{(family, "4-bit"): groups for family, groups in WHOLE_BLOCKS.items()},
    **{(family, "4-bit-zeros"): groups for family, groups in WHOLE_BYTES.items()},
    # Biases by distance are one stored matrix, which both layers read: they keep the same heads.
    ("mpt", "torchscript"): (Expected("heads", 6, 1), *widths(2, 8, 8), *neurons({192: 2})),
    # One node holds the attention: its scale follows from the width of its heads.
    ("bert", "fused-torchscript"): (Expected("heads", 6, 2), *neurons({80: 2, 48: 1})),
    # One node rotates: entries i and i + 4 are tied inside of it.
    ("llama", "opset-23"): ROTATED,
    ("llama", "opset-23-attention"): ROTATED,
    # Convolutions laid out for one processor: refused as a whole.
    **{(family, "ort-99"): () for family in ("vit", "swin", "resnet")},
}
"""Groups of files that have others than their family, and of dialects than the export which they are made from."""


def expected(family: str, form: str) -> Counter[tuple[str, int]]:
    """Return how many groups there are of each kind and size, in a file of an exporter or in a dialect."""
    rows = FORMS.get((family, form), (*EXPECTED[family], *UNTIED.get((family, form), ())))
    found: Counter[tuple[str, int]] = Counter()
    for row in rows:
        found[row.kind, row.units] += row.groups
    return found
