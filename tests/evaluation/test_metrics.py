"""Metrics beside published worked examples, and beside numbers that well-kept packages gave for the same texts."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from hfvlm.evaluation.answering import normalised, vqa_accuracy
from hfvlm.evaluation.bootstrap import interval, mean_interval
from hfvlm.evaluation.captioning import bleu, cider, rouge_l
from hfvlm.evaluation.classification import (
    accuracy,
    average_precision,
    confusion,
    mean_average_precision,
    mean_per_class_accuracy,
)
from hfvlm.evaluation.metrics import load_metric

CAPTIONS = [
    "a man riding a horse on the beach",
    "two dogs play",
    "a red bus parked next to the old the old building in town",
    "a woman with a hat is standing near a table",
]
REFERENCES = [
    ["a man rides a horse along the beach", "someone riding a brown horse on the sand", "a man on a horse by the sea"],
    ["two dogs play with a ball", "a pair of dogs playing in the grass", "two dogs are running"],
    [
        "a red bus is parked next to a building",
        "the bus stands in front of an old building",
        "a large red bus in town",
    ],
    ["a woman in a hat stands by a table", "a lady with a hat near the table", "woman standing near a wooden table"],
]


def test_captions_are_scored_as_cocos_tools_do():
    """The numbers are pycocoevalcap 1.2's for the same words."""
    assert bleu(CAPTIONS, REFERENCES)[:3] == pytest.approx([0.9117647058, 0.7796429549, 0.5195848427], abs=1e-8)
    assert bleu(CAPTIONS, REFERENCES)[3] == 0
    assert rouge_l(CAPTIONS, REFERENCES) == pytest.approx(0.694556768837379, abs=1e-12)
    assert cider(CAPTIONS, REFERENCES) == pytest.approx(2.227054465914869, abs=1e-9)


def test_examples_of_the_papers():
    the = ["the the the the the the the"]
    assert bleu(the, [["The cat is on the mat.", "There is a cat on the mat."]])[0] == pytest.approx(2 / 7)
    assert rouge_l(["police kill the gunman"], [["police killed the gunman"]]) == pytest.approx(3 / 4)
    assert rouge_l(["the gunman kill police"], [["police killed the gunman"]]) == pytest.approx(2 / 4)


def test_the_same_words_are_perfect_and_none_are_nothing():
    own = [texts[:1] for texts in REFERENCES]
    same = [texts[0] for texts in own]
    assert bleu(same, own) == [1, 1, 1, 1]
    assert rouge_l(same, own) == cider(same, own) / 10 == 1
    for metric in (rouge_l, cider):
        assert metric([""] * 4, own) == 0
    assert bleu([""] * 4, own) == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="Caption 1 needs a list of references"):
        bleu(same[:2], [["a"], "b"])
    with pytest.raises(ValueError, match="2 captions need 2 lists"):
        cider(same[:2], own)


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_vqa_accuracy_by_the_number_of_people_who_agree(agreeing, expected):
    """The challenge's table: an answer that three of ten people gave is 90 % right."""
    people = ["yes"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]
    assert vqa_accuracy(["Yes."], [people]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat.", "cat"),
        ("two dogs, a cat", "2 dogs cat"),
        ("dont know", "don't know"),
        ("shouldnt've", "shouldn't've"),
        ("1,000", "1000"),
        ("$3.50", "$3.50"),
        ("black/white", "black white"),
        ("no!", "no"),
        ("none", "0"),
        ("St. Paul", "st paul"),
    ],
)
def test_answers_are_normalised(text, expected):
    assert normalised(text) == expected


def test_where_all_people_agree_answers_are_compared_as_they_are():
    assert vqa_accuracy(["Two"], [["two"] * 10]) == 0
    assert vqa_accuracy(["two"], [["two"] * 10]) == 1
    with pytest.raises(ValueError, match="no references"):
        vqa_accuracy(["x"], [[]])


def test_classes_are_scored_as_scikit_learn_does():
    random = np.random.RandomState(0)
    scores, labels = random.rand(60, 5).round(1), random.randint(5, size=60)
    predictions = scores.argmax(1)
    assert mean_per_class_accuracy(predictions, labels) == pytest.approx(balanced_accuracy_score(labels, predictions))
    relevant = random.rand(60, 5) < 0.3
    for j in range(5):
        expected = average_precision_score(relevant[:, j], scores[:, j])
        assert average_precision(scores[:, j], relevant[:, j]) == pytest.approx(expected)
    assert mean_average_precision(scores, relevant) == pytest.approx(average_precision_score(relevant, scores))
    assert confusion(predictions, labels, 5).sum() == 60
    assert np.trace(confusion(predictions, labels, 5)) == (predictions == labels).sum()


def test_equal_and_missing_scores_count_against_a_row():
    assert accuracy(np.eye(3), np.arange(3)) == 1
    assert accuracy(np.ones((3, 3)), np.arange(3)) == 0
    assert accuracy(np.ones((3, 3)), np.arange(3), k=3) == 1
    assert accuracy(np.full((3, 3), np.nan), np.arange(3)) == 0
    assert accuracy(np.array([[0.5, np.nan]]), np.array([0])) == 0


def test_the_interval_of_a_share_is_that_of_its_normal_approximation():
    values = np.arange(400) < 100
    low, high = interval(lambda rows: values[rows].mean(), 400)
    assert mean_interval(values) == pytest.approx((low, high), abs=0.005)
    width = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (low, high) == (pytest.approx(0.25 - width, abs=0.01), pytest.approx(0.25 + width, abs=0.01))


@pytest.mark.parametrize(("name", "metric"), [("cider", cider), ("rouge_l", rouge_l), ("vqa_accuracy", vqa_accuracy)])
def test_metrics_add_up_batches(name, metric):
    batched = load_metric(name)
    for i in (0, 2):
        batched.add_batch(predictions=CAPTIONS[i : i + 2], references=REFERENCES[i : i + 2])
    assert batched.compute() == {name: pytest.approx(metric(CAPTIONS, REFERENCES))}
    assert load_metric("bleu").compute(predictions=CAPTIONS, references=REFERENCES)["bleu_1"] > 0.9
    with pytest.raises(ValueError, match="No metric is called 'meteor'; there are bleu"):
        load_metric("meteor")


def test_metrics_of_scores_add_up_batches():
    random = np.random.RandomState(1)
    scores, labels = random.rand(12, 4), random.randint(4, size=12)
    right = np.eye(4, dtype=bool)[labels]
    expected = {
        "mean_average_precision": mean_average_precision(scores, right),
        "recall@1": accuracy(scores, labels),
        "mean_per_class_accuracy": mean_per_class_accuracy(scores.argmax(1), labels),
    }
    inputs = {
        "mean_average_precision": (scores, right),
        "recall": (scores, right),
        "mean_per_class_accuracy": (scores.argmax(1), labels),
    }
    found = {}
    for name, (predictions, references) in inputs.items():
        metric = load_metric(name)
        for part in (slice(5), slice(5, None)):
            metric.add_batch(predictions=predictions[part].tolist(), references=references[part].tolist())
        found |= metric.compute()
    assert {name: found[name] for name in expected} == pytest.approx(expected)
