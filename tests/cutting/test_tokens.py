"""Merging of tokens in a graph, beside Token Merging written in torch from its paper, on two engines."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import combinations, product
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from benchmarks.zoo.export import export
from optin_deploy.cutting.compensate import compensated
from optin_deploy.cutting.graph import cut
from optin_deploy.cutting.masks import masks
from optin_deploy.cutting.tokens import counted, merged
from optin_deploy.cutting.tying import ROWS, Ties
from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.read_torch import read_module
from optin_deploy.network.run import Program
from optin_deploy.network.write import write
from optin_deploy.planning.plan import describe_merges
from optin_deploy.planning.tokens import Growth, growth, mean_share, schedule
from optin_deploy.runtimes.openvino import OpenVinoRuntime
from optin_deploy.runtimes.ort import OrtRuntime
from optin_deploy.scoring.subject import Subject
from optin_deploy.structure.find import find
from optin_deploy.structure.groups import Layout
from optin_deploy.structure.macs import macs
from optin_deploy.structure.tokens import SelfAttention, TokenStream, most_merged, token_stream
from support.fewer_tokens import check_fewer
from support.rtx import builds

pytestmark = pytest.mark.usefixtures("by_torchscript")

WIDTH, HEADS, BLOCKS = 16, 2, 3


class Block(nn.Module):
    """A block of a vision transformer, that can merge `count` tokens behind its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.merging(x, None, 0, 0)[0]

    def attended(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.norm1(x)
        batch, tokens = x.shape[:2]
        q, k, v = (layer(y).reshape(batch, tokens, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        if size is not None:
            scores = scores + size.log()[:, None, None, :, 0]
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, WIDTH)), k

    def merging(self, x: Tensor, size: Tensor | None, count: int, protected: int) -> tuple[Tensor, Tensor | None]:
        x, k = self.attended(x, size)
        if count:
            x, size = soft_matching(x, k.mean(1), size, count, protected)
        return x + self.mlp(self.norm2(x)), size


def soft_matching(x: Tensor, keys: Tensor, size: Tensor | None, count: int, protected: int) -> tuple[Tensor, Tensor]:
    """Bolya et al., appendix D, with scatter; `protected` tokens at the front are never merged.

    With a negative `count`, so many are left out in place of merged.
    """
    drops, count = count < 0, abs(count)
    size = torch.ones_like(x[..., :1]) if size is None else size
    keys = keys / keys.norm(dim=-1, keepdim=True)
    scores = keys[:, ::2] @ keys[:, 1::2].transpose(-1, -2)
    scores[:, : (protected + 1) // 2] = -torch.inf
    scores[:, :, : protected // 2] = -torch.inf
    best, partner = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    stays, goes = order[:, count:].sort(dim=1).values, order[:, :count]
    into = partner[..., None].gather(1, goes)

    def reduced(values: Tensor) -> Tensor:
        first, second, width = values[:, ::2], values[:, 1::2], values.shape[-1]
        kept, moved = (first.gather(1, index.expand(-1, -1, width)) for index in (stays, goes))
        if not drops:
            second = second.scatter_reduce(1, into.expand(-1, -1, width), moved, reduce="sum")
        front = [(second if place % 2 else kept)[:, place // 2 : place // 2 + 1] for place in range(protected)]
        return torch.cat([*front, kept[:, (protected + 1) // 2 :], second[:, protected // 2 :]], dim=1)

    total = reduced(size)
    return (reduced(x) if drops else reduced(x * size) / total), total


class Vit(nn.Module):
    """A small vision transformer that is read at its class token and at the mean of its patches."""

    def __init__(self, extra: int = 1) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.extra = nn.Parameter(torch.randn(1, extra, WIDTH)) if extra else None
        self.positions = nn.Parameter(torch.randn(1, 25 + extra, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(2 * WIDTH, 5)
        self.count = extra

    def embedded(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        if self.extra is not None:
            x = torch.cat([self.extra.expand(x.shape[0], -1, -1), x], 1)
        return x + self.positions

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embedded(pixels)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(torch.cat([x[:, 0], x[:, self.count :].mean(1)], -1))

    def merging(self, pixels: Tensor, merges: list[int]) -> Tensor:
        """The same with merged tokens; the mean is weighted by how many patches each stands for.

        A dropped patch is stood for by the one that it would have become a part of.
        """
        x, size = self.embedded(pixels), None
        for block, count in zip(self.blocks, merges, strict=True):
            x, size = block.merging(x, size, count, self.count)
        x = self.norm(x)
        size = torch.ones_like(x[..., :1]) if size is None else size
        patches, weights = x[:, self.count :], size[:, self.count :]
        first = x[:, 0]
        if not self.count:  # the first patch became a part of whatever it was merged into
            first = first * torch.nan
        return self.head(torch.cat([first, (patches * weights).sum(1) / weights.sum(1)], -1))


class First(nn.Module):
    """The class token alone."""

    def __init__(self, vit: Vit) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.vit.embedded(pixels)
        for block in self.vit.blocks:
            x = block(x)
        return self.vit.norm(x[:, 0])


@cache
def made(extra: int = 1) -> tuple[Vit, Network]:
    torch.manual_seed(extra)
    model = Vit(extra).eval()
    return model, read_module(model, {"pixels": torch.randn(2, 3, 20, 20)}, axes={"pixels": {0: "batch"}})


@pytest.mark.parametrize("extra", [1, 2, 5])
@pytest.mark.parametrize("merges", [[0, 7, 4], [9, 6, 2], [0, 0, 10], [3, 0, 5]])
def test_a_merged_graph_computes_what_token_merging_computes(extra: int, merges: list[int], tmp_path: Path) -> None:
    model, network = made(extra)
    probes = probes_of(network)
    layout = find(network, probes)
    assert token_stream(layout).protected == extra
    smaller = merged(layout, merges, probes)
    write(smaller, tmp_path / "model.onnx")
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, 20, 20)
        with torch.no_grad():
            wanted, dense = model.merging(pixels, merges), model(pixels)
            found = Program(smaller)({"pixels": pixels}).outputs
        (name,) = found
        assert (dense - wanted).abs().max() > 1e-3
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5)
        for runtime in (OrtRuntime, OpenVinoRuntime):
            with runtime(tmp_path / "model.onnx", threads=1) as engine:
                given = engine.run({"pixels": pixels.numpy()})[name]
            np.testing.assert_allclose(given, wanted.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("merges", [[0, -7, -4], [-9, -6, 0], [-3, 5, -4], [6, -4, 2]])
def test_a_graph_that_drops_tokens_computes_what_torch_does(extra: int, merges: list[int], tmp_path: Path) -> None:
    """At the class token; merges may come before and behind."""
    model, _ = made(extra)
    first = First(model)
    network = read_module(first, {"pixels": torch.randn(2, 3, 20, 20)}, axes={"pixels": {0: "batch"}})
    probes = probes_of(network)
    layout = find(network, probes)
    smaller = merged(layout, merges, probes)
    assert macs(find(smaller, probes).structure) < macs(layout.structure)
    write(smaller, tmp_path / "model.onnx")
    for batch in (1, 3):
        pixels = torch.randn(batch, 3, 20, 20)
        with torch.no_grad():
            x, size = model.embedded(pixels), None
            for block, count in zip(model.blocks, merges, strict=True):
                x, size = block.merging(x, size, count, extra)
            wanted = model.norm(x[:, 0])
        for runtime in (OrtRuntime, OpenVinoRuntime):
            with runtime(tmp_path / "model.onnx", threads=1) as engine:
                (found,) = engine.run({"pixels": pixels.numpy()}).values()
            np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-4)


def test_every_place_has_the_token_that_stands_for_a_dropped_one() -> None:
    torch.manual_seed(1)
    module = Vit(1).eval()
    module.head = nn.Identity()  # the mean of the patches, each read by its place
    network = read_module(module, {"pixels": torch.randn(2, 3, 20, 20)}, axes={"pixels": {0: "batch"}})
    probes = probes_of(network)
    (found,) = Program(merged(find(network, probes), [0, 0, -9], probes))(feeds := probes[0]).outputs.values()
    with torch.no_grad():
        x = module.embedded(feeds["pixels"])
        x = module.blocks[1](module.blocks[0](x))
        x, keys = module.blocks[2].attended(x)
        keys = keys.mean(1) / keys.mean(1).norm(dim=-1, keepdim=True)
        best, partner = (keys[:, 2::2] @ keys[:, 1::2].transpose(-1, -2)).max(-1)
        for row in range(len(x)):
            for even in best[row].topk(9).indices.tolist():
                x[row, 2 * even + 2] = x[row, 2 * partner[row, even] + 1]
        x = module.norm(x + module.blocks[2].mlp(module.blocks[2].norm2(x)))
    torch.testing.assert_close(found, torch.cat([x[:, 0], x[:, 1:].mean(1)], -1), rtol=0, atol=1e-5)


def some_cut(layout: Layout) -> dict[str, list[int]]:
    """A head of one block, and half of the neurons of another."""
    heads, neurons = ([g for g in layout.groups if g.kind == kind] for kind in ("heads", "neurons"))
    return {heads[1].name: [1], neurons[0].name: list(range(0, 24, 2))}


@pytest.mark.parametrize("extra", [1, 2, 5])
@pytest.mark.parametrize("merges", [[0, 7, 4], [9, 6, 2], [3, 0, 5]])
def test_tokens_that_are_the_same_compute_what_merged_ones_do(extra: int, merges: list[int]) -> None:
    _, network = made(extra)
    probes = probes_of(network)
    layout = find(network, probes)
    stream, keep, pixels = token_stream(layout), some_cut(layout), {"pixels": torch.randn(3, 3, 20, 20)}
    smaller = merged(find(cut(layout, keep), probes), merges, probes, stream)
    (wanted,) = Program(smaller, dtype=torch.float64)(pixels).outputs.values()

    def tied(by: Mapping[str, Sequence[int]]) -> Tensor:
        same = Ties(layout, stream, merges, by).tied(network)
        assert [node.index for node in same.nodes] == [node.index for node in network.nodes]
        program = Program(same, dtype=torch.float64, own=ROWS)
        (found,) = program(pixels, masks=masks(layout, keep)).outputs.values()
        return found

    torch.testing.assert_close(tied(keep), wanted, rtol=0, atol=1e-9)
    if merges[1]:
        assert (tied({}) - wanted).abs().max() > 1e-6, "tokens are compared by the keys that stay"


def test_weights_make_up_for_merging_too() -> None:
    _, network = made(1)
    probes = probes_of(network)
    layout, merges = find(network, probes), [0, 8, 3]
    subject, stream, keep = Subject.make(layout), token_stream(layout), some_cut(layout)
    rows = torch.rand(400, 3, 5, 5, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 2)
    rows = rows.repeat_interleave(4, 3) + 0.1 * torch.randn(400, 3, 20, 20)
    fitted, unseen = rows[:300], {"pixels": rows[300:]}
    (dense,) = Program(network)(unseen).outputs.values()
    errors = []
    for kept, ties in (
        ({}, None),
        ({}, Ties(layout, stream, merges, {})),
        (keep, None),
        (keep, Ties(layout, stream, merges, keep)),
    ):
        repaired = compensated(subject, kept, [{"pixels": fitted}], ties=ties).network
        whole = find(repaired, probes)
        smaller = merged(find(cut(whole, kept), probes) if kept else whole, merges, probes, stream)
        (found,) = Program(smaller)(unseen).outputs.values()
        errors.append(float((found - dense).square().mean()))
    assert errors[1] < 0.8 * errors[0]
    assert errors[3] < 0.9 * errors[2]


@pytest.mark.parametrize(
    ("merges", "told"),
    [
        ((0, 3, 2), "5 tokens are merged, behind the attention of the blocks: 0, 3, 2"),
        ((0, -3, -2), "5 tokens are dropped, behind the attention of the blocks: 0, 3, 2"),
        ((4, -3), "7 tokens are merged or dropped (-), behind the attention of the blocks: 4, -3"),
    ],
)
def test_what_is_told_of_merges(merges: tuple[int, ...], told: str) -> None:
    assert describe_merges(merges, of_text=False) == told
    assert describe_merges(merges, of_text=True) == told.replace(" tokens", "% of the tokens")


def test_nothing_merged_is_the_same_network() -> None:
    _, network = made()
    probes = probes_of(network)
    assert merged(find(network, probes), [0, 0, 0], probes) is network


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize(
    ("family", "protected"),
    [("vit", 1), ("deit", 2), ("dinov2", 1), ("dinov2-swiglu", 1), ("clip-vision", 1), ("siglip", 0)],
)
def test_streams_of_tokens_are_found_and_merged_in_real_families(family: str, protected: int, exporter: str) -> None:
    network = read_file(export(family, exporter).path)
    probes = probes_of(network)
    layout = find(network, probes)
    stream = token_stream(layout)
    assert (len(stream.blocks), stream.protected) == (2, protected)
    smaller = merged(layout, [4, 2], probes)
    assert macs(find(smaller, probes).structure) < macs(layout.structure)
    check_fewer(network, smaller, probes)


@pytest.mark.parametrize(
    ("family", "why"),
    [("bert", "dropped, not merged"), ("swin", "no attention of all tokens"), ("beit", "change places")],
)
def test_what_cannot_be_merged_is_refused_with_the_reason(family: str, why: str) -> None:
    network = read_file(export(family, "dynamo").path)
    probes = probes_of(network)
    with pytest.raises(BadInput, match=why):
        merged(find(network, probes), [2, 0], probes)


def test_more_than_a_block_can_merge_is_refused() -> None:
    _, network = made()
    probes = probes_of(network)
    layout = find(network, probes)
    assert counted(token_stream(layout), [12, 6, 0]) == [14, 8, 8]
    with pytest.raises(BadInput, match="block 0 has 26 tokens: 0 to 12 of them can be merged or dropped, not 13"):
        merged(layout, [13, 0, 0], probes)
    with pytest.raises(BadInput, match="merges for 2 blocks, where there are 3"):
        merged(layout, [1, 1], probes)


@pytest.mark.parametrize(("tokens", "protected", "most"), [(26, 1, 12), (27, 1, 13), (3, 1, 1), (2, 1, 0), (7, 5, 1)])
def test_the_most_that_a_block_can_merge(tokens: int, protected: int, most: int) -> None:
    assert most_merged(tokens, protected) == most


@pytest.mark.parametrize("share", [0.95, 0.8, 0.7, 0.5, 0.4])
@pytest.mark.parametrize(("tokens", "protected"), [(257, 1), (198, 2), (64, 0)])
def test_a_schedule_leaves_the_asked_share_in_the_mean(tokens: int, protected: int, share: float) -> None:
    stream = TokenStream((SelfAttention("", "", (), ""),) * 12, tokens, protected, "")
    merges = schedule(stream, share)
    left = counted(stream, merges)
    assert not merges[0]
    assert sum(map(bool, merges)) <= 4 or share < 0.7
    assert share - 1 / tokens < sum(left) / len(left) / tokens <= share
    assert mean_share(stream, merges) == pytest.approx(sum(left) / len(left) / tokens)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7])
@pytest.mark.parametrize("seed", range(8))
def test_a_schedule_costs_little_more_than_the_best_of_all(seed: int, share: float) -> None:
    draw = random.Random(seed)
    stream = TokenStream((SelfAttention("", "", (), ""),) * 6, 24, 1, "")
    errors = [Growth(10 ** draw.uniform(-3, 0), draw.uniform(1, 3)) for _ in range(6)]

    def cost(merges: Sequence[int]) -> float:
        left = [24, *counted(stream, merges)]
        return sum(each.scale * (24 * n / m) ** each.power for each, n, m in zip(errors, merges, left, strict=False))

    best = np.inf
    for one, other in combinations(range(1, 6), 2):
        for few, many in product(range(12), repeat=2):
            merges = [0] * 6
            merges[one], merges[other] = few, many
            with suppress(BadInput):
                if sum(counted(stream, merges)) / 6 / 24 <= share:
                    best = min(best, cost(merges))
    found = schedule(stream, share, errors)
    assert sum(map(bool, found)) <= 2
    assert best <= cost(found) <= 1.3 * best


@pytest.mark.parametrize(
    ("counts", "errors", "at"),
    [((2, 4), (0.1, 0.4), 0.9), ((2, 4), (0.1, 0.1), 0.15), ((2, 4), (0.0, 0.4), 0.9), ((1, 1), (0.5, 0.5), 18)],
)
def test_an_error_grows_as_it_was_measured(counts: tuple[int, int], errors: tuple[float, float], at: float) -> None:
    found = growth(counts, errors)
    assert found.error(counts[1]) == pytest.approx(errors[1])
    assert found.error(6) == pytest.approx(at)


def test_a_share_that_cannot_be_had_is_refused() -> None:
    stream = TokenStream((SelfAttention("", "", (), ""),) * 2, 17, 1, "")
    assert sum(counted(stream, schedule(stream, 0.8))) / 34 <= 0.8
    with pytest.raises(BadInput, match=r"at least 0\.7\d\d of the tokens stay"):
        schedule(stream, 0.5)


def test_tensorrt_rtx_builds_a_network_that_merges_tokens(tmp_path: Path) -> None:
    network = read_file(export("deit", "dynamo").path)
    probes = probes_of(network)
    write(merged(find(network, probes), [4, 2], probes), tmp_path / "model.onnx")
    profile = {"pixel_values": ((1, 3, 32, 32), (2, 3, 32, 32), (4, 3, 32, 32))}
    assert builds(tmp_path / "model.onnx", profile)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7, 0.6, 0.5])
@pytest.mark.parametrize("tokens", [196, 256, 64])
def test_streams_without_a_class_token_keep_one_at_an_even_place(tokens: int, share: float) -> None:
    stream = TokenStream((SelfAttention("", "", (), ""),) * 12, tokens, 0, "")
    try:
        merges = schedule(stream, share)
    except BadInput as err:
        assert "of the tokens stay in the mean" in str(err)  # noqa: PT017
        return
    left = tokens
    for count in merges:
        assert count < (left + 1) // 2
        left -= count


def test_a_stream_without_a_class_token_merges_as_far_as_it_can() -> None:
    torch.manual_seed(0)
    module = Vit(0).eval()
    network = read_module(module, {"pixels": torch.randn(2, 3, 20, 20)}, axes={"pixels": {0: "batch"}})
    probes = probes_of(network)
    found = Program(merged(find(network, probes), [12, 6, 3], probes))({"pixels": torch.randn(3, 3, 20, 20)}).outputs
    assert all(value.isfinite().all() for value in found.values())


class Parallel(Vit):
    """Blocks side by side on the same tokens."""

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embedded(pixels)
        return self.head(torch.cat([block(x).mean(1) for block in self.blocks[:2]], -1)) + self.blocks[2](x).mean()


class Bare(Vit):
    """Ends with an attention."""

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.blocks[0](self.embedded(pixels))
        y = self.blocks[1].norm1(x)
        q, k, v = (layer(y).unsqueeze(1) for layer in (self.blocks[1].q, self.blocks[1].k, self.blocks[1].v))
        x = x + self.blocks[1].out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).squeeze(1))
        return self.head(torch.cat([x.mean(1), x.mean(1)], -1))


@pytest.mark.parametrize("kind", [Parallel, Bare])
def test_networks_that_are_no_chain_of_blocks_are_refused(kind: type[Vit]) -> None:
    torch.manual_seed(0)
    network = read_module(kind(1).eval(), {"pixels": torch.randn(2, 3, 20, 20)}, axes={"pixels": {0: "batch"}})
    probes = probes_of(network)
    layout = find(network, probes)
    with pytest.raises(BadInput, match=r"Leave out --tokens"):
        merged(layout, [3, *[2] * 7][: len(token_stream(layout).blocks)], probes)


class Told(Vit):
    """Tells all tokens their mean between two blocks."""

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](self.embedded(pixels)))
        x = self.norm(self.blocks[2](x * x.mean(1, keepdim=True).sigmoid()))
        return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], -1))


class Early(Vit):
    """Tells all tokens their mean behind the first attention."""

    depth = BLOCKS

    def forward(self, pixels: Tensor) -> Tensor:
        first = self.blocks[0]
        x, _ = first.attended(self.embedded(pixels))
        x = x * x.mean(1, keepdim=True).sigmoid()
        x = x + first.mlp(first.norm2(x))
        for block in self.blocks[1 : self.depth]:
            x = block(x)
        return self.head(torch.cat([x[:, 0], x[:, 1:].mean(1)], -1))


class Single(Early):
    """The same with one block."""

    depth = 1


@pytest.mark.parametrize("kind", [Early, Single])
def test_what_reads_tokens_right_behind_a_merge_is_tried_too(kind: type[Early]) -> None:
    torch.manual_seed(0)
    network = read_module(kind(1).eval(), {"pixels": torch.randn(2, 3, 20, 20)}, axes={"pixels": {0: "batch"}})
    probes = probes_of(network)
    layout = find(network, probes)
    merges = [3, *[0] * (kind.depth - 1)]
    with pytest.raises(BadInput, match="does not count how many a token stands for"):
        merged(layout, merges, probes)


@pytest.mark.parametrize("merges", [[3, 0, 0], [0, 3, 0], [3, 3, 3]])
def test_what_reads_merged_tokens_without_counting_them_is_refused(merges: list[int]) -> None:
    torch.manual_seed(0)
    network = read_module(Told(1).eval(), {"pixels": torch.randn(2, 3, 20, 20)}, axes={"pixels": {0: "batch"}})
    probes = probes_of(network)
    with pytest.raises(BadInput, match="does not count how many a token stands for"):
        merged(find(network, probes), merges, probes)
    merged(find(network, probes), [0, 0, 3], probes)  # behind it, nothing else reads them


def test_images_of_free_size_are_refused() -> None:
    _, network = made()
    model = network.model.clone()
    model.graph.inputs[0].shape = ir.Shape(["batch", 3, "height", 20])
    with pytest.raises(BadInput, match="images of any size"):
        token_stream(find(Network(model, "x"), probes_of(network)))


class Mixed(nn.Module):
    """A network in float16 whose Softmax is in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Vit(1).half().eval()

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.inner.embedded(pixels)
        for block in self.inner.blocks:
            y = block.norm1(x)
            q, k, v = (
                layer(y).reshape(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)
                for layer in (block.q, block.k, block.v)
            )
            weights = (q @ k.transpose(-1, -2)).float().softmax(-1).half()
            x = x + block.out((weights @ v).transpose(1, 2).reshape(x.shape))
            x = x + block.mlp(block.norm2(x))
        return self.inner.head(torch.cat([x[:, 0], x.mean(1)], -1))


def test_types_may_differ_along_the_stream(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 20, 20).half()
    network = read_module(Mixed().eval(), {"pixels": pixels}, axes={"pixels": {0: "batch"}})
    probes = probes_of(network)
    smaller = merged(find(network, probes), [0, 6, 3], probes)
    write(smaller, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    wanted = Program(smaller)({"pixels": pixels}).outputs
    with OrtRuntime(tmp_path / "model.onnx", threads=1) as engine:
        found = engine.run({"pixels": pixels.numpy()})
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=2e-2)
