"""One figure for what a cut did: accuracy, agreement, perplexity, cosine, correlation or error, as fits the output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from onnx import helper
from scipy.stats import pearsonr
from torch import Tensor

from optin_deploy.errors import BadInput, NonFiniteActivation
from optin_deploy.feeds.rows import Feeds, Label
from optin_deploy.network.read import read
from optin_deploy.network.run import Program
from optin_deploy.quality.judges import judge_of
from optin_deploy.quality.outputs import NetworkJudge, readouts
from optin_deploy.quality.quality import Quality, correlation
from optin_deploy.scoring.losses import Readout
from optin_deploy.scoring.reading import Reading, reading_of
from optin_deploy.scoring.settings import Kind
from support import tiny_ports
from support.tiny_graphs import FLOAT, INT64, model_of, value, weight

ROWS, LENGTH, CLASSES = 40, 6, 5


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IDS = torch.randint(1, CLASSES, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
RIGHT = (torch.arange(LENGTH) < (torch.arange(ROWS) % LENGTH + 1)[:, None]).long()
LEFT = RIGHT.flip(1)


def rows(labels: Sequence[Label] | None = None, mask: Tensor | None = None, split: int = 16) -> Feeds:
    batch = {"input_ids": IDS} | ({} if mask is None else {"attention_mask": mask})
    batches = [{name: part[i : i + split] for name, part in batch.items()} for i in range(0, ROWS, split)]
    return Feeds(tuple(batches), tuple(labels if labels is not None else [None] * ROWS), "here")


def read_by(kind: Kind, values: Tensor, feeds: Feeds) -> list[Readout]:
    found, start = [], 0
    for batch in feeds.batches:
        count = len(batch["input_ids"])
        found.append(Reading("y", kind).read({"y": values[start : start + count]}, batch.get("attention_mask")))
        start += count
    return found


def judged(kind: Kind, dense: Tensor, cut: Tensor, feeds: Feeds, **options: object) -> Quality:
    judge = judge_of(read_by(kind, dense, feeds), Reading("y", kind), feeds, **options)  # type: ignore[arg-type]
    assert judge.compare(read_by(kind, dense, feeds)).drop == pytest.approx(0, abs=1e-4)
    return judge.compare(read_by(kind, cut, feeds))


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_classes_of_rows_are_compared_with_the_dense_ones(kind: Kind) -> None:
    dense, cut = drawn(ROWS, CLASSES).softmax(-1), drawn(ROWS, CLASSES, seed=1).softmax(-1)
    found = judged(kind, dense, cut, rows())
    assert found == Quality("same_prediction", 1.0, float((dense.argmax(1) == cut.argmax(1)).double().mean()), ROWS)


def test_labels_make_it_accuracy_of_both() -> None:
    labels = torch.arange(ROWS) % CLASSES
    dense = drawn(ROWS, CLASSES) + 4 * torch.nn.functional.one_hot(labels, CLASSES)
    cut = dense + 3 * drawn(ROWS, CLASSES, seed=1)
    wanted = Quality(
        "accuracy",
        float((dense.argmax(1) == labels).double().mean()),
        float((cut.argmax(1) == labels).double().mean()),
        ROWS,
    )
    assert judged("logits", dense, cut, rows(labels.tolist())) == wanted
    assert judged("logits", dense, cut, rows([float(each) for each in labels])) == wanted
    names = ["a", "b", "c", "d", "e"]
    assert judged("logits", dense, cut, rows([names[i] for i in labels]), names=names) == wanted
    some = [None if i % 4 == 0 else int(label) for i, label in enumerate(labels)]
    counted = torch.arange(ROWS) % 4 != 0
    found = judged("logits", dense, cut, rows(some))
    assert found.samples == int(counted.sum())
    assert found.pruned == float((cut.argmax(1) == labels)[counted].double().mean())


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["a", *[0] * (ROWS - 1)], "the label 'a' is a name, and the order of the classes is not known"),
        ([9, *[0] * (ROWS - 1)], "label 9 is not one of the model's"),
        ([0.5] * ROWS, "the label 0.5 is no class"),
        ([torch.zeros(LENGTH, dtype=torch.int64)] * ROWS, "6 classes up to 0; the network puts out 1 positions"),
    ],
)
def test_labels_that_are_no_classes_are_not_used(
    labels: list[Label], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    values = drawn(ROWS, CLASSES)
    assert judged("logits", values, values, rows(labels)).metric == "same_prediction"
    assert told in caplog.text
    with pytest.raises(BadInput, match="Correct the labels"):
        judged("logits", values, values, rows(labels), strict=True)


def test_labels_in_another_order_are_refused() -> None:
    labels = torch.arange(ROWS) % 2
    dense = drawn(ROWS, 2) + 9 * torch.nn.functional.one_hot(1 - labels, 2)
    with pytest.raises(BadInput, match="another order"):
        judged("logits", dense, dense, rows(labels.tolist()))


def test_few_labels_are_not_used(caplog: pytest.LogCaptureFixture) -> None:
    values = drawn(ROWS, CLASSES)
    assert judged("logits", values, values, rows([1, *[None] * (ROWS - 1)])).metric == "same_prediction"
    assert "39 of the 40 rows that judge have no label: too few" in caplog.text


@pytest.mark.parametrize("mask", [RIGHT, LEFT])
def test_tokens_are_compared_one_by_one_without_padding(mask: Tensor) -> None:
    dense, cut = drawn(ROWS, LENGTH, CLASSES), drawn(ROWS, LENGTH, CLASSES, seed=1)
    same = (dense.argmax(-1) == cut.argmax(-1))[mask.bool()].double().mean()
    assert judged("logits", dense, cut, rows(mask=mask)) == Quality("same_prediction_per_token", 1.0, float(same), ROWS)


@pytest.mark.parametrize("mask", [RIGHT, LEFT])
def test_labels_of_tokens_stay_with_their_tokens(mask: Tensor) -> None:
    labels = torch.randint(CLASSES, (ROWS, LENGTH), generator=torch.Generator().manual_seed(5))
    labels = labels.masked_fill(mask == 0, -100)
    labels[::3, :2] = -1
    dense = drawn(ROWS, LENGTH, CLASSES) + 3 * torch.nn.functional.one_hot(labels.clamp(min=0), CLASSES)
    cut = dense + 2 * drawn(ROWS, LENGTH, CLASSES, seed=1)
    right = [(each.argmax(-1) == labels)[labels >= 0].double().mean() for each in (dense, cut)]
    found = judged("logits", dense, cut, rows(list(labels), mask))
    assert found == Quality("accuracy_per_token", float(right[0]), float(right[1]), ROWS)
    assert judged("logits", dense, cut, rows([0] * ROWS, mask)).metric == "same_prediction_per_token"


@pytest.mark.parametrize("mask", [None, RIGHT, LEFT])
def test_perplexity_is_that_of_the_next_token(mask: Tensor | None) -> None:
    dense, cut = drawn(ROWS, LENGTH, CLASSES), drawn(ROWS, LENGTH, CLASSES, seed=1)
    counted = torch.ones_like(IDS) if mask is None else mask

    def by_hand(logits: Tensor) -> float:
        losses = [
            -math.log(logits[row, place].double().softmax(-1)[IDS[row, place + 1]])
            for row in range(ROWS)
            for place in range(LENGTH - 1)
            if counted[row, place] and counted[row, place + 1]
        ]
        return math.exp(sum(losses) / len(losses))

    found = judged("logits", dense, cut, rows(mask=mask), metric="perplexity")
    assert found.metric == "perplexity"
    assert found.dense == pytest.approx(by_hand(dense), rel=1e-6)
    assert found.pruned == pytest.approx(by_hand(cut), rel=1e-6)
    assert found.drop == pytest.approx(100 * (found.pruned / found.dense - 1), abs=1e-5)
    assert not found.holds(0) or found.pruned <= found.dense


def test_perplexity_needs_a_language_model() -> None:
    with pytest.raises(BadInput, match=r"perplexity needs logits of each token .* agreement is measured"):
        judged("logits", drawn(ROWS, CLASSES), drawn(ROWS, CLASSES), rows(), metric="perplexity")


def test_texts_of_one_token_foretell_nothing_beside_others() -> None:
    longer, one = IDS[:16], IDS[16:24, :1]
    feeds = Feeds(({"input_ids": longer}, {"input_ids": one}), (None,) * 24, "here")
    values = [drawn(16, LENGTH, CLASSES), drawn(8, 1, CLASSES)]
    found = [Reading("y", "logits").read({"y": each}) for each in values]
    judge = judge_of(found, Reading("y", "logits"), feeds, metric="perplexity")
    loss = torch.nn.functional.cross_entropy(values[0][:, :-1].flatten(0, 1), longer[:, 1:].flatten())
    assert judge.compare(found).dense == pytest.approx(float(loss.exp()), rel=1e-5)
    with pytest.raises(BadInput, match=r"no token of the rows that judge is foretold\. Give longer texts"):
        alone = Feeds(({"input_ids": one},), (None,) * 8, "here")
        judge_of(found[1:], Reading("y", "logits"), alone, metric="perplexity")


def test_a_perplexity_that_is_no_number_is_told() -> None:
    with pytest.raises(NonFiniteActivation, match=r"here: a token costs .*e\+0[34] nats on average"):
        judged("logits", 1e4 * drawn(ROWS, LENGTH, CLASSES), drawn(ROWS, LENGTH, CLASSES), rows(), metric="perplexity")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_quality_is_a_number(value: float) -> None:
    for dense, pruned, beside in ((value, 1.0, {}), (1.0, value, {}), (1.0, 1.0, {"mrr": (1.0, value)})):
        with pytest.raises(NonFiniteActivation, match=r"by which nothing can be judged\. Check the labels for NaN"):
            Quality("spearman", dense, pruned, 9, beside)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -7.7])
def test_constant_outputs_correlate_with_nothing(value: float) -> None:
    for count in range(2, 60):
        constant = torch.full((count,), value)
        for other in (constant, 3 * constant, drawn(count)):
            assert correlation(constant, other) == correlation(other, constant) == 0
    a = drawn(50) + 1e4
    b = a + drawn(50, seed=1)
    assert correlation(a, b) == pytest.approx(float(pearsonr(a.double(), b.double()).statistic), abs=1e-9)


@pytest.mark.parametrize("shape", [(ROWS, 8), (ROWS, LENGTH, 8)])
def test_embeddings_are_compared_by_cosine(shape: tuple[int, ...]) -> None:
    dense, cut = drawn(*shape), drawn(*shape) + drawn(*shape, seed=1)
    means = [(each * RIGHT.unsqueeze(-1)).sum(1) if len(shape) == 3 else each for each in (dense, cut)]
    wanted = float(torch.cosine_similarity(*means, dim=-1).mean())
    found = judged("embedding", dense, cut, rows(mask=RIGHT))
    assert (found.metric, found.dense, found.samples) == ("cosine_to_dense", 1.0, ROWS)
    assert found.pruned == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("kind", ["regression", "logits"])
def test_one_number_a_row_is_compared_by_correlation(kind: Kind) -> None:
    dense = drawn(ROWS, 1)
    cut = 3 * dense + drawn(ROWS, 1, seed=1) + 7
    found = judged(kind, dense, cut, rows())
    assert found.metric == "correlation_with_dense"
    assert found.pruned == pytest.approx(float(torch.corrcoef(torch.cat([dense, cut], 1).T)[0, 1]), abs=1e-6)


def test_other_numbers_are_compared_by_their_error() -> None:
    dense, cut = drawn(ROWS, 4, 3, 3), drawn(ROWS, 4, 3, 3) + 0.1 * drawn(ROWS, 4, 3, 3, seed=1)
    found = judged("regression", dense, cut, rows())
    assert (found.metric, found.dense) == ("relative_error", 0.0)
    assert found.pruned == pytest.approx(float((dense - cut).norm() / dense.norm()), rel=1e-5)
    assert found.drop == pytest.approx(100 * found.pruned, abs=1e-5)
    assert found.holds(20)
    assert not found.holds(1)


def test_nan_is_told() -> None:
    with pytest.raises(NonFiniteActivation, match="NaN or infinity on rows that judge"):
        judged("logits", torch.full((ROWS, CLASSES), torch.nan), drawn(ROWS, CLASSES), rows())


def test_a_network_is_run_on_its_own_inputs_with_what_tells_padding() -> None:
    network = tiny_ports.text("input_ids")
    feeds = rows(mask=RIGHT)
    reading = Reading("input_ids_out", "embedding")
    found = list(readouts(Program(network), reading, feeds))
    assert [readout.values.shape for readout in found] == [(16, 1, 4), (16, 1, 4), (8, 1, 4)]
    table = Program(network)({"input_ids": torch.arange(CLASSES)[None]}).outputs["input_ids_out"][0]
    mean = (table[IDS] * RIGHT.unsqueeze(-1)).sum(1)
    assert torch.allclose(torch.cat([r.values for r in found])[:, 0], torch.nn.functional.normalize(mean, dim=-1))
    judge = NetworkJudge(found, feeds)
    assert judge.compare(readouts(Program(network), reading, feeds)).pruned == pytest.approx(1)


def test_ids_that_a_file_hands_through_are_not_what_is_compared() -> None:
    nodes = [
        helper.make_node("Identity", ["input_ids"], ["ids_out"]),
        helper.make_node("Gather", ["words", "input_ids"], ["states"]),
    ]
    outputs = [value("ids_out", "b", "n", dtype=INT64), value("states", "b", "n", 4, dtype=FLOAT)]
    network = read(model_of(nodes, [value("input_ids", "b", "n", dtype=INT64)], outputs, [weight("words", 9, 4)]))
    assert reading_of(network, {"ids_out": (2, 7), "states": (2, 7, 8)}).output == "states"


def test_as_many_labels_as_rows() -> None:
    with pytest.raises(BadInput, match="here: 3 labels for 40 rows"):
        replace(rows(), labels=(1, 2, 3))
