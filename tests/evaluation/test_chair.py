"""Objects that captions make up, counted by hand."""

import pytest

from hfvlm.evaluation.chair import object_hallucination


def test_made_up_objects_are_counted_by_mentions_and_by_captions():
    shown = [{"dog", "cat"}, {"cup"}, {"car", "bus", "tree"}]
    named = [["dog", "bird", "bird"], ["cup"], ["car", "bus"]]
    found = object_hallucination(named, shown)
    assert found == {"chair_i": 2 / 6, "chair_s": 1 / 3, "recall": 4 / 6, "named": 2}


def test_silence_makes_nothing_up_and_finds_nothing():
    assert object_hallucination([[], []], [{"dog"}, {"cat"}]) == {"chair_i": 0, "chair_s": 0, "recall": 0, "named": 0}


def test_an_object_that_is_named_twice_is_found_once():
    assert object_hallucination([["dog", "dog"]], [{"dog", "cat"}])["recall"] == 0.5


@pytest.mark.parametrize(
    ("named", "shown", "message"),
    [([[]], [], "1 captions, 0 images"), ([], [], "a caption an image"), ([["dog"]], [set()], "no image shows")],
)
def test_what_cannot_be_compared_is_refused(named, shown, message):
    with pytest.raises(ValueError, match=message):
        object_hallucination(named, shown)
