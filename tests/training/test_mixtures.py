"""Several data sets as one."""

from collections import Counter

import pytest

from hfvlm.training.mixtures import Mixture, weights_of
from hfvlm.training.recipe_arguments import ChatDataArguments, DataArguments

LETTERS, NUMBERS = list("abcdefghij"), list(range(40))


def rows_of(mixture):
    return [mixture[i] for i in range(len(mixture))]


def test_weights_are_shares_of_the_rows():
    mixture = Mixture([LETTERS, NUMBERS], [3, 1], seed=1)
    rows = rows_of(mixture)
    letters = [row for row in rows if isinstance(row, str)]
    assert set(rows) == {*LETTERS, *NUMBERS}
    assert 0.68 < len(letters) / len(rows) < 0.82
    counts = Counter(letters)
    assert max(counts.values()) - min(counts.values()) <= 1  # all of a smaller one, before any again
    assert rows_of(Mixture([LETTERS, NUMBERS], [3, 1], seed=1)) == rows
    assert rows_of(Mixture([LETTERS, NUMBERS], [3, 1], seed=2)) != rows


def test_shares_are_in_proportion_to_rows():
    parts = [{"path": "a"}, {"path": "b", "weight": 0.5}]
    assert weights_of(parts, "proportional", [LETTERS, NUMBERS]) == [10, 20]
    assert weights_of(parts, "weights", [LETTERS, NUMBERS]) == [1, 0.5]
    assert weights_of(parts, "round_robin", [LETTERS, NUMBERS]) is None
    rows = rows_of(Mixture([LETTERS, NUMBERS], [10, 40], seed=1))
    assert set(rows) == {*LETTERS, *NUMBERS}
    assert 0.1 < sum(isinstance(row, str) for row in rows) / len(rows) < 0.3


def test_data_sets_take_turns():
    rows = rows_of(Mixture([LETTERS, NUMBERS], views=[str.upper, lambda row: row]))
    assert all(isinstance(row, str) for row in rows[::2])
    assert set(rows[1::2]) == set(NUMBERS)
    assert rows[1::2] != NUMBERS
    assert {row for row in rows if isinstance(row, str)} == set("ABCDEFGHIJ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": []}, "dataset needs a path, or a list"),
        ({"dataset": None}, "dataset needs a path"),
        ({"dataset": [{"weight": 1}]}, "entry 0 needs a path"),
        ({"dataset": [{"path": "a", "wieght": 1}]}, "a has no field 'wieght'; there are path, weight, subset"),
        ({"dataset": [{"path": "a", "weight": 0}]}, "weight of a must be"),
        ({"dataset": [{"path": "a", "weight": 1}], "mixing": "round_robin"}, "a has a weight"),
        ({"dataset": "a", "mixing": "equal"}, "mixing 'equal' is none of weights, proportional, round_robin"),
    ],
)
def test_mixtures_that_are_none(values, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(**values)


def test_conversations_have_fields_of_their_own():
    with pytest.raises(ValueError, match="a has no field 'columns'; there are path, weight, pictures"):
        ChatDataArguments(data=[{"path": "a", "columns": {}}])
