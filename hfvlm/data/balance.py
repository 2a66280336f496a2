"""Balancing by queries, as CLIP's data (https://arxiv.org/abs/2103.00020, section 2.2) and MetaCLIP's
(https://arxiv.org/abs/2309.16671, section 3)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfvlm.checks.ranges import check_integer
from hfvlm.data.procedure import SHARD_ROWS, Decision, Procedure, run_procedure
from hfvlm.data.queries import FromWords, Queries, count_words
from hfvlm.data.reading import Source, as_source
from hfvlm.data.report import Report
from hfvlm.data.sampling import Samples
from hfvlm.data.store import Store
from hfvlm.data.words import key_of
from hfvlm.inference.shards import Row

# "clip" takes at most N pairs of a query; "metaclip" each pair of a query with the probability N / count.
METHODS = ("clip", "metaclip")
# Pairs of a query, of both papers.
MOST = {"clip": 20_000, "metaclip": 20_000}


def balance(
    source: Source | str | Path,
    output: str | Path,
    *,
    method: str = "metaclip",
    most: int | None = None,
    queries: Sequence[str] | FromWords | None = None,
    seed: int = 0,
    shard_rows: int = SHARD_ROWS,
) -> Report:
    """Balance pairs by the queries that their texts contain; texts that contain none are dropped.

    A pair is kept if any of its queries takes it, so that pairs of rare queries all stay. For the output see
    `run_procedure`; the report names the most frequent queries, with the number of pairs that each takes.

    Args:
        source: what `open_source` opened, or takes.
        output: a folder.
        method: "clip" takes exactly `most` pairs of a query that has more; "metaclip" takes each of a query's pairs
            with the probability most / count, independently.
        most: pairs of a query; by default 20,000, as both papers.
        queries: words with blanks between; by default those of the texts that `FromWords()` chooses.
        seed: of what is drawn.
        shard_rows: rows that are read at a time.

    Raises:
        ValueError: there are no texts or queries, there is no such method, a number is out of its range, or see
            `run_procedure`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}.")
    most = check_integer("most", MOST[method] if most is None else most)
    check_integer("seed", seed, 0)
    opened = as_source(source, output)
    opened.needs("text")
    numbers = {"method": method, "most": most, "seed": seed}
    return run_procedure(Balance(opened, numbers, queries or FromWords()), output, shard_rows=shard_rows)


class Balance(Procedure):
    """Balancing: a pass counts words, unless there are queries, another the texts of each query, and another decides.

    Args:
        source: the rows.
        numbers: {"method": ..., "most": ..., "seed": ...}.
        queries: see `balance`.
    """

    name, passes = "balance", ("words", "count")

    def __init__(self, source: Source, numbers: Mapping[str, Any], queries: Sequence[str] | FromWords):
        super().__init__(source)
        self.numbers, self.given = dict(numbers), queries
        self.queries = Queries(() if isinstance(queries, FromWords) else queries)

    @property
    def settings(self) -> dict[str, Any]:
        if isinstance(self.given, FromWords):
            return self.numbers | {"queries": asdict(self.given)}
        queries = sorted(self.queries.queries)
        return self.numbers | {"queries": {"count": len(queries), "hash": key_of("\n".join(queries))}}

    def begin(self, store: Store) -> None:
        store.counts("words")
        store.counts("neighbours")
        exact = self.numbers["method"] == "clip"
        self.samples = Samples(store, most=self.numbers["most"], exact=exact, seed=self.numbers["seed"])

    def words(self, shard: Sequence[Row], store: Store) -> None:
        """Count the words of a shard, of which queries are made."""
        if isinstance(self.given, FromWords):
            count_words(store, (text for _, row in shard for text in self.source.texts(row)))

    def count(self, shard: Sequence[Row], store: Store) -> None:
        """Count the texts of each query."""
        self.samples.count([(number, self.keys(row)) for number, row in shard])

    def ended(self, name: str, store: Store) -> None:
        if name == "words" and isinstance(self.given, FromWords):
            self.queries = Queries(self.given.chosen(store))
        elif name == "count":
            self.samples.limit()

    def keys(self, row: Mapping[str, Any]) -> dict[int, str]:
        """Return the queries that a row's texts contain, by key."""
        found = (query for text in self.source.texts(row) for query in self.queries.matches(text))
        return {key_of(query): query for query in found}

    def decide(self, shard: Sequence[Row], store: Store) -> Iterator[Decision]:
        for number, row in shard:
            keys = self.keys(row)
            _, taken = self.samples.take(number, keys)
            decision = Decision(number, text=self.source.shown(row))
            if taken:
                decision.rows = [row]
            else:
                decision.reasons = ["over-limit" if keys else "no-query"]
                decision.note = ", ".join(list(keys.values())[:3])
            yield decision

    def details(self, store: Store, output: Path) -> dict[str, Any]:
        return {"queries": len(self.queries.queries)} | self.samples.details("queries")
