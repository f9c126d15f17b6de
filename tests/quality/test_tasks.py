"""Figures of tasks equal those of other libraries, or counts by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, ndcg_score
from torch import Tensor

from optin_deploy.data.targets import Answers, Grade, Role
from optin_deploy.errors import BadInput
from optin_deploy.feeds.rows import Feeds, Label
from optin_deploy.quality.answers import answer, f1, plain
from optin_deploy.quality.entities import entity_f1, spans, tags_spans
from optin_deploy.quality.guessing import spearman_skill
from optin_deploy.quality.judges import judge_of
from optin_deploy.quality.label_sets import label_set, label_sets, micro_f1
from optin_deploy.quality.quality import Quality
from optin_deploy.quality.ranking import guessed_gain, ranked
from optin_deploy.scoring.losses import Readout
from optin_deploy.scoring.reading import Kind, Reading

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "E-LOC", "S-PER")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(labels: Sequence[Label], tokens: int = 4, split: int = 7) -> Feeds:
    """Rows in several batches; what they are fed does not matter."""
    ids = torch.zeros(len(labels), tokens, dtype=torch.long)
    batches = tuple({"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(split))
    return Feeds(batches, tuple(labels), "here")


def read(values: dict[str, Tensor], reading: Reading, split: int = 7) -> list[Readout]:
    count = len(next(iter(values.values())))
    parts = [{name: value[i : i + split] for name, value in values.items()} for i in range(0, count, split)]
    return [reading.read(part, torch.ones(part[reading.output].shape[:2])) for part in parts]


# ---- several labels


def test_sets_of_labels_are_judged_as_scikit_learn_does() -> None:
    wanted = drawn(40, 6) > 0.4
    dense, cut = (wanted.float() + drawn(40, 6, seed=seed) * noise - 0.5 for seed, noise in ((1, 0.3), (2, 0.8)))
    names = tuple("abcdef")
    labels: list[Label] = [tuple(names[i] for i in range(6) if row[i]) for row in wanted]
    reading, feeds = Reading("y", "multi-label"), rows(labels)
    found = judge_of(read({"y": dense}, reading), reading, feeds, names=names, strict=True).compare(
        read({"y": cut}, reading)
    )
    assert found.metric == "micro_f1"
    expected = [f1_score(wanted, each > 0, average="micro") for each in (dense, cut)]
    assert [found.dense, found.pruned] == pytest.approx(expected)
    assert found.beside["subset_accuracy"] == pytest.approx([accuracy_score(wanted, each > 0) for each in (dense, cut)])
    alone = judge_of(read({"y": dense}, reading), reading, rows([None] * 40)).compare(read({"y": cut}, reading))
    assert (alone.metric, alone.pruned) == ("same_prediction", pytest.approx(accuracy_score(dense > 0, cut > 0)))


def test_labels_of_another_order_are_refused() -> None:
    wanted = torch.eye(6)[torch.arange(60) % 6] > 0
    reading = Reading("y", "multi-label")
    labels: list[Label] = [row.roll(1).long() for row in wanted]
    with pytest.raises(BadInput, match=r"micro F1 of 0\.0%, no more than one label for all rows"):
        judge_of(read({"y": wanted.float() - 0.5}, reading), reading, rows(labels))


def test_one_label_in_all_rows_judges_what_is_right_on_all_of_them() -> None:
    reading, feeds = Reading("y", "multi-label"), rows([("b",)] * 12)
    dense = torch.tensor([[-1.0, 1.0, -1.0]] * 12)
    cut = dense.clone()
    cut[6:] *= -1
    found = judge_of(read({"y": dense}, reading), reading, feeds, names=tuple("abc")).compare(read({"y": cut}, reading))
    wanted = np.array([[0, 1, 0]] * 12)
    assert (found.dense, found.pruned) == (1.0, pytest.approx(f1_score(wanted, cut > 0, average="micro")))
    with pytest.raises(BadInput, match="All rows have the same labels: give rows with others too"):
        judge_of(read({"y": cut}, reading), reading, feeds, names=tuple("abc"))


@pytest.mark.parametrize("label", [("b", "c"), (1, 2), "b|c", " b | c ", torch.tensor([0, 1, 1])])
def test_a_set_of_labels_may_be_written_in_several_ways(label: Label) -> None:
    assert label_set(label, ("a", "b", "c"), 3).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (("b", "d"), "'d' is not one of"),
        (torch.tensor([0, 2, 1]), "give 0 or 1"),
        (Answers("", ()), "names or numbers"),
    ],
)
def test_a_label_that_the_network_does_not_know_is_refused(label: Label, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        label_set(label, ("a", "b", "c"), 3)


@pytest.mark.parametrize("as_written", [int, float, bool])
def test_lists_of_zeros_and_ones_are_marks_and_not_numbers(as_written: type) -> None:
    """As scikit-learn's MultiLabelBinarizer and problem_type multi_label_classification have them."""
    wanted = drawn(40, 3) > 0.4
    labels: list[Label] = [tuple(as_written(each) for each in row) for row in wanted.tolist()]
    reading, dense = Reading("y", "multi-label"), wanted.float() + drawn(40, 3, seed=1) - 0.5
    found = judge_of(read({"y": dense}, reading), reading, rows(labels), names=tuple("abc"), strict=True)
    assert found.compare(read({"y": dense}, reading)).dense == pytest.approx(
        f1_score(wanted, dense > 0, average="micro")
    )
    assert torch.equal(label_sets(labels, None, 3), wanted)
    two: list[Label] = [(0, 1), (1, 0), (1, 1)]  # one list names a label twice, so that all are marks
    assert label_sets(two, None, 2).tolist() == [[False, True], [True, False], [True, True]]
    assert label_sets([(1,), (0,)], None, 1).tolist() == [[True], [False]]


def test_lists_that_may_be_numbers_or_marks_are_refused() -> None:
    with pytest.raises(BadInput, match=r"lists such as \(0, 1\).* or 0 and 1 .* names, such as 'a', or .* its number"):
        label_sets([(0, 1), (1, 0)], ("a", "b"), 2)
    assert label_sets([(0, 1), 1], ("a", "b"), 2).tolist() == [[True, True], [False, True]]
    assert label_sets([("a", "b"), ("b",)], ("a", "b"), 2).tolist() == [[True, True], [False, True]]
    for label in ((1, 0, 1, 0), ("b", "b"), "b|b", (1, "b")):
        with pytest.raises(BadInput, match=r"name .* twice: .* in all rows 0 or 1 for each of 3 labels"):
            label_sets([label, (0, 2)], ("a", "b", "c"), 3)


def test_no_labels_at_all_are_found_rightly() -> None:
    assert micro_f1(torch.zeros(3, 2) > 0, torch.zeros(3, 2) > 0) == 1
    assert label_set((), ("a", "b"), 2).sum() == 0


# ---- entities


def test_entities_are_counted_as_seqeval_does() -> None:
    from seqeval.metrics import f1_score as seqeval_f1
    from seqeval.metrics.sequence_labeling import get_entities

    rng = np.random.default_rng(0)
    wanted = [[TAGS[i] for i in rng.integers(len(TAGS), size=rng.integers(1, 12))] for _ in range(300)]
    found = [[tag if rng.random() < 0.7 else TAGS[rng.integers(len(TAGS))] for tag in row] for row in wanted]
    for row in wanted:
        assert spans(row) == {(kind, start, end + 1) for kind, start, end in get_entities(row)}
    assert entity_f1(wanted, found) == pytest.approx(seqeval_f1(wanted, found))
    assert 0.1 < entity_f1(wanted, found) < 0.9


def test_only_tags_of_spans_are_entities() -> None:
    assert tags_spans(TAGS)
    assert not tags_spans(("NOUN", "VERB", "O"))
    assert not tags_spans(("O", "0"))


def test_entities_of_words_are_judged_where_their_first_tokens_are() -> None:
    wanted = torch.arange(40).view(10, 4) % 3
    names = ("O", "B-x", "I-x")
    labels: list[Label] = [tuple(None if i == 2 else names[t] for i, t in enumerate(row)) for row in wanted.tolist()]
    logits = torch.nn.functional.one_hot(wanted, 3).float()
    logits[:, 2] = drawn(10, 3)  # a position without a tag
    cut = logits.clone()
    cut[:5, 0] = cut[:5, 0].roll(1, -1)
    reading, feeds = Reading("y", "logits"), rows(labels)
    found = judge_of(read({"y": logits}, reading), reading, feeds, names=names).compare(read({"y": cut}, reading))
    assert (found.metric, found.dense) == ("entity_f1", 1.0)
    assert found.beside["accuracy_per_token"] == (1.0, pytest.approx(25 / 30))
    told = [[names[t] for i, t in enumerate(row) if i != 2] for row in (cut.argmax(-1)).tolist()]
    right = [[names[t] for i, t in enumerate(row) if i != 2] for row in wanted.tolist()]
    assert found.pruned == pytest.approx(entity_f1(right, told)) != 1.0


def tagged(wanted: Tensor, found: Tensor, names: Sequence[str], **options: bool) -> Quality:
    """Quality of predicted tags, (rows, words), by those of words; -1 where a word has none."""
    reading = Reading("y", "logits")
    labels: list[Label] = [tuple(None if each < 0 else names[each] for each in row) for row in wanted.tolist()]
    dense = read({"y": torch.nn.functional.one_hot(found, len(names)).float()}, reading)
    return judge_of(dense, reading, rows(labels, wanted.shape[1]), names=names, **options).compare(dense)


def test_tags_in_another_order_are_refused_though_most_words_are_right() -> None:
    names, rng = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER"), np.random.default_rng(0)
    found = torch.from_numpy(np.where(rng.random((60, 20)) < 0.85, 0, rng.integers(1, 5, (60, 20))))
    assert tagged(found, found, names).dense == 1.0
    wanted = torch.tensor([0, 3, 4, 1, 2])[found]
    assert float((wanted == found).double().mean()) > 0.8
    with pytest.raises(BadInput, match=r"right on 0 of \d+ labelled tokens of entities.* 'B-LOC' -> 'B-PER'.*No loss"):
        tagged(wanted, found, names)
    with pytest.raises(BadInput, match=r"right on 0 of 1200 labelled tokens, .* another order"):
        tagged((found + 1) % 5, found, ("NOUN", "VERB", "X", "Y", "Z"))
    with pytest.raises(BadInput, match=r"right on 0 of \d+ labelled tokens of entities, and guessing on 0.0. No loss"):
        tagged(found, torch.zeros_like(found), names)


def test_a_model_that_finds_few_entities_is_judged(caplog: pytest.LogCaptureFixture) -> None:
    """A third of the words of one kind, and nothing else: better than guessing, though nearly all words are of it."""
    rng, names = np.random.default_rng(0), ("O", "B-drug", "I-drug")
    wanted = torch.from_numpy((rng.random((200, 20)) < 0.1).astype(int))
    wanted[0, :2] = 2
    found = wanted * torch.from_numpy(rng.random((200, 20)) < 0.3)
    told = [[[names[tag] for tag in row] for row in each.tolist()] for each in (wanted, found)]
    quality = tagged(wanted, found, names)
    assert (quality.metric, quality.dense) == ("entity_f1", pytest.approx(entity_f1(*told)))
    assert 0.3 < quality.dense < 0.6
    assert caplog.text == ""


def test_a_row_of_one_token_is_judged_by_its_tag(caplog: pytest.LogCaptureFixture) -> None:
    """Rows of one length share a batch, and the shortest come first."""
    names, lengths = ("O", "B-x", "I-x"), (1, 3, 3, 4, 5)
    wanted = [torch.arange(length) % 3 for length in lengths]
    wanted[0] += 1
    reading = Reading("y", "logits")
    dense = [
        reading.read({"y": torch.nn.functional.one_hot(row, 3).float()[None]}, torch.ones(1, len(row)))
        for row in wanted
    ]
    labels: list[Label] = [tuple(names[tag] for tag in row.tolist()) for row in wanted]
    batches = tuple({"input_ids": torch.zeros(1, length, dtype=torch.long)} for length in lengths)
    for start in (0, 1):
        feeds = Feeds(batches[start:], tuple(labels[start:]), "here")
        found = judge_of(dense[start:], reading, feeds, names=names, strict=True).compare(dense[start:])
        assert (found.metric, found.dense, found.samples) == ("entity_f1", 1.0, 5 - start)
    alone = judge_of(dense, reading, Feeds(batches, (None,) * 5, "here")).compare(dense)
    assert alone.metric == "same_prediction_per_token"
    assert caplog.text == ""


def test_rows_without_any_tag_or_entity_tell_no_f1(caplog: pytest.LogCaptureFixture) -> None:
    found = torch.arange(80).view(20, 4) % 3
    none, outside = torch.full_like(found, -1), torch.zeros_like(found)
    with pytest.raises(BadInput, match="no token of the 20 rows that judge has a tag that counts"):
        tagged(none, found, ("O", "B-x", "I-x"), strict=True)
    assert tagged(none, found, ("O", "B-x", "I-x")).metric == "same_prediction_per_token"
    assert "No label is used" in caplog.text
    quality = tagged(outside, found.clamp(max=1) * (found == 1), ("O", "B-x", "I-x"))
    assert (quality.metric, quality.dense) == ("accuracy_per_token", pytest.approx(53 / 80))


# ---- answers


@pytest.mark.parametrize(
    ("one", "other", "points"),
    [
        ("The Eiffel tower!", "eiffel Tower", 1),
        ("in Paris", "Paris, France", 1 / 2),
        ("a theory of an art", "theory", 1 / 2),
        ("", "Paris", 0),
        ("", "the", 1),
        ("two two three", "two", 1 / 2),
    ],
)
def test_answers_are_compared_without_case_punctuation_and_articles(one: str, other: str, points: float) -> None:
    assert f1(one, other) == f1(other, one) == pytest.approx(points)
    assert (plain(one) == plain(other)) == (points == 1)


def test_the_best_answer_is_that_of_all_pairs_tried() -> None:
    context = "abcdefghij"
    places = (None, *((i, i + 1) for i in range(10)), None)
    for seed in range(50):
        logits = drawn(2, 12, seed=seed)
        sums = {(i, j): float(logits[0, i] + logits[1, j]) for i in range(1, 11) for j in range(i, 11)}
        first, last = max(sums, key=lambda pair: sums[pair])
        assert answer(logits, Answers(context, (), places)) == context[first - 1 : last]
        none = float(logits[:, 0].sum()) > max(sums.values())
        assert (answer(logits, Answers(context, (), places), impossible=0) == "") == none


def test_answers_of_both_networks_are_judged() -> None:
    context, places = "one two three", (None, (0, 3), (4, 7), (8, 13))
    labels: list[Label] = [Answers(context, (text,), places) for text in ("two", "three", "one two")] * 4
    starts, ends = torch.tensor([2, 3, 1] * 4), torch.tensor([2, 3, 2] * 4)
    dense = {name: torch.nn.functional.one_hot(each, 4).float() for name, each in (("s", starts), ("e", ends))}
    cut = {"s": dense["s"], "e": torch.nn.functional.one_hot(torch.tensor([2, 3, 1] * 4), 4).float()}
    reading, feeds = Reading("s", "span", ends="e"), rows(labels)
    found = judge_of(read(dense, reading), reading, feeds).compare(read(cut, reading))
    assert (found.metric, found.dense, found.beside["exact_match"]) == ("answer_f1", 1.0, (1.0, pytest.approx(2 / 3)))
    assert found.pruned == pytest.approx((1 + 1 + 2 / 3) / 3)
    alone = judge_of(read(dense, reading), reading, rows([None] * 12)).compare(read(cut, reading))
    assert (alone.metric, alone.pruned) == ("same_answer", pytest.approx(2 / 3))


def test_rows_without_an_answer_beside_others_are_refused_or_told(caplog: pytest.LogCaptureFixture) -> None:
    context, places = "one two three", (None, (0, 3), (4, 7), (8, 13))
    reading, known = Reading("s", "span", ends="e"), Answers(context, ("two",), places)
    logits = torch.nn.functional.one_hot(torch.tensor([2] * 12), 4).float()
    dense = read({"s": logits, "e": logits}, reading)
    for labels, said in (
        ([known] * 11 + [None], r"here: 1 of the 12 rows that judge have no label\. Label all rows, or none"),
        (
            [known] * 11 + ["two"],
            r"here: a label is 'two', and the network is judged by `answers` .* Correct the labels",
        ),
        ([0] * 12, "here: a label is 0"),
    ):
        with pytest.raises(BadInput, match=said):
            judge_of(dense, reading, rows(labels), strict=True)
    found = judge_of(dense, reading, rows([*[known] * 7, *[None] * 5])).compare(dense)
    assert (found.metric, found.samples) == ("answer_f1", 7)
    assert "5 of the 12 rows that judge have no label: quality is that of the others" in caplog.text
    found = judge_of(dense, reading, rows([*[known] * 5, *[None] * 7])).compare(dense)
    assert (found.metric, found.samples) == ("same_answer", 12)
    assert "7 of the 12 rows that judge have no label: too few have one" in caplog.text
    assert judge_of(dense, reading, rows([0] * 12)).compare(dense).metric == "same_answer"
    assert "No label is used" in caplog.text


def test_no_answer_stands_at_the_first_token_behind_the_padding() -> None:
    """A row is judged alike wherever its padding is."""
    context, places = "one two three", (None, (0, 3), (4, 7), (8, 13))
    labels = [Answers(context, (text,) if text else (), places) for text in ("two", "", "one", "")]
    best = torch.tensor([2, 0, 1, 0])
    padded = [replace(label, places=(None, None, *label.places)) for label in labels]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 4)
    reading, plain_rows = Reading("s", "span", ends="e"), rows([*labels])
    left = Feeds(({"input_ids": mask, "attention_mask": mask},), tuple(padded), "here")
    values = 9 * torch.nn.functional.one_hot(best, 4).float()
    wide = torch.cat((torch.full((4, 2), 5.0), values), 1)
    for feeds, logits, real in ((plain_rows, values, torch.ones(4, 4)), (left, wide, mask)):
        dense = [reading.read({"s": logits, "e": logits}, real)]
        found = judge_of(dense, reading, feeds).compare(dense)
        assert (found.metric, found.dense, found.beside["exact_match"][0]) == ("answer_f1", 1.0, 1.0)


# ---- masked words


def test_masked_words_are_judged_by_the_loss_of_transformers() -> None:
    logits, cut = drawn(20, 4, 9), drawn(20, 4, 9, seed=1)
    wanted = torch.full((20, 4), -1)
    wanted[:, 1] = torch.arange(20) % 9
    wanted[::2, 3] = 5
    reading, feeds = Reading("y", "logits"), rows(list(wanted))
    found = judge_of(read({"y": logits}, reading), reading, feeds, metric="pseudo_perplexity").compare(
        read({"y": cut}, reading)
    )
    for told, values in ((found.dense, logits), (found.pruned, cut)):
        loss = torch.nn.functional.cross_entropy(values.view(-1, 9), wanted.view(-1), ignore_index=-1)
        assert told == pytest.approx(math.exp(float(loss)), rel=1e-5)
    mark = wanted >= 0
    assert found.beside["masked_accuracy"][0] == pytest.approx(accuracy_score(wanted[mark], logits.argmax(-1)[mark]))


# ---- searches


def test_searches_are_judged_as_by_hand() -> None:
    """Every third text is a query for the next one; the others are candidates that nobody asks for."""
    vectors, cut = (torch.nn.functional.normalize(drawn(60, 8, seed=seed), dim=-1) for seed in (0, 1))
    for each, share in ((vectors, 0.3), (cut, 0.1)):
        each[0::3] = torch.nn.functional.normalize(each[0::3] + share * 3 * each[1::3], dim=-1)
    labels: list[Label] = [
        Role(i, (i + 1,) if i % 3 == 0 else (), candidate=i % 3 != 0, scores=((i + 2, i / 60),) if i % 3 == 0 else ())
        for i in range(60)
    ]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))  # rows are sorted by length in earnest
    reading, feeds = Reading("y", "embedding"), rows([labels[i] for i in order])
    judge = judge_of(read({"y": vectors[order]}, reading), reading, feeds)
    found = judge.compare(read({"y": cut[order]}, reading))
    assert (found.metric, found.samples) == ("recall_at_10", 20)
    candidates = [i for i in range(60) if i % 3 != 0]
    for place, each in enumerate((vectors, cut)):
        told = {name: values[place] for name, values in found.beside.items()}
        told["recall_at_10"] = (found.dense, found.pruned)[place]
        scores = each[0::3] @ each[candidates].T
        right = torch.tensor([[c == q + 1 for c in candidates] for q in range(0, 60, 3)])
        ranks = (scores > scores[right].unsqueeze(1)).sum(1) + 1
        assert told["recall_at_10"] == pytest.approx(float((ranks <= 10).double().mean()))
        assert told["recall_at_1"] == pytest.approx(float((ranks == 1).double().mean()))
        assert told["mrr"] == pytest.approx(float((1 / ranks).mean()))
        assert told["ndcg_at_10"] == pytest.approx(ndcg_score(right.numpy(), scores.numpy(), k=10))
        cosines = [float(each[i] @ each[i + 2]) for i in range(0, 60, 3)]
        assert told["spearman"] == pytest.approx(spearmanr(cosines, np.arange(0, 60, 3)).statistic)
    assert found.beside["cosine_to_dense"] == (1.0, pytest.approx(float((vectors * cut).sum(1).mean())))
    assert found.dense != found.pruned


def test_a_text_does_not_find_itself_and_equal_vectors_find_nothing() -> None:
    labels: list[Label] = [Role(i, ((i + 1) % 30,), candidate=True) for i in range(30)]
    reading = Reading("y", "embedding")
    judge = judge_of(read({"y": drawn(30, 4)}, reading), reading, rows(labels))
    found = judge.compare(read({"y": torch.ones(30, 4)}, reading))
    assert (found.pruned, found.beside["mrr"][1]) == (0.0, pytest.approx(1 / 29))


def test_a_text_with_two_prompts_is_searched_by_one_and_asks_by_the_other() -> None:
    """Thirty texts, each of which wants the next one, have a vector as queries and another one as candidates."""
    asks, searched = (torch.nn.functional.normalize(drawn(30, 8, seed=seed), dim=-1) for seed in (0, 1))
    asks = torch.nn.functional.normalize(asks + searched.roll(-1, 0), dim=-1)
    labels: list[Label] = [
        *(Role(i, ((i + 1) % 30,)) for i in range(30)),
        *(Role(i, candidate=True) for i in range(30)),
    ]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    reading, vectors = Reading("y", "embedding"), {"y": torch.cat((asks, searched))[order]}
    judge = judge_of(read(vectors, reading), reading, rows([labels[i] for i in order]))
    scores = (asks @ searched.T).fill_diagonal_(-2)  # a text does not find itself
    right = torch.eye(30).roll(1, 1)
    ranks = (scores > (scores * right).sum(1, keepdim=True)).sum(1) + 1
    found = judge.compare(read(vectors, reading))
    assert (found.samples, found.dense) == (30, pytest.approx(float((ranks <= 10).double().mean())))
    assert found.beside["mrr"][0] == pytest.approx(float((1 / ranks).mean()))


def test_a_search_through_ten_texts_is_told_to_tell_nothing(caplog: pytest.LogCaptureFixture) -> None:
    reading = Reading("y", "embedding")
    for count, told in ((11, False), (10, True)):
        labels: list[Label] = [Role(i, (i - 1,) if i % 2 else (), candidate=i % 2 == 0) for i in range(2 * count)]
        judge_of(read({"y": drawn(2 * count, 4)}, reading), reading, rows(labels))
        assert ("look through 10 texts" in caplog.text) == told


def test_queries_without_their_texts_are_refused() -> None:
    labels: list[Label] = [Role(i, (100 + i,)) for i in range(12)]
    reading = Reading("y", "embedding")
    with pytest.raises(BadInput, match="no query of the rows that judge has its text to be found among them"):
        judge_of(read({"y": drawn(12, 4)}, reading), reading, rows(labels))


def test_rankings_are_judged_as_by_scikit_learn() -> None:
    """Twenty queries with six texts each, two of which fit; one query has none that does not, and does not count."""
    scores, cut = drawn(126, 1, seed=3), drawn(126, 1, seed=4)
    fits = [place % 6 < 2 for place in range(120)] + [True] * 6
    labels: list[Label] = [Grade(place // 6, float(fits[place])) for place in range(126)]
    order = torch.randperm(126, generator=torch.Generator().manual_seed(2))
    reading, feeds = Reading("y", "regression"), rows([labels[i] for i in order])
    found = judge_of(read({"y": scores[order]}, reading), reading, feeds).compare(read({"y": cut[order]}, reading))
    assert (found.metric, found.samples) == ("ndcg_at_10", 20)
    wanted = np.array(fits[:120]).reshape(20, 6)
    for place, each in enumerate((scores, cut)):
        table = each[:120].reshape(20, 6).numpy()
        assert (found.dense, found.pruned)[place] == pytest.approx(ndcg_score(wanted, table, k=10))
        first = (-table).argsort(1).argsort(1)[wanted].reshape(20, 2).min(1) + 1
        assert found.beside["mrr"][place] == pytest.approx(float((1 / first).mean()))
    classes = torch.cat((torch.zeros_like(scores), scores), 1)  # two classes rank as their difference does
    reading = Reading("y", "logits")
    again = judge_of(read({"y": classes}, reading), reading, rows(labels)).compare(read({"y": classes}, reading))
    assert again.dense == again.pruned == pytest.approx(found.dense)


def test_rankings_of_three_classes_or_without_other_texts_are_refused() -> None:
    reading = Reading("y", "logits")
    graded: list[Label] = [Grade(place // 4, float(place % 2)) for place in range(12)]
    with pytest.raises(BadInput, match="this one puts out 3 numbers"):
        judge_of(read({"y": drawn(12, 3)}, reading), reading, rows(graded))
    with pytest.raises(BadInput, match="no query of the rows that judge has texts that fit it and texts that do not"):
        judge_of(read({"y": drawn(12, 1)}, reading), reading, rows([Grade(0, 1.0)] * 12))


def test_the_ndcg_of_a_random_order_is_that_of_all_orders() -> None:
    for texts, fitting in ((2, 1), (5, 1), (6, 3), (7, 5)):
        right = torch.arange(texts) < fitting
        found = [ranked(torch.tensor(order), right).gain for order in permutations(range(texts))]
        assert guessed_gain(texts, fitting) == pytest.approx((np.mean(found), np.var(found)))
    right, rng = torch.arange(30) < 4, np.random.default_rng(0)
    found = [ranked(torch.from_numpy(rng.permutation(30)), right).gain for _ in range(4000)]
    assert guessed_gain(30, 4) == pytest.approx((np.mean(found), np.var(found)), rel=0.06)


def test_a_random_order_has_the_spread_that_spearmans_correlation_is_judged_by() -> None:
    found = [spearmanr(range(6), order).statistic for order in permutations(range(6))]
    assert (spearman_skill(0.3, 6).guessed, spearman_skill(0.3, 6).spread) == pytest.approx(
        (np.mean(found), np.std(found)), abs=1e-9
    )


def test_rankings_of_texts_that_do_not_fit_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Of four texts three fit, and stand behind the other one: the lists say the contrary of what they mean."""
    labels: list[Label] = [Grade(query, float(place != 0)) for query in range(5) for place in range(4)]
    reading, backwards = Reading("y", "regression"), torch.tensor([1.0, 0.0, -0.1, -0.2] * 5)[:, None]
    with pytest.raises(
        BadInput, match=r"nDCG@10 is 0\.733 .* on 5 queries, and 0\.902 for a random order\. No loss can"
    ):
        judge_of(read({"y": backwards}, reading), reading, rows(labels))
    judge_of(read({"y": -backwards}, reading), reading, rows(labels))
    assert caplog.text == ""
    one: list[Label] = [Grade(0, float(place == 0)) for place in range(100)]
    judge_of(read({"y": torch.arange(100.0)[:, None]}, reading), reading, rows(one))  # a query may fail
    assert "nDCG@10 is 0.000 for the dense network on 1 queries" in caplog.text


def test_numbers_that_rank_backwards_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    reading, dense = Reading("y", "regression"), drawn(60, 1)
    wanted = [-float(each) for each in dense]
    with pytest.raises(BadInput, match=r"correlation with the labels is -1\.000 .* 60 rows, and 0\.000 for a random"):
        judge_of(read({"y": dense}, reading), reading, rows([*wanted]))
    with pytest.raises(BadInput, match=r"No loss can be measured there\. Give labels that are greater where"):
        judge_of(read({"y": drawn(900, 1)}, reading), reading, rows(drawn(900, seed=1).tolist()))
    assert caplog.text == ""
    for count, told in (
        (4, True),
        (900, False),
    ):  # of four rows an order proves nothing
        weak = drawn(count, 1) if told else drawn(count, 1) + 5 * drawn(count, 1, seed=2)
        labels = [float(each) * (-1 if told else 1) for each in drawn(count, 1)]
        judge_of(read({"y": weak}, reading), reading, rows([*labels]))
        assert ("Do these labels fit the model?" in caplog.text) == told
        caplog.clear()


def test_distances_of_pairs_are_no_scores() -> None:
    vectors = torch.nn.functional.normalize(drawn(60, 8), dim=-1)
    cosines = (vectors[0::2] * vectors[1::2]).sum(1).tolist()
    reading = Reading("y", "embedding")
    for sign in (1, -1):
        labels: list[Label] = [
            role
            for pair, cosine in enumerate(cosines)
            for role in (Role(2 * pair, scores=((2 * pair + 1, sign * cosine),)), Role(2 * pair + 1))
        ]
        if sign > 0:
            assert judge_of(read({"y": vectors}, reading), reading, rows(labels))
            continue
        with pytest.raises(BadInput, match=r"is -1\.000 .* \(not distances or ranks\)"):
            judge_of(read({"y": vectors}, reading), reading, rows(labels))


def test_numbers_are_judged_by_numbers() -> None:
    dense, cut, wanted = drawn(40, 1, seed=5), drawn(40, 1, seed=6), [float(each) for each in drawn(40, 1, seed=7)]
    reading = Reading("y", "regression")
    for labels, metric in ((wanted, "spearman"), ([str(each) for each in wanted], "spearman"), (["a"] * 40, None)):
        judge = judge_of(read({"y": dense}, reading), reading, rows([*labels]))
        found = judge.compare(read({"y": cut}, reading))
        assert found.metric == (metric or "correlation_with_dense")
        if metric:
            assert found.dense == pytest.approx(spearmanr(wanted, dense[:, 0]).statistic)
            assert found.pruned == pytest.approx(spearmanr(wanted, cut[:, 0]).statistic)
            assert found.beside["correlation_with_dense"][1] == pytest.approx(
                float(np.corrcoef(dense[:, 0], cut[:, 0])[0, 1]), rel=1e-4
            )


UNUSED: list[tuple[Label, str]] = [
    (None, r"1 of the 40 rows that judge have no label\. Label all rows, or none"),
    ("n/a", r"the label 'n/a' is no finite number, .* Correct the labels, or leave out all of them"),
    ("nan", "the label 'nan' is no finite number"),
    (math.inf, "the label inf is no finite number"),
    (torch.ones(2), "is no finite number"),
    (Role(0, (1,)), "judge embeddings, .* name the columns of pairs by --text-column"),
]


@pytest.mark.parametrize(("label", "said"), UNUSED)
def test_a_label_that_is_no_number_is_told_before_anything_is_cut(
    label: Label, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    dense, cut = drawn(40, 1, seed=5), drawn(40, 1, seed=6)
    wanted = drawn(40, 1, seed=7)[:, 0].tolist()
    reading, feeds = Reading("y", "regression"), rows([*wanted[:3], label, *wanted[4:]])
    with pytest.raises(BadInput, match=said):
        judge_of(read({"y": dense}, reading), reading, feeds, strict=True)
    found = judge_of(read({"y": dense}, reading), reading, feeds).compare(read({"y": cut}, reading))
    if label is None:  # of calibration rows, those that have one judge
        others = np.arange(40) != 3
        assert (found.metric, found.samples) == ("spearman", 39)
        assert found.pruned == pytest.approx(spearmanr(np.array(wanted)[others], cut[others, 0]).statistic)
        assert "quality is that of the others" in caplog.text
    else:
        assert found.metric == "correlation_with_dense"
        assert "No label is used" in caplog.text


def test_equal_numbers_rank_nothing() -> None:
    reading, dense = Reading("y", "regression"), drawn(40, 1)
    with pytest.raises(BadInput, match=r"the labels are all 3\.0, and rank nothing"):
        judge_of(read({"y": dense}, reading), reading, rows([3.0] * 40), strict=True)


KINDS: list[tuple[Kind, Label]] = [("logits", Role(0, (1,))), ("logits", Answers("", ())), ("regression", ("a", "b"))]


@pytest.mark.parametrize(("kind", "label"), KINDS)
def test_labels_of_another_task_are_left_out_or_refused(kind: Kind, label: Label) -> None:
    reading = Reading("y", kind)
    feeds, dense = rows([label] * 12), read({"y": drawn(12, 3)}, reading)
    assert judge_of(dense, reading, feeds).compare(dense).metric in ("same_prediction", "relative_error")
    if kind == "logits":
        with pytest.raises(BadInput, match="Correct the labels, or leave out all of them"):
            judge_of(dense, reading, feeds, strict=True)
