"""Scores of unit groups of any network, against full runs of the masked network and against Jacobians by autograd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor

from benchmarks.zoo.dialects import dialect
from benchmarks.zoo.export import export
from optin_deploy.cutting.masks import masks
from optin_deploy.errors import BadInput
from optin_deploy.network.run import Program
from optin_deploy.pruning.networks import find_in
from optin_deploy.scoring.masking_units import masked_terms
from optin_deploy.scoring.noise import sample_keys, signs, stream
from optin_deploy.scoring.settings import PAPER, Features
from optin_deploy.scoring.slopes import Projections, slope_terms
from optin_deploy.scoring.subject import Subject
from optin_deploy.scoring.terms import OUTPUT, TRAJECTORY
from optin_deploy.structure.groups import Layout, UnitGroup

Batch = Mapping[str, Tensor]
SIZES = {"batch": 3, "length": 7, "target": 6, "source": 5}
NETWORKS = {
    "bert": ("bert", "torchscript"),
    "post-norm language model of two texts": ("bart", "torchscript"),
    "decoder": ("t5-decoder", "dynamo"),
    "groups of queries": ("llama", "dynamo"),
    "windows folded into the batch": ("swin", "dynamo"),
    "samples in several parts": ("mobilevit", "torchscript"),
    "places of words counted over the batch": ("clip-text", "dynamo"),
    "channels over a stage": ("resnet", "dynamo"),
}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tiny matrices."""


@cache
def layout(name: str) -> Layout:
    return find_in(export(*NETWORKS[name]).path).layout


@cache
def fixed_batch(family: str) -> Layout:
    """A network that takes one sample alone."""
    model = onnx.load(export(family, "torchscript").path)
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.shape.dim[0].dim_value = 1
    return find_in(model).layout


def subject(name: str, **more: Any) -> Subject:
    return Subject.make(layout(name), dtype=torch.float64, **more)


def batch_of(name: str, seed: int = 0, **sizes: int) -> Batch:
    family = export(*NETWORKS[name]).family
    return family.feeds(seed, **{**SIZES, **sizes})


def some_units(layout: Layout) -> dict[UnitGroup, list[int]]:
    """Two of every sixth group, and of one of each kind."""
    kinds: dict[str, UnitGroup] = {}
    for group in layout.groups:
        kinds.setdefault(group.kind, group)
    chosen = [group for n, group in enumerate(layout.groups) if n % 6 == 0 or group in kinds.values()]
    return {group: [0, group.units - 1] for group in chosen}


# --- by plain arithmetic --------------------------------------------------------------------------------------


def cosines(tokens: Tensor) -> Tensor:
    unit = tokens / tokens.norm(dim=1, keepdim=True)
    return unit @ unit.T / len(unit)


def looked_at(subject: Subject, values: Mapping[str, Tensor], real: Tensor | None) -> list[Tensor]:
    """Gram matrices of one sample, real tokens alone."""
    found = []
    for feature in subject.features:
        tokens = values[feature.value].movedim(feature.channels, -1).flatten(0, -2)
        fits = real is not None and len(real) == len(tokens) and feature.value not in other_text(subject)
        found.append(cosines(tokens[real] if fits else tokens))
    return found


def other_text(subject: Subject) -> set[str]:
    """Values of BART's decoder, which the padding mask says nothing of: they have its length in the probe, 17."""
    names = [*(feature.value for feature in subject.features), subject.reading.output]
    return {name for name in names if 17 in (subject.structure.shapes.shape(name) or ())[:2]}


def moved(kind: str, dense: Tensor, bent: Tensor, real: Tensor | None) -> Tensor:
    if kind == "embedding":
        pooled = [x if x.dim() == 1 else (x if real is None else x[real]).mean(0) for x in (dense, bent)]
        return (pooled[0] / pooled[0].norm() - pooled[1] / pooled[1].norm()).square().sum()
    p, q = ((x if x.dim() == 2 else x[None]).softmax(-1) for x in (dense, bent))
    each = (p * (p / q).log()).sum(-1)
    return (each[real] if real is not None and len(real) == len(each) else each).mean()


def by_full_runs(subject: Subject, batches: Sequence[Batch], units: Mapping[UnitGroup, Sequence[int]]) -> Iterator[Any]:
    """Both terms of each unit, summed over samples that run alone, in float64, through every operator."""
    network = subject.structure.network
    program = Program(network, dtype=torch.float64)
    names = [port.name for port in network.inputs]
    watch = [feature.value for feature in subject.features]
    output = subject.reading.output
    samples = [{name: b[name][row : row + 1] for name in names} for b in batches for row in range(len(b[names[0]]))]
    dense = [program(one, watch=watch) for one in samples]
    for group, some in units.items():
        for unit in some:
            places = masks(subject.layout, {group.name: [u for u in range(group.units) if u != unit]})
            d = o = torch.zeros(())
            for one, before in zip(samples, dense, strict=True):
                real = one["attention_mask"][0].bool() if "attention_mask" in one else None
                after = program(one, watch=watch, masks=places)
                pairs = zip(*(looked_at(subject, run.watched, real) for run in (before, after)), strict=True)
                d = d + sum((a - b).square().sum() for a, b in pairs)
                spoken = None if output in other_text(subject) else real
                o = o + moved(subject.reading.kind, before.outputs[output][0], after.outputs[output][0], spoken)
            yield group, unit, float(d), float(o)


# --- exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_masking_moves_features_and_output_as_full_runs_of_single_samples_say(name: str) -> None:
    network, batch = subject(name), batch_of(name)
    units = some_units(network.layout)
    with torch.no_grad():
        terms = masked_terms(network, [batch], units)
        expected = list(by_full_runs(network, [batch], units))
    assert network.features
    for group, unit, d, o in expected:
        assert float(terms.sums[group][TRAJECTORY, unit]) == pytest.approx(d, rel=1e-7, abs=1e-13), (group.name, unit)
        assert float(terms.sums[group][OUTPUT, unit]) == pytest.approx(o, rel=1e-6, abs=1e-12), (group.name, unit)
    assert max(d for *_, d, _ in expected) > 1e-4
    assert max(o for *_, o in expected) > 1e-6
    assert terms.samples == SIZES["batch"]


def test_a_decoder_of_the_length_of_the_padded_text_has_no_padding() -> None:
    network, batch = (
        subject("post-norm language model of two texts"),
        batch_of("post-norm language model of two texts", target=7),
    )
    units: dict[UnitGroup, list[int]] = {network.layout.groups[n]: [0] for n in (0, -1)}
    with torch.no_grad():
        terms = masked_terms(network, [batch], units)
        for group, unit, d, o in by_full_runs(network, [batch], units):
            assert float(terms.sums[group][TRAJECTORY, unit]) == pytest.approx(d, rel=1e-7)
            assert float(terms.sums[group][OUTPUT, unit]) == pytest.approx(o, rel=1e-7)


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_a_network_for_one_sample_runs_them_one_by_one(family: str) -> None:
    free = Subject.make(find_in(export(family, "torchscript").path).layout, dtype=torch.float64)
    fixed = Subject.make(fixed_batch(family), dtype=torch.float64)
    batch = export(family, "torchscript").family.feeds(0, **SIZES)
    assert fixed.alone
    assert not free.alone
    assert len(fixed.features) == len(free.features) > 0
    found = []
    for network in (free, fixed):
        groups = [network.layout.groups[n] for n in (0, 1, -1)]
        masked = masked_terms(network, [batch], {group: [0, 1] for group in groups})
        sloped = slope_terms(network, [batch], Projections(range(2), range(1)))
        found.append([terms.sums[group] for terms in (masked, sloped) for group in groups])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-15)


def test_tokens_across_a_batch_share_one_gram() -> None:
    network, batch = subject("bert"), batch_of("bert")
    assert PAPER.site == "ffn"
    network = replace(network, compared="ffn")
    group = network.layout.groups[0]
    with torch.no_grad():
        found = masked_terms(network, [batch], {group: [0]}, features=PAPER)
        places = masks(network.layout, {group.name: range(1, group.units)})
        runs = [network.run(batch, watch=[f.value for f in network.features], masks=m).watched for m in ({}, places)]
    real = batch["attention_mask"].bool()
    expected = sum(
        (cosines(runs[0][f.value][real]) - cosines(runs[1][f.value][real])).square().sum() for f in network.features
    )
    # What is added before the residual: the results of output projections, four in two layers.
    assert len(network.features) == 4
    assert not {f.value for f in network.features} & {f.value for f in subject("bert").features}
    assert float(found.sums[group][TRAJECTORY, 0]) == pytest.approx(SIZES["batch"] * float(expected), rel=1e-9)


# --- the sketch -----------------------------------------------------------------------------------------------


def jacobians(network: Subject, one: Batch, group: UnitGroup, unit: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """How the Gram matrices and the output of one sample without padding change with the multiplier of a unit."""
    zeroed = masks(network.layout, {group.name: [u for u in range(group.units) if u != unit]})

    def run(m: Tensor) -> tuple[Tensor, ...]:
        places = {place: mask.double() + (1 - mask.double()) * m for place, mask in zeroed.items()}
        values = network.run(one, masks=places, watch=[f.value for f in network.features])
        return (*looked_at(network, values.watched, None), values.outputs[network.reading.output][0])

    one_off, step = torch.ones((), dtype=torch.float64), 1e-4
    *grams, output = ((b - a) / (2 * step) for a, b in zip(run(one_off - step), run(one_off + step), strict=True))
    return grams, output, run(one_off)[-1]


SKETCHED = ("bert", "windows folded into the batch", "channels over a stage")


@pytest.mark.parametrize("name", SKETCHED)
def test_slopes_are_projections_of_jacobians(name: str) -> None:
    network, projections = subject(name), Projections(range(3), range(2), seed=5)
    batch = {key: value[1:] for key, value in batch_of(name).items()}  # without the row that is padded
    units = some_units(network.layout)
    terms = slope_terms(network, [batch], projections)
    assert (terms.samples, terms.probes, terms.output_probes) == (2, 3, 2)
    for group, (unit, _) in units.items():
        expected = torch.zeros(2)
        for row, key in enumerate(sample_keys(batch)):
            grams, output, dense = jacobians(network, {n: v[row : row + 1] for n, v in batch.items()}, group, unit)
            for probe in projections.trajectory:
                noise = [
                    signs([key], stream(5, f"feature {place}", probe), len(gram), len(gram), like=gram)[0]
                    for place, gram in enumerate(grams)
                ]
                slope = sum((r * j).sum() for r, j in zip(noise, grams, strict=True))
                expected[0] += slope**2
            root = dense.softmax(-1).sqrt()
            for probe in projections.output:
                e = root * signs([key], stream(5, "output", probe), 1, len(dense), like=dense)[0, 0]
                expected[1] += ((e - root.square() * e.sum()) * output).sum() ** 2 / 2
        assert terms.sums[group][:2, unit].tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-12)


def test_slopes_squared_are_the_curvature_on_average_within_the_errors_that_they_tell() -> None:
    name, probes = "bert", 400
    network = subject(name)
    batch = {key: value[1:2] for key, value in batch_of(name, length=4).items()}
    terms = slope_terms(network, [batch], Projections(range(probes), range(probes)))
    pulls = []
    for group, (unit, _) in some_units(network.layout).items():
        grams, output, dense = jacobians(network, batch, group, unit)
        p = dense.softmax(-1)
        curvature = [sum(j.square().sum() for j in grams), (p * output**2).sum() / 2 - (p * output).sum() ** 2 / 2]
        found = terms.sums[group][:, unit]
        for row, expected in enumerate(curvature):
            error = float(found[2 + row].sqrt()) / probes
            assert error < 0.15 * float(expected)
            pulls.append((float(found[row]) / probes - float(expected)) / error)
    assert max(map(abs, pulls)) < 4
    assert sum(x * x for x in pulls) / len(pulls) < 2


# --- what changes nothing -------------------------------------------------------------------------------------


def both_terms(network: Subject, batches: Sequence[Batch], **more: Any) -> list[Tensor]:
    """Sums by masks of two units of every group that is looked at, and by slopes of all groups."""
    groups = list(some_units(network.layout))
    masked = masked_terms(network, batches, {group: [0, 1] for group in groups}, features=Features(), **more)
    sloped = slope_terms(network, batches, Projections(range(2), range(1)))
    return [*(masked.sums[group] for group in groups), *(sloped.sums[group] for group in network.layout.groups)]


def close(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """The same but for float32's rounding: batches of other sizes are sums in another order, on each processor."""
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "samples in several parts"])
def test_batches_and_their_order_change_nothing(name: str) -> None:
    network, batch = subject(name), batch_of(name)
    rows = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(3)]
    with torch.no_grad():
        whole = both_terms(network, [batch])
        close(whole, both_terms(network, rows[::-1]))
        close(whole, both_terms(network, [batch], rows=2))


def test_padding_changes_nothing() -> None:
    network, batch = subject("bert"), batch_of("bert")
    longer = {key: torch.nn.functional.pad(value, (0, 3)) for key, value in batch.items()}
    with torch.no_grad():
        close(both_terms(network, [batch]), both_terms(network, [longer]))


def test_a_network_of_whole_numbers_whose_range_follows_from_a_batch_is_masked_as_it_is_cut() -> None:
    found = find_in(dialect("bert", "int8-dynamic").path).layout
    network = Subject.make(found)
    assert network.alone
    batch = export("bert", "dynamo").family.feeds(0, **SIZES)
    groups = {group: [0] for group in network.layout.groups[:4]}
    with torch.no_grad():
        terms = masked_terms(network, [batch], groups)
        for group, *_ in groups.items():
            places = masks(found, {group.name: range(1, group.units)})
            o = torch.zeros(())
            for row in range(3):
                one = {key: value[row : row + 1] for key, value in batch.items()}
                dense, bent = (network.run(one, masks=m).outputs["logits"].double() for m in ({}, places))
                o = o + moved("logits", dense[0], bent[0], None)
            assert float(terms.sums[group][OUTPUT, 0]) == pytest.approx(float(o), rel=1e-3)
            assert float(o) > 1e-6
    with pytest.raises(BadInput, match=r"DynamicQuantizeLinear .* rounds to 8 bits.*--scorer exact"):
        slope_terms(network, [batch], Projections(range(1), range(1)))
