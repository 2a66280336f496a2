"""Queries that texts are matched with: from a file, or the words of the data."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path

from hfvlm.checks.messages import cut
from hfvlm.checks.ranges import check_integer, check_number
from hfvlm.data.store import Store
from hfvlm.data.words import key_of, pairs_of, words_of


def read_queries(path: str | Path) -> list[str]:
    """Read queries, one on each line; lines without words are left out.

    Raises:
        ValueError: there is none.
    """
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    queries = list(dict.fromkeys(" ".join(words_of(line)) for line in lines))
    if not (found := [query for query in queries if query]):
        raise ValueError(f"{path}: no line of it has a word.")
    return found


class Queries:
    """Queries, which match texts that contain their words in a row.

    Args:
        queries: words with blanks between.
    """

    def __init__(self, queries: Iterable[str]):
        self.queries = frozenset(queries)
        self.lengths = sorted({query.count(" ") + 1 for query in self.queries})

    def matches(self, text: str) -> Iterator[str]:
        """Yield the queries that a text contains; the time does not depend on how many there are."""
        words = words_of(text)
        for length in self.lengths:
            for i in range(len(words) - length + 1):
                if (query := " ".join(words[i : i + length])) in self.queries:
                    yield query


def count_words(store: Store, texts: Iterable[str]) -> None:
    """Count words and pairs of neighbouring words, in tables of `words` and `neighbours`."""
    words: Counter[str] = Counter()
    neighbours: Counter[str] = Counter()
    for text in texts:
        own = words_of(text)
        words.update(own)
        neighbours.update(pairs_of(own))
    for table, found in (("words", words), ("neighbours", neighbours)):
        store.count(table, {key_of(name): (name, n) for name, n in found.items()})


@dataclass(frozen=True)
class FromWords:
    """Queries made of the data: its frequent words.

    Args:
        min_count: a word is a query if it occurs as often. CLIP's, of Wikipedia, occur 100 times.
        information: pairs of neighbouring words are, too, that occur as often and have a pointwise mutual information
            of as many bits; None for single words only.

    Raises:
        ValueError: a number is out of its range.
    """

    min_count: int = 100
    information: float | None = None

    def __post_init__(self) -> None:
        check_integer("min_count", self.min_count)
        if self.information is not None:
            check_number("information", self.information)

    def chosen(self, store: Store) -> list[str]:
        """Return the queries, of what `count_words` counted.

        Raises:
            ValueError: there is none.
        """
        least, frequent = self.min_count, "WHERE n >= ? ORDER BY n DESC, name"
        found = [name for (name,) in store.run(f"SELECT name FROM words {frequent}", least)]
        if self.information is not None:
            total = store.one("SELECT sum(n) FROM words")
            rows = store.run(f"SELECT name, n FROM neighbours {frequent}", least).fetchall()
            found += [x for x, n in rows if mutual_information(store, x.split(" "), n, total) >= self.information]
        if not found:
            most = store.run("SELECT name, n FROM words ORDER BY n DESC LIMIT 1").fetchone()
            which = f"the most frequent, {cut(most[0])!r}, occurs {most[1]} times" if most else "there are no words"
            raise ValueError(f"No word occurs {least} times; {which}: lower min_count, or give queries.")
        return found


def mutual_information(store: Store, words: Sequence[str], together: int, total: int) -> float:
    """Return the pointwise mutual information of two words, in bits."""
    one, other = (store.one("SELECT n FROM words WHERE key = ?", key_of(word)) for word in words)
    return log2(together * total / (one * other))
