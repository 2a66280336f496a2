"""Sampling by noun phrases, and the phrases."""

import sys
import types
from collections import Counter

import pytest
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.data.nouns import nouns
from hfvlm.data.phrases import by_spacy, chunks, extractor

CAPTIONS = {
    "a man riding a wave on top of a surfboard": ["man", "wave", "top", "surfboard"],
    "Two brown dogs and the neighbour's cat, slowly eating": ["brown dogs", "neighbour cat"],
    "A small red circle on a dark ground": ["small red circle", "dark ground"],
    "there is an old brick building with 3 large windows": ["old brick building", "large windows"],
    "sunset over New York City": ["sunset", "new york city"],
    "he is very happy": ["happy"],
    "of the": [],
}


@pytest.mark.parametrize("text", CAPTIONS)
def test_rules_find_the_noun_phrases_of_captions(text):
    assert chunks(text) == CAPTIONS[text]


@pytest.fixture(scope="module")
def texts():
    return ["a red circle"] * 50 + ["a red circle on a blue square"] * 8 + ["a rare thing"] * 2 + ["of the"] * 3


@pytest.fixture(scope="module")
def rows(jsonl, texts):
    return jsonl([{"text": text} for text in texts])


def test_rare_phrases_are_skipped_and_frequent_ones_sampled(rows, texts, tmp_path, written):
    report = nouns(rows, tmp_path / "out", most=10, by="rules")
    found = Counter(row["text"] for row in written(tmp_path / "out"))
    assert found["a red circle on a blue square"] == 8  # "blue square" takes all of its eight
    assert found["a rare thing"] == found["of the"] == 0
    table = {row["name"]: (row["rows"], row["takes"]) for row in report.details["phrases with the most rows"]}
    assert table == {"red circle": (58, 10), "blue square": (8, 8), "rare thing": (2, 0)}
    assert 8 < sum(found.values()) <= 18
    assert report.dropped == {"over-limit": 58 - sum(found.values()), "no-phrase": 3, "rare-phrases": 2}
    assert report.details["phrases with fewer than 3 rows"] == 1


def test_seeds_draw_others(rows, tmp_path, content):
    kept = [nouns(rows, tmp_path / str(seed), most=10, by="rules", seed=seed) and content(tmp_path / str(seed))
            for seed in (0, 1)]  # fmt: skip
    assert kept[0] != kept[1]


def test_the_command(rows, tmp_path):
    result = CliRunner().invoke(app, ["data", "nouns", str(rows), "-o", str(tmp_path / "out"), "--by", "rules"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# nouns: 58 of 63 rows kept")


class Word(types.SimpleNamespace):
    """A word as spaCy's."""


class Pipeline:
    """A pipeline as spaCy's, which takes everything after a determiner for a noun phrase."""

    meta = {"lang": "en", "name": "core_web_sm", "version": "3"}

    def pipe(self, texts):
        for text in texts:
            words = [Word(text=word, pos_="DET" if word == "a" else "NOUN") for word in text.split()]
            yield types.SimpleNamespace(noun_chunks=[words])


def test_spacys_chunks_come_without_determiners(monkeypatch):
    assert list(by_spacy(Pipeline())(["a Red circle", "a"])) == [["red circle"], []]
    spacy = types.ModuleType("spacy")
    spacy.__version__ = "3.8"
    spacy.load = lambda name: Pipeline()
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    extract, about = extractor("spacy:en_core_web_sm")
    assert about == "spacy 3.8, en_core_web_sm 3"
    assert list(extract(["a cat"])) == [["cat"]]

    def missing(name):
        raise OSError("[E050] Can't find model")

    spacy.load = missing
    with pytest.raises(ValueError, match="spaCy has no model 'xx': python -m spacy download xx"):
        extractor("spacy:xx")
    with pytest.raises(ValueError, match="extractor must be rules, spacy or spacy:MODEL, not 'nltk'"):
        extractor("nltk")
