"""Checks of what a chat model wrote, and what it is given."""

import pytest

from hfvlm.data.answers import CHECKS, faults, read_pairs
from hfvlm.data.prompts import KINDS, known_of_image, notes_on


def test_pairs_are_read_from_lines():
    text = "Q: What is there?\nA: A dog\nand a cat.\n\n**Q:** Where?\na. On the grass."
    assert read_pairs(text, 3) == [("What is there?", "A dog and a cat."), ("Where?", "On the grass.")]


@pytest.mark.parametrize(
    "text", ["", "There is a dog.", "Q: What?", "A: A dog.\nQ: What?", "Sure!\nQ: a\nA: b", "Q: a\nA: b\nQ: c\nA: d"]
)
def test_other_forms_are_refused(text):
    assert read_pairs(text, 1) is None


FAULTY = {
    "empty": [("What is there?", " . ")],
    "mentions-source": [("What does the caption say?", "A dog.")],
    "refusal": [("What is there?", "I'm sorry, as an AI language model I cannot see images.")],
    "repeated": [("What is there?", "A dog."), ("What is there", "A cat.")],
}


@pytest.mark.parametrize("name", FAULTY)
def test_faults_are_found(name):
    assert faults(FAULTY[name]) == [name]
    assert name in CHECKS


@pytest.mark.parametrize(
    "text",
    [
        "The dog is in the bounding box.", "As described, the dog is brown.", "It is at [0.12, 0.5, 0.3, 0.9].",
        "The provided information says so.", "The coordinates are near the left.", "In the key frames a dog runs.",
    ],
)  # fmt: skip
def test_answers_that_speak_of_what_was_given(text):
    assert faults([("What is there?", text)]) == ["mentions-source"]


@pytest.mark.parametrize(
    "text", ["A brown dog lies in a cardboard basket.", "A man is boxing.", "The goalkeeper is sorry for the ball."]
)
def test_answers_that_are_well(text):
    assert faults([("What is there?", text)]) == []
    assert (
        faults([("Describe what is provided in this box.", text)], ("Describe what is provided in this box.",)) == []
    )


def test_what_the_model_is_given():
    assert known_of_image(["a dog"], [("dog", (0.1, 0.25, 0.5, 1.0))]) == "a dog\ndog: [0.100, 0.250, 0.500, 1.000]"
    frames = [
        {"caption": "a man", "regions": ["a red ball", "a cat", "the sky"], "tags": ["man", "ball"]},
        {"caption": "a cat", "regions": ["a white cat"], "tags": ["cat"]},
    ]
    # The cat is no tag of the first frame, and the sky of none.
    assert notes_on(frames) == "1. a man; a red ball\n2. a cat; a white cat"


def test_prompts_ask_for_what_is_checked():
    for kind in KINDS.values():
        system, user = kind.messages("a dog")
        assert (system["role"], user["role"]) == ("system", "user")
        assert user["content"].startswith("a dog\n\n")
        assert ("Q: a question" in user["content"]) == bool(kind.pairs) != bool(kind.questions)
        assert not faults([(question, "A dog.") for question in kind.questions])
