"""Questions with yes or no, as POPE's authors make and count them."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.evaluation.hallucination import SUBSETS, answer_of, object_questions
from hfvlm.evaluation.tasks import Data, evaluate
from hfvlm.inference.captioner import Captioner
from hfvlm.samples import scenes

OBJECTS = [
    ["person", "dog", "ball", "tree"],
    ["person", "dog", "ball"],
    ["person", "apple", "table"],
    ["person", "dog", "umbrella", "tree"],
    ["cat", "apple", "table", "cat"],
    ["cat"],
    None,
]


def of(found, subset, answer):
    return [each for each in found if (each.subset, each.answer) == (subset, answer)]


def test_half_of_the_questions_are_about_objects_that_are_not_there():
    found, errors = object_questions(OBJECTS, seed=1)
    assert errors == {5: "objects: 3 are needed, not 1.", 6: "objects: 3 are needed, not 0."}
    assert len(found) == 5 * 6 * 3
    for subset in SUBSETS:
        yes = of(found, subset, "yes")
        assert [each.text for each in yes if each.row == 0] == [
            f"Is there a {x} in the image?" for x in ("person", "dog", "ball")
        ]
        assert len(yes) == len(of(found, subset, "no")) == 15
        for row, names in enumerate(OBJECTS[:5]):
            absent = [each.text for each in of(found, subset, "no") if each.row == row]
            assert len(set(absent)) == 3
            assert not [text for text in absent for name in names if f" {name} " in text]
    assert found == object_questions(OBJECTS, seed=1)[0]
    assert of(found, "random", "no") != of(object_questions(OBJECTS, seed=2)[0], "random", "no")
    assert of(found, "popular", "no") == of(object_questions(OBJECTS, seed=2)[0], "popular", "no")


def test_popular_and_adversarial_objects_are_those_of_the_counts():
    """By hand: person 4, dog 3, then ball, tree, apple, table twice, in order of first occurrence."""
    found, _ = object_questions(OBJECTS)
    popular = {row: [e.text.split()[3] for e in of(found, "popular", "no") if e.row == row] for row in range(5)}
    assert popular[0] == ["apple", "table", "umbrella"]
    assert popular[2] == ["dog", "ball", "tree"]
    assert popular[4] == ["person", "dog", "ball"]
    # With the person of row 2 most often the dog, then the ball; with the apple only the table, the person, the cat.
    adversarial = {
        row: [e.text.split()[3] for e in of(found, "adversarial", "no") if e.row == row] for row in range(5)
    }
    assert adversarial[2][:2] == ["dog", "cat"]
    # With the dog of row 1 the tree, twice; before it, with the person, the tree, too, which then is used.
    assert adversarial[1][0] == "tree"
    assert adversarial[1][1] == "umbrella"


def test_articles_follow_the_names():
    found, _ = object_questions([["apple", "ant", "bee"], ["cow", "dog", "egg"]], question="Do you see a {}?")
    texts = {each.text for each in found}
    assert {"Do you see an apple?", "Do you see a cow?", "Do you see an egg?"} <= texts
    (first, *_), _ = object_questions([["egg"], ["cow"]], count=1, question="In a map, is there a {}?")
    assert first.text == "In a map, is there an egg?"


@pytest.mark.parametrize(
    ("objects", "options", "message"),
    [
        ([["a", "b", "c"], ["a", "b", "c", "d"]], {}, "Row 0: has all objects but 1; 3 others are needed"),
        ([["a"], []], {}, "No image has 3 objects"),
        ([["a", "b", "c"]], {"question": "Is it there?"}, "needs one {}"),
        ([["a", "b", "c"]], {"count": 0}, "count must be an integer of at least 1"),
    ],
)
def test_objects_that_make_no_questions_are_refused(objects, options, message):
    with pytest.raises(ValueError, match=message):
        object_questions(objects, **options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes, there is a dog.", "yes"),
        ("No, there is no dog.", "no"),
        ("There is not a dog", "no"),
        ("yes", "yes"),
        ("no", "no"),
        ("A dog is on the left. No cat is there.", "yes"),
        ("There are many; nothing is missing", "yes"),
        ("", "yes"),
    ],
)
def test_answers_are_read_as_the_authors_do(text, expected):
    assert answer_of(text) == expected


QUESTIONS = [
    # row, question, answer, subset, the model's answer
    (0, "a dog?", "yes", "random", "Yes."),
    (1, "a cat?", "no", "random", "Yes, a cat."),
    (2, "a cow?", "no", "random", "No."),
    (3, "an egg?", "yes", "random", "No."),
    (4, "a pig?", "Yes", "popular", "yes"),
    (5, "a hen?", "no", "popular", "yes"),
    (6, "a fox?", "no", "popular", "yes"),
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pope") / "test"
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as metadata:
        for row, question, answer, subset, _ in [*QUESTIONS, (7, "why?", "because", "popular", "")]:
            scenes.all_scenes()[row].render().save(folder / f"{row}.png")
            line = {"file_name": f"{row}.png", "question": question, "answer": answer, "category": subset}
            metadata.write(json.dumps(line) + "\n")
    return folder.parent


def value(report, metric):
    return next(result for result in report.results if result.metric == metric)


def test_answers_are_counted_as_scikit_learn_does(small_blip, asked, monkeypatch):
    answers = {question: answer for _, question, _, _, answer in QUESTIONS}
    monkeypatch.setattr(Captioner, "__call__", lambda self, images, texts, **options: [answers[t] for t in texts])
    folder = small_blip("HfvlmBLIPForQuestionAnswering")
    report = evaluate("hallucination", folder, Data(str(asked), columns={"subset": "category"}))
    truth = np.array([answer.lower() == "yes" for _, _, answer, _, _ in QUESTIONS])
    given = np.array([answer_of(answer) == "yes" for *_, answer in QUESTIONS])
    subsets = np.array([subset for _, _, _, subset, _ in QUESTIONS])
    for subset in ("random", "popular", None):
        chosen = subsets == subset if subset else np.ones(len(subsets), bool)
        ending = f" ({subset})" if subset else ""
        expected = precision_recall_fscore_support(truth[chosen], given[chosen], average="binary")[:3]
        for name, number in zip(("precision", "recall", "F1"), expected, strict=True):
            assert value(report, name + ending).value == pytest.approx(number)
        assert value(report, f"accuracy{ending}").value == accuracy_score(truth[chosen], given[chosen])
        assert value(report, f"yes ratio{ending}").value == given[chosen].mean()
        assert value(report, f"accuracy{ending}").n == chosen.sum()
        assert value(report, f"precision{ending}").n == given[chosen].sum()
        assert value(report, f"recall{ending}").n == truth[chosen].sum()
    assert [r.metric for r in report.results][:2] == ["accuracy (random)", "precision (random)"]
    assert report.errors == {7: "a question with the answer yes or no is needed, not 'why?' with 'because'."}
    assert [mistake.text for mistake in report.mistakes] == [
        "a cat? Yes, a cat.", "a hen? yes", "a fox? yes", "an egg? No.",
    ]  # fmt: skip
    plain = evaluate("hallucination", folder, Data(str(asked)))
    assert [r.metric for r in plain.results] == ["accuracy", "precision", "recall", "F1", "yes ratio"]


def test_questions_are_made_of_objects(small_blip, tmp_path, monkeypatch):
    """A model that affirms everything is right about half, and a real one answers something to each."""
    (tmp_path / "test").mkdir()
    with (tmp_path / "test" / "metadata.jsonl").open("w") as metadata:
        for row, names in enumerate(OBJECTS):
            scenes.all_scenes()[row].render().save(tmp_path / "test" / f"{row}.png")
            metadata.write(json.dumps({"file_name": f"{row}.png", "objects": names}) + "\n")
    folder = small_blip("HfvlmBLIPForQuestionAnswering")
    real = evaluate("hallucination", folder, Data(str(tmp_path)), generate={"max_new_tokens": 2}, device="cpu")
    assert real.protocol["questions"] == value(real, "accuracy").n == 90
    assert list(real.errors) == [5, 6]
    monkeypatch.setattr(Captioner, "__call__", lambda self, images, texts, **options: ["yes"] * len(texts))
    command = ["eval", str(folder), "--task", "hallucination", "--data", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--question", "Is a {} visible?", "--json"])
    assert result.exit_code == 0, result.stdout
    report = json.loads(result.stdout)
    assert report["protocol"]["question"] == "Is a {} visible?"
    for subset in SUBSETS:
        numbers = {r["metric"]: r["value"] for r in report["results"] if r["metric"].endswith(f"({subset})")}
        assert numbers == {
            f"accuracy ({subset})": 0.5, f"precision ({subset})": 0.5, f"recall ({subset})": 1,
            f"F1 ({subset})": pytest.approx(2 / 3), f"yes ratio ({subset})": 1,
        }  # fmt: skip
    assert report["each"]["F1 (random)"]["0"] == [6, 9]


def test_data_without_questions_are_refused(small_blip, asked):
    folder = small_blip("HfvlmBLIPForQuestionAnswering")
    with pytest.raises(ValueError, match="has no column for question"):
        evaluate("hallucination", folder, Data(str(asked), columns={"question": "query"}))
    with pytest.raises(ValueError, match="no row has a question; row 0: a question with the answer yes or no"):
        evaluate("hallucination", folder, Data(str(asked), columns={"answer": "category"}))
