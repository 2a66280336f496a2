"""Balancing by queries."""

from collections import Counter

import pytest
from typer.testing import CliRunner

from hfvlm.cli.commands import app
from hfvlm.data.balance import balance
from hfvlm.data.queries import FromWords, Queries, read_queries
from hfvlm.data.words import drawn, key_of

TEXTS = ["a red circle"] * 200 + ["a blue square"] * 30 + ["one green cross"] * 5 + ["nothing of interest"] * 15
QUERIES = ["red", "blue square", "green", "circle"]


@pytest.fixture(scope="module")
def rows(jsonl):
    return jsonl([{"text": text} for text in TEXTS])


def counts(written, output):
    return Counter(row["text"] for row in written(output))


def test_a_query_takes_at_most_n_pairs(rows, tmp_path, written):
    report = balance(rows, tmp_path / "out", method="clip", most=20, queries=QUERIES)
    found = counts(written, tmp_path / "out")
    assert found["a blue square"] == 20
    assert found["one green cross"] == 5
    assert 20 < found["a red circle"] <= 40  # either of two queries takes twenty
    assert report.dropped == {"over-limit": 210 - found["a red circle"], "no-query": 15}
    table = {row["name"]: row["takes"] for row in report.details["queries with the most rows"]}
    assert table == {"red": 20, "circle": 20, "blue square": 20, "green": 5}


def test_metaclip_takes_each_pair_with_its_probability(rows, tmp_path, written):
    sizes = []
    for seed in range(6):
        balance(rows, tmp_path / str(seed), most=20, queries=["circle", "square", "cross"], seed=seed)
        sizes.append(counts(written, tmp_path / str(seed))["a red circle"])
    assert counts(written, tmp_path / "0")["one green cross"] == 5
    assert len(set(sizes)) > 2
    assert sum(sizes) / 6 == pytest.approx(20, abs=5.2)  # three standard errors


def test_neither_shards_nor_order_change_what_is_drawn(rows, tmp_path, written):
    for method in ("clip", "metaclip"):
        for size in (7, 4096):
            balance(rows, tmp_path / f"{method}-{size}", method=method, most=20, queries=QUERIES, shard_rows=size)
        assert written(tmp_path / f"{method}-7") == written(tmp_path / f"{method}-4096")


def test_queries_are_made_of_frequent_words_and_of_words_that_belong_together(rows, tmp_path, written):
    report = balance(rows, tmp_path / "one", queries=FromWords(min_count=30))
    assert report.details["queries"] == 5  # a, red, circle, blue, square
    assert report.dropped == {"no-query": 20}
    report = balance(rows, tmp_path / "two", queries=FromWords(min_count=30, information=1.5))
    names = {row["name"] for row in report.details["queries with the most rows"]}
    # log2 of 30 * 750 / 30**2 bits for "blue square", of 200 * 750 / 200**2 for "red circle", 1.7 for "a red".
    assert names == {"a", "red", "circle", "blue", "square", "blue square", "red circle", "a red", "a blue"}
    with pytest.raises(ValueError, match="No word occurs 1000 times; the most frequent, 'a', occurs 230 times"):
        balance(rows, tmp_path / "three", queries=FromWords(min_count=1000))


def test_queries_match_whole_words_in_a_row():
    queries = Queries(["red", "red circle", "circle red"])
    assert sorted(queries.matches("A RED circle, bordered")) == ["red", "red circle"]
    assert not list(queries.matches("a bordered reddish one"))


def test_the_command_reads_queries_from_a_file(rows, tmp_path):
    (tmp_path / "queries.txt").write_text("Red\n\ncross\n")
    assert read_queries(tmp_path / "queries.txt") == ["red", "cross"]
    command = ["data", "balance", str(rows), "-o", str(tmp_path / "out"), "--queries", str(tmp_path / "queries.txt")]
    result = CliRunner().invoke(app, [*command, "--method", "clip", "-n", "10"])
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# balance: 15 of 250 rows kept (6.0%)")
    assert "| red" in result.stdout


def test_wrong_arguments_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="method must be one of clip, metaclip, not 'meta'"):
        balance(rows, tmp_path / "out", method="meta")
    with pytest.raises(ValueError, match="most must be an integer of at least 1"):
        balance(rows, tmp_path / "out", most=0)
    (tmp_path / "empty.txt").write_text("\n ... \n")
    with pytest.raises(ValueError, match="no line of it has a word"):
        read_queries(tmp_path / "empty.txt")


def test_numbers_are_uniform_and_of_their_arguments_alone():
    numbers = [drawn(0, i, key_of("red")) for i in range(4000)]
    assert sum(numbers) / 4000 == pytest.approx(0.5, abs=0.02)
    assert sum(number < 0.1 for number in numbers) / 4000 == pytest.approx(0.1, abs=0.02)
    assert drawn(0, 1, 2) == drawn(0, 1, 2) != drawn(1, 1, 2)
