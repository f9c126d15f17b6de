"""Dropping of tokens in texts, beside the same written in torch, on two engines."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import optin_deploy
from benchmarks.zoo.export import export
from optin_deploy.cutting.tokens import merged
from optin_deploy.errors import BadInput
from optin_deploy.network.graph import Network
from optin_deploy.network.probe import probes_of
from optin_deploy.network.read_onnx import read_file
from optin_deploy.network.read_torch import read_module
from optin_deploy.network.run import Program
from optin_deploy.network.write import write
from optin_deploy.pruning.networks import network_of
from optin_deploy.runtimes.openvino import OpenVinoRuntime
from optin_deploy.runtimes.ort import OrtRuntime
from optin_deploy.structure.find import find
from optin_deploy.structure.macs import macs
from optin_deploy.structure.tokens import token_stream
from support.fewer_tokens import check_fewer
from support.rtx import builds
from support.tiny_checkpoint import Shell, classifier, copy_of, labelled

pytestmark = pytest.mark.usefixtures("by_torchscript")

FAMILIES = ("bert", "roberta", "distilbert", "albert", "electra", "mpnet", "modernbert", "clip-text")
WORDS, WIDTH, HEADS = 30, 16, 2


class Block(nn.Module):
    """A block of a text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))

    def attended(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """What attention leaves, and its weights."""
        batch, tokens = x.shape[:2]
        q, k, v = (layer(x).reshape(batch, tokens, HEADS, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = (3 * q @ k.transpose(-1, -2) + bias).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, WIDTH)), weights

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.behind(self.attended(x, bias)[0])

    def behind(self, x: Tensor) -> Tensor:
        """The rest of the block."""
        x = self.norm1(x)
        return self.norm2(x + self.mlp(x))


class Reader(nn.Module):
    """A small text encoder with a bias of relative places; it is read at its first token and at the mean of all."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.far = nn.Embedding(64, HEADS)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(2 * WIDTH, 5)

    def bias(self, mask: Tensor) -> Tensor:
        places = torch.arange(mask.shape[1])
        far = self.far((places[:, None] - places[None]).abs()).permute(2, 0, 1)[None]
        return far + (1 - mask[:, None, None].float()) * -1e4

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, bias = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])), self.bias(attention_mask)
        for block in self.blocks:
            x = block(x, bias)
        return self.read(x, attention_mask)

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = mask[..., None].float()
        return self.head(torch.cat([x[:, 0], (x * weights).sum(1) / weights.sum(1)], -1))

    def dropping(self, input_ids: Tensor, attention_mask: Tensor, left: list[int]) -> Tensor:
        """The same with so many percent of the tokens left behind the attention of each block, text by text."""
        length = input_ids.shape[1]
        x, mask, bias = (
            self.words(input_ids) + self.places(torch.arange(length)), attention_mask, self.bias(attention_mask)
        )  # fmt: skip
        for block, share in zip(self.blocks, left, strict=True):
            x, weights = block.attended(x, bias)
            count = max(-(-length * share // 100), min(2, length))
            rows = []
            for row in range(len(x)):
                real = mask[row].nonzero()[:, 0].tolist()
                asked = (weights[row] * mask[row][None, :, None]).sum((0, 1)).tolist()
                ranked = sorted(real, key=lambda place: (place not in (real[0], real[-1]), -asked[place]))
                padding = [place for place in range(len(asked)) if place not in real]
                rows.append(sorted([*ranked, *padding][:count]))
            kept = torch.tensor(rows)
            each = torch.arange(len(x))[:, None]
            x, mask = x[each, kept], mask[each, kept]
            bias = bias.expand(len(x), -1, -1, -1)[each[..., None], :, kept[:, :, None], kept[:, None]].movedim(-1, 1)
            x = block.behind(x)
        return self.read(x, mask)


@cache
def made() -> tuple[Reader, Network]:
    torch.manual_seed(0)
    model = Reader().eval()
    return model, exported(model)


def exported(model: nn.Module, feeds: dict[str, Tensor] | None = None) -> Network:
    """Its graph, for any number of texts and tokens."""
    feeds = feeds or texts(3, 9)
    return read_module(model, feeds, axes={name: {0: "rows", 1: "length"} for name in feeds})


def texts(rows: int, length: int) -> dict[str, Tensor]:
    """Texts of several lengths."""
    draw = torch.Generator().manual_seed(rows)
    mask = torch.ones(rows, length, dtype=torch.int64)
    for row in range(1, rows):
        mask[row, length - 3 * row :] = 0
    return {"input_ids": torch.randint(1, WORDS, (rows, length), generator=draw) * mask, "attention_mask": mask}


@pytest.mark.parametrize("merges", [[0, -30, 0], [-20, -25, -10], [0, -45, -5]])
def test_a_graph_that_drops_tokens_of_texts_computes_what_torch_does(merges: list[int], tmp_path: Path) -> None:
    model, network = made()
    probes = probes_of(network)
    smaller = merged(find(network, probes), merges, probes)
    path = tmp_path / "x.onnx"
    write(smaller, path)
    left = [100 + sum(merges[: n + 1]) for n in range(3)]
    with OrtRuntime(path, threads=1) as ort, OpenVinoRuntime(path, threads=1) as openvino:
        for rows, length in ((2, 9), (4, 23)):
            feeds = texts(rows, length)
            with torch.no_grad():
                wanted = model.dropping(**feeds, left=left)
                assert (model(**feeds) - wanted).abs().max() > 1e-3
            arrays = {name: value.numpy() for name, value in feeds.items()}
            for engine in (ort, openvino):
                (found,) = engine.run(arrays).values()
                np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "in_front"),
    [*((family, False) for family in (*FAMILIES[:-1], "gpt2", "llama")), ("gpt2", True), ("llama", True)],
)
def test_a_text_of_which_only_padding_goes_is_read_as_before(family: str, in_front: bool) -> None:
    network = classifying(family)
    probes = probes_of(network)
    layout = find(network, probes)
    smaller = Program(merged(layout, [-20, -20, *[0] * (len(token_stream(layout).blocks) - 2)], probes))
    feeds = texts(4, 20)
    if in_front:
        feeds = {name: value.flip(1) for name, value in feeds.items()}
    feeds |= {port.name: torch.zeros(4, 20).long() for port in network.inputs if port.name not in feeds}
    with torch.no_grad():
        one, other = (program(feeds).outputs["logits"] for program in (smaller, Program(network)))
    changed = (one - other).abs().amax(1) / other.abs().max()
    few = feeds["attention_mask"].sum(1) <= 12
    assert few.any()
    assert changed[few].max() < 1e-5
    assert changed[~few].max() > 1e-5


def classifying(family: str) -> Network:
    """A small classifier of texts."""
    usual = {"vocab_size": WORDS, "pad_token_id": 0, "use_cache": False}
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    kinds: dict[str, tuple[Any, Any]] = {
        "gpt2": (GPT2ForSequenceClassification, GPT2Config(n_embd=16, n_layer=2, n_head=2, **usual)),
        "llama": (LlamaForSequenceClassification, LlamaConfig(num_key_value_heads=2, **llama, **usual)),
    }
    if family not in kinds:
        return read_file(export(family, "dynamo").path)
    kind, config = kinds[family]
    torch.manual_seed(0)
    return network_of(kind(config).eval())


def test_tensorrt_rtx_builds_a_network_that_drops_tokens(tmp_path: Path) -> None:
    network = read_file(export("bert", "dynamo").path)
    probes = probes_of(network)
    write(merged(find(network, probes), [-30, -20], probes), tmp_path / "model.onnx")
    assert builds(tmp_path / "model.onnx", {port.name: ((1, 8), (2, 16), (4, 32)) for port in network.inputs})


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_real_text_classifiers_are_dropped(family: str, exporter: str) -> None:
    network = read_file(export(family, exporter).path)
    probes = probes_of(network)
    layout = find(network, probes)
    stream = token_stream(layout)
    assert (stream.of_text, stream.tokens, stream.protected) == (True, 100, 1)
    smaller = merged(layout, [-30, -20, *[0] * (len(stream.blocks) - 2)], probes)
    assert macs(find(smaller, probes).structure) < 0.85 * macs(layout.structure)
    check_fewer(network, smaller, probes)


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("t5-encoder", "'last_hidden_state' has a value for each token"),
        ("gpt2", "'logits' has a value for each token"),
        ("deberta-v2", "no attention of all tokens"),
    ],
)
def test_texts_of_which_no_token_can_go_are_refused(family: str, why: str) -> None:
    network = read_file(export(family, "dynamo").path)
    probes = probes_of(network)
    layout = find(network, probes)
    with pytest.raises(BadInput, match=why):
        merged(layout, [-20, 0], probes)


class Neighbours(Reader):
    """Each token looks at the ones beside it too."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.beside = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().read(x + self.beside(x.transpose(1, 2)).transpose(1, 2), mask)


class Second(Reader):
    """It is read at its second token, which may be gone."""

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().read(x, mask) + x[:, 1, :5]


class Last(Reader):
    """It is read at its last token that is no padding, which is found by the mask."""

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        last = (torch.arange(mask.shape[1]) * mask).argmax(-1)
        return super().read(x, mask) + x[..., :5].gather(1, last[:, None, None].expand(-1, 1, 5))[:, 0]


class Mean(Reader):
    """It divides by the number of tokens that the input has."""

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().read(x, mask) + x[..., :5].sum(1) / mask.shape[1]


class Sum(Reader):
    """It counts tokens."""

    def read(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().read(x, mask) + x[..., :5].sum(1)


@pytest.mark.parametrize("kind", [Neighbours, Second, Mean, Sum])
def test_networks_that_need_tokens_at_their_places_are_refused(kind: type[Reader]) -> None:
    network = exported(kind(2).eval())
    probes = probes_of(network)
    with pytest.raises(BadInput, match="by where they stand or how many they are, or reads another than the first"):
        merged(find(network, probes), [-20, 0], probes)


def test_what_is_found_by_the_mask_is_found_among_those_that_stay() -> None:
    torch.manual_seed(0)
    model = Last().eval()
    network = exported(model)
    probes = probes_of(network)
    smaller = Program(merged(find(network, probes), [-30, -20, 0], probes))
    for rows, length in ((4, 17), (1, 1), (1, 2), (1, 3)):
        feeds = texts(rows, length)
        with torch.no_grad():
            (found,) = smaller(feeds).outputs.values()
            torch.testing.assert_close(found, model.dropping(**feeds, left=[70, 50, 50]), rtol=0, atol=1e-5)


class Towers(nn.Module):
    """Two encoders that read the same text."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Reader(2), Reader(2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.one(input_ids, attention_mask) + self.two(input_ids, attention_mask)


def test_blocks_beside_each_other_do_not_drop_one_after_the_other() -> None:
    network = exported(Towers().eval())
    probes = probes_of(network)
    with pytest.raises(BadInput, match="its blocks do not follow on each other"):
        merged(find(network, probes), [-10, -10, -10, 0], probes)


def test_a_mask_of_real_numbers_is_refused() -> None:
    feeds = texts(3, 9)
    network = exported(Reader(2).eval(), {**feeds, "attention_mask": feeds["attention_mask"].float()})
    probes = probes_of(network)
    with pytest.raises(BadInput, match="its attention_mask holds real numbers"):
        merged(find(network, probes), [-20, 0], probes)


def test_tokens_of_a_text_are_not_merged(shell: Shell, tmp_path: Path) -> None:
    ran = shell("optin-export", classifier(), "--calibration", labelled(), "--out", tmp_path / "x", "--tokens", 0.8)
    assert (ran.code, "which are dropped, not merged. Add --drop-tokens" in ran.err) == (2, True)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--tokens", 0.8), ("--units", "heads,neurons,tokens")])
def test_a_job_drops_tokens_of_texts(options: tuple[str, ...], shell: Shell, tmp_path: Path) -> None:
    out = tmp_path / "x"
    ran = shell(
        "optin-export",
        classifier(),
        "--calibration",
        labelled(),
        "--out",
        out,
        *options,
        "--drop-tokens",
        "--flops",
        0.6,
    )
    assert ran.code == 0, ran.err
    for command in (("plan", "--flops", 0.8), ("sweep", "--flops", "0.9,0.8")):
        again = shell("optin", command[0], copy_of(out, tmp_path / command[0]), *command[1:])
        assert again.code == 0, again.err
    plan = json.loads((out / "plan.json").read_text())
    assert plan["of_text"]
    assert min(plan["merges"]) < 0 == max(plan["merges"])
    assert "% of the tokens are dropped, behind the attention of the blocks: 0, " in ran.out
    assert plan["cost"]["macs_pruned"] <= 0.6 * plan["cost"]["macs_dense"]
    sizes = plan["cost"]["inputs"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Program(read_file(out / "model.onnx"))({name: torch.ones(*shape).long() for name, shape in sizes.items()})
    assert counter.get_total_flops() == 2 * plan["cost"]["macs_pruned"]
    loaded = optin_deploy.load(out)
    feeds = {"input_ids": torch.randint(5, 20, (3, 11)), "attention_mask": torch.ones(3, 11, dtype=torch.int64)}
    feeds |= {} if "token_type_ids" not in sizes else {"token_type_ids": torch.zeros(3, 11).long()}
    with torch.no_grad():
        wanted = loaded(**feeds)["logits"]
    with OrtRuntime(out / "model.onnx", threads=1) as engine:
        found_there = engine.run({name: value.numpy() for name, value in feeds.items()})["logits"]
    np.testing.assert_allclose(found_there, wanted.numpy(), atol=1e-4)
