"""Scores by independent arithmetic: zeroed weight columns, full forwards, Jacobians by autograd, noise by integers."""

from __future__ import annotations

import copy
import hashlib
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tiny_scoring import (
    BARE_BERT,
    BERT,
    DINOV2,
    HEADS,
    VIT,
    Batch,
    Family,
    bare_bert,
    bert,
    dinov2,
    image_batch,
    masked_lm,
    rows,
    text_batch,
    vit,
)
from torch import Tensor, nn
from torch.func import functional_call

TEXT = [text_batch((3, 7, 5)), text_batch((6, 2), padding=1, seed=1)]
IMAGES = [image_batch(2), image_batch(1, seed=1)]
Place = tuple[str, int, int]
"""heads or neurons, layer, unit."""
Pick = Callable[[Batch, int], list[int]]
"""Places of the tokens of one sample that are compared, in order."""


@dataclass(frozen=True)
class Case:
    """A model, where it keeps its units, data, and how its outputs are compared."""

    model: nn.Module
    family: Family
    batches: list[Batch]
    kind: str
    """logits, words (logits a token), regression, embedding."""

    def depth(self) -> int:
        """Number of blocks."""
        return len(list(self.model.get_submodule(self.family.blocks).children()))

    def places(self) -> list[Place]:
        """Heads of all layers, then neurons of all layers."""
        widths = [self.weight("neurons", i, 0)[0].shape[1] for i in range(self.depth())]
        heads = [("heads", i, u) for i in range(self.depth()) for u in range(HEADS)]
        return heads + [("neurons", i, u) for i in range(self.depth()) for u in range(widths[i])]

    def weight(self, kind: str, layer: int, unit: int) -> tuple[Tensor, list[int]]:
        """The output projection's weight, and the columns of a unit."""
        path, columns = self.family.columns(layer, kind, unit)
        return self.model.get_submodule(path).weight, columns

    def samples(self) -> Iterator[Batch]:
        """Batches of one, without padding."""
        for batch in self.batches:
            for i in range(len(next(iter(batch.values())))):
                real = real_tokens(batch, i)
                yield {name: value[:, real] if value.dim() == 2 else value for name, value in rows(batch, [i]).items()}


def flat(terms: Any) -> Tensor:
    """Sums of `Terms` in the order of `Case.places`, (5, units)."""
    in_order = sorted(terms.sums, key=lambda branch: (branch.unit_width == 1, branch.output))
    return torch.cat([terms.sums[branch] for branch in in_order], 1)


CASES: dict[str, Callable[[], Case]] = {
    "3 classes": lambda: Case(bert(), BERT, TEXT, "logits"),
    "3 classes, 3 layers": lambda: Case(bert(layers=3, seed=4), BERT, [text_batch((3, 5, 4))], "logits"),
    "2 classes, 1 layer": lambda: Case(bert(labels=2, layers=1), BERT, TEXT, "logits"),
    "12 classes": lambda: Case(bert(labels=12), BERT, TEXT[1:], "logits"),
    "regression": lambda: Case(bert(labels=1), BERT, TEXT, "regression"),
    "2 regression targets": lambda: Case(bert(labels=2, problem_type="regression"), BERT, TEXT[1:], "regression"),
    "embeddings": lambda: Case(bare_bert(), BARE_BERT, TEXT, "embedding"),
    "words": lambda: Case(masked_lm(), BERT, [text_batch((3, 5))], "words"),
    "images, 3 classes": lambda: Case(vit(), VIT, IMAGES, "logits"),
    "images, embeddings": lambda: Case(dinov2(), DINOV2, IMAGES[1:], "embedding"),
}


@cache
def case(name: str) -> Case:
    """A case to read, not to change."""
    return CASES[name]()


# --- noise, by plain integers ---------------------------------------------------------------------------------

GOLDEN, ALL_BITS = 0x9E3779B97F4A7C15, 2**64 - 1


def splitmix(x: int) -> int:
    """The finaliser of SplitMix64, as published."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & ALL_BITS
    x = (x ^ x >> 27) * 0x94D049BB133111EB & ALL_BITS
    return x ^ x >> 31


def word(key: int, number: int, counter: int) -> int:
    """64 random bits of a sample."""
    return splitmix(splitmix((key ^ number) & ALL_BITS) + counter * GOLDEN & ALL_BITS)


def signs_of(key: int, number: int, height: int, width: int) -> Tensor:
    """+1 and -1, (height, width)."""
    bits = [[word(key, number, (i << 32) + j // 64) >> j % 64 & 1 for j in range(width)] for i in range(height)]
    return 2.0 * torch.tensor(bits, dtype=torch.float64) - 1


def stream_of(seed: int, name: str, index: int) -> int:
    """Number of one use of noise."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{index}".encode()).digest()[:8], "little")


def key_of(sample: Batch) -> int:
    """Of the content of a batch of one."""
    if "pixel_values" in sample:
        values = sample["pixel_values"].flatten().tolist()
        data = struct.pack(f"<{len(values)}d", *values)
    else:
        ids = sample["input_ids"][0, real_tokens(sample, 0)].tolist()
        data = struct.pack(f"<{len(ids)}q", *ids)
    return int.from_bytes(hashlib.sha256(data).digest()[:6], "little")


def real_tokens(batch: Batch, i: int) -> list[int]:
    """All tokens of a text that are no padding; all patches and the class token of an image."""
    if "attention_mask" in batch:
        return [j for j, real in enumerate(batch["attention_mask"][i].tolist()) if real]
    return list(range(1 + (batch["pixel_values"].shape[-1] // 4) ** 2))


def drawn_tokens(count: int, seed: int) -> Pick:
    """Those real tokens with the smallest random numbers (as signed integers), smallest first."""

    known: dict[tuple[int, ...], list[int]] = {}

    def pick(batch: Batch, i: int) -> list[int]:
        key, places = key_of(rows(batch, [i])), real_tokens(batch, i)
        if (key, *places) not in known:
            drawn = {place: word(key, stream_of(seed, "tokens", 0), order) for order, place in enumerate(places)}
            order = sorted(drawn, key=lambda place: drawn[place] - (drawn[place] >> 63 << 64))
            known[(key, *places)] = order[:count]
        return known[(key, *places)]

    return pick


# --- what masking a unit changes ------------------------------------------------------------------------------


@contextmanager
def watched(model: Any, family: Family, site: str) -> Iterator[list[Tensor]]:
    """The features of each layer, (batch, tokens, hidden), as a forward makes them."""
    states: list[Tensor] = []
    layers = range(len(list(model.get_submodule(family.blocks).children())))
    blocks = [f"{family.blocks}.{i}" for i in layers]
    paths = blocks if site == "block" else [family.columns(i, "neurons", 0)[0] for i in layers]
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for path in paths
    ]
    yield states
    for hook in hooks:
        hook.remove()


def cosines(tokens: Tensor) -> Tensor:
    """(tokens, hidden) -> cosine of every pair over the number of tokens."""
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    return unit @ unit.T / len(unit)


def look(
    model: Any, family: Family, batch: Batch, kind: str, *, site: str = "block", pick: Pick = real_tokens
) -> list[tuple[list[Tensor], Tensor]]:
    """Of each sample: the Gram of each layer, and the vectors that the output compares, (positions, width)."""
    with watched(model, family, site) as states:
        output = model(**batch)
    found = []
    for i in range(len(states[0])):
        places = pick(batch, i)
        grams = [cosines(state[i][places]) for state in states]
        if kind == "embedding":
            mean = output.last_hidden_state[i][real_tokens(batch, i)].mean(0)
            vectors = (mean / mean.norm())[None]
        else:
            vectors = output.logits[i][real_tokens(batch, i)] if kind == "words" else output.logits[i][None]
        found.append((grams, vectors))
    return found


def output_moved(kind: str, dense: Tensor, bent: Tensor) -> Tensor:
    """Mean over positions of the KL divergence or squared distance."""
    if kind in ("logits", "words"):
        p, q = dense.softmax(1), bent.softmax(1)
        return (p * (p / q).log()).sum(1).mean()
    return (dense - bent).pow(2).sum(1).mean()


@contextmanager
def one_removed(case: Case) -> Iterator[Callable[[Place], None]]:
    """A function that zeroes the columns of one unit and gives the one before its own back."""
    fine: list[tuple[Tensor, Tensor]] = []

    def remove(place: Place) -> None:
        while fine:
            weight, values = fine.pop()
            weight.copy_(values)
        weight, columns = case.weight(*place)
        fine.append((weight, weight.clone()))
        weight[:, columns] = 0

    with torch.no_grad():
        yield remove


def simple_terms(case: Case, *, site: str = "block", pick: Pick = real_tokens) -> Tensor:
    """Trajectory and output term of each unit on each sample: one full forward a unit. (2, units, samples)."""
    bent = copy.deepcopy(case)
    table = []
    with one_removed(bent) as remove:
        dense = [look(case.model, case.family, b, case.kind, site=site, pick=pick) for b in case.batches]
        for place in case.places():
            remove(place)
            line = []
            for batch, before in zip(case.batches, dense, strict=True):
                after = look(bent.model, case.family, batch, case.kind, site=site, pick=pick)
                for (grams, vectors), (bent_grams, moved) in zip(before, after, strict=True):
                    pairs = list(zip(grams, bent_grams, strict=True))[place[1] :]
                    d = torch.stack([(a - b).pow(2).sum() for a, b in pairs]).sum()
                    line.append(torch.stack([d, output_moved(case.kind, vectors, moved)]))
            table.append(torch.stack(line, 1))  # (2, samples)
    return torch.stack(table, 1)


@cache
def terms_of(name: str, site: str = "block") -> Tensor:
    """Of a case, all tokens."""
    return simple_terms(case(name), site=site)


# --- curvature ------------------------------------------------------------------------------------------------


class _Called:
    """A model with other parameters."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.model, self.parameters = model, parameters

    def __call__(self, **batch: Tensor) -> Any:
        return functional_call(self.model, self.parameters, kwargs=batch)

    def get_submodule(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)


@dataclass(frozen=True)
class Slopes:
    """d / d mask of one sample."""

    key: int
    grams: Tensor
    """(layers, tokens, tokens, units)."""
    vectors: Tensor
    """(positions, width, units)."""
    dense: Tensor
    """The vectors themselves, (positions, width)."""
    kind: str

    def trajectory(self) -> Tensor:
        """Curvature of the trajectory term, (units,)."""
        return self.grams.pow(2).sum((0, 1, 2))

    def output(self) -> Tensor:
        """Curvature of the output term, (units,)."""
        total = torch.zeros(self.vectors.shape[2], dtype=torch.float64)
        for value, slope in zip(self.dense, self.vectors, strict=True):
            metric = torch.eye(len(value), dtype=torch.float64)
            if self.kind in ("logits", "words"):
                p = value.softmax(0)
                metric = (p.diag() - torch.outer(p, p)) / 2
            total += ((metric @ slope) * slope).sum(0) / len(self.dense)
        return total


def slopes_of(case: Case, *, site: str = "block", pick: Pick = real_tokens) -> list[Slopes]:
    """By autograd, through weights whose columns are multiplied by the mask. One entry a sample."""
    parameters = {name: p.detach() for name, p in case.model.named_parameters()}
    places = case.places()

    def run(mask: Tensor, sample: Batch) -> tuple[Tensor, Tensor]:
        changed = dict(parameters)
        for factor, place in zip(mask, places, strict=True):
            path, columns = case.family.columns(place[1], place[0], place[2])
            weight = changed[f"{path}.weight"]
            wide = torch.ones(weight.shape[1], dtype=mask.dtype)
            wide = wide.index_put((torch.tensor(columns),), factor.expand(len(columns)))
            changed[f"{path}.weight"] = weight * wide
        called = _Called(case.model, changed)
        ((grams, vectors),) = look(called, case.family, sample, case.kind, site=site, pick=pick)
        return torch.stack(grams), vectors

    ones = torch.ones(len(places), dtype=torch.float64)
    found = []
    for sample in case.samples():
        grams, vectors = torch.autograd.functional.jacobian(lambda mask, s=sample: run(mask, s), ones)
        found.append(Slopes(key_of(sample), grams, vectors, run(ones, sample)[1], case.kind))
    return found


@cache
def slopes(name: str) -> list[Slopes]:
    """Of a case, all tokens of the blocks' outputs."""
    return slopes_of(case(name))
